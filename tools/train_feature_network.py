"""Train a small classifier on a folder of images, to be the feature network of `tools/eval_fid.py --features`.

    python tools/train_feature_network.py --data DIR --out FILE [--image-size 32] [--steps 120] [--seed 0]

DIR has one sub-folder per class. A fifth of each class is held out, and its accuracy printed; the images become square
as in tools/extract_latents.py. Where FILE was made of the same images with the same settings, it is left as it is.

On scikit-learn's digits (tools/digits.py), with the defaults: 98.5 % or more of the held-out fifth, in ten seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

from switchdit.errors import UserError, exit_on_user_error
from switchdit.progress import progress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from switchdit.data.image_source import ImageSource
    from tools.feature_network import Architecture, Classifier

# N = images, S = pixels of a side, K = classes

CHANNELS = (32, 64, 128)
NUM_FEATURES = 64
HELD_OUT = 5  # one image in five, of every class
BATCH = 128
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05
THREADS = 2


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with one sub-folder of images per class")
    parser.add_argument("--out", type=Path, required=True, help="the file to write (safetensors)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels of a side, a multiple of 8")
    parser.add_argument("--steps", type=int, default=120, help=f"of {BATCH} images each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    stages = 2 ** len(CHANNELS)
    if args.image_size < stages or args.image_size % stages or args.image_size > 512:
        raise UserError(f"--image-size is {args.image_size}; it must be a multiple of {stages}, at most 512")
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must not be negative")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; give a file")
    train(args)


def train(args: argparse.Namespace) -> None:
    """Train, print the accuracy on the held-out images, and write the file."""
    import numpy as np

    from switchdit.data.image_pixels import read_all_images
    from switchdit.data.image_source import list_images

    source = list_images(args.data)
    if len(source.class_names) < 2:
        raise UserError(f"--data {args.data} has fewer than two class folders; a classifier needs two")
    settings = {
        "images_sha256": images_sha256(source),
        "image_size": args.image_size,
        "steps": args.steps,
        "seed": args.seed,
        "recipe": [list(CHANNELS), NUM_FEATURES, HELD_OUT, BATCH, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING],
    }
    if accuracy := accuracy_of_former_training(args.out, settings):
        print(f"{args.out} is up to date: {accuracy:.2%} of the held-out images recognised")
        return

    import torch

    from tools.feature_network import Architecture, save_feature_network

    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    images, labels = read_all_images(source, args.image_size), np.asarray(source.labels, np.int64)
    held_out = held_out_images(labels)
    architecture = Architecture(args.image_size, CHANNELS, NUM_FEATURES, source.class_names)
    classifier = fit(architecture, images[~held_out], labels[~held_out], args.steps, args.seed)
    accuracy = recognised(classifier, images[held_out], labels[held_out])
    training = {"settings": settings, "held_out_accuracy": accuracy}
    architecture = Architecture(args.image_size, CHANNELS, NUM_FEATURES, source.class_names, training)
    save_feature_network(args.out, classifier, architecture)
    print(
        f"wrote {args.out}: {NUM_FEATURES} features; {accuracy:.2%} of the {int(held_out.sum())} held-out images "
        f"recognised, trained on {int((~held_out).sum())}"
    )


def images_sha256(source: ImageSource) -> str:
    """Of the names and contents of all images; `UserError` naming one that cannot be read."""
    digest = hashlib.sha256()
    for i, name in enumerate(source.names):
        try:
            content = source.reader(i)()
        except (OSError, ValueError) as problem:
            raise UserError(f"cannot read the image {source.where(i)}: {problem}; repair or remove it") from problem
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def accuracy_of_former_training(path: Path, settings: dict[str, Any]) -> float | None:
    """The held-out accuracy of the network at ``path`` if it was trained with these settings, else None."""
    from tools.feature_network import load_classifier

    if not path.is_file():
        return None
    try:
        training = load_classifier(path).architecture.training
    except UserError:
        return None  # something else, or damaged: it is replaced
    return training.get("held_out_accuracy") if training.get("settings") == settings else None


def held_out_images(labels: np.ndarray) -> np.ndarray:
    """(N,) bool: every fifth image of each class. Raises `UserError` when a class has fewer than five."""
    import numpy as np

    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < HELD_OUT:
            raise UserError(f"class {label} has {len(members)} images; at least {HELD_OUT} are needed to hold out one")
        held_out[members[HELD_OUT - 1 :: HELD_OUT]] = True
    return held_out


def fit(architecture: Architecture, images: np.ndarray, labels: np.ndarray, steps: int, seed: int) -> Classifier:
    """Train on images (N, S, S, 3) uint8 that are moved by up to a sixteenth of their side; AdamW, one cycle."""
    import torch
    from torch.nn import functional

    from tools.feature_network import Classifier, normalised

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(architecture).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels)
    order = torch.empty(0, dtype=torch.int64)
    bar = progress(range(steps), desc="training the classifier", unit="step")
    for _ in bar:
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(pixels), generator=generator)])
        chosen, order = order[:BATCH], order[BATCH:]
        batch = shifted(normalised(pixels[chosen]), architecture.image_size // 16, generator)
        _, logits = classifier(batch)
        loss = functional.cross_entropy(logits, targets[chosen], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return classifier.eval()


def shifted(images: Tensor, most: int, generator) -> Tensor:
    """Images (N, 3, S, S), each moved by up to ``most`` pixels each way; the border's pixels are repeated."""
    import torch
    from torch.nn import functional

    n, size = len(images), images.shape[-1]
    padded = functional.pad(images, (most,) * 4, mode="replicate")
    rows, columns = torch.randint(0, 2 * most + 1, (2, n), generator=generator)
    return torch.stack(
        [image[:, r : r + size, c : c + size] for image, r, c in zip(padded, rows, columns, strict=True)]
    )


def recognised(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images (N, S, S, 3) whose label (N,) gets the highest logit."""
    import torch

    from tools.feature_network import normalised

    with torch.inference_mode():
        parts = [classifier(normalised(images[i : i + BATCH]))[1].argmax(1) for i in range(0, len(images), BATCH)]
    return float((torch.cat(parts).numpy() == labels).mean())


if __name__ == "__main__":
    main()
