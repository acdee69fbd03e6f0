"""The demo in miniature: every door once, and an outcome that chance does not give."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, environment, free_port
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tiny_run import read_log

STEPS = 400


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    size = ["--steps", STEPS, "--autoencoder-steps", 100, "--num-samples", 100]
    command = [sys.executable, "tools/demo.py", "--run-dir", folder / "run", "--data-dir", folder / "data", *size]
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env=environment(MASTER_PORT=str(free_port())),
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder / "run", done.stdout


def recognised(samples: Path) -> float:
    """Share of samples that an SVM, which this project has never seen, gives their label."""
    digits = load_digits()
    classifier = SVC(gamma=0.001).fit(digits.data, digits.target)
    with np.load(samples) as file:
        images, labels = file["arr_0"], file["arr_1"]
    grey = images.astype(float).mean(-1).reshape(len(images), 8, 4, 8, 4).mean((2, 4)) / 255 * 16
    return float((classifier.predict(grey.reshape(len(images), -1)) == labels).mean())


@pytest.mark.world_size(2)
def test_what_it_says_and_leaves(demo):
    run, printed = demo
    assert "deepspeed --num_accelerators 2 " in printed
    assert "switchdit/train.py --config switchdit/configs/digits.yaml --deepspeed_config ds_configs/" in printed
    assert "2 processes on cpu, ep_size 2" in printed
    assert "Fréchet distance (digit features)" in printed
    assert "FID" not in printed
    for name in ("samples.png", "samples.npz", "metrics.json", "checkpoints/latest", "tensorboard", "log.jsonl"):
        assert (run / name).exists(), name
        assert name.startswith("log") or str(run / name.split("/")[0]) in printed
    with np.load(run / "samples.npz") as file:
        assert file["arr_0"].shape == (100, 32, 32, 3)
        assert file["arr_0"].dtype == np.uint8
        assert np.bincount(file["arr_1"]).tolist() == [10] * 10
    assert Image.open(run / "samples.png").size == (10 * 34 + 2, 10 * 34 + 2)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"frechet_distance", "precision", "recall", "label_accuracy"} <= metrics.keys()
    assert "fid" not in metrics
    assert metrics["feature_space"] == "digit features"


@pytest.mark.world_size(2)
def test_loss_falls_and_digits_begin_to_be_recognised(demo):
    run, _ = demo
    log = read_log(run)
    # means over the last and the first 100 steps
    assert log[STEPS]["loss/mse"] < 0.5 * log[min(log)]["loss/mse"]
    assert log[STEPS]["loss/prior"] < 0.2 * log[min(log)]["loss/prior"]
    assert recognised(run / "samples.npz") > 0.2  # chance: 0.1; the full demo: 0.85 and more
