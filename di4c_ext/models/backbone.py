"""Calling a masked language model of transformers by its description, and opening one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from di4c_ext.models import remote_code
from di4c_ext.models.teacher import AUTO_CLASSES, TeacherDescription
from di4c_ext.ops import Hidden

# The published value for a class that must not be: exp gives exactly 0, and no sum meets an infinity.
IMPOSSIBLE = -1e6
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


class _AtHeadError(Exception):
    """Carries the states that the head's linear map was about to be given."""

    def __init__(self, states: Tensor) -> None:
        super().__init__("the head was reached")
        self.states = states


def call(
    model: nn.Module,
    teacher: TeacherDescription,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    added: Tensor | None = None,
    *,
    hidden: bool = False,
) -> Tensor | Hidden:
    """Logits (N, D, S) of tokens (N, D), or the states and the head that they are the product of.

    Args:
        attention_mask: (N, D), 0 where a sequence is filled up. added: (N, 1, E), to every token's embedding.
    """
    length = tokens.shape[1]
    extra = -length % teacher.pad_to_multiple_of
    if extra:
        whole = torch.ones_like(tokens) if attention_mask is None else attention_mask
        attention_mask = nn.functional.pad(whole, (0, extra))
        tokens = nn.functional.pad(tokens, (0, extra), value=teacher.pad_id)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if teacher.causal:
        inputs["attention_mask"] = _both_ways(model, teacher, tokens, attention_mask)
    with ExitStack() as stack:
        if added is not None:
            stack.enter_context(_added_to(model.get_submodule(teacher.embeddings), added))
        if not hidden:
            logits = _of(model(**inputs))[:, :length]
            return impossible(_shifted(logits) if teacher.shift else logits, teacher)
        states = _before_head(model, teacher, inputs)[:, :length]
    head: Any = model.get_submodule(str(teacher.head))
    states, weight = _as_autocast(states), _as_autocast(head.weight).to(states.dtype)
    bias = states.new_zeros(len(weight)) if head.bias is None else _as_autocast(head.bias).to(states.dtype).clone()
    return Hidden(_shifted(states) if teacher.shift else states, weight, impossible(bias, teacher))


def impossible(logits: Tensor, teacher: TeacherDescription) -> Tensor:
    """Logits (..., S) with the classes that are never drawn put out of reach, in place."""
    value = max(IMPOSSIBLE, torch.finfo(logits.dtype).min / 2)
    for first, past in teacher.never_drawn():
        logits[..., first:past] = value
    return logits


def check_hidden(model: Any, teacher: TeacherDescription) -> None:
    """ValueError where the head's last linear map does not give the logits: another follows it, or it is not called."""
    length = min(4, teacher.max_positions or 4)
    tokens = torch.full((1, length), teacher.mask_id, device=next(model.parameters()).device)
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            wanted: Any = call(model, teacher, tokens)
            found: Any = call(model, teacher, tokens, hidden=True)
            whole = found.logits()
    finally:
        for module in trained:
            module.training = True
    possible = wanted > IMPOSSIBLE / 2
    scale = float(wanted[possible].abs().max())
    if whole.shape != wanted.shape or float((whole - wanted)[possible].abs().max()) > 0.02 * scale + 1e-4:
        raise ValueError(
            f"{type(model).__name__}: its logits are not what its last linear map {teacher.head!r} gives; "
            "use it without hidden_logits"
        )


def open_model(
    where: str | os.PathLike[str], new_head: bool, consent: bool, load: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a folder or of a hub name, in evaluation mode, and the fields of its description that tell how."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(where, trust_remote_code=consent, **_where(load))
    except (ValueError, KeyError) as error:
        held, _ = PreTrainedConfig.get_config_dict(where)
        if held.get("auto_map") and not consent:
            raise remote_code.refuse(str(where), "teacher") from error
        raise ValueError(f"{where}: transformers cannot read its config.json: {error}") from error
    told = kind_of(str(where), config)
    if told["remote_code"] and not consent:
        raise remote_code.refuse(str(where), "teacher")
    opener: Any = getattr(transformers, told["auto_class"])
    model, info = opener.from_pretrained(
        where, config=config, trust_remote_code=told["remote_code"], output_loading_info=True, **load
    )
    missing = sorted(info["missing_keys"])
    if missing and not new_head:
        raise ValueError(
            f"{where}: holds no weights for {missing[:20]}{' and more' if len(missing) > 20 else ''}; an encoder "
            "without its head predicts nothing yet: open it with new_head=True and train it first, as a teacher"
        )
    return model.eval(), told


def kind_of(where: str, config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a description that tell how a model of this config is opened and which way it looks."""
    name, remote = remote_code.auto_class_of(where, config, AUTO_CLASSES)
    return {"auto_class": name, "remote_code": remote, "causal": not remote and name == AUTO_CLASSES[1]}


def tokenizer_of(where: str | os.PathLike[str], consent: bool) -> Any:
    """The tokenizer in a folder or of a hub name, None where there is none."""
    from transformers import AutoTokenizer

    folder = Path(where)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=consent)
    except OSError:
        return None


def mark_as_filled(model: nn.Module) -> None:
    """Tells transformers that these weights are not to be started anew."""
    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        setattr(part, "_is_hf_initialized", True)  # noqa: B010  (tensors have no such attribute of their own)


def _added_to(embeddings: nn.Module, added: Tensor) -> Any:
    """A context in which `added` (N, 1, E) goes on top of what the embeddings give."""

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + added.to(output.dtype)

    return _hook(embeddings.register_forward_hook(add))


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _before_head(model: nn.Module, teacher: TeacherDescription, inputs: dict[str, Any]) -> Tensor:
    """What the head's last linear map is given; it is never run, so that its output is never whole."""

    def stop(module: nn.Module, args: Any) -> None:
        raise _AtHeadError(args[0])

    with _hook(model.get_submodule(str(teacher.head)).register_forward_pre_hook(stop)):
        try:
            model(**inputs)
        except _AtHeadError as reached:
            return reached.states
    raise ValueError(f"{type(model).__name__}: {teacher.head!r} is never called; use it without hidden_logits")


def _of(output: Any) -> Tensor:
    """The logits of a model's output."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model gives a {type(output).__name__} without logits; give one with a head")
    return logits


def _shifted(x: Tensor) -> Tensor:
    """(N, D, ...) whose place d - 1 holds what is of position d; the first, which nothing is before, keeps its own."""
    return torch.cat([x[:, :1], x[:, :-1]], 1)


def _both_ways(model: Any, teacher: TeacherDescription, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(N, 1, D, D): every position may look at every other that is not filled up."""
    size, length = tokens.shape
    seen = torch.ones_like(tokens) if attention_mask is None else attention_mask
    mask = seen.bool()[:, None, None].expand(size, 1, length, length)
    if getattr(model.config, "_attn_implementation", None) != "eager":
        return mask
    dtype = model.get_submodule(teacher.embeddings).weight.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=tokens.device).masked_fill(~mask, torch.finfo(dtype).min)


def _as_autocast(x: Tensor) -> Tensor:
    """In the dtype in which autocast would compute a linear map of it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _where(load: dict[str, Any]) -> dict[str, Any]:
    """What of the arguments of from_pretrained says where a file is."""
    names = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
    return {name: load[name] for name in names if name in load}
