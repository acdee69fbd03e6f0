"""Latents that do not belong to a run are refused; those of an autoencoder known by name alone are told by it."""

from dataclasses import replace

import numpy as np
import pytest

from switchdit.config import DataConfig
from switchdit.data import latent_shards as shards
from switchdit.data.autoencoder import WEIGHTS
from switchdit.data.compatibility import check_latents
from switchdit.data.latent_dataset import UNKNOWN, LatentDataset
from switchdit.errors import UserError
from switchdit.files import sha256_of

NAME, SHAPE = "test/autoencoder", (4, 8, 8)
FIELDS = {"in_channels": 4, "input_size": 8, "num_classes": 3}


def write(out, vae_sha256, flip=True, stored="moments"):
    plan = shards.Plan("d", 2, 64, SHAPE, 2, "float32", vae_sha256, 0.5, "t", flip, stored)
    sidecar = shards.write_shard(out, 0, np.zeros((2, *plan.image_shape), np.float16), plan, "s")
    vae = {"name": NAME, "sha256": vae_sha256}
    shards.write_manifest(out, plan, [sidecar], np.array([0, 2]), ["a", "b"], ["x", "y", "z"], vae)
    return LatentDataset(out)


@pytest.fixture
def folder(tmp_path):
    """Of an autoencoder; only its weights' hash counts here."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / WEIGHTS).write_bytes(b"weights")
    return tmp_path / "vae"


def config(latents, vae=NAME, image_size=64, horizontal_flip=True):
    return DataConfig(latents=str(latents), vae=str(vae), image_size=image_size, horizontal_flip=horizontal_flip)


@pytest.mark.parametrize("stored", ["moments", "sample"])
@pytest.mark.parametrize("flip", [True, False])
def test_what_is_stored_matters_only_where_mirrored_images_are_asked_for(tmp_path, stored, flip):
    data = write(tmp_path, "v" * 64, flip, stored)
    check_latents(data, config(tmp_path, horizontal_flip=flip), FIELDS)
    check_latents(data, config(tmp_path, horizontal_flip=False), FIELDS)
    if not flip:
        with pytest.raises(UserError, match=r"no flipped images; set data\.horizontal_flip to false"):
            check_latents(data, config(tmp_path), FIELDS)


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        ({"image_size": 32}, {}, r"made at 64 pixels, but data\.image_size is 32"),
        ({}, {"input_size": 16}, r"have shape \(4, 8, 8\), but the model expects \(4, 16, 16\)"),
        ({}, {"in_channels": 3}, r"the model expects \(3, 8, 8\)"),
        ({}, {"num_classes": 4}, r"have 3 classes, but model\.num_classes is 4"),
        ({"vae": "other/autoencoder"}, {}, rf"made by autoencoder '{NAME}', but data\.vae is 'other/autoencoder'$"),
    ],
)
def test_what_differs_is_named(tmp_path, data, fields, message):
    with pytest.raises(UserError, match=message):
        check_latents(write(tmp_path, "v" * 64), replace(config(tmp_path), **data), {**FIELDS, **fields})


def test_an_autoencoder_at_hand_is_told_by_its_weights(tmp_path, folder):
    data = write(tmp_path / "latents", sha256_of(folder / WEIGHTS))
    check_latents(data, config(tmp_path, folder), FIELDS)
    (folder / WEIGHTS).write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"made by another autoencoder \(sha256"):
        check_latents(data, config(tmp_path, folder), FIELDS)


def test_one_known_by_name_alone_is_told_by_it(tmp_path, folder):
    data = write(tmp_path / "latents", UNKNOWN)
    check_latents(data, config(tmp_path), FIELDS)
    for other in (folder, "other/autoencoder"):
        with pytest.raises(UserError, match=f"made by autoencoder '{NAME}', .* import the latents again with --vae"):
            check_latents(data, config(tmp_path, other), FIELDS)
