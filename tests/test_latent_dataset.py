"""Reading latents back: any sample by index, and every damage named."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchdit.data import latent_shards as shards
from switchdit.data.latent_dataset import LatentDataset
from switchdit.errors import UserError

LABELS = "labels_00000.npy"
SHARD_SIZES = (4, 0, 3, 4, 1)  # the second lost all its images to --skip-bad
TOTAL = sum(SHARD_SIZES)


def write_dataset(path):
    """A data set of 12 images; returns its moments (12, 2, 2, 2, 3, 4) and labels."""
    plan = shards.Plan("d", TOTAL, 8, (2, 3, 4), 4, "float32", "v" * 64, 0.5, "t")
    everything = np.random.default_rng(0).normal(size=(TOTAL, 2, 2, 2, 3, 4)).astype(np.float16)
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
        (lambda path: cut(path, LABELS), "labels_00000.npy is missing or damaged"),
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
    with pytest.raises(UserError, match="damaged"):
        LatentDataset(tmp_path)


def test_verify_finds_a_changed_bit(tmp_path):
    write_dataset(tmp_path)
    content = bytearray((tmp_path / "shard_00003.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "shard_00003.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"shard_00003.npy is damaged"):
        LatentDataset(tmp_path).verify()


def test_empty_and_absent_folders(tmp_path):
    with pytest.raises(UserError, match="no extracted latents"):
        LatentDataset(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        LatentDataset(tmp_path / "nowhere")
