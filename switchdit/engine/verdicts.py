"""What the signs of life of all ranks mean: nothing, or a fault, told in one line that names the rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

EXIT_FAULT = 1
SETTLE = 0.2  # seconds after a connection has closed: processes that die together are told together
GRACE = 2.0  # seconds in which others may themselves meet the mistake that a rank has ended with
TOGETHER = 0.7  # of peer_timeout: ranks that have been silent for so long when the first is judged are told with it
AT_MOST = 4  # ranks or places that a line spells out


@dataclass
class Rank:
    """The last that is known of a rank. Times are seconds of the judge's clock.

    step, marks: the mark it has reached last; marks counts those within the step. Before the first, step is -1.
    waits: it is inside a collective. where: "file:line function" of the project.
    ended: when its connection closed or it said that it ends. reason, code: what it said then.
    """

    number: int
    host: str
    pid: int
    step: int = -1
    marks: int = 0
    phase: str = ""
    waits: bool = False
    where: str = ""
    heard: float = 0.0
    ended: float | None = None
    reason: str | None = None
    code: int = EXIT_FAULT

    def __str__(self) -> str:
        return f"rank {self.number} (host {self.host}, pid {self.pid})"

    @property
    def position(self) -> tuple[int, int]:
        return self.step, self.marks

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step >= 0 else "the start, before the first step"


class Verdict(NamedTuple):
    """line: without the "error: " in front; code: every process ends with it."""

    line: str
    code: int = EXIT_FAULT


def judge(ranks: list[Rank], now: float, moved: float, peer_timeout: float, hang_timeout: float) -> Verdict | None:
    """The fault of a run, if there is one: a rank that has ended, or is silent, or all stand still.

    Args:
        ranks: those watched, in any order.
        now, moved: seconds; the present, and when any rank last reached a mark.
        peer_timeout, hang_timeout: seconds; 0 leaves that check out. Nobody stands still before the first mark.
    """
    ended = [rank for rank in ranks if rank.ended is not None]
    silent = [rank for rank in ranks if peer_timeout and rank.ended is None and now - rank.heard > peer_timeout]
    if ended:
        killed = [rank for rank in ended if rank.reason is None]
        if killed:  # first: what others end with may be its consequence
            if now - min(rank.ended for rank in killed) < SETTLE:
                return None
            return Verdict(f"{_names(killed)} ended without a word; last seen in {killed[0].place}")
        first = min(ended, key=lambda rank: rank.ended)
        if now - first.ended < GRACE:
            return None
        if first.code == EXIT_FAULT:
            return Verdict(f"{first} ended in {first.place}: {first.reason}")
        return Verdict(f"(process {first.number}) {first.reason}", first.code)
    if silent:
        lost = [rank for rank in ranks if now - rank.heard > TOGETHER * peer_timeout]
        verb = "has" if len(lost) == 1 else "have"
        place = min(silent, key=lambda rank: rank.heard).place
        return Verdict(f"{_names(lost)} {verb} given no sign of life for {peer_timeout:g} s; last seen in {place}")
    started = any(rank.step >= 0 for rank in ranks)
    if hang_timeout and started and now - moved > hang_timeout:
        return Verdict(_standstill(ranks, hang_timeout))
    return None


def _standstill(ranks: list[Rank], hang_timeout: float) -> str:
    """Whoever is not in a collective holds the others up; of several, those that are behind."""
    free = [rank for rank in ranks if not rank.waits]
    behind = min((rank.position for rank in free), default=None)
    culprits = [rank for rank in free if rank.position == behind]
    since = f"no progress for {hang_timeout:g} s"
    if culprits and (len(culprits) < len(ranks) or len(ranks) == 1):
        verb = "has" if len(culprits) == 1 else "have"
        waiting = "; the others wait for it" if len(ranks) > 1 else ""
        return f"{_names(culprits)} {verb} made {since}: {_scene(culprits[0])}{waiting}"
    scenes: dict[str, list[int]] = {}
    for rank in ranks:
        scenes.setdefault(_scene(rank), []).append(rank.number)
    told = [f"{_numbers(numbers)} in {scene}" for scene, numbers in scenes.items()][:AT_MOST]
    more = "; ..." if len(scenes) > AT_MOST else ""
    doing = "all wait for each other" if not free else "none waits in a collective"
    return f"{since} of any rank, {doing}: {'; '.join(told)}{more}"


def _scene(rank: Rank) -> str:
    return f"{rank.place}, at {rank.where}" if rank.where else rank.place


def _names(ranks: list[Rank]) -> str:
    ranks = sorted(ranks, key=lambda rank: rank.number)
    more = len(ranks) - AT_MOST
    return ", ".join(map(str, ranks[:AT_MOST])) + (f" and {more} more" if more > 0 else "")


def _numbers(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` is "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {text}"
