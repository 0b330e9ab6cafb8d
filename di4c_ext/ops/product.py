"""Drawing from products of tables: `sample_product`, the reverse step of a process whose transitions are matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext.ops import checks, native, reference
from di4c_ext.ops.library import register

_OP = "sample_product"


def sample_product(
    left: Tensor, right: Tensor, i: Tensor, j: Tensor, keys: Tensor, *, base: Tensor | None = None, stream: int = 0
) -> Tensor:
    """States s in proportion to left[n, i, s] right[n, j, s] + base[n, i, j], one for each pair of rows (i, j).

    With left[i, s] = q(x_t = i | x_s = s) and right[j, s] = q(x_s = s | x_0 = j) that is the posterior
    q(x_s | x_t = i, x_0 = j). Nothing is normalised, and nothing of S numbers a position is kept.

    Args:
        left, right: (S, S) or (N, S, S) float64, entries >= 0; N = B, or 1 for tables that all samples share.
        i: (B, D) int64, rows of `left`.
        j: (B, D) or (B, n, D) int64, rows of `right`: n draws of each position.
        keys: (B,) int64, one per sample (`di4c_ext.random.keys`).
        base: None for 0, or float64 of the shape of `left`, entries >= 0: weight that every state has.
        stream: number in [0, 2^31 - 1). The draws take the stream's coins, so that tokens which
            `sample_categorical` draws by the same keys on the same stream are independent of them.

    Returns:
        int64 of the shape of j. A state of weight 0 is never drawn; weights below 2^-44 to 2^-61 of their row's largest
        (2^-53 at S = 256) count as 0. -1 where i or j lies outside [0, S), where some weight is negative, infinite or
        NaN, and where all are 0. The same keys give the same states on every device and backend, to the last one.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    checks.stream(_OP, stream)
    if not isinstance(j, Tensor) or j.dim() not in (2, 3):
        kind = f"shape {checks.shape(j)}" if isinstance(j, Tensor) else type(j).__name__
        raise ValueError(f"{_OP}: j must be an int64 tensor (B, D) or (B, n, D), got {kind}")
    for name, value in (("left", left), ("right", right), ("base", base), ("i", i), ("keys", keys)):
        if isinstance(value, Tensor) and value.device != j.device:
            raise ValueError(f"{_OP}: {name} must be on {j.device} like j, got {value.device}")
    batch, length = j.shape[0], j.shape[-1]
    checks.indices(_OP, "j", j, checks.shape(j), "(B, n, D)", j)
    checks.indices(_OP, "i", i, (batch, length), "(B, D)", j)
    checks.indices(_OP, "keys", keys, (batch,), "(B,)", j)
    tables = [_tables(name, value, batch) for name, value in (("left", left), ("right", right), ("base", base))]
    shapes = [checks.shape(table) for table in tables if table is not None]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{_OP}: left, right and base must be alike in shape, got {' and '.join(map(str, shapes))}")
    columns = j if j.dim() == 3 else j[:, None]
    drawn: Tensor = torch.ops.di4c.sample_product(*tables, i, columns, keys, stream)
    return drawn.view(j.shape)


def _tables(name: str, value: object, batch: int) -> Tensor | None:
    """Tables (N, S, S) for so many samples, or one for all; None for no `base`."""
    if value is None and name == "base":
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: {name} must be a float64 tensor (S, S) or (N, S, S), got {type(value).__name__}")
    if value.dtype != torch.float64:
        raise TypeError(f"{_OP}: {name} must be float64, got {value.dtype}; tails of a narrower one are gone already")
    shape = checks.shape(value)
    if value.dim() not in (2, 3) or shape[-1] != shape[-2] or not 1 <= shape[-1] <= checks.MAX_STATES:
        raise ValueError(f"{_OP}: {name} must be (S, S) or (N, S, S) with 1 <= S <= {checks.MAX_STATES}, got {shape}")
    if value.dim() == 3 and shape[0] not in (1, batch):
        raise ValueError(f"{_OP}: {name} must have N = B = {batch} tables, or 1 for all samples, got {shape[0]}")
    return (value if value.dim() == 3 else value[None]).detach()


def _sample_product(
    left: Tensor, right: Tensor, base: Tensor | None, i: Tensor, j: Tensor, keys: Tensor, stream: int
) -> Tensor:
    run = native.kernels(j)
    if run is None:
        return reference.sample_product(left, right, base, i, j, keys, stream)
    tokens = _sample_product_fake(left, right, base, i, j, keys, stream)
    run(
        "sample_product",
        left=native.dense(left),
        right=native.dense(right),
        base=native.dense(base),
        i=native.dense(i),
        j=native.dense(j),
        keys=native.dense(keys),
        tokens=tokens,
        B=j.shape[0],
        D=j.shape[2],
        S=left.shape[-1],
        N=left.shape[0],
        draws=j.shape[1],
        stream=stream,
    )
    return tokens


def _sample_product_fake(
    left: Tensor, right: Tensor, base: Tensor | None, i: Tensor, j: Tensor, keys: Tensor, stream: int
) -> Tensor:
    return j.new_empty(j.shape)


register(
    "sample_product(Tensor left, Tensor right, Tensor? base, Tensor i, Tensor j, Tensor keys, int stream) -> Tensor",
    _sample_product,
    _sample_product_fake,
)
