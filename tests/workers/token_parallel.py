"""Train one small Diff-MoE in several ways and write down what came out: token_parallel.py EP_SIZE OUT.npz

Every process sees the same global batch and takes its share of it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from switchdit import build_model
from switchdit.engine.checkpoint_writer import tensor_file, write_hashed
from switchdit.engine.engine import build_engine, init_processes, leave
from switchdit.engine.global_state import gather_experts, global_state_dict, load_global_state_dict

FIELDS = {
    "input_size": 8,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 1.0,
    "num_classes": 3,
    "num_experts": 4,
    "top_k": 2,
}
GLOBAL_BATCH, STEPS = 16, 3

#        name       optimizer  load balance
CASES = {
    "adam": ("AdamW", 0.0),
    "balance": ("SGD", 0.01),  # depends on the micro-batch, hence on the number of processes
}
UNEVEN = {1: [16], 2: [0, 16], 4: [3, 0, 12, 1]}  # samples of each process, in evaluation


def initial_weights() -> dict[str, torch.Tensor]:
    """The same whatever the topology, with nothing at zero."""
    rng = torch.Generator().manual_seed(7)
    weights = build_model("Diff-MoE-S/2", **FIELDS).state_dict()
    for name, value in weights.items():
        if name != "pos_embed":
            value.copy_(0.1 * torch.randn(value.shape, generator=rng))
    return weights


def engine_of(model: torch.nn.Module, optimizer: str, micro_batch: int):
    params = {"lr": 1e-4, "weight_decay": 0.0, "torch_adam": True} if optimizer == "AdamW" else {"lr": 0.3}
    return build_engine(
        model,
        {
            "train_batch_size": GLOBAL_BATCH,
            "train_micro_batch_size_per_gpu": micro_batch,
            "optimizer": {"type": optimizer, "params": params},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000, "allgather_bucket_size": 3000},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )


def batch(rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    x, target = (torch.randn(GLOBAL_BATCH, c, 8, 8, generator=rng) for c in (4, 8))
    t = torch.randint(0, 1000, (GLOBAL_BATCH,), generator=rng)
    y = torch.randint(0, 3, (GLOBAL_BATCH,), generator=rng)
    return x, t, y, target


def run(case: str, ep_size: int, processes, folder: Path) -> dict[str, np.ndarray]:
    optimizer, weight = CASES[case]
    model = build_model("Diff-MoE-S/2", **FIELDS, ep_size=ep_size)
    load_global_state_dict(model, initial_weights())
    model.class_dropout_prob = 0.0
    micro_batch = GLOBAL_BATCH // processes.world_size
    mine = slice(processes.rank * micro_batch, (processes.rank + 1) * micro_batch)
    engine = engine_of(model, optimizer, micro_batch)
    rng = torch.Generator().manual_seed(11)
    losses, gradients = [], {}
    engine.train()
    for step in range(STEPS):
        x, t, y, target = (part[mine] for part in batch(rng))
        out, routing = engine(x, t, y, return_routing=True)
        mse = (out - target).square().mean()
        engine.backward(mse + weight * routing.load_balance.sum())
        if step == 0:
            local = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
            gradients = {f"{case}/grad/{n}": g.numpy() for n, g in gather_experts(model, local).items()}
        engine.step()
        mean = mse.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / processes.world_size)
    out = {f"{case}/losses": np.array(losses), **gradients}
    trained = {n: v.clone() for n, v in global_state_dict(model).items()}
    out |= {f"{case}/param/{n}": v.numpy() for n, v in trained.items()}
    if case == "adam":
        out |= uneven_evaluation(model.eval(), processes)
        out["saved/differs"] = np.array(differs_after_saving(engine, trained, ep_size, micro_batch, folder))
    engine.destroy()
    return out


@torch.no_grad()
def uneven_evaluation(model: torch.nn.Module, processes) -> dict[str, np.ndarray]:
    x, t, y, _ = batch(torch.Generator().manual_seed(13))
    shares = UNEVEN[processes.world_size]
    out = model(*(part.split(shares)[processes.rank] for part in (x, t, y)))
    everyone = [None] * processes.world_size
    torch.distributed.all_gather_object(everyone, out.numpy())
    return {"uneven/out": np.concatenate(everyone)}


def differs_after_saving(engine, trained, ep_size: int, micro_batch: int, folder: Path) -> int:
    """How many tensors are others in a new model that loads what this one has saved."""
    engine.save_checkpoint(str(folder), tag="saved", save_latest=False)
    for name, state in engine.checkpoint_engine.take().items():
        write_hashed(folder / "saved" / name, tensor_file(state))
    torch.distributed.barrier()
    model = build_model("Diff-MoE-S/2", **FIELDS, ep_size=ep_size)
    again = engine_of(model, "AdamW", micro_batch)
    again.load_checkpoint(str(folder), tag="saved", load_module_strict=True)
    loaded = global_state_dict(model)
    again.destroy()
    return sum(not torch.equal(loaded[name], value) for name, value in trained.items())


def main():
    ep_size, path = int(sys.argv[-2]), Path(sys.argv[-1])
    processes = init_processes()
    torch.manual_seed(3)
    built = build_model("Diff-MoE-S/2", **FIELDS, ep_size=ep_size)
    # expert-parallel groups are made by an engine
    engine_of(built, "SGD", GLOBAL_BATCH // processes.world_size).destroy()
    results = {f"initial/{n}": v.numpy().copy() for n, v in global_state_dict(built).items()}
    results["initial/next_random_number"] = torch.rand(1).numpy()
    for case in CASES:
        results |= run(case, ep_size, processes, path.with_suffix(".checkpoint"))
    if processes.is_first:
        np.savez(path, **results)
    leave()


main()
