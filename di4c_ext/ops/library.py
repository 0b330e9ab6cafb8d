"""The operators' home in the dispatcher, namespace `di4c`: schema, implementation, FakeTensor rule, gradient.

`torch.library.Library.define/impl` rather than `custom_op`: half the overhead per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("di4c", "FRAGMENT")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One operator for every device: `implementation` itself picks the kernels or the reference."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"di4c::{name}", fake, lib=LIBRARY)


def register_gradient(
    name: str, definition: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """`backward(ctx, *grad_outputs)` as the gradient of di4c::name, and an error as the gradient of that gradient,
    which points to the definition in ops.reference."""
    torch.library.register_autograd(f"di4c::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(
        f"di4c::{name}_backward", _no_double_backward(name, definition), setup_context=_keep_nothing, lib=LIBRARY
    )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_double_backward(name: str, definition: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"di4c::{name}: the gradient of its gradient is not provided; "
            f"use the differentiable definition di4c_ext.ops.reference.{definition} for second derivatives"
        )

    return backward
