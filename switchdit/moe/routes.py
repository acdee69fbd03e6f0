"""What is known of a layer before its samples come: where they go, or where its experts come from.

N = samples of this rank, D = width, M = experts, B = layers,
R = expert-parallel ranks (ep_size), J = M / R experts that live on one rank
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch import distributed as dist

from switchdit.moe.exchanges import Pending, begin_gather, exchange_rows
from switchdit.moe.experts import stacked


@dataclass
class Route:
    """Where the samples of one layer go, or where its experts come from.

    Attributes:
        probs: (N, M) gate probabilities of this rank's samples.
        gates: (n, J) gates of the samples that this rank's experts will see, where samples travel; otherwise (N, M).
        sample: (K,) the samples to send, in the order of the ranks they go to; None where samples stay.
        send, receive: how many go to and come from each rank.
        experts: where experts travel, those of all ranks, then the next layer's, which set out before this one's work.
    """

    probs: Tensor
    gates: Tensor
    sample: Tensor | None = None
    send: list[int] | None = None
    receive: list[int] | None = None
    experts: list[ExpertsOnTheirWay] = field(default_factory=list)


class ExpertsOnTheirWay:
    """The weights of all M experts of a layer, gathered once for each time they are taken: again, where the layer is
    computed again."""

    def __init__(self, local: nn.ModuleList, group):
        self.local, self.group = local, group  # this rank's experts, and all ranks that have others
        self.pending: Pending | None = None
        self.was_taken = False

    def begin(self) -> None:
        if self.pending is None:
            weight, bias = stacked(self.local)
            self.pending = begin_gather(torch.cat([weight, bias.unsqueeze(1)], dim=1), self.group)

    def begin_ahead(self) -> None:
        """`begin`, for a layer whose turn is to come: it has been where the one before it is computed again."""
        if not self.was_taken:
            self.begin()

    def take(self) -> tuple[Tensor, Tensor]:
        """Weights (M, D, D) and biases (M, D), waited for."""
        self.begin()
        pending, self.pending, self.was_taken = self.pending, None, True
        weight, bias = pending().split([len(self.local[0].weight), 1], dim=1)
        return weight, bias.squeeze(1)


@torch.compiler.disable
def exchange_routes(gated: list[tuple[Tensor, Tensor]], group) -> list[Route]:
    """Tell the ranks of the group how many samples will come from where, and their gates: one exchange of each.

    Args:
        gated: probs and gates, (N, M) each, of the B layers.
    """
    num_layers, num_ranks = len(gated), dist.get_world_size(group)
    gates = torch.stack([g for _, g in gated]).unflatten(2, (num_ranks, -1))  # (B, N, R, J)
    chosen = (gates.detach() != 0).any(-1).transpose(1, 2)  # (B, R, N)
    block, rank, sample = chosen.nonzero(as_tuple=True)  # by block, then rank, then sample
    counts = chosen.sum(-1).T.contiguous()  # (R, B) to send
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    send, receive = counts.tolist(), arriving.tolist()

    # gates travel by rank, then block; they are cut and joined by block, then rank
    blocks, ranks = range(num_layers), range(num_ranks)
    outgoing = gates[block, sample, rank].split([send[r][b] for b in blocks for r in ranks])
    outgoing = torch.cat([outgoing[b * num_ranks + r] for r in ranks for b in blocks])
    incoming = exchange_rows(outgoing, group, [sum(c) for c in send], [sum(c) for c in receive])
    incoming = incoming.split([receive[r][b] for r in ranks for b in blocks])
    samples = sample.split([sum(send[r][b] for r in ranks) for b in blocks])
    return [
        Route(
            probs=gated[b][0],
            gates=torch.cat([incoming[r * num_layers + b] for r in ranks]),
            sample=samples[b],
            send=[send[r][b] for r in ranks],
            receive=[receive[r][b] for r in ranks],
        )
        for b in blocks
    ]
