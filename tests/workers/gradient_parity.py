"""Train small models in many ways, and tell how far each is from a plain loop.

gradient_parity.py EP_SIZE IN.json OUT.json

IN.json: a list of combinations, see tests/gradient_parity.py. OUT.json: for each of them its errors by name. Every
process sees the same global batch and takes its share of it; the first one also runs the plain loop, without DeepSpeed,
on the whole batch in float64.
"""

import functools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from switchdit import build_model
from switchdit.engine.engine import build_engine, grad_norm, init_processes, leave
from switchdit.engine.global_state import gather_experts, load_global_state_dict
from switchdit.moe.diffusion_prior import diffusion_prior_loss, match_columns, prior_mask

WIDTH = 32
COMMON = {"input_size": 8, "hidden_size": WIDTH, "num_heads": 2, "num_classes": 3}
EXPERTS = {"num_experts": 4, "top_k": 2}
FIELDS = {
    "Switch-DiT": {"depth": 3, **EXPERTS},
    "Diff-MoE": {"depth": 2, "mlp_ratio": 1.0, "input_size": 4, **EXPERTS},
    "Multi-Expert-DiT": {"depth": 2, "mlp_ratio": 1.0, "num_denoisers": 4},
}
# by ZeRO stage and precision; for stage 1 in float32, which is not shipped, that of stage 0
SHIPPED = {
    (0, "float32"): "zero0_fp32",
    (1, "float32"): "zero0_fp32",
    (1, "bf16"): "zero1_bf16",
    (2, "float32"): "zero2_fp32",
    (2, "bf16"): "zero2_bf16",
}
GLOBAL_BATCH, STEPS, LR = 16, 2, 0.3
# experts (or denoisers) that nobody chooses: the last leaves whole ranks without samples
REFUSED = {"mixed": (), "idle": (2,), "same": (2, 3)}
# Tokens choose experts by nearly equal probabilities now and then, and rounding decides; what follows is then another
# function. With these seeds of the data the k-th and the next differ by more than bfloat16 rounds, for all tokens.
DATA_SEEDS = {("Diff-MoE", "mixed"): 435, ("Diff-MoE", "idle"): 97}
MARGIN = 0.0015  # of probabilities; rounding has been seen to decide at 0.0010
EXPERT = re.compile(r"\b(?:deepspeed_experts|denoisers)\.(\d+)\.")  # in a parameter's name
ZERO = 1e-6  # the largest entry of a tensor that is taken to be zero


def small_model(system: str, ep_size: int = 1) -> torch.nn.Module:
    fields = {**COMMON, **FIELDS[system], **({} if system == "Multi-Expert-DiT" else {"ep_size": ep_size})}
    return build_model(f"{system}-S/2", **fields, class_dropout_prob=0.0)


@functools.cache
def initial_weights(system: str, routing: str) -> dict[str, torch.Tensor]:
    """The same whatever the topology, with nothing at zero, and exact in bfloat16. ``routing``: see `REFUSED`."""
    rng = torch.Generator().manual_seed(7)
    refused = list(REFUSED[routing])
    weights = small_model(system).state_dict()
    for name, value in weights.items():
        if name != "pos_embed":
            value.copy_(0.1 * torch.randn(value.shape, generator=rng))
        if name.endswith("gate.wg.bias"):
            value[refused] = -50.0
        if system == "Diff-MoE" and EXPERT.search(name):
            value *= 2  # alike experts give the gates differences of nearly equal numbers, which float32 cannot tell
        if (
            system == "Diff-MoE"
            and refused
            and name.startswith("blocks.")
            and name.endswith(".adaLN_modulation.1.bias")
        ):
            value[3 * WIDTH : 4 * WIDTH] = 0.3  # shift of the tokens: they all point one way
        if system == "Diff-MoE" and name.endswith("gate.wg.weight"):
            value[refused] = -1.0
        value.copy_(value.bfloat16())
    return weights


