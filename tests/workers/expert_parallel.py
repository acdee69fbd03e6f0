"""Train one small model in several ways and write down what came out: expert_parallel.py EP_SIZE OUT.npz

Every process sees the same global batch and takes its share of it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from switchdit import build_model
from switchdit.engine.ema import Ema
from switchdit.engine.engine import build_engine, grad_norm, init_processes, leave
from switchdit.engine.global_state import gather_experts, global_state_dict, load_global_state_dict, local_view
from switchdit.moe.diffusion_prior import diffusion_prior_loss, match_columns, prior_mask

FIELDS = {
    "input_size": 8,
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "num_classes": 3,
    "num_experts": 4,
    "top_k": 2,
}
GLOBAL_BATCH, STEPS = 16, 4

#        name            stage  optimizer  clip  accumulation  gates
CASES = {
    "adam": (2, "AdamW", 0.0, 1, "mixed"),
    "idle": (2, "AdamW", 0.0, 1, "idle"),
    "same": (2, "AdamW", 0.0, 1, "same"),
    "clip": (2, "SGD", 0.05, 2, "mixed"),
    "zero1": (1, "SGD", 0.05, 1, "idle"),
    "zero0": (0, "SGD", 0.0, 2, "mixed"),
    "noisy": (2, "AdamW", 0.0, 1, "mixed"),
}
MODEL = {"noisy": {"gate": "noisy", "integration": "multiply_skip"}}  # fields of a case's model beyond FIELDS


def initial_weights(gates: str, fields: dict) -> dict[str, torch.Tensor]:
    """The same whatever the topology, with nothing at zero; ``gates`` steers who is chosen."""
    rng = torch.Generator().manual_seed(7)
    weights = build_model("Switch-DiT-S/2", **fields).state_dict()
    for name, value in weights.items():
        if name != "pos_embed":
            value.copy_(0.1 * torch.randn(value.shape, generator=rng))
        if name.endswith("gate.wg.weight") and gates == "same":
            value.zero_()
        if name.endswith("gate.wg.bias"):
            if gates == "idle":
                value[2] = -50.0
            if gates == "same":
                value.copy_(torch.tensor([0.0, 1.0, 0.0, 2.0]))  # experts 1 and 3 always
    return weights


def run(case: str, ep_size: int, processes) -> dict[str, np.ndarray]:
    stage, optimizer, clip, accumulation, gates = CASES[case]
    fields = {**FIELDS, **MODEL.get(case, {})}
    model = build_model("Switch-DiT-S/2", **fields, ep_size=ep_size)
    load_global_state_dict(model, initial_weights(gates, fields))
    model.class_dropout_prob = 0.0
    micro_batch = GLOBAL_BATCH // (processes.world_size * accumulation)
    params = {"lr": 1e-4, "weight_decay": 0.0, "torch_adam": True} if optimizer == "AdamW" else {"lr": 0.3}
    engine = build_engine(
        model,
        {
            "train_batch_size": GLOBAL_BATCH,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "optimizer": {"type": optimizer, "params": params},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000, "allgather_bucket_size": 3000},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    ema = Ema(engine, 0.5)
    prior = prior_mask(len(model.blocks), model.num_experts, model.top_k)
    rng = torch.Generator().manual_seed(11)
    losses, norms, gradients = [], [], {}
    engine.train()
    for step in range(STEPS):
        x = torch.randn(GLOBAL_BATCH, 4, 8, 8, generator=rng)
        target = torch.randn(GLOBAL_BATCH, 8, 8, 8, generator=rng)
        t = torch.randint(0, 1000, (GLOBAL_BATCH,), generator=rng)
        y = torch.randint(0, 3, (GLOBAL_BATCH,), generator=rng)
        noise = torch.randn(GLOBAL_BATCH, model.num_gates, generator=rng) if model.gate == "noisy" else None
        assignment = match_columns(model.task_expert_map(), prior, 0, step)
        loss_of_step = 0.0
        for micro_step in range(accumulation):
            at = (micro_step * processes.world_size + processes.rank) * micro_batch
            mine = slice(at, at + micro_batch)
            options = {} if noise is None else {"gate_noise": noise[mine]}
            out, routing = engine(x[mine], t[mine], y[mine], return_routing=True, **options)
            aux = diffusion_prior_loss(routing.probs, t[mine], prior, assignment, len(model.blocks))
            loss = (out - target[mine]).square().mean() + aux
            engine.backward(loss)
            loss_of_step += loss.item() / accumulation
            if step == 0 and micro_step == accumulation - 1 and stage > 0:
                local = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
                gradients = {f"{case}/grad/{n}": g.numpy() for n, g in gather_experts(model, local).items()}
            engine.step()
        ema.update()
        mean = torch.tensor(loss_of_step)
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / processes.world_size)
        norms.append(grad_norm(engine) or 0.0)
    out = {f"{case}/losses": np.array(losses), f"{case}/norms": np.array(norms), **gradients}
    out |= {f"{case}/param/{n}": v.numpy() for n, v in global_state_dict(model).items()}
    out |= {f"{case}/ema/{n}": v.numpy() for n, v in ema.state_dict().items()}
    engine.destroy()
    return out


def check_initialisation(ep_size: int) -> None:
    """A seed gives the same experts on whatever rank they live."""
    fields = {**FIELDS, **MODEL["noisy"]}
    torch.manual_seed(3)
    whole = build_model("Switch-DiT-S/2", **fields).state_dict()
    torch.manual_seed(3)
    model = build_model("Switch-DiT-S/2", **fields, ep_size=ep_size)
    mine = local_view(model, whole)
    for name, value in model.state_dict().items():
        assert torch.equal(value, mine[name]), name


def main():
    ep_size, path = int(sys.argv[-2]), sys.argv[-1]
    processes = init_processes()
    check_initialisation(ep_size)
    results = {}
    for case in CASES:
        results |= run(case, ep_size, processes)
    if processes.is_first:
        np.savez(path, **results)
    leave()


main()
