"""The comparison of systems: runs that differ in nothing but the system, and numbers that come out as they went in."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment
from PIL import Image

from switchdit.errors import UserError
from tools.compare_systems import keep_settings, means, report, run_config, settings
from tools.compare_systems import main as compare
from tools.digits import main as write_digits

CONFIG = "switchdit/configs/cifar10_narrow.yaml"


def options(**values) -> argparse.Namespace:
    return argparse.Namespace(**{"config": CONFIG, "overrides": [], "out": Path("/out"), **values})


def test_runs_differ_in_the_system_alone():
    configs = [run_config(options(), system, "1")[1] for system in ("DiT", "DTR", "Switch-DiT", "Multi-Expert-DiT")]
    assert [c.model.pop("name") for c in configs] == ["DiT-S/2", "DTR-S/2", "Switch-DiT-S/2", "Multi-Expert-DiT-S/2"]
    assert len({c.run_dir for c in configs}) == 4
    same = [{**dataclasses.asdict(c), "run_dir": None} for c in configs]
    assert all(c == same[0] for c in same)
    assert same[0]["train"]["seed"] == 1


ROWS = [
    {"system": system, "seed": seed, "step": step, "frechet_distance": distance + seed}
    for system, step, distance in (("DiT", 100, 4.0), ("DiT", 200, 2.0), ("DTR", 100, 3.0), ("DTR", 200, 1.5))
    for seed in (0, 1)
]


def test_means_and_ranges():
    assert means(ROWS, "frechet_distance")["DiT"] == {100: (4.5, 4.0, 5.0), 200: (2.5, 2.0, 3.0)}
    assert means(ROWS, "frechet_distance")["DTR"][200] == (2.0, 1.5, 2.5)


def test_numbers_of_other_settings_are_not_mixed(tmp_path):
    first = options(num_samples=10, classifier_steps=5, data=Path("/data"), deepspeed_config=Path("x.json"))
    config = run_config(first, "DiT", "0")[1]
    keep_settings(tmp_path / "settings.json", settings(first, config))
    keep_settings(tmp_path / "settings.json", settings(first, run_config(first, "DTR", "1")[1]))
    first.num_samples = 20
    with pytest.raises(UserError, match="holds a comparison with num_samples 10, not 20; choose another --out"):
        keep_settings(tmp_path / "settings.json", settings(first, config))
    first.num_samples, config.train.lr = 10, 0.5
    with pytest.raises(UserError, match=r"holds a comparison with train .*'lr': 0\.002.*, not .*'lr': 0\.5"):
        keep_settings(tmp_path / "settings.json", settings(first, config))


def test_report(tmp_path, capsys):
    report(tmp_path, ROWS)
    table = (tmp_path / "comparison.md").read_text()
    assert table in capsys.readouterr().out
    assert "| DiT | 4.50 (4.00 to 5.00) | 2.50 (2.00 to 3.00) |" in table
    assert "FID" not in table
    assert Image.open(tmp_path / "comparison.png").size[0] > 1000
    report(tmp_path, [row for row in ROWS if (row["system"], row["step"]) != ("DiT", 100)])
    assert "| DiT |  | 2.50 (2.00 to 3.00) |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere"], "--data 'nowhere' must hold folders train and test"),
        (["--data", ".", "--parallel", "0"], "--parallel is 0; it must be at least 1"),
        (
            ["--data", "{data}", "--systems", "DiT,Swich-DiT"],
            "model 'Swich-DiT-S/2' is unknown; did you mean 'Switch-DiT-S/2'?",
        ),
        (["--data", "{data}", "model.name=foo"], "model 'foo' is unknown"),
        (["--data", "{data}", "--seeds", ","], "--seeds is empty"),
        (["--data", "{data}", "train.step=1"], "config key 'train.step' is unknown"),
        (["--data", "{data}", "--seeds", "x"], "config key 'train.seed' must be of type int"),
    ],
)
def test_mistakes(tmp_path, arguments, says, monkeypatch, capsys):
    for part in ("train", "test"):
        (tmp_path / "data" / part).mkdir(parents=True)
    arguments = [a.replace("{data}", str(tmp_path / "data")) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["compare_systems.py", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match="2"):
        compare()
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_systems_on_digits(tmp_path):
    for part in ("train", "test"):
        write_digits(["--out", str(tmp_path / "data" / part)])
    run = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--systems", "DTR,Switch-DiT", "--seeds", "0"]
    small = [
        "--num-samples",
        30,
        "--classifier-steps",
        40,
        "train.steps=20",
        "train.decay_steps=0",
        "sample.num_steps=4",
    ]
    command = [sys.executable, "tools/compare_systems.py", *map(str, [*run, *small]), "monitor.checkpoint_every=10"]
    for _ in range(2):  # the second time it finds all there is
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    rows = json.loads((tmp_path / "out/comparison.json").read_text())["rows"]
    assert [(row["system"], row["step"]) for row in rows] == [(s, t) for s in ("DTR", "Switch-DiT") for t in (10, 20)]
    assert all(row["frechet_distance"] > 0 for row in rows)
    assert (tmp_path / "out/Switch-DiT_seed0/routing/task_expert_map.png").exists()
