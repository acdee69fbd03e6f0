"""Shard files: mapping, resumption, refusal of other plans, and nothing half-written."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchdit.data import latent_shards as shards
from switchdit.errors import UserError

PLAN = shards.Plan("d", 3, 8, (2, 3, 4), 2, "float32", "v", 0.5, "t")


def moments(num, seed=0):
    return np.random.default_rng(seed).normal(size=(num, 2, 2, 2, 3, 4)).astype(np.float16)


@given(st.integers(1, 400), st.integers(1, 50), st.integers(1, 9))
def test_every_file_is_in_one_shard_of_one_process(num_files, shard_size, world_size):
    ranges = shards.shard_ranges(num_files, shard_size)
    assert [i for r in ranges for i in r] == list(range(num_files))
    assert all(len(r) == shard_size for r in ranges[:-1])
    owned = [i for rank in range(world_size) for i in shards.owned_shards(len(ranges), rank, world_size)]
    assert sorted(owned) == list(range(len(ranges)))


@given(st.lists(st.text(min_size=1, max_size=5), max_size=6), st.lists(st.text(min_size=1, max_size=5), max_size=6))
def test_digest_tells_lists_of_names_apart(one, other):
    if not any("\0" in name for name in one + other):  # no file name holds it
        assert (shards.digest_of(one) == shards.digest_of(other)) == (one == other)


def test_digest_sees_sizes():
    assert shards.digest_of(["a", "b"], [1, 23]) != shards.digest_of(["a", "b"], [12, 3])


def test_finished_means_whole_same_plan_same_files_same_tolerance(tmp_path):
    sidecar = shards.write_shard(tmp_path, 0, moments(2), PLAN, "source", ["bad.png"])
    assert shards.finished_shard(tmp_path, 0, PLAN, "source", skip_bad=True) == json.loads(json.dumps(sidecar))
    assert shards.finished_shard(tmp_path, 0, PLAN, "source", skip_bad=False) is None
    assert shards.finished_shard(tmp_path, 0, PLAN, "other", skip_bad=True) is None
    assert shards.finished_shard(tmp_path, 0, replace(PLAN, image_size=9), "source", skip_bad=True) is None
    assert shards.finished_shard(tmp_path, 1, PLAN, "source", skip_bad=True) is None
    with open(tmp_path / sidecar["file"], "r+b") as file:
        file.truncate(sidecar["bytes"] - 1)
    assert shards.finished_shard(tmp_path, 0, PLAN, "source", skip_bad=True) is None


@pytest.mark.parametrize("change", [{"image_size": 16}, {"vae_sha256": "w"}, {"shard_size": 3}, {"images": "e"}])
def test_other_plan_in_the_same_folder_is_refused_and_named(tmp_path, change):
    shards.check_same_plan(tmp_path, PLAN)
    shards.write_shard(tmp_path, 0, moments(2), PLAN, "source")
    shards.check_same_plan(tmp_path, PLAN)
    with pytest.raises(UserError, match=f"{next(iter(change))} .* there"):
        shards.check_same_plan(tmp_path, replace(PLAN, **change))


@pytest.mark.parametrize("value", [70000.0, np.nan, np.inf])
def test_value_beyond_float16_names_the_image(value):
    batch = np.zeros((3, 2, 2, 1, 1, 1), np.float32)
    batch[1, 1, 0] = value
    with pytest.raises(UserError, match=r"b\.png"):
        shards.to_float16(batch, ["a.png", "b.png", "c.png"])


@pytest.mark.parametrize("target", ["shard", "sidecar"])
def test_full_disk_leaves_no_shard_and_spoils_none(tmp_path, monkeypatch, target):
    shards.write_shard(tmp_path, 0, moments(2), PLAN, "source")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*(("os.fsync", full) if target == "shard" else ("switchdit.files.json.dump", full)))
    with pytest.raises(OSError, match="No space left"):
        shards.write_shard(tmp_path, 1, moments(1), PLAN, "source")
    monkeypatch.undo()
    assert shards.finished_shard(tmp_path, 1, PLAN, "source", skip_bad=False) is None
    assert not list(tmp_path.glob(".*"))
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_manifest_describes_the_files(tmp_path):
    sidecars = [
        shards.write_shard(tmp_path, i, moments(n), PLAN, "s", bad) for i, n, bad in [(0, 2, []), (1, 1, ["x"])]
    ]
    (tmp_path / f".{shards.MANIFEST}.7.partial").write_text("of a killed run")
    labels, vae = np.array([0, 1, 1]), {"name": "n", "sha256": "v"}
    shards.write_manifest(tmp_path, PLAN, sidecars, labels, ["a", "b", "c"], ["cat", "dog"], vae)
    manifest = shards.read_manifest(tmp_path)
    assert manifest["num_images"] == 3
    assert manifest["skipped"] == ["x"]
    assert [entry["num"] for entry in manifest["shards"]] == [2, 1]
    for entry in manifest["shards"]:
        assert entry["sha256"] == shards.sha256_of(tmp_path / entry["file"])
        assert entry["bytes"] == (tmp_path / entry["file"]).stat().st_size
    assert np.load(tmp_path / manifest["labels"]["file"]).dtype == np.int64
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "version 99"),
        ({"num_images": 4}, "3 images, not 4"),
        ({"scale_factor": "big"}, "scale_factor"),
        ({"class_names": ["one"]}, "class_names"),
        ({"latent_shape": None}, "latent_shape"),
        ({"shards": [{"file": "../shard_00000.npy", "num": 3, "bytes": 1, "sha256": ""}]}, "shards"),
    ],
)
def test_manifest_edited_by_hand_is_refused(tmp_path, change, message):
    sidecar = shards.write_shard(tmp_path, 0, moments(3), PLAN, "s")
    labels, vae = np.array([0, 1, 1]), {"name": "n", "sha256": "v"}
    manifest = shards.write_manifest(tmp_path, PLAN, [sidecar], labels, ["a", "b", "c"], ["cat", "dog"], vae)
    (tmp_path / shards.MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UserError, match=message):
        shards.read_manifest(tmp_path)
