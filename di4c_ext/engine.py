"""The model as it is trained: its loss as one module, which one process runs as it is, several within DDP or FSDP.

A step calls the network several times, with a graph and without, and may call it again on the way back (`micro_batch`).
Wrapped by itself the network would have each of these calls taken for a step. So what is wrapped is the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Compute = Callable[..., Tensor]  # (network, x_0, keys, **conditions) -> loss


class LossModule(nn.Module):
    """compute(model, ...) as the forward pass of a module that holds the model.

    call: what stands for the model in `compute`, a compiled or a timed form of it.
    """

    def __init__(self, model: nn.Module, compute: Compute, call: Any = None) -> None:
        super().__init__()
        self.model = model
        self._run = compute, (model if call is None else call)  # a tuple: not a second submodule

    def forward(self, x_0: Tensor, keys: Tensor, **told: Tensor) -> Tensor:
        compute, network = self._run
        return compute(network, x_0, keys, **told)


def distributed(module: LossModule, args: Any) -> nn.Module:
    """The module within DistributedDataParallel, which averages gradients. args: TrainingArguments, its ddp_ flags."""
    device = args.device
    unused = args.ddp_find_unused_parameters
    more = {} if args.ddp_bucket_cap_mb is None else {"bucket_cap_mb": args.ddp_bucket_cap_mb}
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=bool(args.ddp_broadcast_buffers),
        find_unused_parameters=True if unused is None else unused,
        **more,
    )


def checkpoint_blocks(model: nn.Module) -> None:
    """Lets a model's blocks forget their activations and compute them again on the way back, for less memory."""
    for block in _blocks(model):
        forward = block.forward

        def once_more(*args: Any, _forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return _forward(*args, **kwargs)
            return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

        block.forward = once_more


def shard(model: nn.Module, *, reshard: bool = True) -> None:
    """Cuts the parameters of a model's blocks over all processes (FSDP2), in place.

    What is left, embeddings and heads, is cut by `shard_rest`, of the model or of the module around it. reshard: a
    block's parameters are let go after its forward pass and gathered again on the way back.
    """
    for block in _blocks(model):
        _cut(block, reshard_after_forward=reshard)


def shard_rest(module: nn.Module) -> None:
    """Cuts what blocks leave; it stays whole from the start of a forward pass to the end of the backward one."""
    _cut(module)


def _cut(module: nn.Module, **settings: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, **settings)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters that lie in lists: a network's layers."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            for item in child.children():
                if isinstance(item, (nn.ModuleList, nn.ModuleDict)):
                    yield from _blocks(item)
                elif next(item.parameters(), None) is not None:
                    yield item
        else:
            yield from _blocks(child)


def together(module: nn.Module) -> None:
    """Lets go what the last forward pass of a cut module has gathered, so that its parameters are the shards."""
    cut: Any = module
    if hasattr(cut, "reshard"):
        cut.reshard()


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def whole(value: Any) -> Any:
    """The same with every cut tensor, in dicts and lists too, gathered on the CPU; all processes must ask at once."""
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def cut_like(value: Tensor, like: Any) -> Tensor:
    """A whole tensor cut as `like` is, where that is cut."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies whole tensors into a model, cut or not; KeyError where one is missing."""
    for name, tensor in model.state_dict().items():
        local(tensor).copy_(local(cut_like(state[name], tensor)))
