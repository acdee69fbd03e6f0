"""Reading latents back: any sample by index, and every damage named."""

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.data import latent_shards as shards
from switchdit.data.latent_dataset import LatentDataset
from switchdit.errors import UserError

LABELS, NAMES = "labels_00000.npy", "names_00000.json"
SHARD_SIZES = (4, 0, 3, 4, 1)  # the second lost all its images to --skip-bad
TOTAL = sum(SHARD_SIZES)


def write_dataset(path, flip=True, stored="moments"):
    """A data set of 12 images; returns what is stored of them (12, V, K, 2, 3, 4) and labels."""
    plan = shards.Plan("d", TOTAL, 8, (2, 3, 4), 4, "float32", "v" * 64, 0.5, "t", flip, stored)
    everything = np.random.default_rng(0).normal(size=(TOTAL, *plan.image_shape)).astype(np.float16)
    parts = np.split(everything, np.cumsum(SHARD_SIZES)[:-1])
    sidecars = [shards.write_shard(path, index, part, plan, "s") for index, part in enumerate(parts)]
    labels = np.arange(TOTAL) % 3
    names = [f"{i}.png" for i in range(TOTAL)]
    shards.write_manifest(path, plan, sidecars, labels, names, ["a", "b", "c"], {"name": "n", "sha256": "v" * 64})
    return everything, labels


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents")
    return path, *write_dataset(path)


def test_attributes_come_from_the_manifest(stored):
    path, _, labels = stored
    data = LatentDataset(path)
    assert len(data) == TOTAL
    assert np.array_equal(data.labels, labels)
    assert (data.num_classes, data.class_names, data.latent_shape) == (3, ["a", "b", "c"], (2, 3, 4))
    assert (data.scale_factor, data.vae_sha256, data.image_size, data.has_flip) == (0.5, "v" * 64, 8, True)
    data.verify()


@given(st.lists(st.tuples(st.integers(0, TOTAL - 1), st.booleans()), max_size=40))
def test_moments_are_those_asked_for_in_that_order(stored, wanted):
    path, everything, _ = stored
    indices = np.array([index for index, _ in wanted], np.int64)
    flipped = np.array([flip for _, flip in wanted], np.bool_)
    mean, std = LatentDataset(path).moments(indices, flipped)
    assert mean.dtype == std.dtype == np.float32
    expected = everything[indices, flipped.astype(int)].astype(np.float32)
    assert np.array_equal(mean, expected[:, 0])
    assert np.array_equal(std, expected[:, 1])


@pytest.mark.parametrize("flip", [False, True])
def test_one_draw_in_place_of_moments_has_no_spread(tmp_path, flip):
    everything, _ = write_dataset(tmp_path, flip, "sample")
    data = LatentDataset(tmp_path)
    assert (data.has_flip, data.stored) == (flip, "sample")
    images = np.array([11, 0, 4, 4])
    for view in (False, True)[: 1 + flip]:
        mean, std = data.moments(images, np.full(4, view))
        assert np.array_equal(mean, everything[images, int(view), 0].astype(np.float32))
        assert std.shape == mean.shape and std.dtype == np.float32 and not std.any()
    data.verify()


def test_mirrored_images_that_are_not_there_are_not_made_up(tmp_path):
    everything, _ = write_dataset(tmp_path, flip=False)
    data = LatentDataset(tmp_path)
    mean, std = data.moments(np.array([3, 9]), np.array([False, False]))
    assert np.array_equal(np.stack([mean, std], axis=1), everything[[3, 9], 0].astype(np.float32))
    with pytest.raises(ValueError, match="no flipped images"):
        data.moments(np.array([3, 9]), np.array([False, True]))


def test_names_are_those_of_the_images_and_read_when_asked_for(tmp_path):
    write_dataset(tmp_path)
    data = LatentDataset(tmp_path)
    assert data.names == [f"{i}.png" for i in range(TOTAL)]
    for damage in ('["a"]', "{}", "[", json.dumps([1] * TOTAL), "[" * 100_000, None):
        (tmp_path / NAMES).unlink() if damage is None else (tmp_path / NAMES).write_text(damage)
        data = LatentDataset(tmp_path)
        with pytest.raises(UserError, match=NAMES):
            _ = data.names


@pytest.mark.parametrize("index", [-1, TOTAL])
def test_index_outside_is_an_error_not_another_image(stored, index):
    with pytest.raises(IndexError, match=str(index)):
        LatentDataset(stored[0]).moments(np.array([index]), np.array([False]))


