"""Shard files: mapping, resumption, refusal of other plans, and nothing half-written."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchdit.data import latent_conflicts as conflicts
from switchdit.data import latent_shards as shards
from switchdit.errors import UserError
from tools.extraction import to_float16

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
    sidecar = shards.write_shard(tmp_path, 0, moments(1), PLAN, "source", ["bad.png"])
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
    conflicts.check_same_plan(tmp_path, PLAN)
    shards.write_shard(tmp_path, 0, moments(2), PLAN, "source")
    conflicts.check_same_plan(tmp_path, PLAN)
    with pytest.raises(UserError, match=f"{next(iter(change))} .* there"):
        conflicts.check_same_plan(tmp_path, replace(PLAN, **change))


@pytest.mark.parametrize("value", [70000.0, np.nan, np.inf])
def test_value_beyond_float16_names_the_image(value):
    batch = np.zeros((3, 2, 2, 1, 1, 1), np.float32)
    batch[1, 1, 0] = value
    with pytest.raises(UserError, match=r"b\.png"):
        to_float16(batch, ["a.png", "b.png", "c.png"])


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


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def in_one_line(work):
    """What ``work`` returns, or None where it raises a `UserError` of one line; nothing else may be raised."""
    try:
        return work()
    except UserError as problem:
        message = str(problem)
    return None if "\n" not in message else pytest.fail(message)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    out = tmp_path_factory.mktemp("complete")
    sidecar = shards.write_shard(out, 0, moments(2), replace(PLAN, num_files=2), "s")
    vae = {"name": "n", "sha256": "v"}
    manifest = shards.write_manifest(out, replace(PLAN, num_files=2), [sidecar], np.array([0, 1]), "ab", "cd", vae)
    return out, sidecar, manifest


@given(st.data())
def test_sidecar_edited_by_hand_counts_as_it_was_or_not_at_all(complete, data):
    out, sidecar, _ = complete
    plan, path = replace(PLAN, num_files=2), shards.sidecar_path(out, 0)
    key = data.draw(st.sampled_from(sorted(sidecar)))
    path.write_text(json.dumps({**sidecar, key: data.draw(JUNK)}))
    in_one_line(lambda: conflicts.check_same_plan(out, plan))
    found = in_one_line(lambda: shards.finished_shard(out, 0, plan, "s", False))
    assert found is None or {**found, "sha256": ""} == {**json.loads(json.dumps(sidecar)), "sha256": ""}


@given(st.data())
def test_manifest_edited_by_hand_is_read_or_refused_in_a_line(complete, data):
    out, _, manifest = complete
    key = data.draw(st.sampled_from(sorted(manifest)))
    edited = {**manifest, key: data.draw(JUNK)}
    if data.draw(st.booleans()):
        edited["sources"] = [{**manifest["sources"][0], data.draw(st.sampled_from(["images", "shard_size"])): 0}]
    (out / shards.MANIFEST).write_text(json.dumps(edited))
    found = in_one_line(lambda: shards.read_manifest(out))
    if found:
        in_one_line(lambda: conflicts.check_same_settings(out, found, PLAN))
        assert found["num_images"] == 2


@given(st.binary(max_size=40) | st.just(b"[" * 100_000))
def test_any_bytes_as_manifest(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("out")
    (out / shards.MANIFEST).write_bytes(data)
    assert in_one_line(lambda: shards.read_manifest(out)) is None


def test_appended_shards_are_listed_after_those_that_are_there(tmp_path):
    vae, first = {"name": "n", "sha256": "v"}, replace(PLAN, num_files=2)
    sidecar = shards.write_shard(tmp_path, 0, moments(1), first, "s", ["bad.png"])
    manifest = shards.write_manifest(tmp_path, first, [sidecar], np.array([0]), ["a"], ["cat"], vae)
    more = replace(PLAN, images="e", num_files=1, first_shard=1)
    conflicts.check_same_settings(tmp_path, manifest, more)
    with pytest.raises(UserError, match="flip True there, False now"):
        conflicts.check_same_settings(tmp_path, manifest, replace(more, flip=False))
    sidecar = shards.write_shard(tmp_path, 1, moments(1, seed=1), more, "s")
    assert shards.read_manifest(tmp_path) == manifest  # until the new one is written
    labels = np.array([0, 1])
    grown = shards.write_manifest(tmp_path, more, [sidecar], labels, ["a", "b"], ["cat", "dog"], vae, manifest)
    assert grown == shards.read_manifest(tmp_path)
    assert [entry["file"] for entry in grown["shards"]] == ["shard_00000.npy", "shard_00001.npy"]
    assert [source["first_shard"] for source in grown["sources"]] == [0, 1]
    assert grown["skipped"] == ["bad.png"]
    assert sorted(path.name for path in tmp_path.glob("[ln]a*")) == ["labels_00001.npy", "names_00001.json"]
    assert shards.damaged_list(tmp_path, grown) is None
    (tmp_path / "names_00001.json").write_text("[]")
    assert shards.damaged_list(tmp_path, grown) == tmp_path / "names_00001.json"
