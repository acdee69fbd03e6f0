"""A run that is killed or damaged loses nothing but steps: twenty runs of the fault campaign, and its judge."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fault_kinds import KINDS, hurt, kind_of
from launching import ROOT
from safetensors.torch import save_file
from same_run import difference

from switchdit.engine.checkpoint_folder import write_state
from switchdit.engine.checkpoint_writer import tensor_file, write_hashed

CAMPAIGN = ROOT / "tests/fault_campaign.py"


def campaign(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, CAMPAIGN, *map(str, arguments)], capture_output=True, text=True, timeout=1800, check=False
    )


@pytest.mark.world_size(2)
def test_every_kind_of_fault_is_survived():
    done = campaign("--runs", len(KINDS))
    assert done.returncode == 0, done.stdout + done.stderr
    runs = re.findall(r"^ +\d+ +\d+\.\d  (.{22}) (\w+) ", done.stdout, re.MULTILINE)
    assert sorted(kind.strip() for kind, _ in runs) == sorted(KINDS)
    assert [how for _, how in runs].count("launcher") == len(KINDS) // 10
    assert "FAILED" not in done.stdout
    assert ("skipped" in done.stdout) <= (os.geteuid() != 0 or not shutil.which("mount"))


def test_a_campaign_is_its_seed():
    for block in range(3):
        numbers = range(block * len(KINDS) + 1, (block + 1) * len(KINDS) + 1)
        assert sorted(kind_of(n, seed=5) for n in numbers) == sorted(KINDS)
        assert [kind_of(n, 5) for n in numbers] == [kind_of(n, 5) for n in numbers]
    assert [kind_of(n, 5) for n in range(1, 21)] != [kind_of(n, 6) for n in range(1, 21)]


def make_run(run_dir: Path, weight: float = 0.5, moment: float = 0.25, loss: float = 1.0, sums: float = 3.0) -> Path:
    folder = run_dir / "checkpoints/step_0000001"
    folder.mkdir(parents=True)
    save_file({"w": torch.tensor([weight, 1.0])}, folder / "ema.safetensors")
    files = {"x.pt": write_hashed(folder / "x.pt", tensor_file({"state": [{"exp_avg": torch.tensor(moment)}, 1]}))}
    config = {"run_dir": str(run_dir), "data": {"latents": str(run_dir)}, "seed": 0}
    write_state(folder, {"format_version": 1, "step": 1, "monitor": [sums], "config": config, "files": files})
    (run_dir / "log.jsonl").write_text(json.dumps({"step": 1, "loss/total": loss}) + "\n")
    return run_dir


@pytest.mark.parametrize(
    ("other", "where"),
    [
        ({}, None),
        ({"weight": 0.50000006}, "/ema.safetensors/w"),
        ({"moment": 0.25000003}, "/x.pt/state/0/exp_avg"),
        ({"loss": 1.0000000000000002}, "/log/1/loss/total"),
        ({"sums": 3.0000000000000004}, "/state.json/monitor/0"),
    ],
)
def test_the_judge_sees_the_last_bit(tmp_path, other, where):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **other)
    assert difference(a, b, "step_0000001") == where


def test_the_judge_sees_what_is_missing_or_damaged(tmp_path):
    a, b, c = (make_run(tmp_path / name) for name in "abc")
    assert "no " in difference(a, b, "step_0000002")
    (b / "checkpoints/step_0000001/more.pt").touch()
    assert difference(a, b, "step_0000001") == "files ['more.pt']"
    state = c / "checkpoints/step_0000001/state.json"
    state.write_text(state.read_text().replace('"step": 1', '"step": 2'))
    assert "state.json is not what was written" in difference(a, c, "step_0000001")


@pytest.mark.parametrize("how", ["cut", "flipped", "deleted"])
def test_damage_changes_what_a_file_means(tmp_path, how):
    path = tmp_path / "state.json"
    for seed in range(20):
        path.write_text(content := json.dumps({"sum": 0.30000000000000004}))
        hurt(path, how, random.Random(seed))
        try:
            assert json.loads(path.read_bytes()) != json.loads(content)
        except (FileNotFoundError, ValueError):
            continue
