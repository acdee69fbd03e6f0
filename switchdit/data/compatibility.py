"""Do these latents belong to this run? Asked before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchdit.config import DataConfig
from switchdit.data.autoencoder import WEIGHTS
from switchdit.data.latent_dataset import UNKNOWN, LatentDataset
from switchdit.errors import UserError
from switchdit.files import sha256_of


def check_latents(dataset: LatentDataset, data: DataConfig, model_fields: dict[str, Any]) -> None:
    """Compare what the latents' manifest says with the run's config.

    Raises:
        UserError: latents of another resolution, shape, number of classes or autoencoder, or without the flipped
            images that the config asks for.
    """
    where = f"latents '{data.latents}'"
    if dataset.image_size != data.image_size:
        raise UserError(f"{where} were made at {dataset.image_size} pixels, but data.image_size is {data.image_size}")
    expected = (model_fields["in_channels"], model_fields["input_size"], model_fields["input_size"])
    if tuple(dataset.latent_shape) != expected:
        raise UserError(
            f"{where} have shape {tuple(dataset.latent_shape)}, but the model expects {expected} "
            "(in_channels, input_size, input_size)"
        )
    if dataset.num_classes != model_fields["num_classes"]:
        raise UserError(
            f"{where} have {dataset.num_classes} classes, but model.num_classes is {model_fields['num_classes']}"
        )
    if data.horizontal_flip and not dataset.has_flip:
        raise UserError(f"{where} hold no flipped images; set data.horizontal_flip to false or extract them anew")
    weights, name = Path(data.vae) / WEIGHTS, dataset.manifest["vae"]["name"]
    known = dataset.vae_sha256 != UNKNOWN
    if known and weights.is_file():
        sha256 = sha256_of(weights)
        if sha256 != dataset.vae_sha256:
            raise UserError(
                f"{where} were made by another autoencoder (sha256 {dataset.vae_sha256[:12]}...) than data.vae "
                f"'{data.vae}' (sha256 {sha256[:12]}...)"
            )
    elif data.vae != name:
        hint = "" if known else f"; if they are the same, import the latents again with --vae {data.vae}"
        raise UserError(f"{where} were made by autoencoder '{name}', but data.vae is '{data.vae}'{hint}")
