"""The image autoencoder (diffusers' AutoencoderKL), and the one place where its scale factor is applied.

Latents lie UNscaled in files and come out of `Autoencoder.encode` unscaled; a model is trained on
``(mean + std * noise) * scale_factor``; `Autoencoder.decode` takes such scaled latents and divides.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from switchdit.errors import UserError
from switchdit.files import sha256_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# N = images, C = latent channels, H, W = pixels, h, w = H / downsampling, W / downsampling

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
PIXELS = "pixels"  # the name of `PixelAutoencoder`
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Autoencoder:
    """A frozen `AutoencoderKL`.

    identity: ``{"name": as asked for, "sha256": of the weights file}``; two autoencoders are the same when the
    SHA-256 is, wherever they lie. scale_factor: diffusers' ``scaling_factor``. downsampling: pixels per latent cell.
    """

    model: AutoencoderKL | None
    identity: dict[str, str]
    scale_factor: float
    latent_channels: int
    downsampling: int

    bounded = False  # whether latents lie between -1 and 1

    @property
    def device(self) -> torch.device:
        return self.model.device

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of square images; `UserError` when ``image_size`` is not divisible."""
        if image_size <= 0 or image_size % self.downsampling:
            raise UserError(
                f"image size {image_size} is not a multiple of {self.downsampling}, "
                f"the downsampling of the autoencoder {self.identity['name']}"
            )
        cells = image_size // self.downsampling
        return self.latent_channels, cells, cells

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) in [-1, 1] -> mean and standard deviation, each (N, C, h, w), float32, UNscaled.

        Both stay on the autoencoder's device.
        """
        posterior = self.model.encode(images.to(self.model.device, self.model.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """SCALED latents (N, C, h, w) -> images (N, H, W, 3), uint8, on the autoencoder's device.

        x in [-1, 1] becomes ``clamp(127.5 * x + 128, 0, 255)`` cut to an integer, as the samplers of ADM and DiT
        do; so 255 levels turned into ``v / 127.5 - 1`` come back as they were.
        """
        unscaled = latents.to(self.model.device, torch.float32) / self.scale_factor
        return _to_levels(self.model.decode(unscaled.to(self.model.dtype)).sample.float())


class PixelAutoencoder(Autoencoder):
    """No autoencoder: images are their own latents, 3 channels from -1 to 1. For small images; ``vae: pixels``."""

    device = torch.device("cpu")  # nothing is computed
    bounded = True

    def __init__(self):
        identity = {"name": PIXELS, "sha256": hashlib.sha256(PIXELS.encode()).hexdigest()}
        super().__init__(model=None, identity=identity, scale_factor=1.0, latent_channels=3, downsampling=1)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) -> themselves and a standard deviation of zero, float32."""
        return images.float(), torch.zeros_like(images, dtype=torch.float32)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> images (N, H, W, 3), uint8."""
        return _to_levels(latents.float())


def _to_levels(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load_autoencoder(
    path_or_name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load an `AutoencoderKL` in diffusers' format from a folder, or from the hub by a name ``owner/model``.

    ``"pixels"`` is `PixelAutoencoder`. Only safetensors is read, never a pickle. Raises `UserError` with one line that
    says what to do when the folder or the network is missing, or when what lies there is not a complete AutoencoderKL.
    """
    name = str(path_or_name)
    if name == PIXELS and not Path(name).exists():
        return PixelAutoencoder()
    folder = Path(name) if Path(name).is_dir() else _fetch(name)
    _check_folder(name, folder)
    model = _load_model(name, folder, dtype)
    if torch.device(device).type == "cpu":
        model = model.to(memory_format=torch.channels_last)  # convolutions there are a third faster
    return Autoencoder(
        model=model.to(device).eval().requires_grad_(False),
        identity={"name": name, "sha256": sha256_of(folder / WEIGHTS)},
        scale_factor=float(model.config.scaling_factor),
        latent_channels=model.config.latent_channels,
        downsampling=2 ** (len(model.config.block_out_channels) - 1),
    )


def is_hub_name(name: str) -> bool:
    """Whether ``owner/model`` is meant, and not a path: where there is a folder "runs", "runs/vae" is one."""
    path = Path(name)
    return HUB_NAME.fullmatch(name) is not None and not path.exists() and not path.parent.exists()


def _fetch(name: str) -> Path:
    """The folder in the hub's cache with the config and the weights of ``owner/model``, downloaded if need be."""
    if not is_hub_name(name):
        fault = "is a file, not a folder" if Path(name).exists() else "does not exist"
        raise UserError(
            f"autoencoder {name} {fault}; give a folder with {CONFIG} and {WEIGHTS}, "
            "or a hub name such as stabilityai/sd-vae-ft-ema"
        )
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        return _from_hub(name, local_files_only=True)
    except (OSError, ValueError):
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"autoencoder {name} is no folder here: asking the Hugging Face hub for it", flush=True)
    try:
        return _from_hub(name, local_files_only=False)
    # The hub's own errors are OSErrors or ValueErrors, those of its HTTP client are not always.
    except Exception as problem:
        raise UserError(
            f"autoencoder {name} is neither a folder here nor could its {CONFIG} and {WEIGHTS} be had from the hub "
            f"({type(problem).__name__}); where there is a network run 'hf download {name} {CONFIG} {WEIGHTS} "
            "--local-dir DIR', then give DIR"
        ) from problem


def _from_hub(name: str, local_files_only: bool) -> Path:
    import huggingface_hub

    paths = [huggingface_hub.hf_hub_download(name, f, local_files_only=local_files_only) for f in (CONFIG, WEIGHTS)]
    return Path(paths[0]).parent


def _check_folder(name: str, folder: Path) -> None:
    """Raise `UserError` unless ``folder`` has an AutoencoderKL's config and weights in safetensors."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"autoencoder {name} has no {CONFIG}; it must be a folder in diffusers' format")
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise UserError(
                f"autoencoder {name} has only pickled weights ({pickled[0]}), which can run code and are never "
                f"loaded; convert them once to {WEIGHTS} with diffusers' save_pretrained"
            )
        raise UserError(f"autoencoder {name} has no {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind, shift = config.get("_class_name"), config.get("shift_factor")
    except (ValueError, AttributeError) as problem:
        raise UserError(f"autoencoder {name}: {CONFIG} is not a JSON object") from problem
    if kind != "AutoencoderKL":
        raise UserError(f"autoencoder {name} is of class {kind}; only AutoencoderKL is supported")
    if shift is not None:
        raise UserError(f"autoencoder {name} has a shift_factor ({shift}); only a scaling_factor is supported")


def _load_model(name: str, folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """The model with all its weights from the file; diffusers would leave missing ones at random with a warning."""
    import diffusers
    import safetensors

    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        # Through from_pretrained, since it also reads the older names of the attention's weights, which the
        # published Stable Diffusion autoencoders have.
        model, report = diffusers.AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as problem:
        first_line = str(problem).strip().split("\n")[0]
        raise UserError(f"autoencoder {name} is damaged or does not fit its {CONFIG}: {first_line}") from problem
    finally:
        diffusers.logging.set_verbosity(verbosity)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            raise UserError(
                f"autoencoder {name}: {WEIGHTS} does not fit {CONFIG} "
                f"({len(report[fault])} {fault.replace('_', ' ')}, such as {sorted(report[fault])[0]})"
            )
    return model
