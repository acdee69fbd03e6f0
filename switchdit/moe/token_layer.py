"""TokenMoE: DeepSpeed's MoE with every token routed for itself, and experts that know their token's sample.

    N = samples of this rank, L = tokens of a sample, T = N L tokens, D = width, E = experts, k = top-k,
    R = expert-parallel ranks (ep_size), J = E / R experts that live on one rank,
    n = tokens that this rank's experts see, S = samples these are of, C = what is known of a sample

As in layer.py nothing has a capacity, nothing is dropped or padded, and the raw top-k probabilities weigh the outputs.
A token travels once to every rank that holds an expert it chose, and comes back as one weighted sum. What conditions
the experts belongs to samples, not to tokens: it goes to every rank once, and tokens carry their sample's number.

Splits depend on the tokens, so the host waits for the device once a layer and forward pass: for the number of tokens of
each expert, which with several ranks comes with the numbers of tokens to send and to receive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor, nn

from switchdit.moe.exchanges import exchange_rows
from switchdit.moe.layer import RoutedMoE
from switchdit.moe.timestep_gate import top_k_map


class TokenGate(TopKGate):
    """``softmax(x W)`` of each token in float32 or better, free of autocast, and its k largest."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int):
        super().__init__(hidden_size, num_experts, top_k, drop_tokens=False, use_rts=False)

    def _set_ep_group(self, ep_group) -> None:
        self.ep_group = ep_group  # the stock gate refuses a second call, but an engine may be made anew

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) -> probs (T, E), chosen (T, E) of 0 and 1, k ones a row."""
        weight = self.wg.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(device_type=tokens.device.type, enabled=False):
            probs = torch.softmax(F.linear(tokens.to(dtype), weight.to(dtype)), dim=-1)
        return probs, top_k_map(probs.detach(), self.k)


class TokenExperts(Experts):
    """DeepSpeed's container of this rank's experts, each applied to the tokens that chose it, as one slice."""

    def forward(
        self, tokens: Tensor, gates: Tensor, counts: list[int], sample: Tensor, known: tuple[Tensor, ...]
    ) -> Tensor:
        """Weighted sums of the experts' outputs.

        Args:
            tokens: (n, D); gates: (n, J), zero where an expert is not chosen.
            counts: how many tokens each of the J experts gets.
            sample: (n,) which of the S samples each token is of.
            known: (S, C) tensors, handed to the experts with the tokens.

        Returns:
            (n, D) in the type of ``gates``.
        """
        expert, token = _positions((gates.detach() != 0).T, sum(counts))
        slices = zip(tokens[token].split(counts), sample[token].split(counts), strict=True)
        # Every expert takes part, also with no tokens at all: each parameter then gets a gradient (zero), so that
        # ZeRO-2's hooks fire in the same order with the same buckets on every rank.
        out = torch.cat(
            [expert(x, *known, sample=s) for expert, (x, s) in zip(self.deepspeed_experts, slices, strict=True)]
        )
        weighted = out * gates[token, expert].unsqueeze(1)
        return weighted.new_zeros(tokens.shape).index_add(0, token, weighted)


class TokenMOELayer(MOELayer):
    """Sends tokens to the ranks of the experts they chose, and adds what comes back."""

    @torch.compiler.disable  # splits depend on data
    def forward(self, x: Tensor, *known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, L, D), (N, C) each -> mixture (N, L, D), probs (T, E), chosen (T, E)."""
        tokens = x.flatten(0, 1)
        probs, chosen = self.gate(tokens)
        gates = probs * chosen
        sample = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
        if self.ep_size == 1:
            counts = (gates.detach() != 0).sum(0).tolist()
            mixture = self.experts(tokens, gates, counts, sample, known).to(x.dtype)
        else:
            mixture = self._dispatch(tokens, gates, sample, known)
        return mixture.view_as(x), probs, chosen

    def _dispatch(self, tokens: Tensor, gates: Tensor, sample: Tensor, known: tuple[Tensor, ...]) -> Tensor:
        num_ranks, num_local, num_samples = self.ep_size, self.num_local_experts, len(known[0])
        gates = gates.unflatten(1, (num_ranks, num_local))  # (T, R, J)
        routed = gates.detach() != 0
        visits = routed.any(2).T  # (R, T)

        # for each rank: tokens and samples that it gets from this one, and the tokens of each of its experts
        mine = torch.cat([visits.sum(1, keepdim=True), routed.sum(0)], dim=1)
        mine = F.pad(mine, (1, 0), value=num_samples)  # (R, 2 + J)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.ep_group)
        mine, theirs = torch.stack([mine, theirs]).tolist()
        send, receive = [row[1] for row in mine], [row[1] for row in theirs]
        samples = [row[0] for row in theirs]
        counts = [sum(row[2 + j] for row in theirs) for j in range(num_local)]

        # samples are numbered through all ranks of the group
        sample = sample + sum(samples[: dist.get_rank(self.ep_group)])
        widths = [of_sample.shape[1] for of_sample in known]
        known = torch.cat(known, dim=1).repeat(num_ranks, 1)
        known = exchange_rows(known, self.ep_group, [num_samples] * num_ranks, samples)

        rank, token = _positions(visits, sum(send))
        # a sample's number is exact in float32 below 2^24: one exchange serves it and the gates
        ticket = torch.cat([gates[token, rank], sample[token, None].to(gates.dtype)], dim=1)
        there = exchange_rows(tokens[token], self.ep_group, send, receive)
        ticket = exchange_rows(ticket, self.ep_group, send, receive)
        gates_there, sample_there = ticket[:, :num_local], ticket[:, num_local].long()
        mixed = self.experts(there, gates_there, counts, sample_there, known.split(widths, dim=1))
        back = exchange_rows(mixed.to(tokens.dtype), self.ep_group, receive, send)
        return torch.zeros_like(tokens).index_add(0, token, back)


class TokenMoE(RoutedMoE):
    """Mixture of experts chosen by each token for itself, e.g. Diff-MoE's.

    Args:
        hidden_size: D, width of tokens.
        num_experts: E.
        top_k: k, experts per token.
        ep_size: expert-parallel ranks; must divide E. Above 1, torch.distributed must be initialised first.
        expert: what every expert is a copy of. Called as ``expert(tokens, *known, sample=sample)`` with tokens (n, D)
            that may be none at all, what is known of samples, (S, C) each, and which of these each token is of, (n,).

    Raises:
        UserError: if the numbers do not fit each other.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, ep_size: int, expert: nn.Module):
        super().__init__(TokenGate(hidden_size, num_experts, top_k), expert, ep_size, TokenMOELayer, TokenExperts)

    def forward(self, x: Tensor, *known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mixture of the experts that the tokens choose.

        Args:
            x: (N, L, D) tokens.
            known: (N, C) each, at least one: what the experts are told of the samples.

        Returns:
            mixture (N, L, D); gate probabilities (T, E) float32, and the choice (T, E) of 0 and 1.
        """
        return self.deepspeed_moe(x, *known)


def _positions(flags: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row and column of each of the ``count`` set flags, row by row: `nonzero` without its wait for the device."""
    order = flags.flatten().argsort(descending=True, stable=True)[:count]
    return order // flags.shape[1], order % flags.shape[1]
