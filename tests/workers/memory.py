"""Train models for two steps each, and write down the bytes of what is alive: memory.py CASES.json OUT.json

A case: ``{"model": name, "fields": {...}, "deepspeed": {...}}``. Of each kind, the process that holds most counts.
"""

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[2])

import deepspeed
import torch
from torch import Tensor

from switchdit import build_model
from switchdit.engine.ema import Ema
from switchdit.engine.engine import build_engine, init_processes, leave


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of each storage that the tensors lie in."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}


def everything() -> dict[int, int]:
    gc.collect()
    return storages(o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter))


def buckets(engine) -> dict[int, int]:
    of_types = getattr(engine.optimizer, "ipg_buckets", {}).values()
    return storages(buffer for bucket in of_types for buffer in bucket.buffer)


def gradients(engine) -> dict[int, int]:
    """Of parameters, and what the optimizer keeps of reduced ones; not the buckets they pass through."""
    kept = [p.grad for p in engine.module.parameters()]
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in getattr(engine.optimizer, name, {}).values():
            kept.extend(group or [])
    return {at: size for at, size in storages(kept).items() if at not in buckets(engine)}


def measure(model: str, fields: dict, deepspeed_config: dict) -> dict[str, int]:
    """Bytes by kind on this process, at their largest; ``reduced``: of all gradients of a pass together."""
    before = everything().keys()
    module = build_model(model, **fields)
    engine = build_engine(module, deepspeed_config)
    ema = Ema(engine, 0.9)
    out = {}

    def note(kind: str, found: dict[int, int]) -> None:
        out[kind] = max(out.get(kind, 0), sum(found.values()))

    def noting(kind: str, call, look):
        def noted(*arguments, **options):
            note(kind, look(*arguments))
            return call(*arguments, **options)

        return noted

    if hasattr(engine.optimizer, "_release_ipg_buffers"):
        release = noting("buckets", engine.optimizer._release_ipg_buffers, lambda: buckets(engine))
        engine.optimizer._release_ipg_buffers = release
    engine.allreduce_gradients = noting("gradients", engine.allreduce_gradients, lambda *_: gradients(engine))

    def reduced(tensor, *_):
        out["reduced"] += tensor.nbytes
        return storages([tensor])

    all_reduce = noting("reducing", deepspeed.comm.all_reduce, reduced)
    engine.train()
    num_passes = 2 * deepspeed_config.get("gradient_accumulation_steps", 1)
    for number in range(num_passes):
        out["reduced"] = 0
        side = fields["input_size"]
        loss = engine(torch.randn(2, 4, side, side), torch.tensor([3, 700]), torch.tensor([1, 2])).float().mean()
        with mock.patch.object(deepspeed.comm, "all_reduce", all_reduce):
            engine.backward(loss)
        del loss
        if number == num_passes - 1:
            note("gradients_in_step", gradients(engine))
            note("all_in_step", {at: size for at, size in everything().items() if at not in before})
        engine.step()
    ema.update()
    masters = getattr(engine.optimizer, "single_partition_of_fp32_groups", [])
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state.values()
    note("parameters", storages(module.parameters()))
    note("masters", storages(masters))
    note("moments", storages(value for state in states for value in state.values() if torch.is_tensor(value)))
    note("ema", storages(ema.shadow))
    engine.destroy()
    return out


def main() -> None:
    processes = init_processes()
    results = []
    for case in json.loads(Path(sys.argv[-2]).read_text()):
        everyone = [None] * processes.world_size
        torch.distributed.all_gather_object(everyone, measure(case["model"], case["fields"], case["deepspeed"]))
        results.append({kind: max(of_rank.get(kind, 0) for of_rank in everyone) for kind in everyone[0]})
    if processes.is_first:
        Path(sys.argv[-1]).write_text(json.dumps(results))
    leave()


main()
