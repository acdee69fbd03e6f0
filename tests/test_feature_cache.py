"""Features kept on disk: found again by content, made anew when damaged, never a reason to fail."""

import errno
import warnings
from itertools import pairwise

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

from switchdit.errors import UserError
from tools import feature_cache
from tools.adm_metrics import neighbour_radii
from tools.feature_extraction import extract
from tools.feature_network import Features
from tools.image_sets import open_images
from tools.processes import Processes


class Means:
    """A network that counts what it sees: colour means and a few pixels."""

    image_size, num_classes = None, 2
    statistics_sizes: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, sha256="f" * 64):
        self.description = {"file": "means", "sha256": sha256}
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        flat = images.reshape(len(images), -1).astype(np.float32)
        light = flat.mean(axis=1, keepdims=True) / 255
        return Features(flat[:, :5], flat[:, 5:8], np.concatenate([light, 1 - light], axis=1))


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "ref.npz", np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8))
    return open_images(tmp_path / "ref.npz", "--ref")


def kept(images, network, folder):
    return feature_cache.features_of(images, network, 16, folder, Processes())


def assert_same(a, b):
    np.testing.assert_array_equal(a.pooled, b.pooled)
    np.testing.assert_array_equal(a.probabilities, b.probabilities)
    for one, other in ((a.pooled_moments, b.pooled_moments), (a.spatial_moments, b.spatial_moments)):
        assert one.count == other.count == len(a.pooled)
        np.testing.assert_array_equal(one.mean, other.mean)
        np.testing.assert_array_equal(one.covariance, other.covariance)


def only_entry(folder):
    (path,) = folder.iterdir()
    return path


def test_second_time_the_network_is_not_asked(images, tmp_path, capsys):
    network = Means()
    first = kept(images, network, tmp_path / "cache")
    assert network.seen == 40
    second = kept(open_images(images.path, "--ref"), network, tmp_path / "cache")
    assert network.seen == 40
    assert_same(first, second)
    path = only_entry(tmp_path / "cache")
    assert capsys.readouterr().out == f"features of the reference: from the cache {path}\n"
    kept(images, network, None)
    assert network.seen == 80


def test_entry_is_a_safetensors_file_that_holds_all(images, tmp_path):
    features = kept(images, Means(), tmp_path / "cache")
    arrays = safetensors.numpy.load_file(only_entry(tmp_path / "cache"))
    assert set(arrays) == {"pooled", "probabilities", "count", *MOMENTS}
    np.testing.assert_array_equal(arrays["pooled"], features.pooled)
    np.testing.assert_allclose(arrays["covariance"], np.cov(features.pooled.astype(np.float64), rowvar=False))
    np.testing.assert_allclose(arrays["spatial_mean"], features.spatial_moments.mean)


MOMENTS = ["mean", "covariance", "spatial_mean", "spatial_covariance"]


@pytest.mark.parametrize("change", ["images", "network", "version", "Pillow"])
def test_other_content_network_or_code_is_computed(change, images, tmp_path, monkeypatch):
    kept(images, Means(), tmp_path / "cache")
    network = Means("0" * 64 if change == "network" else "f" * 64)
    if change == "images":
        np.savez(images.path, np.load(images.path)["arr_0"][::-1].copy())
    if change == "version":
        monkeypatch.setattr(feature_cache, "VERSION", 99)
    if change == "Pillow":
        monkeypatch.setattr(feature_cache.PIL, "__version__", "99")
    kept(open_images(images.path, "--ref"), network, tmp_path / "cache")
    assert network.seen == 40
    assert len(list((tmp_path / "cache").iterdir())) == 2


class Meddler(Means):
    """While it works, somebody replaces the images."""

    def __call__(self, images):
        if not self.seen:
            self.change()
        return super().__call__(images)


