"""Latents in fast-DiT's layout: draws that depend on seed and image alone, and come back as they went."""

import math
import os

import numpy as np
import pytest
from scipy import stats

from switchdit.data import latent_shards as shards
from switchdit.data.latent_dataset import LatentDataset
from switchdit.errors import UserError
from tests.extraction_inputs import small_disk, without_sidecars
from tools import export_latents as tool
from tools import import_latents as importer

NUM, SHAPE, SCALE = 60, (4, 2, 2), 0.18215
LABELS = np.arange(NUM) * 7 % 5


@pytest.fixture(autouse=True)
def no_waiting_for_the_whole_machine(monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)


def write(out, std, flip=True):
    """Posteriors with ``std`` standard deviations, none of them the mirror image's; returns the means (NUM, *SHAPE)."""
    plan = shards.Plan("d", NUM, 16, SHAPE, 20, "float32", "unknown", SCALE, "t", flip)
    moments = np.random.default_rng(0).normal(0, 5, (NUM, *plan.image_shape)).astype(np.float16)
    moments[:, 0, 1] = std
    parts = np.split(moments, 3)
    sidecars = [shards.write_shard(out, i, part, plan, "s") for i, part in enumerate(parts)]
    names, classes = [f"{i}.png" for i in range(NUM)], [str(c) for c in range(5)]
    shards.write_manifest(out, plan, sidecars, LABELS, names, classes, {"name": "test/vae", "sha256": "unknown"})
    return moments[:, 0, 0].astype(np.float32)


def export(latents, to, *more):
    tool.main(["--latents", str(latents), "--to", str(to), *more])
    return to


def import_again(source, out):
    importer.main(["--from", str(source), "--out", str(out), "--vae", "test/vae", "--shard-size", "32"])
    return LatentDataset(out)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_layout(tmp_path):
    means = write(tmp_path / "in", std=0)
    to = export(tmp_path / "in", tmp_path / "deep" / "to")
    assert [path.name for path in sorted(to.iterdir())] == ["imagenet16_features", "imagenet16_labels"]
    for i in range(NUM):
        latent = np.load(to / "imagenet16_features" / f"{i}.npy")
        label = np.load(to / "imagenet16_labels" / f"{i}.npy")
        assert (latent.dtype, latent.shape) == (np.float32, (1, *SHAPE))
        assert np.array_equal(latent[0], means[i] * np.float32(SCALE))
        assert (label.dtype, label.tolist()) == (np.int64, [LABELS[i]])
    assert len(content(to)) == 2 * NUM
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["to"]


def test_means_come_back_within_the_rounding_of_float16_and_then_for_ever(tmp_path):
    """One rounding, and an export of what was imported is imported as the same bytes."""
    means = write(tmp_path / "in", std=0)
    first = import_again(export(tmp_path / "in", tmp_path / "a"), tmp_path / "b")
    mean, std = first.moments(np.arange(NUM), np.zeros(NUM, bool))
    assert np.array_equal(mean, means)  # which were float16
    assert not std.any()
    assert np.array_equal(first.labels, LABELS)
    assert content(export(tmp_path / "b", tmp_path / "c")) == content(tmp_path / "a")
    import_again(tmp_path / "c", tmp_path / "d")
    assert without_sidecars(content(tmp_path / "b")) == without_sidecars(content(tmp_path / "d"))


def test_draws_are_of_the_posteriors_and_rounded_once(tmp_path):
    means = write(tmp_path / "in", std=0.5)
    first = import_again(export(tmp_path / "in", tmp_path / "a"), tmp_path / "b")
    drawn, std = first.moments(np.arange(NUM), np.zeros(NUM, bool))
    assert not std.any()
    noise = ((drawn - means) / 0.5).ravel()
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(noise.mean()) < 4 / math.sqrt(len(noise))
    exported = np.stack([np.load(tmp_path / "a" / "imagenet16_features" / f"{i}.npy")[0] for i in range(NUM)])
    np.testing.assert_allclose(drawn * SCALE, exported, rtol=2**-11 + 1e-6)
    again = content(export(tmp_path / "b", tmp_path / "c"))
    assert content(export(import_again(tmp_path / "c", tmp_path / "d").path, tmp_path / "e")) == again


def test_draws_depend_on_seed_and_image_alone(tmp_path):
    write(tmp_path / "in", std=0.5)
    one, again, other = (
        content(export(tmp_path / "in", tmp_path / name, "--seed", seed))
        for name, seed in zip("abc", "001", strict=True)
    )
    assert one == again
    assert all((one[name] == other[name]) == name.startswith("imagenet16_labels") for name in one)
    data = LatentDataset(tmp_path / "in")
    assert np.array_equal(tool.draw(data, range(50, 60), 0), tool.draw(data, range(40, 60), 0)[10:])


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, fault):
    write(tmp_path / "in", std=0)
    save, calls = tool.write_npy, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 9:
            raise fault
        save(*arguments)

    monkeypatch.setattr(tool, "write_npy", failing)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        export(tmp_path / "in", tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_only_a_new_or_empty_folder_is_written(tmp_path, capsys):
    write(tmp_path / "in", std=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name, message in (
        ("full", "is a folder with files in it"),
        ("file", "is a file"),
        ("file/to", "is no folder that you may write to"),
    ):
        with pytest.raises(SystemExit):
            export(tmp_path / "in", tmp_path / name)
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    assert len(content(export(tmp_path / "in", tmp_path / "empty"))) == 2 * NUM
    with pytest.raises(SystemExit):
        export(tmp_path / "in", tmp_path / "to", "--seed", "-1")
    with pytest.raises(UserError, match="there is no folder"):
        LatentDataset(tmp_path / "to")


def refusal(latents, to, capsys):
    with pytest.raises(SystemExit, match="2"):
        export(latents, to)
    return capsys.readouterr().err.splitlines()[-1]


def test_a_link_to_an_empty_folder_is_that_folder(tmp_path):
    write(tmp_path / "in", std=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export(tmp_path / "in", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(content(tmp_path / "empty")) == 2 * NUM


def test_disks_that_are_full_or_cannot_be_written(tmp_path, capsys):
    write(tmp_path / "in", std=0)
    with small_disk(tmp_path / "small", "size=100k") as disk:
        assert refusal(tmp_path / "in", disk / "to", capsys).startswith("error: no space left on the disk")
        assert not list(disk.iterdir())
    with small_disk(tmp_path / "ro", "ro") as disk:
        assert f"--to {disk}/new/to cannot be written" in refusal(tmp_path / "in", disk / "new" / "to", capsys)


def test_several_processes_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(tmp_path / "in", tmp_path / "to", capsys)
    assert line == "error: tools/export_latents.py runs in one process; start it without a launcher"
