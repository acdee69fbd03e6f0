"""Training runs one after the other whose checkpoints are looked at to the last bit: resharding.py RUNS.json

RUNS.json: [{"world_size": 2, "argv": ["--config", ...], "output": "file", "group_size": null}, ...]; the last line has
their exit codes. "group_size" limits the parameters in a group of the optimizer's, as 178 million do in large models.

- No weight begins with zeros: adaLN-Zero would keep what goes wrong in a block from the loss.
- Every resumed run goes through load_resharded, also where DeepSpeed could load, and saves again at once, under
  OUTPUT.again; OUTPUT.engine.json has the layout of its partitions and its optimizer's identity.
- DeepSpeed's compiled Adams work, with their arithmetic in PyTorch.
"""

import json
import os
import sys
from functools import wraps
from pathlib import Path
from zlib import crc32

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

import torch
from forked_run import fork_rank, prepare
from launching import free_port


@torch.no_grad()
def adam_step(weights, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    weights.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    weights.addcdiv_(exp_avg, scale, value=-lr / (1 - beta1**step))


class AdamKernels:
    """In place of what FusedAdam and DeepSpeedCPUAdam compile, and of the builder that compiles it."""

    multi_tensor_adam = None

    def load(self):
        return self

    def create_adam(self, *_):
        pass

    def destroy_adam(self, *_):
        pass

    def adam_update(self, _, step, lr, beta1, beta2, eps, weight_decay, correct, weights, gradient, *moments):
        adam_step(weights, gradient, *moments, step, lr, beta1, beta2, eps, weight_decay)


def apply_to_lists(_, flag, lists, lr, beta1, beta2, eps, step, decoupled, correct, weight_decay):
    for gradient, weights, *moments in zip(*lists, strict=True):
        adam_step(weights, gradient, *moments, step, lr, beta1, beta2, eps, weight_decay)


def plant(group_size: int | None, output: Path) -> None:
    import deepspeed.moe.utils
    import deepspeed.ops.adam.cpu_adam
    import deepspeed.ops.adam.fused_adam

    from switchdit.engine import checkpoint, engine, resharding
    from switchdit.engine.global_state import global_name_of

    deepspeed.ops.adam.cpu_adam.CPUAdamBuilder = deepspeed.ops.adam.fused_adam.FusedAdamBuilder = AdamKernels
    deepspeed.ops.adam.fused_adam.multi_tensor_applier = apply_to_lists
    if group_size:
        deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer.__defaults__ = (group_size,)
    build, load, topology = engine.build_engine, checkpoint.load_checkpoint, checkpoint.topology

    @wraps(build)
    def build_lively(model, *more):
        global_name = global_name_of(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not parameter.any():
                    generator = torch.Generator().manual_seed(crc32(global_name(name).encode()))
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        built = build(model, *more)
        about = {"layout": resharding.layout_digest(built), "optimizer": resharding.optimizer_identity(built)}
        if os.environ["RANK"] == "0":
            Path(f"{output}.engine.json").write_text(json.dumps(about))
        return built

    @wraps(load)
    def load_and_save_again(path, built, ema, about):
        checkpoint.topology = lambda _: {}  # unlike any
        result = load(path, built, ema, about)
        checkpoint.topology = topology
        again = Path(f"{output}.again")
        again.mkdir(exist_ok=True)
        checkpoints = checkpoint.Checkpoints(again, built, ema)
        checkpoints.save(result[0], about, {})
        checkpoints.finish()
        return result

    engine.build_engine, checkpoint.load_checkpoint = build_lively, load_and_save_again


prepare()
codes = []
for run in json.loads(Path(sys.argv[1]).read_text()):
    ranks, port, output = range(run["world_size"]), free_port(), Path(run["output"])
    outputs = [Path(f"{output}.{rank}") for rank in ranks]
    before = [run["group_size"], output]
    pids = [
        fork_rank(rank, len(ranks), port, run["argv"], outputs[rank], before=lambda before=before: plant(*before))
        for rank in ranks
    ]
    codes.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    output.write_text("".join(part.read_text(errors="replace") for part in outputs))
print(json.dumps(codes))
