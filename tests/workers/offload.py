"""Train a small model with and without optimizer state in host memory: offload.py OUT.npz

Writes losses, gradient norms and averages of both, by case.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from switchdit import build_model
from switchdit.engine.ema import Ema
from switchdit.engine.engine import build_engine, grad_norm, init_processes, leave

FIELDS = {"input_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 3, "num_experts": 4}
STEPS, ACCUMULATION, MICRO_BATCH = 3, 2, 2

#        bf16   clip
CASES = {"float32": (False, 0.0), "clipped": (False, 0.05), "bf16": (True, 0.0)}


def run(bf16: bool, clip: float, offload: bool, processes) -> dict[str, np.ndarray]:
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01, "torch_adam": True}},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if bf16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    torch.manual_seed(0)
    model = build_model("Switch-DiT-S/2", **FIELDS, ep_size=2)
    model.class_dropout_prob = 0.0
    engine = build_engine(model, config)
    ema = Ema(engine, 0.5)
    rng = torch.Generator().manual_seed(processes.rank)
    losses, norms = [], []
    engine.train()
    for _ in range(STEPS):
        for _ in range(ACCUMULATION):
            x = torch.randn(MICRO_BATCH, 4, 8, 8, generator=rng)
            target = torch.randn(MICRO_BATCH, 8, 8, 8, generator=rng)
            t = torch.randint(0, 1000, (MICRO_BATCH,), generator=rng)
            loss = (engine(x, t, torch.tensor([0, 2])).float() - target).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(grad_norm(engine))
        ema.update()
    averaged = {f"ema/{name}": value.numpy() for name, value in ema.state_dict().items()}
    engine.destroy()
    return {"losses": np.array(losses), "norms": np.array(norms), **averaged}


def main() -> None:
    processes = init_processes()
    out = {}
    for case, settings in CASES.items():
        for place, offload in (("device", False), ("host", True)):
            for name, value in run(*settings, offload, processes).items():
                out[f"{case}/{place}/{name}"] = value
    if processes.is_first:
        np.savez(sys.argv[-1], **out)
    leave()


main()
