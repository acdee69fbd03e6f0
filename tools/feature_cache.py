"""Features of image sets on disk, so that a reference passes through a network once.

An entry is found by what it was made of and with: the set's SHA-256, the network's, the version of this code, PyTorch,
Pillow and the kind of device. It is a safetensors file whose metadata repeats these and holds a checksum of every
array; an entry that is damaged, or of something else, is made anew. Nothing that goes wrong with the cache ends a
program.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import safetensors
import torch

from switchdit.errors import UserError
from switchdit.files import atomic_write
from switchdit.progress import say
from tools.adm_metrics import neighbour_radii
from tools.feature_extraction import Moments, SetFeatures, extract, on_device
from tools.feature_network import FeatureNetwork
from tools.image_sets import ImageSet
from tools.processes import Processes

# N = images

VERSION = 1  # to be raised with every change that moves a feature or a radius by more than rounding
TYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}  # numpy's names and those of safetensors


def entry(images_sha256: str, network_sha256: str, part: str = "features") -> dict[str, str]:
    """What an entry holds: ``part`` of a set in a network's eyes."""
    return {
        "kind": "switchdit features",
        "version": str(VERSION),
        "images": images_sha256,
        "network": network_sha256,
        "made with": f"torch {torch.__version__}, pillow {PIL.__version__}, {on_device(np.empty(0)).device.type}",
        "part": part,
    }


def entry_path(folder: Path, wanted: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest}.safetensors"


def load(folder: Path, wanted: dict[str, str]) -> dict[str, np.ndarray] | None:
    """The arrays of an entry; None where there is none, and with a warning where it is damaged."""
    path = entry_path(folder, wanted)
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if any(metadata.get(name) != value for name, value in wanted.items()):
            raise ValueError("it is of something else")
        for name, array in arrays.items():
            if metadata.get(f"sha256 of {name}") != _checksum(array):
                raise ValueError(f"{name} has another checksum")
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as problem:
        _warn(f"{path} is left aside, it is damaged ({_reason(problem)})")
        return None
    return arrays


def store(folder: Path, wanted: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
    """Write an entry, atomically. A full disk or a folder that may not be written is a warning."""
    path = entry_path(folder, wanted)
    try:
        with atomic_write(path) as file:
            metadata = {**wanted, **{f"sha256 of {name}": _checksum(array) for name, array in arrays.items()}}
            _write_safetensors(file, arrays, metadata)
    except (OSError, UserError) as problem:
        _warn(f"{path} could not be written ({_reason(problem)}); the next run computes it again")


# ------------------------------------------------------------------------------------ features and radii


def features_of(
    images: ImageSet, network: FeatureNetwork, batch_size: int, folder: Path | None, processes: Processes
) -> SetFeatures | None:
    """Features of a set on rank 0, None on the others; from the cache ``folder`` or into it, if there is one."""
    found, wanted = None, {}
    if folder and processes.rank == 0:
        wanted = entry(images.sha256(), network.description["sha256"])
        found = _load_features(folder, wanted, images.count)
        if found:
            name = "reference" if images.option == "--ref" else "samples"
            say(f"features of the {name}: from the cache {entry_path(folder, wanted)}")
    if processes.agree(found is not None):
        return found
    features = extract(network, images, batch_size, processes)
    images.check_unchanged()
    if wanted:
        store(folder, wanted, _arrays(features))
    return features


def radii_of(
    features: SetFeatures, images: ImageSet, network: FeatureNetwork, k: int, distances: str, folder: Path | None
) -> np.ndarray:
    """Squared distances (N,) of `neighbour_radii`, from the cache ``folder`` or into it, if there is one."""
    wanted = {}
    if folder:
        wanted = entry(images.sha256(), network.description["sha256"], f"radii {k} {distances}")
        found = (load(folder, wanted) or {}).get("radii")
        if found is not None and found.shape == (images.count,):
            return found
    print(f"neighbours within {images.path.name} ...", file=sys.stderr, flush=True)
    radii = neighbour_radii(on_device(features.pooled), k, distances).cpu().numpy()
    if wanted:
        store(folder, wanted, {"radii": radii})
    return radii


def _load_features(folder: Path, wanted: dict[str, str], count: int) -> SetFeatures | None:
    """The features of ``count`` images, or None."""
    arrays = load(folder, wanted)
    if arrays is None:
        return None
    try:
        features = SetFeatures(
            arrays["pooled"],
            arrays.get("probabilities"),
            Moments(count, arrays["mean"], arrays["covariance"]),
            Moments(count, arrays["spatial_mean"], arrays["spatial_covariance"]) if "spatial_mean" in arrays else None,
        )
    except KeyError as missing:
        _warn(f"{entry_path(folder, wanted)} is left aside, it has no {missing}")
        return None
    if len(features.pooled) != count or int(arrays.get("count", -1)) != count:
        _warn(f"{entry_path(folder, wanted)} is left aside, it is not of {count} images")
        return None
    return features


def _arrays(features: SetFeatures) -> dict[str, np.ndarray]:
    arrays = {
        "pooled": features.pooled,
        "count": np.array(features.pooled_moments.count),
        "mean": features.pooled_moments.mean,
        "covariance": features.pooled_moments.covariance,
    }
    if features.probabilities is not None:
        arrays["probabilities"] = features.probabilities
    if features.spatial_moments is not None:
        arrays["spatial_mean"] = features.spatial_moments.mean
        arrays["spatial_covariance"] = features.spatial_moments.covariance
    return arrays


# ----------------------------------------------------------------------------------------------- the file


def _write_safetensors(file: IO[bytes], arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """What `safetensors.numpy.save` makes, without the second copy of all arrays that it holds meanwhile."""
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    header, offset = {"__metadata__": metadata}, 0
    for name, array in arrays.items():
        where = [offset, offset + array.nbytes]
        header[name] = {"dtype": TYPES[array.dtype.name], "shape": array.shape, "data_offsets": where}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        file.write(memoryview(array.reshape(-1)).cast("B"))


def _checksum(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape} ".encode())
    digest.update(memoryview(np.ascontiguousarray(array).reshape(-1)).cast("B"))
    return digest.hexdigest()


def _reason(problem: BaseException) -> str:
    text = getattr(problem, "strerror", None) or str(problem)
    return (text.split("\n")[0] or type(problem).__name__)[:200]


def _warn(line: str) -> None:
    warnings.warn(f"the cache entry {line}", stacklevel=3)