def batches(system: str, routing: str) -> list[tuple[torch.Tensor, ...]]:
    """x, t, y and target of each step. Whole denoisers own their timesteps: there these decide who is idle."""
    rng, side = torch.Generator().manual_seed(DATA_SEEDS.get((system, routing), 11)), small_model(system).input_size
    of_steps = [
        (
            torch.randn(GLOBAL_BATCH, 4, side, side, generator=rng),
            torch.randint(0, 1000, (GLOBAL_BATCH,), generator=rng),
            torch.randint(0, 3, (GLOBAL_BATCH,), generator=rng),
            torch.randn(GLOBAL_BATCH, 8, side, side, generator=rng),
        )
        for _ in range(STEPS)
    ]
    if system == "Multi-Expert-DiT":
        for _, t, _, _ in of_steps:
            t -= 500 * torch.isin(t // 250, torch.tensor(REFUSED[routing]))
    return of_steps


class Loss:
    """Squared error, and with timestep gates the diffusion prior's, matched at the start of each step."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.step = model, 0
        if has_prior := hasattr(model, "task_expert_map"):
            self.prior = prior_mask(len(model.blocks), model.num_experts, model.top_k)
        self.has_prior = has_prior

    def start_step(self) -> None:
        if self.has_prior:
            self.assignment = match_columns(self.model.task_expert_map(), self.prior, 0, self.step)
        self.step += 1

    def __call__(self, engine, x, t, y, target) -> torch.Tensor:
        if not self.has_prior:
            return (engine(x, t, y).float() - target).square().mean()
        out, routing = engine(x, t, y, return_routing=True)
        prior = diffusion_prior_loss(routing.probs, t, self.prior, self.assignment, len(self.model.blocks))
        return (out.float() - target).square().mean() + prior


def assert_decided(block: torch.nn.Module, _, output: tuple[torch.Tensor, ...]) -> None:
    """No token is between two experts."""
    probs = output[1].sort(dim=1, descending=True).values
    top_k = FIELDS["Diff-MoE"]["top_k"]
    assert (probs[:, top_k - 1] - probs[:, top_k]).min() > MARGIN


@functools.cache
def plain(system: str, routing: str, clip: float) -> dict[str, torch.Tensor]:
    """What everything is compared with: one process, PyTorch alone, the whole batch at once, in float64."""
    model = small_model(system)
    model.load_state_dict(initial_weights(system, routing))
    model.double()
    if system == "Diff-MoE":
        for block in model.blocks:
            block.register_forward_hook(assert_decided)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss_of = Loss(model)
    results = {}
    for step, batch in enumerate(batches(system, routing)):
        loss_of.start_step()
        model.zero_grad()
        loss = loss_of(model, *batch)
        loss.backward()
        if step == 0:
            results |= {f"grad/{name}": p.grad.clone() for name, p in trained.items()}
            busy = {int(found[1]) for name, p in trained.items() if (found := EXPERT.search(name)) and p.grad.any()}
            assert busy == set(range(4)) - set(REFUSED[routing])
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip or float("inf"))
        assert norm > 2 * clip, "clipping must bite"
        results |= {f"loss/{step}": loss.detach(), f"norm/{step}": norm}
        with torch.no_grad():
            for p in trained.values():
                p -= LR * p.grad
    return results | {f"param/{name}": p.detach().clone() for name, p in trained.items()}


def run(how: dict, ep_size: int, processes) -> dict[str, torch.Tensor]:
    model = small_model(how["system"], ep_size)
    load_global_state_dict(model, initial_weights(how["system"], how["routing"]))
    model.activation_checkpointing = how["activation_checkpointing"]
    for module in model.modules():
        if hasattr(module, "dispatch"):
            module.dispatch = how["dispatch"]
    accumulation, in_bf16 = how["accumulation"], how["dtype"] == "bf16"
    micro_batch = GLOBAL_BATCH // (processes.world_size * accumulation)
    config = json.loads((ROOT / f"ds_configs/{SHIPPED[how['stage'], how['dtype']]}.json").read_text())
    config["zero_optimization"] |= {"stage": how["stage"], "reduce_bucket_size": 3000, "allgather_bucket_size": 3000}
    engine = build_engine(
        model,
        {
            **config,
            "train_batch_size": GLOBAL_BATCH,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": how["clip"],
            "optimizer": {"type": "SGD", "params": {"lr": LR}},
            "zero_allow_untested_optimizer": True,
        },
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss_of = Loss(model)
    results = {}
    engine.train()
    for step, batch in enumerate(batches(how["system"], how["routing"])):
        loss_of.start_step()
        loss_of_step = torch.zeros(())
        for micro_step in range(accumulation):
            at = (micro_step * processes.world_size + processes.rank) * micro_batch
            loss = loss_of(engine, *(part[at : at + micro_batch] for part in batch))
            engine.backward(loss)
            loss_of_step += loss.detach() / (accumulation * processes.world_size)
            if step == 0 and micro_step == accumulation - 1:
                gradients = {name: safe_get_full_grad(p).float() for name, p in trained.items()}
                results |= {f"grad/{name}": g.clone() for name, g in gather_experts(model, gradients).items()}
            engine.step()
        torch.distributed.all_reduce(loss_of_step)
        results[f"loss/{step}"] = loss_of_step
        if (norm := grad_norm(engine)) is not None:
            results[f"norm/{step}"] = torch.tensor(norm)
    masters = {name: safe_get_full_fp32_param(p) if in_bf16 else p.detach() for name, p in trained.items()}
    results |= {f"param/{name}": value.clone() for name, value in gather_experts(model, masters).items()}
    engine.destroy()
    return results


def errors(how: dict, results: dict[str, torch.Tensor]) -> dict[str, float]:
    """By name. In float32: of the entry that is furthest off, relative to the largest of the tensor.

    In bfloat16, where single entries are a matter of luck: in the 2-norm, of all experts, of all gates and of the rest,
    of their gradients and of how far the parameters went.
    """
    expected = plain(how["system"], how["routing"], how["clip"])
    assert set(results) | {f"norm/{step}" for step in range(STEPS)} == set(expected)
    results = {name: value.double() for name, value in results.items()}
    if how["dtype"] == "float32":
        return {
            name: ((value - expected[name]).abs().max() / expected[name].abs().max().clamp(min=ZERO)).item()
            for name, value in results.items()
        }
    start = {f"param/{name}": value for name, value in initial_weights(how["system"], how["routing"]).items()}
    squares = {}
    for name, value in results.items():
        went = expected[name] - start.get(name, 0)
        of_part = squares.setdefault(part_of(name), [0.0, 0.0])
        of_part[0] += (value - expected[name]).square().sum().item()
        of_part[1] += went.square().sum().item()
    return {part: (off / size) ** 0.5 for part, (off, size) in squares.items()}


def part_of(name: str) -> str:
    kind, _, parameter = name.partition("/")
    if kind in ("loss", "norm"):
        return name
    part = "experts" if EXPERT.search(parameter) else "gates" if ".gate.wg" in parameter else "rest"
    return f"{kind}/{part}"


def main():
    ep_size, wanted, path = int(sys.argv[-3]), Path(sys.argv[-2]), Path(sys.argv[-1])
    processes = init_processes()
    found = []
    for how in json.loads(wanted.read_text()):
        results = run(how, ep_size, processes)
        if processes.is_first:
            found.append(errors(how, results))
    if processes.is_first:
        path.write_text(json.dumps(found))
    leave()


main()
