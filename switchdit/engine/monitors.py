"""What a run tells about itself: TensorBoard, ``log.jsonl`` and a line on the terminal. The only writer of TensorBoard.

Scalars: loss/{total,mse,vlb,prior,balance}, loss_by_timestep/NNN-NNN (mse), train/{lr,grad_norm,images_per_second}.
Of experts that tokens choose: routing/{most,least}_used_expert, relative to an equal share.
Images: samples/ema (one row per class), routing/task_expert_map (gates left, matched prior right; paper, Fig. 6).
``faults.jsonl`` has a line for each step that was skipped or whose loss was a spike, with the samples it saw.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from switchdit.engine.engine import Processes
from switchdit.engine.objective import TERMS
from switchdit.files import DISK_FULL, append_line, atomic_write
from switchdit.progress import say

NUM_BINS = 10


class Monitor:
    """Sums losses on the device and, at logging steps alone, reduces them over all processes and writes them.

    Args:
        run_dir: gets ``tensorboard/``, ``log.jsonl`` and ``faults.jsonl``, written by the first process.
        log_every: steps from one `log` to the next.
        first_step: steps done before; whatever an interrupted run logged beyond is dropped.
    """

    def __init__(
        self,
        run_dir: Path,
        processes: Processes,
        num_timesteps: int,
        global_batch: int,
        log_every: int,
        first_step: int,
    ):
        self.processes, self.num_timesteps, self.global_batch = processes, num_timesteps, global_batch
        self.writer, self.log_path, self.faults_path = None, run_dir / "log.jsonl", run_dir / "faults.jsonl"
        if processes.is_first:
            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
            threading.excepthook = _quiet_on_full_disk
            for path in (self.log_path, self.faults_path):
                if path.exists():
                    _cut_log(path, first_step)
        # per term: sum and count; per bin of timesteps: sum and count of the squared error; per step: sum and count
        # of the total loss. Where a loss is not finite nothing is added.
        sizes = (len(TERMS) + 1, 2 * NUM_BINS, 2 * log_every)
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64, device=processes.device)
        self.terms, by_bin, by_step = self.sums.split(sizes)
        self.by_bin, self.by_step = by_bin.view(2, NUM_BINS), by_step.view(log_every, 2)
        self._restart(first_step)

    def add(self, step: int, terms: dict[str, Tensor], mse: Tensor, t: Tensor) -> None:
        """A micro-batch of the ``step``-th step: scalar loss terms, and (n,) squared errors at (n,) timesteps.

        No host synchronisation.
        """
        values = torch.stack([terms[name].detach().double() for name in TERMS] + [self.terms.new_ones(())])
        values = torch.where(values.isfinite().all(), values, 0.0)
        self.terms += values
        self.by_step[(step - 1) % len(self.by_step)] += values[:: len(TERMS)]  # first and last
        errors = mse.detach().double()
        bins, finite = t * NUM_BINS // self.num_timesteps, errors.isfinite()
        self.by_bin[0].index_add_(0, bins, torch.where(finite, errors, 0.0))
        self.by_bin[1].index_add_(0, bins, finite.double())

    def state(self) -> list[list[float]]:
        """The sums since the last log of every process, for a checkpoint; collective."""
        everyone = [torch.empty_like(self.sums) for _ in range(self.processes.world_size)]
        dist.all_gather(everyone, self.sums)
        return torch.stack(everyone).tolist()

    def restore(self, state: list[list[float]]) -> None:
        """Go on with the sums of `state`, so that a resumed run logs what the uninterrupted one does.

        With another number of processes the first goes on with the sums of all.
        """
        sums = torch.tensor(state, dtype=torch.float64)
        if sums.shape[1] != len(self.sums):  # logged at other steps than before
            return
        if len(state) == self.processes.world_size:
            self.sums.copy_(sums[self.processes.rank])
        elif self.processes.is_first:
            self.sums.copy_(sums.sum(0))

    def log(self, step: int, num_steps: int, lr: float, grad_norm: float | None) -> dict[int, float]:
        """Write the means since the last call over all processes at ``step``; collective.

        Returns:
            The mean loss of each step since, without those that had none.
        """
        dist.all_reduce(self.sums)
        *terms, count = self.terms.tolist()
        rate = (step - self.last_step) * self.global_batch / (time.perf_counter() - self.last_time)
        scalars = {f"loss/{name}": value / count for name, value in zip(TERMS, terms, strict=True) if count}
        scalars["train/lr"] = lr
        if grad_norm is not None:
            scalars["train/grad_norm"] = grad_norm
        scalars["train/images_per_second"] = rate
        for i, (total, samples) in enumerate(self.by_bin.T.tolist()):
            if samples:
                low, high = i * self.num_timesteps // NUM_BINS, (i + 1) * self.num_timesteps // NUM_BINS - 1
                scalars[f"loss_by_timestep/{low:03d}-{high:03d}"] = total / samples
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            append_line(self.log_path, json.dumps({"step": step, **scalars}))
            shown = [(name, scalars.get(f"loss/{name}")) for name in TERMS]
            losses = "  ".join(f"{name} {value:.4f}" for name, value in shown if value) or "not finite"
            norm = "" if grad_norm is None else f"  grad {grad_norm:.3f}"
            say(f"step {step}/{num_steps}  loss: {losses}{norm}  lr {lr:.2e}  {rate:.0f} images/s")
        by_step, length = self.by_step.tolist(), len(self.by_step)
        steps = ((s, *by_step[(s - 1) % length]) for s in range(max(0, step - length) + 1, step + 1))
        losses = {s: total / number for s, total, number in steps if number}
        self._restart(step)
        return losses

    def fault(self, step: int, what: str, samples: list[int], told_at: int, **values: float) -> None:
        """A line in ``faults.jsonl``: ``what`` happened at ``step``, and which images of the data set it saw.

        ``told_at``: the first step whose checkpoint knows of it; a run that is resumed before will tell it again.
        """
        if self.writer:
            self.writer.add_scalar(f"faults/{what}", 1, told_at)
            line = {"step": step, "what": what, **values, "told_at": told_at, "samples": samples}
            append_line(self.faults_path, json.dumps(line))

    def log_samples(self, step: int, images: np.ndarray) -> None:
        """A picture (H, W, 3) uint8."""
        if self.writer:
            self.writer.add_image("samples/ema", images, step, dataformats="HWC")

    def log_routing(self, step: int, task_expert_map: Tensor, prior: Tensor, assignment: Tensor) -> None:
        """The gates' map (T, C) beside its prior, columns brought into the prior's order."""
        if self.writer:
            picture = routing_picture(task_expert_map.cpu().numpy(), prior.cpu().numpy(), assignment.numpy())
            self.writer.add_image("routing/task_expert_map", picture, step, dataformats="HWC")

    def log_token_share(self, step: int, token_share: Tensor) -> None:
        """(B, E) share of this process's tokens at each expert: how far the extremes are from an equal share, 1."""
        if self.writer:
            relative = token_share / token_share.mean(1, keepdim=True)
            self.writer.add_scalar("routing/most_used_expert", relative.max().item(), step)
            self.writer.add_scalar("routing/least_used_expert", relative.min().item(), step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def _restart(self, step: int) -> None:
        self.sums.zero_()
        self.last_step, self.last_time = step, time.perf_counter()


def routing_picture(task_expert_map: np.ndarray, prior: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Two binary maps (T, C) side by side, timesteps downwards: (about 500, about 1000, 3) uint8, active is dark.

    Columns of the gates stand where `assignment` puts them in the prior, so that a perfect match looks the same.
    """
    ordered = np.empty_like(task_expert_map)
    ordered[:, assignment] = task_expert_map
    rows = np.linspace(0, len(prior) - 1, 500).round().astype(int)
    scale = max(1, 500 // prior.shape[1])
    panels = [np.repeat(panel[rows], scale, axis=1) for panel in (ordered, prior)]
    dark, light = np.array([28, 60, 120], dtype=np.uint8), np.array([235, 238, 243], dtype=np.uint8)
    left, right = (np.where(panel[..., None] > 0.5, dark, light) for panel in panels)
    gap = np.full((len(rows), 20, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _quiet_on_full_disk(problem: threading.ExceptHookArgs) -> None:
    """TensorBoard writes on a thread, whose full disk is also met by what is written next, and told in a line there."""
    if not (isinstance(problem.exc_value, OSError) and problem.exc_value.errno in DISK_FULL):
        threading.__excepthook__(problem)


def _cut_log(path: Path, first_step: int) -> None:
    """Keep the lines up to ``first_step``."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line)
            if line.endswith("\n") and entry.get("told_at", entry["step"]) <= first_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, AttributeError):  # cut off by an interruption, or not ours
            continue
    with atomic_write(path, "w") as file:
        file.writelines(kept)
