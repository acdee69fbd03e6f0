"""What every trial of the fault campaign shares: a tiny run, what it is compared with, and what is demanded of it."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fault_points import WHENS, WRITING, Fault, events_of
from forked_run import PATIENCE, WORLD_SIZE, Ended, run_forked, run_launched
from same_run import difference
from tiny_run import write_config, write_latents

STEPS, SAVE_EVERY = 12, 3
LAUNCHED_EVERY = 10  # of this many runs one starts with the launcher
FINAL = f"step_{STEPS:07d}"


class Failed(Exception):
    """The run did not do what it must."""


class Skipped(Exception):
    """This machine cannot do what the fault needs."""


def require(condition: object, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


@dataclass
class Reference:
    """What all runs are compared with.

    Attributes:
        whole: folder of the run that nothing happened to.
        killed: folder of a run killed while it saved its last checkpoint, with those before it.
        counts: per rank, how often the whole run reached each point.
    """

    whole: Path
    killed: Path
    latents: Path
    counts: list[Counter]


class Trial:
    """One run of the campaign: its folder, its random choices and what is known about it so far.

    Attributes:
        where, happened, resumed: columns of the table.
    """

    def __init__(self, number: int, seed: int, folder: Path, reference: Reference):
        self.rng = random.Random(f"{seed}/{number}")
        self.launched = number % LAUNCHED_EVERY == 0
        self.folder, self.reference = folder, reference
        self.run_dir, self.latents = folder / "run", reference.latents
        self.where, self.happened, self.resumed = "", "", ""
        self.starts = 0
        folder.mkdir()

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def start(self, fault: Fault | None = None, resume: bool = True) -> Ended:
        """Train; the first start of a launched trial is the launcher's."""
        self.starts += 1
        folder = self.folder / f"start_{self.starts}"
        folder.mkdir()
        config = tiny_config(self.folder / "config.yaml", self.latents, self.run_dir)
        run = run_launched if self.launched and self.starts == 1 else run_forked
        ended = run(config, self.run_dir, folder, fault, resume)
        (folder / "output").write_text(ended.output)
        require("Traceback" not in ended.output, "a traceback")
        require(not ended.late, f"rank {ended.late} did not end within {PATIENCE:.0f} s")
        return ended

    def choose_fault(self, points: tuple[str, ...], action: str = "SIGKILL", to_all: bool = False) -> Fault:
        """Any of the times at which any rank of the whole run reaches one of the points."""
        counts = self.reference.counts
        places = [(p, rank, counts[rank][p]) for p in points for rank in range(WORLD_SIZE) if counts[rank][p]]
        require(places, f"no run comes to: {', '.join(points)}")
        point, rank, total = self.rng.choice(places)
        count, when, kept = self.rng.randint(1, total), self.rng.choice(WHENS), 1.0
        self.where += f"{', then ' if self.where else ''}rank {rank}, {when} {point} {count} of {total}"
        if (point in WRITING, when, action) == (True, "before", "SIGKILL"):
            kept = self.rng.random()
            self.where += f", {kept:.0%} written"
        return Fault(point, rank, count, when, action, to_all, kept)

    def copy_killed_run(self) -> list[Path]:
        """Begin as the killed reference; returns its checkpoints, oldest first."""
        shutil.copytree(self.reference.killed, self.run_dir)
        return self.whole_checkpoints()

    def whole_checkpoints(self) -> list[Path]:
        return sorted(p.parent for p in self.checkpoints.glob("step_*/state.json"))

    def must_resume_to_the_same_end(self, from_step: int | None = None) -> Ended:
        """Resume from the newest checkpoint, or from that of another step, and compare the end."""
        whole = self.whole_checkpoints()
        expected = from_step if from_step is not None else int(whole[-1].name[5:]) if whole else 0
        ended = self.start()
        self.resumed = str(ended.resumed_from)
        require(set(ended.codes) == {0}, f"resumed, it ended with {ended.codes}: {last_line(ended)}")
        require(ended.resumed_from == expected, f"it resumed from step {ended.resumed_from}, not {expected}")
        problem = difference(self.run_dir, self.reference.whole, FINAL)
        require(problem is None, f"other than the whole run: {problem}")
        return ended

    def must_stop_with_a_line(self, says: str) -> None:
        ended = self.start()
        self.happened = last_line(ended)
        require(set(ended.codes) == {2}, f"it ended with {ended.codes} instead of 2")
        require(len(ended.errors) == 1, f"{len(ended.errors)} lines of errors")
        require(re.search(says, ended.errors[0]), f"the line does not say '{says}'")


def last_line(ended: Ended) -> str:
    lines = ended.errors or ended.output.strip().splitlines()[-1:]
    return f"{ended.codes} {lines[0] if lines else ''}"


def tiny_config(path: Path, latents: Path, run_dir: Path) -> Path:
    return write_config(
        path,
        latents,
        run_dir,
        model={"depth": 1, "hidden_size": 16},
        moe={"dispatch": "samples"},
        train={"steps": STEPS},
        monitor={"checkpoint_every": SAVE_EVERY, "keep_last": 2, "routing_every": 0},
        faults={"peer_timeout": 10.0, "hash_every": 1},
    )


def make_reference(folder: Path) -> Reference:
    """The run that nothing happens to, which also counts what can be struck, and one that is killed late."""
    latents = write_latents(folder / "latents")

    def run(name: str, fault: Fault | None) -> tuple[Path, Path, Ended]:
        notes, run_dir = folder / f"{name}_notes", folder / name
        notes.mkdir()
        config = tiny_config(folder / f"{name}.yaml", latents, run_dir)
        return run_dir, notes, run_forked(config, run_dir, notes, fault, resume=False)

    whole, notes, ended = run("whole", None)
    require(ended.codes == [0, 0], f"the run without a fault ended with {ended.codes}:\n{ended.output}")
    counts = [events_of(notes, rank) for rank in range(WORLD_SIZE)]
    saves = STEPS // SAVE_EVERY
    last_save = counts[0]["weights' file"] * (saves - 1) // saves + 1
    killed_run, _, ended = run("killed", Fault("weights' file", 0, last_save, to_all=True))
    require(ended.codes == [-9, -9], f"the killed run ended with {ended.codes}:\n{ended.output}")
    return Reference(whole, killed_run, latents, counts)
