"""What the mixture of experts is compared with: the plainest implementation of the paper, two that others offer, and
whole models.

    N = samples, L = tokens of a sample, D = width, M = experts, k = top-k

The three mixtures multiply every token k times, where merged experts do so once. Their arguments are those of
`switchdit.kernels.expert_mix.expert_mix`: ``z`` (N, L, D), ``weight`` (M, D, D), ``bias`` (M, D), ``gates`` (N, M) or
(1, M); the results are ``routed`` and ``mask``, both (N, L, D).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from switchdit.config import Config, config_from_dict
from switchdit.engine.compilation import compile_blocks
from switchdit.errors import UserError
from switchdit.models import build_model, model_fields, system_of
from switchdit.moe.experts import LinearExpert
from switchdit.moe.layer import MoE  # DeepSpeed's own
from switchdit.moe.routes import Route

SWITCH, DIT, WITH_PLAIN = "Switch-DiT", "DiT", "Switch-DiT with (a)"


def plain_expert_mix(
    z: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], gates: Tensor
) -> tuple[Tensor, Tensor]:
    """Gather the samples of each expert, multiply, scatter: as published, differentiable.

    As the authors' code does it, products are in float32 under autocast too (which does not know ``torch.mm(out=)``),
    the host waits for how many tokens each expert gets, and the gather is an index, whose gradient costs more than that
    of ``index_select``: an eighth of the whole on a CPU with D = 384, a twentieth with D = 1152.
    """
    n, tokens, width = z.shape
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        gates = gates.expand(n, -1)
        expert, sample = gates.T.nonzero().unbind(1)  # (k N,), by expert
        counts = ((gates != 0).sum(0) * tokens).tolist()
        gathered = z.to(dtype)[sample].flatten(0, 1)
        products = [
            torch.addmm(b.to(dtype), x, w.to(dtype))
            for x, w, b in zip(gathered.split(counts), weight, bias, strict=True)
        ]
        weighted = torch.cat(products).view(-1, tokens, width) * gates[sample, expert][:, None, None]
        mask = 1 + torch.zeros_like(z, dtype=dtype).index_add(0, sample, weighted)
        return (z * mask).to(z.dtype), mask.to(z.dtype)


def grouped_expert_mix(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same with PyTorch's grouped product of all experts at once; nothing waits for the device.

    Raises:
        RuntimeError, AttributeError: where PyTorch has none for the device and the type, or none at all.
    """
    n, tokens, _ = z.shape
    gates = gates.expand(n, -1)
    expert, order = gates.topk(top_k, dim=1).indices.flatten().sort()  # whole samples, by expert
    sample = order // top_k
    ends = (expert[:, None] == torch.arange(len(weight), device=z.device)).sum(0).cumsum(0) * tokens
    gathered = z.index_select(0, sample)  # (k N, L, D)
    products = torch._grouped_mm(gathered.flatten(0, 1), weight, offs=ends.to(torch.int32)).view_as(gathered)
    chosen_gates = gates[sample, expert].to(z.dtype)[:, None, None]
    weighted = (products + bias.index_select(0, expert).unsqueeze(1)) * chosen_gates
    mask = 1 + torch.zeros_like(z).index_add(0, sample, weighted)
    return z * mask, mask


class StockExpertMix(nn.Module):
    """DeepSpeed's MoE layer with the same linear experts, on one process, dropping nothing.

    Its gate sees the tokens: the first M channels of all tokens of a sample have to hold the logarithms of its
    probabilities. It renormalises the k chosen to a sum of 1 (but for k = 1), and its gradient goes to ``z``. Every
    expert's rows are padded to as many as the fullest has.
    """

    def __init__(self, weight: Tensor, bias: Tensor, top_k: int):
        super().__init__()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it logs every layer that is built
        num_experts, width = bias.shape
        gate = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
        self.moe = MoE(width, LinearExpert(width), num_experts, k=top_k, min_capacity=0, **gate).to(weight)
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(torch.eye(num_experts, width))
            for expert, w, b in zip(self.moe.deepspeed_moe.experts.deepspeed_experts, weight, bias, strict=True):
                expert.weight.copy_(w)
                expert.bias.copy_(b)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mask = 1 + self.moe(z)[0]
        return z * mask, mask


def use_plain_mixture(model: nn.Module) -> None:
    """Put `plain_expert_mix` in place of the mixtures of a Switch-DiT, on one process; its numbers stay the same."""
    for block in model.blocks:
        block.forward = MethodType(_plain_block, block)


def _plain_block(block: nn.Module, z: Tensor, c: Tensor, e_t: Tensor, route: Route) -> Tensor:
    experts = block.moe.deepspeed_moe.experts.deepspeed_experts
    routed, mask = plain_expert_mix(z, [e.weight for e in experts], [e.bias for e in experts], route.gates)
    return block.modulated(routed, block.adaLN_modulation(c)) + z * (1 - mask)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="Switch-DiT-S/2", help="(default: Switch-DiT-S/2)")
    parser.add_argument("--compile", action="store_true", help="every block by torch.compile")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="of the model, e.g. num_experts=4")


def system_configs(args: argparse.Namespace, **train: Any) -> dict[str, Config]:
    """Runs of a Switch-DiT, of the DiT of its size, and of the Switch-DiT again, for its mixture to be replaced by (a).

    Raises:
        UserError: another system or an unknown field, experts on several processes, or another integration than (a) is
            written for.
    """
    for text in args.fields:
        if "=" not in text:
            raise UserError(f"'{text}' must have the form field=value, of a field of the model")
    switch = run_config({"name": args.model}, [f"model.{text}" for text in args.fields], train)
    name, overrides = switch.model_name, switch.model_overrides
    fields = model_fields(name, **overrides)
    if system_of(name) != "Switch-DiT":
        raise UserError(f"--model {name} must be a Switch-DiT; DiT of its size is measured beside it")
    for field, needed in (("ep_size", 1), ("integration", "multiply_skip_one")):
        if fields[field] != needed:
            raise UserError(f"model field '{field}' must be {needed!r} here, not {fields[field]!r}")
    dit = name.replace("Switch-DiT", "DiT")
    shared = {key: value for key, value in overrides.items() if key in model_fields(dit)}
    return {SWITCH: switch, DIT: run_config({"name": dit, **shared}, [], train), WITH_PLAIN: switch}


def run_config(model: dict[str, Any], overrides: Sequence[str], train: dict[str, Any]) -> Config:
    return config_from_dict(
        {
            "run_dir": ".",
            "model": model,
            "data": {"latents": ".", "image_size": 256, "vae": "."},
            "train": {"steps": 1, **train},
        },
        overrides,
    )


def build_system(system: str, config: Config, compiled: bool) -> nn.Module:
    """One of `system_configs`, no parameter of it zero: a device's clock depends on the numbers it multiplies."""
    torch.manual_seed(0)
    model = build_model(config.model_name, **config.model_overrides)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    if system == WITH_PLAIN:
        use_plain_mixture(model)
    if compiled and system == WITH_PLAIN:
        for block in model.blocks:
            block.compile()  # with a break at every count that the host waits for
    elif compiled:
        compile_blocks(model)
    return model
