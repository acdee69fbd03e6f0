"""The kinds of faults of the campaign: what is done to a run, and what is demanded of it then."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from fault_points import FILLER, POINTS, RENAMING
from fault_trials import FINAL, Skipped, Trial, last_line, require

from switchdit.engine.checkpoint import DOCUMENTATION
from switchdit.errors import EXIT_REQUEUE


def killed(*points: str) -> Callable[[Trial], str]:
    """One rank or all of them end by SIGKILL."""

    def run(trial: Trial) -> str:
        fault = trial.choose_fault(points, to_all=trial.rng.random() < 0.5)
        ended = trial.start(fault, resume=False)
        complete = (trial.checkpoints / FINAL / "state.json").is_file()
        trial.happened = f"{'all killed' if fault.to_all else 'killed'}: {ended.codes} {''.join(ended.errors[:1])}"
        if not fault.to_all:
            named = len(ended.errors) == 1 and f"rank {fault.rank} " in ended.errors[0]
            require(named or complete, f"no line of the others names rank {fault.rank}: {ended.errors}")
        for rank, code in enumerate(ended.codes if not trial.launched else []):
            if fault.to_all or rank == fault.rank:
                require(code == -9, f"rank {rank} ended with {code} instead of being killed")
            else:
                require(code == 1 or (code == 0 and complete), f"rank {rank} ended with {code}: {last_line(ended)}")
        require(any(ended.codes), "nobody was killed")
        trial.must_resume_to_the_same_end()
        return "equal"

    return run


def killed_twice(trial: Trial) -> str:
    """The resumed run, too, comes to an end before its time; unless it is over before it comes to that point."""
    for resume in (False, True):
        ended = trial.start(trial.choose_fault(POINTS, to_all=True), resume)
        trial.happened += f"{ended.codes} "
        require(all(ended.codes) or (resume and not any(ended.codes)), f"it ended with {ended.codes}")
    trial.must_resume_to_the_same_end()
    return "equal"


def terminated(trial: Trial) -> str:
    """What schedulers send, to one rank or to all: saved, and the code that requeues."""
    signal_name = trial.rng.choice(("SIGTERM", "SIGUSR1"))
    fault = trial.choose_fault(POINTS, action=signal_name, to_all=trial.rng.random() < 0.5)
    ended = trial.start(fault, resume=False)
    trial.happened = f"{signal_name} to {'all' if fault.to_all else 'one'}: {sorted(set(ended.codes))}"
    complete = (trial.checkpoints / FINAL / "state.json").is_file()
    require(set(ended.codes) == {0 if complete else EXIT_REQUEUE}, f"it ended with {ended.codes}: {last_line(ended)}")
    trial.must_resume_to_the_same_end()
    return "equal"


def bit_flipped(trial: Trial) -> str:
    """A weight changes in the memory of one rank: seen in the same step, before it can be saved."""
    fault = replace(trial.choose_fault(("forward",), action="flip"), when="before")
    trial.where = f"a weight of rank {fault.rank} in step {fault.count}"  # there is one block
    ended = trial.start(fault, resume=False)
    trial.happened = last_line(ended)
    require(set(ended.codes) == {1}, f"it ended with {ended.codes}")
    require(len(ended.errors) == 1, f"{len(ended.errors)} lines of errors")
    says = f"ranks 0, 1 do not agree in the parameters at step {fault.count} (blocks.0.attn.qkv.weight)"
    require(says in ended.errors[0], f"the line does not say '{says}'")
    trial.must_resume_to_the_same_end()
    return "equal"


def hurt(path: Path, how: str, rng: random.Random) -> str:
    """Damage a file; returns what was done. A flipped bit changes what the file means, not only its bytes."""
    size, meant = path.stat().st_size, meaning(path)
    if how == "deleted":
        path.unlink()
        return f"{path.name} deleted"
    at = rng.randrange(size)
    if how == "cut":
        os.truncate(path, at)
        return f"{path.name} cut at {at} of {size}"
    while meaning(path) == meant:  # the last digits of a number in JSON may be beyond its precision
        content = bytearray(path.read_bytes())
        content[at := rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return f"{path.name}, a bit of byte {at} flipped"


def meaning(path: Path) -> object:
    """What the file says: values of a JSON file that can be read, else its bytes."""
    content = path.read_bytes()
    with contextlib.suppress(ValueError):
        return json.loads(content) if path.suffix == ".json" else content
    return content


def newest_damaged(how: str | None = None, name: str = "*") -> Callable[[Trial], str]:
    """A file of the newest checkpoint is not what it was: the one before serves, and the user is told."""

    def run(trial: Trial) -> str:
        *_, before, newest = trial.copy_killed_run()
        path = trial.rng.choice(sorted(newest.glob(name)))
        trial.where = hurt(path, how or trial.rng.choice(("cut", "flipped", "deleted")), trial.rng)
        ended = trial.must_resume_to_the_same_end(int(before.name[5:]))
        told = [line for line in ended.output.splitlines() if newest.name in line and "damaged" in line]
        require(told, f"nothing was said about {newest.name}")
        trial.happened = told[0]
        return "equal"

    return run


def all_damaged(trial: Trial) -> str:
    hurts = []
    for checkpoint in trial.copy_killed_run():
        path = trial.rng.choice(sorted(checkpoint.iterdir()))
        hurts.append(hurt(path, trial.rng.choice(("cut", "flipped", "deleted")), trial.rng))
    trial.where = "; ".join(hurts)
    trial.must_stop_with_a_line("damaged")
    return "stopped"


def latest_damaged(trial: Trial) -> str:
    trial.copy_killed_run()
    content = trial.rng.choice((b"", b"\xff\x00" * 40, b"../../elsewhere\n", b"step_9999999\n", None))
    latest = trial.checkpoints / "latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    trial.where = "deleted" if content is None else f"it holds {content[:16]!r}"
    trial.must_resume_to_the_same_end()
    return "equal"


def shard_gone(trial: Trial) -> str:
    """Training stops with a line that names the shard; with the shard back in its place it goes on."""
    trial.copy_killed_run()
    trial.latents = trial.folder / "latents"
    shutil.copytree(trial.reference.latents, trial.latents)
    shard = trial.rng.choice(sorted(trial.latents.glob("shard_*.npy")))
    trial.where = hurt(shard, trial.rng.choice(("cut", "deleted")), trial.rng)
    trial.must_stop_with_a_line(re.escape(shard.name))
    shutil.copy(trial.reference.latents / shard.name, shard)
    trial.must_resume_to_the_same_end()
    return "stopped, then equal"


def disk_full(filled: bool) -> Callable[[Trial], str]:
    """The run's disk is too small from the start, or it fills up at some point; then there is space again."""

    def run(trial: Trial) -> str:
        bytes_of_one = sum(p.stat().st_blocks * 512 for p in (trial.reference.whole / "checkpoints" / FINAL).iterdir())
        size = 64 << 20 if filled else DOCUMENTATION + int(bytes_of_one * trial.rng.uniform(0.5, 2.7))
        fault = trial.choose_fault(POINTS, action="fill") if filled else None
        trial.where = trial.where if filled else f"a disk of {size:,} bytes, a checkpoint has {bytes_of_one:,}"
        with small_disk(trial.run_dir, size):
            ended = trial.start(fault, resume=False)
            trial.happened = last_line(ended)
            complete = (trial.checkpoints / FINAL / "state.json").is_file()
            if not (filled and complete):
                require({2} <= set(ended.codes) <= {1, 2}, f"it ended with {ended.codes}: {last_line(ended)}")
                require(re.search("no space left|needs .* left", trial.happened), "no line about space")
            (trial.run_dir / FILLER).unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,size=64m", str(trial.run_dir)], check=True)
            trial.must_resume_to_the_same_end()
        return "equal" if filled and complete else "stopped, then equal"

    return run


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise Skipped("a tmpfs cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


KINDS: dict[str, Callable[[Trial], str]] = {
    "killed in forward": killed("forward"),
    "killed in all-to-all": killed("all-to-all"),
    "killed in backward": killed("backward"),
    "killed in optimizer": killed("optimizer step"),
    "killed writing weights": killed("weights' file"),
    "killed writing average": killed("average's file"),
    "killed writing state": killed("state.json", "list of files", "run's file"),
    "killed at a rename": killed(*RENAMING),
    "killed at retention": killed("retention's deletion"),
    "killed twice": killed_twice,
    "terminated": terminated,
    "bit flipped in memory": bit_flipped,
    "newest truncated": newest_damaged("cut"),
    "newest bit-flipped": newest_damaged("flipped"),
    "newest lost a file": newest_damaged("deleted"),
    "state.json damaged": newest_damaged(name="state.json"),
    "all damaged": all_damaged,
    "latest damaged": latest_damaged,
    "disk too small": disk_full(filled=False),
    "disk fills up": disk_full(filled=True),
    "shard gone": shard_gone,
}


def kind_of(number: int, seed: int) -> str:
    """All kinds come up once in as many runs as there are kinds, each time in another order."""
    block, place = divmod(number - 1, len(KINDS))
    return random.Random(f"{seed}/order/{block}").sample(list(KINDS), len(KINDS))[place]
