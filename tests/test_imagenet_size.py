"""A data set of ImageNet's size, in files with holes: 42 GB to the reader, next to nothing on the disk."""

import tracemalloc

import numpy as np
import pytest

from switchdit.data import latent_shards as shards
from switchdit.data.latent_dataset import LatentDataset
from switchdit.data.training_batches import EpochOrder, TrainingBatches

NUM_IMAGES, NUM_CLASSES, LATENT_SHAPE = 1_281_167, 1000, (4, 32, 32)
SHARD_SIZE = shards.default_shard_size(shards.image_shape(LATENT_SHAPE, True, "moments"))
PLAN = shards.Plan("d", NUM_IMAGES, 256, LATENT_SHAPE, SHARD_SIZE, "float32", "v" * 64, 0.18215, "t")
MEGABYTE = 1 << 20


def digits(index, view):
    """What tells an image and its mirror image apart: numbers that float16 holds exactly."""
    return np.array([index % 1000, index // 1000 % 1000, index // 1_000_000, view], np.float16)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder, the images that hold more than zeros, and the labels."""
    out = tmp_path_factory.mktemp("imagenet")
    ranges = shards.shard_ranges(NUM_IMAGES, SHARD_SIZE)
    edges = [i for r in (*ranges[:2], *ranges[-2:]) for i in (r.start, r.stop - 1)]
    marked = np.unique(np.concatenate([edges, np.random.default_rng(0).integers(0, NUM_IMAGES, 40)]))
    sidecars = []
    for number, files in enumerate(ranges):
        path, shape = out / shards.shard_name(number), (len(files), *PLAN.image_shape)
        with open(path, "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            start, view_size = file.tell(), 2 * np.prod(PLAN.image_shape[1:])
            for index in marked[(marked >= files.start) & (marked < files.stop)]:
                for view in (0, 1):
                    file.seek(start + (2 * (index - files.start) + view) * view_size)
                    file.write(digits(index, view).tobytes())
            file.truncate(start + 2 * len(files) * view_size)
        size = path.stat().st_size
        sidecars.append({"file": path.name, "num": len(files), "bytes": size, "sha256": "", "skipped": []})
    labels = np.arange(NUM_IMAGES) % NUM_CLASSES
    names = [f"{i}.png" for i in range(NUM_IMAGES)]
    classes = [str(c) for c in range(NUM_CLASSES)]
    shards.write_manifest(out, PLAN, sidecars, labels, names, classes, {"name": "n", "sha256": "v" * 64})
    return out, marked, labels


@pytest.fixture(scope="module")
def data(stored):
    return LatentDataset(stored[0])


def test_opening_and_shuffling_takes_labels_and_a_permutation_of_memory(stored):
    tracemalloc.start()
    data = LatentDataset(stored[0])
    opened, _ = tracemalloc.get_traced_memory()
    EpochOrder(len(data), 0)[np.arange(256)]
    data.moments(np.arange(0, NUM_IMAGES, 40_037), np.zeros(32, bool))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(data), len(data.manifest["shards"])) == (NUM_IMAGES, 157)
    assert opened < 15 * MEGABYTE
    assert peak < 60 * MEGABYTE


def test_any_image_at_random(stored, data):
    _, marked, labels = stored
    images = np.random.default_rng(1).permutation(np.repeat(marked, 2))
    flipped = np.random.default_rng(2).random(len(images)) < 0.5
    mean, std = data.moments(images, flipped)
    expected = np.stack([digits(*pair) for pair in zip(images, flipped, strict=True)])
    assert np.array_equal(mean.reshape(len(images), -1)[:, :4], expected)
    assert not mean.reshape(len(images), -1)[:, 4:].any() and not std.any()
    assert np.array_equal(data.labels[marked], labels[marked])
    assert data.names[int(marked[-1])] == f"{NUM_IMAGES - 1}.png"


def visited(data, steps, world_size, global_batch):
    """Positions of all processes in these steps, in the order of steps and ranks."""
    options = {"num_timesteps": 1000, "label_dropout": 0.1, "horizontal_flip": True}
    micro_batch = global_batch // world_size // 2
    ranks = [
        TrainingBatches(
            data, seed=3, rank=rank, world_size=world_size, micro_batch=micro_batch, accumulation=2, **options
        )
        for rank in range(world_size)
    ]
    return np.concatenate([r.positions(step, micro) for step in steps for micro in (0, 1) for r in ranks])


def test_three_epochs_resumed_on_half_as_many_processes_show_each_image_three_times(data):
    global_batch, stopped_at = 1024, 1700  # in the second epoch
    steps = -(-3 * NUM_IMAGES // global_batch)
    positions = np.concatenate(
        [
            visited(data, range(stopped_at), 8, global_batch),
            visited(data, range(stopped_at, steps), 4, global_batch),
        ]
    )
    assert NUM_IMAGES < stopped_at * global_batch < 2 * NUM_IMAGES
    assert np.array_equal(positions, np.arange(steps * global_batch))
    order = EpochOrder(NUM_IMAGES, 3)
    images = np.concatenate([order[part] for part in np.array_split(positions, 40)])
    for epoch in range(3):
        of_epoch = images[epoch * NUM_IMAGES : (epoch + 1) * NUM_IMAGES]
        assert (np.bincount(of_epoch, minlength=NUM_IMAGES) == 1).all()
    assert (images[:NUM_IMAGES] == images[NUM_IMAGES : 2 * NUM_IMAGES]).mean() < 1e-4


def test_batches_of_both_runs_are_the_same_samples(data):
    """What 8 processes see in a step, 4 see too; the step spans the end of the first epoch."""
    step = NUM_IMAGES // 16
    options = {"num_timesteps": 1000, "label_dropout": 0.1, "horizontal_flip": True, "seed": 3, "accumulation": 1}
    seen = []
    for world_size in (8, 4):
        ranks = [
            TrainingBatches(data, rank=r, world_size=world_size, micro_batch=16 // world_size, **options)
            for r in range(world_size)
        ]
        batches = [rank.batch(step, 0) for rank in ranks]
        for field in ("index", "y", "t", "drop_label", "x0", "noise"):
            seen.append(np.concatenate([getattr(batch, field).numpy() for batch in batches]))
    for one, other in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        assert np.array_equal(one, other)
    order = EpochOrder(NUM_IMAGES, 3)
    assert np.array_equal(seen[0], order[np.arange(step * 16, (step + 1) * 16)])
    assert np.array_equal(seen[1], seen[0] % NUM_CLASSES)
