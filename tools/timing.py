"""How the benchmarks of speed measure: candidates in turn, medians, the roof of the device, bars met or missed.

The device is the GPU where there is one, unless DS_ACCELERATOR=cpu; of a CPU, ``--threads`` threads are used.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from switchdit.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GPU_HEAD_START = 2_000_000  # cycles, about a millisecond: time to queue what is then measured without the host's part


class Timed(NamedTuple):
    """Of one candidate: seconds of each round, and on a GPU the most memory beyond what stood before a call."""

    seconds: list[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Timed) -> float:
        """The median over the rounds of this one's time divided by the other's: what both suffered cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def in_turn(
    candidates: dict[str, Callable[[], object]],
    device: torch.device,
    warm_up: int,
    repeats: int,
    hide_launches: bool = False,
) -> dict[str, Timed]:
    """Call all candidates in turn, ``repeats`` rounds after ``warm_up`` that are not counted.

    Each round begins with another candidate, so that none always comes after the same.

    Args:
        hide_launches: on a GPU, leave out the host's time to queue a call; a call that waits for the device shows it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: dict[str, int] = dict.fromkeys(candidates, 0)
    names = list(candidates)
    for r in range(warm_up + repeats):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            took, peak = _timed(candidates[name], device, hide_launches)
            if r >= warm_up:
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
    on_gpu = device.type == "cuda"
    return {name: Timed(seconds[name], peaks[name] if on_gpu else None) for name in names}


def _timed(call: Callable[[], object], device: torch.device, hide_launches: bool) -> tuple[float, int]:
    """Seconds and peak bytes of one call."""
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started, 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hide_launches:
        torch.cuda._sleep(GPU_HEAD_START)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated(device) - before


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    timed = in_turn({"product": lambda: torch.mm(a, b, out=out)}, device, 2, 10, hide_launches=True)["product"]
    return 2 * size**3 / min(timed.seconds)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy, the best of ten."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = in_turn({"copy": lambda: target.copy_(source)}, device, 2, 10, hide_launches=True)["copy"]
    return 2 * source.numel() / min(timed.seconds)


def roof_of(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    return {"matmul_flops_per_second": matmul_rate(device, dtype), "copy_bytes_per_second": copy_bandwidth(device)}


def judged(ratio: float, limit: float | None) -> dict[str, Any] | None:
    """A bar and whether it is met, ``{"limit": 0.46, "met": True}``; None where there is none."""
    return None if limit is None else {"limit": limit, "met": ratio <= limit}


def shown_bar(bar: dict[str, Any] | None) -> str:
    return "" if bar is None else f"<= {bar['limit']:.2f} {'met' if bar['met'] else 'missed'}"


def add_common_options(parser: argparse.ArgumentParser, batch_size: int, repeats: int) -> None:
    parser.add_argument("--batch_size", type=int, default=batch_size, help=f"samples (default: {batch_size})")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds that count (default: {repeats})")
    parser.add_argument("--warm_up", type=int, default=3, help="rounds before them (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")


def check_common_options(args: argparse.Namespace) -> None:
    """Raise `UserError` for numbers below 1; set the number of threads, and on a GPU the precision of float32."""
    for name in ("batch_size", "repeats", "warm_up", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    torch.set_num_threads(args.threads)
    if measured_device().type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, with which the baselines were published


def measured_device() -> torch.device:
    use_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda" if use_gpu else "cpu")


def has_bars(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether this is the setting that the bars are stated for: two threads of a CPU, 8 samples in float32."""
    return (device.type, args.threads, args.batch_size, args.dtype) == ("cpu", 2, 8, "float32")


def surroundings(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the measurement depends on; taken before it, for the sake of the load."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "device": name,
        "threads": args.threads,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
    }


def shown_surroundings(of: dict[str, Any]) -> str:
    return (
        f"{of['device']}, {of['threads']} threads, load {of['load']} before; torch {of['torch']}; {of['dtype']}, "
        f"batch_size {of['batch_size']}; medians of {of['repeats']} rounds, all candidates in turn"
    )


def shown_roof(roof: dict[str, float], dtype: str) -> str:
    return (
        f"measured: {roof['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s of a large {dtype} product, "
        f"{roof['copy_bytes_per_second'] / 1e9:,.1f} GB/s read and written by a large copy"
    )


def megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f}"


def short(number: float) -> str:
    """Three digits, without an exponent where one can do without."""
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
