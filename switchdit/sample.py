"""Sample images from a checkpoint's averaged weights into a .npz in ADM's format and a picture.

deepspeed [launcher options] switchdit/sample.py --checkpoint RUN_DIR --out samples.npz [--num-samples 50000]
          [sample.key=value ...]       (or plain python for one process; e.g. sample.cfg_scale=4.0)
          or, of published weights (.pt of the authors, or what tools/convert_checkpoint.py made of it):
          --weights FILE --config switchdit/configs/X.yaml --out samples.npz [section.key=value ...]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # the launcher runs this as a file: import from the repository root, not from switchdit/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from switchdit.config import Config, config_from_dict, load_config
from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import allocate, atomic_write, make_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from switchdit.data.autoencoder import Autoencoder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=__doc__.split("\n\n")[1])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="a run's folder (its newest checkpoint) or a checkpoint")
    source.add_argument("--weights", help="weights of the authors, with the --config that describes them")
    parser.add_argument("--config", help="YAML file, with --weights: model, diffusion, data.vae and sample")
    parser.add_argument("--which", choices=("ema", "model"), default="ema", help="entry of a file of --weights")
    parser.add_argument("--out", required=True, help="arr_0 (N, H, W, 3) uint8 and arr_1 (N,) labels; .npz")
    parser.add_argument("--grid", help="picture with one row per class (default: beside --out, .png)")
    parser.add_argument("--num-samples", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass and process, on a GPU")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone")
    parser.add_argument("--vae", help="decoder, if it is not where the run's config says")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. sample.num_steps=50")
    return parser.parse_intermixed_args()  # overrides may stand between options


@exit_on_user_error
def main() -> None:
    args = arguments()
    for name, value in (("--num-samples", args.num_samples), ("--batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; it must be from 0 to {2**32 - 1}")
    if args.config and args.checkpoint:
        raise UserError("--config is for --weights: a run has a config of its own; change it by sample.key=value")
    if args.which != "ema" and args.checkpoint:
        raise UserError("--which is for --weights: of a run the averaged weights are sampled")
    if Path(args.out).suffix != ".npz":
        raise UserError(f"--out is '{args.out}'; it must end in .npz")
    sample(args)


def sample(args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from switchdit.engine.compilation import check_compiler, compile_model
    from switchdit.engine.engine import barrier, init_processes, leave, wait_long
    from switchdit.engine.generate import (
        DecoderBeside,
        balanced_labels,
        check_sampling,
        class_rows,
        cpu_block_size,
        image_blocks,
        image_grid,
        sample_latents,
    )
    from switchdit.engine.objective import build_process
    from switchdit.models import system_of
    from switchdit.progress import progress

    # Validate and load.
    processes = init_processes()
    wait_long()  # for processes that have a block more, or slower images
    load = load_run if args.checkpoint else load_published
    config, model, autoencoder = load(args, processes.device)
    check_sampling(config.sample, model.in_channels, model.num_timesteps, model.null_label is not None)
    if config.sample.compile:
        check_compiler("sample.compile", system_of(config.model_name), processes.device)
        compile_model(model)
    process = build_process(config.diffusion, model.num_timesteps)

    # The last bits of an image depend on how many share a call with it, and on a CPU on the number of threads, which is
    # one there, so that any number of processes makes the same images.
    on_cpu = processes.device.type == "cpu"
    size = cpu_block_size(args.num_samples) if on_cpu else args.batch_size
    blocks = image_blocks(args.num_samples, size, world_size=1 if on_cpu else processes.world_size)
    shares = np.array_split(blocks, processes.world_size)
    counts = [int((share < args.num_samples).sum()) for share in shares]
    mine = shares[processes.rank]
    labels = balanced_labels(blocks.size, model.num_classes)
    if on_cpu:
        torch.set_num_threads(1)

    # Sample: every process its share of the images, into a file of its own.
    out = Path(args.out)
    make_folder(out.parent)
    parts = [out.parent / f".{out.name}.part_{rank:05d}" for rank in range(processes.world_size)]
    side = model.input_size * autoencoder.downsampling
    if processes.is_first:
        print(
            f"sampling {args.num_samples} images of {side}x{side} from {args.checkpoint or args.weights}: "
            f"{config.sample.sampler}, {config.sample.num_steps} steps, guidance {config.sample.cfg_scale}, "
            f"seed {args.seed}",
            flush=True,
        )
    try:
        images = allocate(parts[processes.rank], (counts[processes.rank], side, side, 3))

        def keep(block: np.ndarray, decoded: np.ndarray) -> None:
            wanted = block[block < args.num_samples]
            images[wanted - mine[0, 0]] = decoded[: len(wanted)]

        steps = len(mine) * config.sample.num_steps
        with progress(desc="sample", total=steps, unit="step") as bar, DecoderBeside(autoencoder) as decode:
            for block in mine:
                y = torch.from_numpy(labels[block])
                options = (config.sample, args.seed, autoencoder.bounded, bar.update)
                latents = sample_latents(model, process, y, block.tolist(), *options)
                decode(latents, partial(keep, block))
        if len(images):
            images.flush()
        barrier()
        if processes.is_first:
            grid = Path(args.grid) if args.grid else out.with_suffix(".png")
            labels, shape = labels[: args.num_samples], (side, side, 3)
            write(out, parts, shape, labels)
            chosen, columns = class_rows(labels, max_rows=10, columns=12)
            with atomic_write(grid) as file:
                picture = image_grid(read(parts, shape, counts, chosen), columns)
                Image.fromarray(picture).save(file, format="PNG")
            print(f"wrote {out} ({args.num_samples} images, arr_0 uint8, arr_1 labels) and {grid}")
        barrier()
    finally:
        for part in parts if processes.is_first else [parts[processes.rank]]:
            part.unlink(missing_ok=True)
    leave()


def load_run(args: argparse.Namespace, device: torch.device) -> tuple[Config, nn.Module, Autoencoder]:
    """A run's averaged weights, with the settings of the run."""
    from switchdit.data.autoencoder import load_autoencoder
    from switchdit.data.latent_dataset import UNKNOWN
    from switchdit.engine.checkpoint_folder import find_checkpoint, read_ema, read_state
    from switchdit.engine.generate import build_averaged_model

    if others := [override for override in args.overrides if not override.startswith("sample.")]:
        raise UserError(f"override '{others[0]}' would change what the run was; only sample.key=value can be given")
    checkpoint = find_checkpoint(args.checkpoint)
    state = read_state(checkpoint)
    config = config_from_dict(state["config"], args.overrides)
    autoencoder = load_autoencoder(args.vae or config.data.vae, device)
    if state.get("vae_sha256") not in (UNKNOWN, autoencoder.identity["sha256"]):
        raise UserError(
            f"autoencoder '{args.vae or config.data.vae}' is not the one whose latents the run was trained on: "
            f"sha256 {autoencoder.identity['sha256']} instead of {state.get('vae_sha256')}"
        )
    return config, build_averaged_model(state["model"], read_ema(checkpoint), device, config.sample.dtype), autoencoder


