"""Extraction: what is stored is right, and no interruption, process count or bad input changes that."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from switchdit.data.autoencoder import load_autoencoder
from switchdit.data.image_folder import list_images, load_image
from switchdit.data.latent_dataset import LatentDataset
from switchdit.errors import UserError
from tools import extract_latents as tool

PROGRAM = Path(tool.__file__)
CLASSES = {"ant": 9, "bee": 10, "cow": 4}  # folder -> images


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(path)
    return path


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    seed = 0
    for name, count in CLASSES.items():
        (root / name / "deeper").mkdir(parents=True)
        for index in range(count):
            seed += 1
            folder = root / name / ("deeper" if index % 3 == 0 else "")
            Image.fromarray(noise(16 + seed, 50 - seed, seed)).save(folder / f"{index}{('.png', '.JPEG')[index % 2]}")
    return root


def arguments(photos, out, vae, *more):
    fixed = ["--image-size", "16", "--shard-size", "4", "--batch-size", "3", "--workers", "2"]
    return ["--data", str(photos), "--out", str(out), "--vae", str(vae), *fixed, *more]


@pytest.fixture(scope="module")
def extracted(photos, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted") / "latents"
    tool.main(arguments(photos, out, vae))
    return out


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(argv, **environment):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---------------------------------------------------------------------------------------------- what is stored


def test_every_image_is_stored_once_with_its_class_and_its_mirror_image(photos, vae, extracted):
    data, autoencoder, files = LatentDataset(extracted), load_autoencoder(vae), list_images(photos)
    data.verify()
    assert data.class_names == list(CLASSES)
    assert np.bincount(data.labels).tolist() == list(CLASSES.values())
    assert (data.image_size, data.latent_shape) == (16, (4, 4, 4))
    assert data.vae_sha256 == autoencoder.identity["sha256"]
    for mirrored in (False, True):
        mean, std = data.moments(np.arange(len(data)), np.full(len(data), mirrored))
        for index, name in enumerate(files.names):
            assert name.startswith(data.class_names[data.labels[index]])
            image = load_image(photos / name, 16)
            image = np.array(image[:, ::-1] if mirrored else image)
            expected = autoencoder.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
            np.testing.assert_allclose(mean[index], expected[0][0].numpy(), rtol=2e-3, atol=1e-5)
            np.testing.assert_allclose(std[index], expected[1][0].numpy(), rtol=2e-3, atol=1e-5)


def test_second_run_leaves_everything_as_it_is(photos, vae, extracted, capsys):
    before = {path: path.stat().st_mtime_ns for path in extracted.iterdir()}
    tool.main(arguments(photos, extracted, vae))
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in extracted.iterdir()}


def test_images_without_class_folders_are_one_class(tmp_path, vae):
    (tmp_path / "flat").mkdir()
    for index in range(3):
        Image.fromarray(noise(20, 20, index)).save(tmp_path / "flat" / f"{index}.png")
    tool.main(arguments(tmp_path / "flat", tmp_path / "out", vae))
    data = LatentDataset(tmp_path / "out")
    assert (len(data), data.num_classes, data.labels.tolist()) == (3, 1, [0, 0, 0])


# ----------------------------------------------------------------------------- interruptions, several processes


KILLED_AT_SYNC = """
import os, signal, sys
from tools import extract_latents
calls = []
def fsync(descriptor):
    calls.append(descriptor)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
