"""Extraction: what is stored is right, and no interruption, process count or bad input changes that."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from switchdit.data.autoencoder import load_autoencoder
from switchdit.data.image_pixels import load_image
from switchdit.data.image_source import list_images
from switchdit.data.latent_dataset import LatentDataset
from switchdit.errors import UserError
from tests.extraction_inputs import (
    CLASSES,
    arguments,
    as_tar,
    as_zip,
    content,
    noise,
    without_sidecars,
    write_autoencoder,
    write_photos,
)
from tools import extract_latents as tool
from tools import extraction

PROGRAM = Path(tool.__file__)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def extracted(photos, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted") / "latents"
    tool.main(arguments(photos, out, vae))
    return out


def failure(capsys, argv):
    """The one line in which the program says what is wrong."""
    with pytest.raises(SystemExit, match="2"):
        tool.main(argv)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "|" not in line)
    return line


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


def test_folder_tar_and_zip_give_the_same_bytes_from_worker_processes_too(photos, vae, extracted, tmp_path):
    tool.main(arguments(as_tar(photos, tmp_path / "x.tar"), tmp_path / "tar", vae, "--workers", "2"))
    tool.main(arguments(as_zip(photos, tmp_path / "x.zip"), tmp_path / "zip", vae))
    of_tar, of_zip, of_folder = (
        without_sidecars(content(out)) for out in (tmp_path / "tar", tmp_path / "zip", extracted)
    )
    assert of_tar == of_zip == of_folder
    assert not multiprocessing.active_children()


def test_flips_are_left_out_when_asked(photos, vae, extracted, tmp_path):
    tool.main(arguments(photos, tmp_path / "out", vae, "--no-flip"))
    data, flipped = LatentDataset(tmp_path / "out"), LatentDataset(extracted)
    assert not data.has_flip
    as_is = np.zeros(len(data), bool)
    for ours, theirs in zip(
        data.moments(np.arange(len(data)), as_is), flipped.moments(np.arange(len(data)), as_is), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-5)


def test_sample_is_one_draw_from_the_posterior_whoever_makes_it(photos, vae, extracted, tmp_path):
    tool.main(arguments(photos, tmp_path / "out", vae, "--sample"))
    data, moments = LatentDataset(tmp_path / "out"), LatentDataset(extracted)
    assert data.stored == "sample"
    everything, noises = np.arange(len(data)), []
    for mirrored in (False, True):
        drawn, width = data.moments(everything, np.full(len(data), mirrored))
        assert not width.any()
        mean, std = moments.moments(everything, np.full(len(data), mirrored))
        noises.append((drawn - mean) / std)
    noises = np.stack(noises)
    assert abs(noises.mean()) < 0.05  # 2944 draws
    assert abs(noises.std() - 1) < 0.05
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.1
    assert len(np.unique(noises[:, :, 0, 0, 0])) == noises[:, :, 0, 0, 0].size

    tool.main(arguments(photos, tmp_path / "batches", vae, "--sample", "--batch-size", "2", "--shard-size", "23"))
    other = LatentDataset(tmp_path / "batches").moments(everything, np.ones(len(data), bool))[0]
    np.testing.assert_allclose(other, drawn, rtol=2e-3, atol=2e-3)


def test_other_sizes_precisions_and_labels(vae, tmp_path):
    photos = write_photos(tmp_path / "in", {"ant": 2, "cow": 1})
    labels = {path.relative_to(photos).as_posix(): 2 * int(path.stem) for path in photos.rglob("*.*")}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    more = ["--image-size", "512", "--dtype", "bfloat16", "--labels", str(tmp_path / "labels.json"), "--no-flip"]
    tool.main(arguments(photos, tmp_path / "out", vae, *more))
    data = LatentDataset(tmp_path / "out")
    assert data.latent_shape == (4, 128, 128)
    assert (data.manifest["encoder_dtype"], data.class_names) == ("bfloat16", ["0", "1", "2"])
    assert data.names == ["ant/deeper/0.png", "cow/deeper/0.png", "ant/1.JPEG"]
    assert data.labels.tolist() == [0, 0, 2]


# ------------------------------------------------------------------------------------------------------- modes


def test_verify_and_stats_need_the_output_alone(extracted, tmp_path, capsys):
    tool.main(["--out", str(extracted), "--verify"])
    assert capsys.readouterr().out.count("\n") == 1
    tool.main(["--out", str(extracted), "--stats"])
    assert "23 images" in capsys.readouterr().out
    damaged = tmp_path / "damaged"
    shutil.copytree(extracted, damaged)
    with open(damaged / "shard_00001.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert "shard_00001.npy" in failure(capsys, ["--out", str(damaged), "--verify"])


def test_preview_shows_images_beside_their_reconstructions(photos, vae, tmp_path, capsys):
    picture = tmp_path / "new" / "preview.png"
    data = str(as_tar(photos, tmp_path / "x.tar"))
    tool.main(["--data", data, "--vae", str(vae), "--image-size", "16", "--preview", str(picture)])
    assert "PSNR" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data, --out, --vae are missing"),
        (["--verify"], "--out is missing"),
        (["--preview", "x.png"], "--data, --vae are missing"),
        (["--verify", "--stats"], "not allowed with"),
        (["--preview", "x.jpg", "--data", "x", "--vae", "x"], "ends in .png"),
        (["--labels", "x", "--unlabeled"], "not allowed with"),
        (["--append", "--out", "nowhere", "--data", "x", "--vae", "x"], "there is no folder nowhere"),
    ],
)
def test_what_a_mode_needs_is_named(argv, message, capsys):
    assert message in failure(capsys, argv)


# ------------------------------------------------------------------------------------------------------ append


@pytest.fixture(scope="module")
def grown(extracted, vae, tmp_path_factory):
    """More images of a class that is there and of a new one, and the data set of both."""
    path = tmp_path_factory.mktemp("grown")
    more = write_photos(path / "more", {"bee": 3, "ape": 4}, seed=24, first=20)
    shutil.copytree(extracted, path / "latents")
    tool.main(arguments(more, path / "latents", vae, "--append"))
    return more, path / "latents"


def test_appended_images_come_after_those_that_are_there(extracted, grown):
    before, after = LatentDataset(extracted), LatentDataset(grown[1])
    after.verify()
    assert after.class_names == ["ant", "bee", "cow", "ape"]
    assert after.labels.tolist() == [*before.labels.tolist(), *[3] * 4, *[1] * 3]
    assert after.names[:23] == before.names
    assert after.names[23:] == sorted(after.names[23:], key=lambda name: (name.split("/")[0], name))
    for name, data in content(extracted).items():
        if name.startswith("shard"):
            assert (grown[1] / name).read_bytes() == data
    assert sorted(p.name for p in grown[1].glob("[ln]a*")) == ["labels_00001.npy", "names_00001.json"]


def test_repeated_append_and_first_extraction_are_complete(photos, grown, vae, capsys):
    before = content(grown[1])
    for argv in (arguments(grown[0], grown[1], vae, "--append"), arguments(photos, grown[1], vae)):
        tool.main(argv)
        assert "already complete" in capsys.readouterr().out
    assert content(grown[1]) == before


def test_images_are_appended_to_appended_ones(grown, vae, tmp_path):
    shutil.copytree(grown[1], tmp_path / "latents")
    others = write_photos(tmp_path / "others", {"bee": 3, "ape": 4}, seed=33, first=40)
    tool.main(arguments(others, tmp_path / "latents", vae, "--append", "--shard-size", "5"))
    data = LatentDataset(tmp_path / "latents")
    assert (len(data), len(data.manifest["sources"])) == (37, 3)
    assert data.names[30:] == list_images(others).names


@pytest.mark.parametrize("damaged", ["shard_00001.npy", "shard_00006.json"])
def test_damaged_shard_of_a_grown_data_set_is_made_again(photos, grown, vae, tmp_path, damaged):
    shutil.copytree(grown[1], tmp_path / "latents")
    (tmp_path / "latents" / damaged).unlink()
    tool.main(arguments(photos, tmp_path / "latents", vae))
    tool.main(arguments(grown[0], tmp_path / "latents", vae, "--append"))
    assert content(tmp_path / "latents") == content(grown[1])


def test_lost_labels_of_a_grown_data_set_are_restored_without_encoding(
    photos, grown, vae, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "latents"
    shutil.copytree(grown[1], out)
    (out / "labels_00001.npy").unlink()
    again = (arguments(photos, out, vae), arguments(grown[0], out, vae, "--append"))
    assert "manifest.json, then run the first extraction" in failure(capsys, again[0])
    (out / "manifest.json").unlink()
    monkeypatch.setattr(extraction, "encode_images", None)
    for argv in again:
        tool.main(argv)
    assert content(out) == content(grown[1])


def test_killed_append_leaves_the_old_data_set_and_is_continued(extracted, grown, vae, tmp_path, monkeypatch, capsys):
    out = tmp_path / "latents"
    shutil.copytree(extracted, out)

    calls = []

    def interrupted(*args, original=extraction.encode_images):
        calls.append(1)
        if len(calls) == 3:  # two batches in the first shard
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(extraction, "encode_images", interrupted)
    with pytest.raises(SystemExit, match="130"):
        tool.main(arguments(grown[0], out, vae, "--append"))
    monkeypatch.undo()
    data = LatentDataset(out)
    data.verify()
    assert len(data) == 23
    assert (out / "shard_00006.json").is_file()
    capsys.readouterr()
    other = write_photos(tmp_path / "other", {"bee": 2}, first=40)
    assert "unfinished --append" in failure(capsys, arguments(other, out, vae, "--append"))
    tool.main(arguments(grown[0], out, vae, "--append"))
    assert content(out) == content(grown[1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size", "32"], "image_size 16 there, 32 now"),
        (["--no-flip"], "flip True there, False now"),
        (["--sample"], "stored moments there, sample now"),
        (["--dtype", "bfloat16"], "encoder_dtype float32 there, bfloat16 now"),
    ],
)
def test_append_in_another_way_is_refused(extracted, grown, vae, more, message, capsys):
    before = content(extracted)
    assert message in failure(capsys, arguments(grown[0], extracted, vae, "--append", *more))
    assert content(extracted) == before


def test_append_needs_a_complete_data_set(extracted, grown, vae, tmp_path, capsys):
    shutil.copytree(extracted, tmp_path / "latents")
    (tmp_path / "latents" / "manifest.json").unlink()
    assert "not complete" in failure(capsys, arguments(grown[0], tmp_path / "latents", vae, "--append"))


def test_other_images_than_those_of_a_grown_data_set_are_refused(grown, vae, tmp_path, capsys):
    other = write_photos(tmp_path / "other", {"bee": 2}, first=40)
    assert "pass --append to add them" in failure(capsys, arguments(other, grown[1], vae))


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
        timeout=300,
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


def test_rank_0_gives_up_when_the_others_are_silent(photos, vae, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(extraction, "PATIENCE", 1)
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

    def interrupted(*args, original=extraction.encode_images):
        calls.append(1)
        if len(calls) == 5:  # two batches a shard: the first of the third shard
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(extraction, "encode_images", interrupted)
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
    assert "1 of 2 shards" in failure(capsys, arguments(tmp_path / "in", out, vae))
    (out / "manifest.json").unlink()
    tool.main(arguments(tmp_path / "in", out, vae))
    assert len(LatentDataset(out)) == 6
    assert (out / "shard_00000.npy").stat().st_mtime_ns == kept


def test_image_with_an_odd_name_is_named_in_one_line(tmp_path, vae, capsys):
    pack(tmp_path / "in", "a/line\nbreak.png", "b/2.png")
    line = failure(capsys, arguments(tmp_path / "in", tmp_path / "out", vae))
    assert f"'a/line\\nbreak.png' in {tmp_path}/in: it is none of BMP, GIF" in line


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


def pack(path, *names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))


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
        (lambda root: make(root, "1.png"), ["--labels", "nowhere.csv"], "nowhere.csv cannot be read"),
        (lambda root: make(root, "1.png"), ["--append"], "there is no folder"),
        (lambda root: make(root, "1.png"), ["--workers", "-1"], "--workers -1"),
        (lambda root: pack(root, "a/1.png", "../b/1.png"), [], "'../b/1.png' leads out"),
        (lambda root: pack(root, "a/1.png", "a/1.png"), [], "two members named 'a/1.png'"),
        (lambda root: pack(root, "a/line\n.png", "2.png"), [], "class folders (a)"),
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
