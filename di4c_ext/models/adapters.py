"""LoRA adapters inside a student, by the peft library: the teacher is the same weights with the adapters off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Every linear map but the head, whatever the family calls them.
_DEFAULTS = {"target_modules": "all-linear"}


def settings(lora: bool | dict[str, Any] | Any) -> dict[str, Any] | None:
    """What of peft's LoraConfig is to be kept in a config.json: the fields that are not its defaults.

    Args:
        lora: False for no adapters, True for adapters on every linear map but the head, a mapping of LoraConfig's
            arguments, or a LoraConfig.

    Raises:
        ValueError: naming the settings that LoraConfig does not take, or the missing library.
    """
    if lora is False or lora is None:
        return None
    peft = _peft()
    if lora is True or isinstance(lora, dict):
        chosen = _DEFAULTS | (lora if isinstance(lora, dict) else {})
        try:
            lora = peft.LoraConfig(**chosen)
        except TypeError as error:
            raise ValueError(f"lora: {error}; give what peft.LoraConfig takes") from error
    elif not isinstance(lora, peft.LoraConfig):
        raise TypeError(f"lora must be True, a mapping or a peft.LoraConfig, got {type(lora).__name__}")
    plain = peft.LoraConfig().to_dict()
    told = {name: value for name, value in lora.to_dict().items() if value != plain[name]}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in told.items()}


def inject(model: nn.Module, lora: dict[str, Any]) -> None:
    """Puts adapters into `model`, which start as nothing; of its parameters these alone are left to train."""
    peft = _peft()
    peft.inject_adapter_in_model(peft.LoraConfig(**lora), model)


def train_only_adapters(model: nn.Module) -> None:
    """Asks a gradient of the adapters' parameters and of no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters inside; nothing else changes, and they are back on after."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # Switching also writes requires_grad, which a frozen copy of a student must keep.
    wanted = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora needs the peft library: pip install 'di4c_ext[lora]'") from error
    return peft