extract_latents.main(sys.argv[2:])
"""


# A shard takes four syncs: file and folder, of the shard and of its sidecar.
@pytest.mark.parametrize(("sync", "complete"), [(5, 1), (7, 1)], ids=["in a shard", "in its sidecar"])
def test_killed_run_continues_to_the_same_bytes(photos, vae, extracted, tmp_path, sync, complete):
    out = tmp_path / "latents"
    process = subprocess.run(
        [sys.executable, "-c", KILLED_AT_SYNC, str(sync), *arguments(photos, out, vae)],
        cwd=PROGRAM.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL
    assert any(path.suffix == ".partial" for path in out.iterdir())
    assert len(list(out.glob("shard_*.json"))) == complete
    with pytest.raises(UserError, match="not complete"):
        LatentDataset(out)
    (out / ".rank_00007.alive").write_text("3")  # as if it had been one of eight processes
    kept = (out / "shard_00000.npy").stat().st_mtime_ns
    tool.main(arguments(photos, out, vae))
    assert (out / "shard_00000.npy").stat().st_mtime_ns == kept
    assert content(out) == content(extracted)


def test_two_processes_write_the_bytes_of_one(photos, vae, extracted, tmp_path):
    argv = arguments(photos, tmp_path / "latents", vae)
    processes = [
        start([f"--local_rank={rank}", *argv], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert content(tmp_path / "latents") == content(extracted)


def test_rank_0_gives_up_when_the_others_are_silent(photos, vae, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(tool, "PATIENCE", 1)
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments(photos, tmp_path / "out", vae))
    assert "no progress for 1 s and 3 shards are missing" in capsys.readouterr().err
    assert not (tmp_path / "out" / tool.MANIFEST).exists()


@pytest.mark.parametrize("shard", ["shard_00002.npy", "shard_00005.npy"])
def test_damaged_shard_is_made_again(photos, vae, extracted, tmp_path, shard):
    out = tmp_path / "latents"
    out.mkdir()
    for name, data in content(extracted).items():
        (out / name).write_bytes(data if name != shard else data[:-2])
    tool.main(arguments(photos, out, vae))
    assert content(out) == content(extracted)


def test_interrupt_keeps_finished_shards(photos, vae, extracted, tmp_path, monkeypatch, capsys):
    calls = []

    def interrupted(*args, original=tool.encode_images):
        calls.append(1)
        if len(calls) == 5:  # two batches a shard: the first of the third shard
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(tool, "encode_images", interrupted)
    with pytest.raises(SystemExit, match="130"):
        tool.main(arguments(photos, tmp_path, vae))
    assert "run the same extraction command again" in capsys.readouterr().err
    names = ["shard_00000.json", "shard_00000.npy", "shard_00001.json", "shard_00001.npy"]
    assert sorted(content(tmp_path)) == names
    tool.main(arguments(photos, tmp_path, vae))
    assert content(tmp_path) == content(extracted)


def test_full_disk_ends_in_one_line_and_leaves_nothing(photos, vae, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments(photos, tmp_path / "out", vae))
    assert "no space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- bad input


def bad_photos(root, truncated=True):
    """Six images of one class in two shards; the fifth is damaged."""
    (root / "only").mkdir(parents=True)
    for index in range(6):
        Image.fromarray(noise(30, 30, index)).save(root / "only" / f"{index}.jpg")
    bad = root / "only" / "4.jpg"
    bad.write_bytes(bad.read_bytes()[:400] if truncated else b"no image at all")
    return bad


@pytest.mark.parametrize("truncated", [True, False])
def test_unreadable_image_is_named_and_skipped_only_when_asked(tmp_path, vae, capsys, truncated):
    bad, out = bad_photos(tmp_path / "in", truncated), tmp_path / "out"
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments(tmp_path / "in", out, vae))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert str(bad) in error[0]
    assert sorted(content(out)) == ["shard_00000.json", "shard_00000.npy"]

    tool.main(arguments(tmp_path / "in", out, vae, "--skip-bad"))
    assert "5 images in 2 shards, 1 skipped" in capsys.readouterr().out
    data = LatentDataset(out)
    assert data.manifest["skipped"] == ["only/4.jpg"]
    assert len(data) == 5

    Image.fromarray(noise(30, 30, 4)).save(bad)  # repaired: its shard is made again, the other one kept
    kept = (out / "shard_00000.npy").stat().st_mtime_ns
    tool.main(arguments(tmp_path / "in", out, vae))
    assert len(LatentDataset(out)) == 6
    assert (out / "shard_00000.npy").stat().st_mtime_ns == kept


def test_mistake_of_another_rank_is_told_and_stops_it(tmp_path, vae, capsys, monkeypatch):
    bad = bad_photos(tmp_path / "in")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments(tmp_path / "in", tmp_path / "out", vae))
    assert str(bad) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_readable_is_an_error_even_with_skip_bad(tmp_path, vae, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments(tmp_path / "in", tmp_path / "out", vae, "--skip-bad"))
    assert "not one image" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(photos, vae, extracted, capsys):
    before = content(extracted)
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments(photos, extracted, vae, "--image-size", "32"))
    assert "image_size 16 there, 32 now" in capsys.readouterr().err
    assert content(extracted) == before


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / name)


@pytest.mark.parametrize(
    ("prepare", "more", "message"),
    [
        (lambda root: None, [], "not there"),
        (lambda root: root.write_text(""), [], "is a file"),
        (lambda root: root.mkdir(), [], "holds no images"),
        (lambda root: make(root, "a/1.png", "2.png"), [], "images outside of them (2.png)"),
        (lambda root: (make(root, "a/1.png"), (root / "b").mkdir()), [], "class folder b holds no images"),
        (lambda root: make(root, "1.png"), ["--image-size", "18"], "18 is not a multiple of 4"),
        (lambda root: make(root, "1.png"), ["--vae", "./nowhere"], "nowhere does not exist"),
        (lambda root: make(root, "1.png"), ["--batch-size", "0"], "--batch-size 0"),
        (lambda root: make(root, "1.png"), ["--dtype", "float8"], "float8"),
        (lambda root: make(root, "1.png"), ["--frobnicate"], "frobnicate"),
        (lambda root: make(root, "1.png"), ["--out", "{data}/latents"], "lies in --data"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path, vae, capsys, prepare, more, message):
    prepare(tmp_path / "in")
    more = [word.format(data=tmp_path / "in") for word in more]
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments(tmp_path / "in", tmp_path / "out", vae, *more))
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