def test_integers_in_place_of_the_flip_mask_are_refused(stored):
    with pytest.raises(ValueError, match="flipped"):
        LatentDataset(stored[0]).moments(np.array([0, 1]), np.array([0, 1]))


def test_pickling_carries_the_path_not_the_data(stored):
    data = LatentDataset(stored[0])
    packed = pickle.dumps(data)
    assert len(packed) < 1000
    indices, flipped = np.arange(TOTAL), np.ones(TOTAL, bool)
    for one, other in zip(data.moments(indices, flipped), pickle.loads(packed).moments(indices, flipped), strict=True):
        assert np.array_equal(one, other)


def cut(path, name):
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-8])


def swap_shards(path):
    one, other = path / "shard_00002.npy", path / "shard_00004.npy"
    one_bytes = one.read_bytes()
    one.write_bytes(other.read_bytes().ljust(len(one_bytes), b"\0"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / shards.MANIFEST).unlink(), "not complete.*run the same extraction command again"),
        (lambda path: (path / shards.MANIFEST).write_text("{"), "not JSON"),
        (lambda path: (path / LABELS).unlink(), "labels_00000.npy is missing"),
        (lambda path: cut(path, LABELS), "labels_00000.npy is damaged: it has"),
        (lambda path: (path / LABELS).write_bytes(b""), "labels_00000.npy is damaged: it does not begin"),
        (lambda path: np.save(path / LABELS, np.zeros(5, np.int64)), r"\(5,\), the manifest says"),
        (lambda path: np.save(path / LABELS, np.full(TOTAL, 7)), "classes 7 to 7"),
        (lambda path: (path / "shard_00003.npy").unlink(), "shard_00003.npy is missing"),
        (lambda path: cut(path, "shard_00002.npy"), "shard_00002.npy has"),
        (swap_shards, r"shard_00002.npy holds float16 \(1,"),
    ],
)
def test_damaged_data_set_is_refused_and_the_file_named(tmp_path, damage, message):
    write_dataset(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        LatentDataset(tmp_path)


def test_pickled_arrays_are_never_loaded(tmp_path):
    write_dataset(tmp_path)
    np.save(tmp_path / LABELS, np.array([print] * TOTAL, object), allow_pickle=True)
    with pytest.raises(UserError, match="pickled Python objects"):
        LatentDataset(tmp_path)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([LABELS, "shard_00000.npy"]), st.integers(0, 127), st.binary(min_size=1, max_size=4))
def test_damaged_heads_are_told_or_harmless(fuzzed, name, position, damage):
    """Nothing but a `UserError` comes of them, and what opens has the values that were written."""
    path, everything = fuzzed
    sound = bytearray((path / name).read_bytes())
    damaged = sound.copy()
    damaged[position : position + len(damage)] = damage
    (path / name).write_bytes(damaged)
    try:
        data, message = LatentDataset(path), name
    except UserError as mistake:
        data, message = None, str(mistake)
    finally:
        (path / name).write_bytes(sound)
    assert name in message and "\n" not in message
    if data and damaged[128:] == sound[128:]:
        assert np.array_equal(data.moments(np.arange(4), np.zeros(4, bool))[0], everything[:4, 0, 0])
        assert np.array_equal(data.labels, np.arange(TOTAL) % 3)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzzed")
    return path, write_dataset(path)[0]


def test_verify_finds_a_changed_bit(tmp_path):
    write_dataset(tmp_path)
    content = bytearray((tmp_path / "shard_00003.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "shard_00003.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"shard_00003.npy is damaged"):
        LatentDataset(tmp_path).verify()


@pytest.mark.parametrize("name", [LABELS, NAMES, "shard_00002.npy"])
def test_verify_tells_what_has_gone_since_opening(tmp_path, name):
    write_dataset(tmp_path)
    data = LatentDataset(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        data.verify()


def test_more_shards_than_files_may_be_open(tmp_path):
    write_dataset(tmp_path)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open(tmp_path, os.O_RDONLY) for _ in range(3)]  # the lowest that are, with gaps where others are open
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1] + 1, limits[1]))
    try:
        with pytest.raises(UserError, match=r"shard_0000\d\.npy cannot be read: Too many open files"):
            LatentDataset(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_empty_and_absent_folders(tmp_path):
    with pytest.raises(UserError, match="no extracted latents"):
        LatentDataset(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        LatentDataset(tmp_path / "nowhere")