@pytest.mark.parametrize("what", ["replaced", "removed"])
def test_a_set_that_changes_meanwhile_is_refused_and_not_kept(what, images, tmp_path):
    network = Meddler()
    network.change = images.path.unlink
    if what == "replaced":
        np.savez(tmp_path / "other.npz", np.zeros((40, 4, 4, 3), np.uint8))
        network.change = lambda: (tmp_path / "other.npz").replace(images.path)
    with pytest.raises(UserError, match=r"--ref .*ref.npz has changed while it was read"):
        kept(images, network, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_changes_meanwhile_is_refused_by_name(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"pictures/{i:02d}.png")
    network = Meddler()
    network.change = lambda: Image.new("RGB", (4, 4), "red").save(tmp_path / "pictures/17.png")
    with pytest.raises(UserError, match=r"17.png has changed while it was read"):
        kept(open_images(tmp_path / "pictures", "--samples"), network, tmp_path / "cache")


@pytest.mark.parametrize("found", ["half of it", "another size"])
def test_an_image_that_is_read_while_it_is_replaced_is_no_bad_image(tmp_path, found):
    for i in range(3):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
    images = open_images(tmp_path, "--samples")
    if found == "half of it":
        (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:30])
    else:
        Image.new("RGB", (5, 5), "red").save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"1.png has changed while it was read; start again$"):
        list(images.batches(2))


def damage(path, kind, images):
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no safetensors":
        path.write_bytes(b"hello" * 100)
    elif kind == "one bit":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    elif kind == "foreign":
        safetensors.numpy.save_file({"pooled": np.zeros((40, 5), np.float32)}, path)
    elif kind == "of another set":
        wanted = feature_cache.entry("0" * 64, "f" * 64)
        feature_cache.store(path.parent, wanted, {"pooled": np.zeros((40, 5), np.float32)})
        feature_cache.entry_path(path.parent, wanted).replace(path)
    elif kind == "arrays missing":
        wanted = feature_cache.entry(images.sha256(), "f" * 64)
        feature_cache.store(path.parent, wanted, {"pooled": np.zeros((40, 5), np.float32)})


DAMAGE = ["cut", "empty", "no safetensors", "one bit", "foreign", "of another set", "arrays missing"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_made_anew_with_one_warning(kind, images, tmp_path):
    first = kept(images, Means(), tmp_path / "cache")
    path = only_entry(tmp_path / "cache")
    damage(path, kind, images)
    network = Means()
    with pytest.warns(UserWarning, match="is left aside") as caught:
        second = kept(images, network, tmp_path / "cache")
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert str(path) in str(caught[0].message)
    assert network.seen == 40
    assert_same(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(first, kept(images, Means(), tmp_path / "cache"))


def test_a_full_disk_is_a_warning(images, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match=r"could not be written \(No space left on device\)"):
        features = kept(images, Means(), tmp_path / "cache")
    assert_same(features, extract(Means(), images, 16, Processes()))
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_made_is_a_warning(images):
    with pytest.warns(UserWarning, match="could not be written"):
        assert kept(images, Means(), images.path / "cache") is not None


def test_radii_are_kept_by_neighbours_and_distances(images, tmp_path, monkeypatch):
    network, folder = Means(), tmp_path / "cache"
    features = extract(network, images, 16, Processes())
    made = {
        (k, distances): feature_cache.radii_of(features, images, network, k, distances, folder)
        for k in (1, 3)
        for distances in ("float16", "float64")
    }
    assert len(list(folder.iterdir())) == 4
    monkeypatch.setattr(feature_cache, "neighbour_radii", None)
    for (k, distances), radii in made.items():
        np.testing.assert_array_equal(radii, neighbour_radii(features.pooled, k, distances).numpy())
        np.testing.assert_array_equal(radii, feature_cache.radii_of(features, images, network, k, distances, folder))


def test_parts_of_a_set_are_whole_batches_and_cover_it():
    for count in (1, 63, 64, 65, 1000):
        for world_size in (1, 2, 3, 7):
            parts = [Processes(rank, world_size).share(count, 64) for rank in range(world_size)]
            assert parts[0][0] == 0 and parts[-1][1] == count
            assert all(a[1] == b[0] and a[1] % 64 in (0, count % 64) for a, b in pairwise(parts))
            assert parts[0][1] > 0
            assert max(stop - start for start, stop in parts) <= 64 * -(-count // (64 * world_size))
