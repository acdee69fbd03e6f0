"""Exchanges between the expert-parallel ranks, as pairs of autograd functions that leave room for work in between.

    R = expert-parallel ranks, J = experts of one rank, M = R J

An exchange is begun, other work is done, and its result is waited for. The gradient does the same the other way
round: it leaves when the backward pass reaches the wait, and is waited for at the beginning, which the backward pass
reaches after all that was done in between. All ranks must begin the same exchanges in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

Pending = Callable[[], Tensor]  # waits for what is under way, and returns it


class _Directions:
    """What an exchange does forward and backward, and what of it is under way."""

    def __init__(self, there: Callable[[Tensor], Pending], back: Callable[[Tensor], Pending]):
        self.there, self.back = there, back
        self.pending: Pending | None = None

    def finish(self) -> Tensor:
        pending, self.pending = self.pending, None
        return pending()


class _Begin(torch.autograd.Function):
    """The result is not there yet: an empty tensor stands for it in the graph."""

    @staticmethod
    def forward(ctx, x: Tensor, directions: _Directions) -> Tensor:
        ctx.directions = directions
        directions.pending = directions.there(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return ctx.directions.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, begun: Tensor, directions: _Directions) -> Tensor:
        ctx.directions = directions
        return directions.finish()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.directions.pending = ctx.directions.back(grad)
        return grad.new_empty(0), None


def begin(x: Tensor, there: Callable[[Tensor], Pending], back: Callable[[Tensor], Pending]) -> Pending:
    """Send ``x``; what is returned is called once, and is differentiable. ``back`` sends the gradient of its result."""
    directions = _Directions(there, back)
    return partial(_Wait.apply, _Begin.apply(x, directions), directions)


def begin_rows(rows: Tensor, group, send: list[int], receive: list[int]) -> Pending:
    """Uneven all-to-all of dimension 0: ``send[r]`` rows go to rank r of the group, ``receive[r]`` come from it."""
    return begin(rows, partial(_rows, group, send, receive), partial(_rows, group, receive, send))


def exchange_rows(rows: Tensor, group, send: list[int], receive: list[int]) -> Tensor:
    """`begin_rows`, waited for."""
    return begin_rows(rows, group, send, receive)()


def begin_gather(local: Tensor, group) -> Pending:
    """All ranks' experts, (J, ...) -> (M, ...) in the order of ranks. The gradient is the sum over all ranks."""
    return begin(local, partial(_gather, group), partial(_sum_at_owner, group))


def _rows(group, send: list[int], receive: list[int], rows: Tensor) -> Pending:
    rows = rows.contiguous()
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)
    return partial(_result, work, out)


def _gather(group, local: Tensor) -> Pending:
    out = local.new_empty((dist.get_world_size(group) * len(local), *local.shape[1:]))
    work = dist.all_gather_into_tensor(out, local.contiguous(), group=group, async_op=True)
    return partial(_result, work, out)


def _sum_at_owner(group, grad: Tensor) -> Pending:
    """Reduce-scatter by an all-to-all of equal pieces and a local sum: always in the order of ranks, so that the same
    run gives the same bits, and gloo can do it asynchronously."""
    pieces = torch.empty_like(grad, memory_format=torch.contiguous_format)
    work = dist.all_to_all_single(pieces, grad.contiguous(), group=group, async_op=True)
    return lambda: _result(work, pieces).unflatten(0, (dist.get_world_size(group), -1)).sum(0)


def _result(work: dist.Work, out: Tensor) -> Tensor:
    work.wait()
    return out