def load_published(args: argparse.Namespace, device: torch.device) -> tuple[Config, nn.Module, Autoencoder]:
    """The authors' weights in the model that a config describes, all experts on this device."""
    import torch

    from switchdit.data.autoencoder import load_autoencoder
    from switchdit.engine.reference_checkpoints import load_reference_checkpoint
    from switchdit.models import build_model

    if not args.config:
        raise UserError("--weights needs a --config that describes the model, such as switchdit/configs/X.yaml")
    config = load_config(args.config, args.overrides)
    autoencoder = load_autoencoder(args.vae or config.data.vae, device)
    one_device = {"ep_size": 1} if "ep_size" in config.model else {}
    model = build_model(config.model_name, **{**config.model_overrides, **one_device})
    expected = (model.in_channels, model.input_size, model.input_size)
    if (latents := autoencoder.latent_shape(config.data.image_size)) != expected:
        raise UserError(
            f"model.input_size and in_channels make latents of {expected}, the autoencoder of {latents} for "
            f"data.image_size {config.data.image_size}"
        )
    load_reference_checkpoint(model, args.weights, args.which)
    model = model.to(device, getattr(torch, config.sample.dtype)).eval().requires_grad_(False)
    return config, model, autoencoder


def write(out: Path, parts: list[Path], shape: tuple[int, ...], labels: np.ndarray) -> None:
    """ADM's format: the images of all parts as arr_0, ``labels`` as arr_1; without the time, so that bytes repeat."""
    import numpy as np

    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
    with atomic_write(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, member, 2**20)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, labels)


def read(parts: list[Path], shape: tuple[int, ...], counts: list[int], indices: np.ndarray) -> np.ndarray:
    """Images by their number in the whole set, of which each part holds the next ``counts``."""
    import numpy as np

    starts = np.cumsum([0, *counts])
    images = np.empty((len(indices), *shape), np.uint8)
    for image, index in zip(images, indices, strict=True):
        part = np.searchsorted(starts, index, side="right") - 1
        image[:] = np.fromfile(parts[part], np.uint8, image.size, offset=(index - starts[part]) * image.size).reshape(
            shape
        )
    return images


if __name__ == "__main__":
    main()
