"""Squared distances between all rows of two sets of features, block by block, in the arithmetic of ADM's evaluator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# N, M = images, F = features of an image

BLOCK = 10_000  # rows and columns of the evaluator's blocks: the unit in which float16 gives way to float32
STRIP = 1_000  # rows of a block computed at a time, which bounds the memory
DISTANCES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def strips(u: Tensor, v: Tensor, distances: str, symmetric: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """All squared distances of u (N, F) to v (M, F): (rows, columns, (rows, columns) distances) strip by strip.

    Those below 0 by rounding stand as they are, for they are within any radius. symmetric: v is u, and the dot
    products of two blocks are computed once; the strips of their mirrored block are transposed views.
    """
    dtype = DISTANCES[distances]
    for top in range(0, len(u), BLOCK):
        for left in range(top if symmetric else 0, len(v), BLOCK):
            rows, columns = slice(top, min(top + BLOCK, len(u))), slice(left, min(left + BLOCK, len(v)))
            orientations = (False, True) if symmetric and left > top else (False,)
            if dtype != torch.float16:
                for products in _products(u, v, rows, columns, dtype):
                    yield from (_squared(products, mirrored) for mirrored in orientations)
                continue
            held = list(_products(u, v, rows, columns, dtype))
            for mirrored in orientations:
                block = [_squared(products, mirrored) for products in held]
                if not all(_finite(squared) for _, _, squared in block):
                    wider = _products(u, v, rows, columns, torch.float32)
                    block = (_squared(products, mirrored) for products in wider)
                yield from block


@dataclass(frozen=True)
class _Products:
    """-2 a.b of rows a of one set and columns b of another, and |a|^2 (rows, 1), |b|^2 (1, columns)."""

    rows: slice
    columns: slice
    doubled: Tensor
    row_norms: Tensor
    column_norms: Tensor


def _products(u: Tensor, v: Tensor, rows: slice, columns: slice, dtype: torch.dtype) -> Iterator[_Products]:
    """The dot products of a block in ``dtype``, a strip of rows at a time.

    In float16 every result is rounded to it, but sums run in float32, as on the evaluator's hardware.
    """
    wide = torch.float32 if dtype == torch.float16 else dtype
    b = v[columns].to(dtype)
    column_norms, b = b.square().to(wide).sum(dim=1).to(dtype), b.to(wide)
    for start in range(rows.start, rows.stop, STRIP):
        strip = slice(start, min(start + STRIP, rows.stop))
        a = u[strip].to(dtype)
        row_norms, a = a.square().to(wide).sum(dim=1).to(dtype), a.to(wide)
        yield _Products(strip, columns, ((-2 * a) @ b.T).to(dtype), row_norms[:, None], column_norms[None])


def _squared(products: _Products, mirrored: bool) -> tuple[slice, slice, Tensor]:
    """|a|^2 - 2 a.b + |b|^2, added in this order, where a is the row; for mirrored ones b is."""
    first, second = products.row_norms, products.column_norms
    if mirrored:
        return products.columns, products.rows, ((products.doubled + second) + first).T
    return products.rows, products.columns, (products.doubled + first) + second


def _finite(squared: Tensor) -> bool:
    """As the evaluator sees it, which cuts at 0 before it looks: minus infinity passes."""
    least, largest = squared.aminmax()
    return bool(largest.isfinite() and not least.isnan())
