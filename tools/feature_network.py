"""Feature networks other than Inception: a small convolutional classifier, and the files that hold a network.

The classifier's file is safetensors: weights, and in its metadata one JSON text that describes the architecture. Any
other architecture comes as an exported program (.pt2), which `tools/exported_program.py` interprets. Nothing in either
can run code; pickles and TorchScript can, and are not opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from switchdit.errors import UserError
from switchdit.files import atomic_write, sha256_of

# N = images, S = pixels of a side, F = features, G = spatial features, K = classes

KIND = "switchdit classifier"
VERSION = 1
LARGEST = 4096  # of any number in a description: a file cannot ask for more memory than a sane network needs


@dataclass(frozen=True)
class Features:
    """What a network says of N images, float32: pooled (N, F); spatial (N, G) and probabilities (N, K), or None."""

    pooled: np.ndarray
    spatial: np.ndarray | None
    probabilities: np.ndarray | None


class FeatureNetwork(Protocol):
    """What `tools/eval_fid.py` needs of a network.

    description: kind, file and SHA-256, for metrics.json. image_size: the only one it takes, or None for any.
    num_classes: of its probabilities, or 0. statistics_sizes: of the arrays ``mu`` and so on that a reference may
    hold for this network; none are known for any but Inception.
    """

    description: dict[str, Any]
    image_size: int | None
    num_classes: int
    statistics_sizes: dict[str, int]

    def __call__(self, images: np.ndarray) -> Features:
        """Images (N, H, W, 3) uint8 -> their features."""
        ...


@dataclass(frozen=True)
class Architecture:
    """Stages of (3x3 convolution, batch norm, ReLU, 2x2 max pool), a linear layer to F features, ReLU, another to K.

    Args:
        image_size: S, a multiple of 2 ** len(channels). channels: width of each stage. num_features: F.
        class_names: K of them, in the order of the labels.
        training: how the weights came about; free of meaning here.

    Raises:
        ValueError: a number that makes no network.
    """

    image_size: int
    channels: Sequence[int]
    num_features: int
    class_names: Sequence[str]
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        numbers = [self.image_size, *self.channels, self.num_features, len(self.class_names)]
        if not all(type(n) is int and 1 <= n <= LARGEST for n in numbers) or not self.channels:
            raise ValueError(f"sizes must be integers from 1 to {LARGEST}, got {numbers}")
        if self.image_size % 2 ** len(self.channels):
            raise ValueError(f"image_size {self.image_size} is not divisible by 2 ** {len(self.channels)} (stages)")
        if not all(isinstance(name, str) for name in self.class_names):
            raise ValueError("class_names must be strings")


class Classifier(nn.Module):
    """The network of an `Architecture`."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        stages, width = [], 3
        for channels in architecture.channels:
            stages += [nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            stages += [nn.MaxPool2d(2)]
            width = channels
        side = architecture.image_size // 2 ** len(architecture.channels)
        self.stages = nn.Sequential(*stages, nn.Flatten())
        self.features = nn.Sequential(nn.Linear(width * side * side, architecture.num_features), nn.ReLU())
        self.head = nn.Linear(architecture.num_features, len(architecture.class_names))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, S, S) in [-1, 1] -> features (N, F), not negative, and logits (N, K)."""
        images = images.contiguous(memory_format=torch.channels_last)  # several times as fast on a CPU
        features = self.features(self.stages(images))
        return features, self.head(features)


def normalised(images: np.ndarray | Tensor) -> Tensor:
    """Images (N, S, S, 3) uint8 -> (N, 3, S, S) float32 in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class ClassifierFeatures:
    """A `FeatureNetwork` made of a `Classifier`: the layer before its head, and softmax over its classes."""

    def __init__(self, classifier: Classifier, architecture: Architecture, description: dict[str, Any]):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier = classifier.eval().to(self.device)
        self.architecture = architecture
        self.description = description
        self.image_size: int | None = architecture.image_size
        self.num_classes = len(architecture.class_names)
        self.statistics_sizes: dict[str, int] = {}

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self.classifier(normalised(images).to(self.device))
        return Features(features.cpu().numpy(), None, logits.softmax(dim=1).cpu().numpy())


def save_feature_network(path: Path, classifier: Classifier, architecture: Architecture) -> None:
    """Write both to ``path``, atomically."""
    text = json.dumps({"kind": KIND, "version": VERSION, **asdict(architecture)})
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(weights, metadata={"network": text}))


def load_feature_network(path: Path) -> FeatureNetwork:
    """Read a file of `save_feature_network` or of ``torch.export.save``. Raises `UserError` for anything else."""
    if not path.is_file():
        raise UserError(f"--features {path} {'is not a file' if path.exists() else 'does not exist'}")
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        from tools.exported_program import load_exported_program

        return load_exported_program(path)
    return load_classifier(path)


def load_classifier(path: Path) -> ClassifierFeatures:
    """Read a file of `save_feature_network`. Raises `UserError` for anything else, running nothing of it."""
    architecture = read_architecture(path)
    classifier = Classifier(architecture)
    try:
        classifier.load_state_dict(safetensors.torch.load_file(path))
    except (RuntimeError, safetensors.SafetensorError) as problem:
        raise UserError(f"--features {path}: the weights do not fit the description of the network") from problem
    description = {"kind": KIND, "file": str(path), "sha256": sha256_of(path)}
    return ClassifierFeatures(classifier, architecture, description)


def read_architecture(path: Path) -> Architecture:
    """The `Architecture` in a file's metadata; `UserError` when there is none."""
    expected = "expected a safetensors file of tools/train_feature_network.py or an exported program (.pt2)"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as problem:
        raise UserError(f"--features {path} is not readable as a feature network; {expected}") from problem
    try:
        values = json.loads(metadata.get("network", "null"))
        if not isinstance(values, dict) or values.pop("kind", None) != KIND:
            raise UserError(f"--features {path} does not describe a feature network; {expected}")
        if (version := values.pop("version", None)) != VERSION:
            raise UserError(f"--features {path} has format version {version}; this program reads version {VERSION}")
        return Architecture(**values)
    except (TypeError, ValueError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"--features {path} has a damaged description: {problem}") from problem
