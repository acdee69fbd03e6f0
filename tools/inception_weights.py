"""The two files in circulation with the weights of the Inception network of 2015: finding, checking, reading them.

`classify_image_graph_def.pb` is the TensorFlow graph that OpenAI's evaluator runs; it is parsed by the protobuf
classes that TensorBoard ships. `pt_inception-2015-12-05-6726825d.pth` holds the same weights for PyTorch.
"""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchdit.errors import UserError
from switchdit.files import DISK_FULL, atomic_write, sha256_of
from switchdit.progress import progress

# scopes are the graph's names of layers

GRAPH = "classify_image_graph_def.pb"
GRAPH_BYTES, GRAPH_MD5 = 95_673_916, "e6bb154e85f5d4331c22abcddb5dcf31"  # as public repositories pin it
GRAPH_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb"
CONVERTED = "pt_inception-2015-12-05-6726825d.pth"
CONVERTED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CONVERTED_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{CONVERTED}"

LARGEST_BYTES = 200_000_000  # of a download: twice what either file has
_NAMES = {"md5": "MD5", "sha256": "SHA-256"}
TIMEOUT = 30  # seconds without a byte

LARGEST_CONSTANT = 1 << 23  # numbers; the matrix of the classes has 2,064,384
EPSILON = 1e-3  # of the batch norms, where the file does not say

# Scope in the graph -> name in the converted file.
_A = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
_B = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
_C = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
_D = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
_E = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
_MIXED = {
    **{
        "mixed": ("Mixed_5b", _A),
        "mixed_1": ("Mixed_5c", _A),
        "mixed_2": ("Mixed_5d", _A),
        "mixed_3": ("Mixed_6a", _B),
    },
    **{f"mixed_{i}": (f"Mixed_6{letter}", _C) for i, letter in zip(range(4, 8), "bcde", strict=True)},
    **{"mixed_8": ("Mixed_7a", _D), "mixed_9": ("Mixed_7b", _E), "mixed_10": ("Mixed_7c", _E)},
}
CONVERTED_NAMES = {
    **{"conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3"},
    **{"conv_3": "Conv2d_3b_1x1", "conv_4": "Conv2d_4a_3x3"},
    **{f"{scope}/{a}": f"{name}.{b}" for scope, (name, block) in _MIXED.items() for a, b in block.items()},
}


@dataclass(frozen=True)
class WeightFile:
    """A file that was found. published: its hash is that of the file everyone's numbers come from."""

    path: Path
    sha256: str
    published: bool

    @property
    def is_graph(self) -> bool:
        return self.path.suffix == ".pb"


def cache_directory() -> Path:
    """$SWITCHDIT_CACHE, or ~/.cache/switchdit."""
    return Path(os.environ.get("SWITCHDIT_CACHE") or Path.home() / ".cache" / "switchdit")


def find_weights(inception: str = "auto", download: bool = False) -> WeightFile:
    """The weight file at the path ``inception``, or for "auto" the one in `cache_directory`.

    What lies in the cache must be one of the two published files, and so must any .pth. Another .pb is taken when
    it is named on purpose; the result says that it is not the published one. ``download`` allows "auto" to fetch
    one of the two into an empty cache.

    Raises:
        UserError: no file (which ones there are, their hashes, where to put them), or one with a wrong hash.
    """
    if inception != "auto":
        path = Path(inception)
        if not path.is_file():
            raise UserError(f"--inception {path} {'is not a file' if path.exists() else 'does not exist'}; {_wanted()}")
        return _checked(path, strict=path.suffix != ".pb")
    for name in (GRAPH, CONVERTED):
        if (cache_directory() / name).is_file():
            return _checked(cache_directory() / name, strict=True)
    if not download:
        raise UserError(f"no Inception weights in {cache_directory()}; {_wanted()}, or add --download")
    failures = []
    for name, url in ((GRAPH, GRAPH_URL), (CONVERTED, CONVERTED_URL)):
        try:
            _download(url, cache_directory() / name)
            return _checked(cache_directory() / name, strict=True)
        except (OSError, http.client.HTTPException, ValueError) as problem:
            if isinstance(problem, OSError) and problem.errno in DISK_FULL:
                raise
            failures.append(f"{url}: {str(problem) or type(problem).__name__}".replace("\n", " "))
    raise UserError(
        f"no Inception weights in {cache_directory()}, and they could not be downloaded ({'; '.join(failures)}); "
        f"{_wanted()}, or add --download where the network is open"
    )


def _download(url: str, path: Path) -> None:
    """Fetch a published file. ValueError, and nothing left, for content that is not it."""
    kind, expected = _published_hash(path)
    digest, got = hashlib.new(kind, usedforsecurity=False), 0
    with atomic_write(path) as file, urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        with progress(desc=f"downloading {path.name}", total=total, unit="B") as bar:
            bar.unit_scale = True
            while block := response.read(1 << 18):
                file.write(block)
                digest.update(block)
                got += len(block)
                bar.update(len(block))
                if got > LARGEST_BYTES:
                    raise ValueError(f"more than {LARGEST_BYTES} bytes, which {path.name} does not have")
        if total is not None and got != total:
            raise ValueError(f"the connection ended after {got} of {total} bytes")
        if digest.hexdigest() != expected:
            raise ValueError(f"its {_NAMES[kind]} is {digest.hexdigest()}, expected {expected}: refused")


def _wanted() -> str:
    return (
        f"put {CONVERTED} (SHA-256 {CONVERTED_SHA256}, from {CONVERTED_URL}) or {GRAPH} ({GRAPH_BYTES} bytes, "
        f"MD5 {GRAPH_MD5}, from {GRAPH_URL}) into {cache_directory()}, or use --features for a network of your own"
    )


def _published_hash(path: Path) -> tuple[str, str]:
    """Kind and value of the hash by which a file of this kind is known."""
    return ("md5", GRAPH_MD5) if path.suffix == ".pb" else ("sha256", CONVERTED_SHA256)


def _checked(path: Path, strict: bool) -> WeightFile:
    sha256 = sha256_of(path)
    kind, expected = _published_hash(path)
    got = sha256 if kind == "sha256" else hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if strict and got != expected:
        name = GRAPH if path.suffix == ".pb" else CONVERTED
        raise UserError(f"{path} is not the published {name}: its {_NAMES[kind]} is {got}, expected {expected}")
    return WeightFile(path, sha256, got == expected)


def read_graph(path: Path) -> dict[str, np.ndarray]:
    """Weights of a GraphDef by scope: ``scope/weight`` (out, in, kh, kw), ``scope/bias``, ``softmax/weights``.

    Batch norm is folded into weight and bias (in float64), with the epsilon and the scaling flag that the graph's
    nodes carry. Raises `UserError` for a file that is not this graph.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto import graph_pb2
    from tensorboard.util.tensor_util import make_ndarray

    try:
        nodes = {node.name: node for node in graph_pb2.GraphDef.FromString(path.read_bytes()).node}
    except DecodeError as problem:
        raise UserError(f"{path} is not a TensorFlow graph, or is cut short") from problem

    def constant(name: str) -> np.ndarray:
        if name not in nodes or nodes[name].op != "Const":
            raise UserError(f"{path} is not the Inception graph of 2015: it has no constant {name}")
        tensor = nodes[name].attr["value"].tensor
        if math.prod(dim.size for dim in tensor.tensor_shape.dim) > LARGEST_CONSTANT:  # one number may stand for all
            raise UserError(f"{path}: the constant {name} is damaged, it says that it is larger than any of Inception")
        try:
            return make_ndarray(tensor)
        except (ValueError, TypeError) as problem:
            raise UserError(f"{path}: the constant {name} is damaged") from problem

    weights = {"softmax/weights": constant("softmax/weights")}
    for scope in CONVERTED_NAMES:
        kernel = constant(f"{scope}/conv2d_params")
        norm = [constant(f"{scope}/batchnorm/{part}") for part in ("gamma", "beta", "moving_mean", "moving_variance")]
        shapes = {part.shape for part in norm}
        if f"{scope}/batchnorm" not in nodes or kernel.ndim != 4 or shapes != {kernel.shape[3:]}:
            raise UserError(f"{path} is not the Inception graph of 2015: {scope} is no convolution with batch norm")
        attributes = nodes[f"{scope}/batchnorm"].attr
        if not attributes["scale_after_normalization"].b:
            norm[0] = np.ones_like(norm[0])
        _fold(weights, scope, kernel.transpose(3, 2, 0, 1), *norm, epsilon=attributes["variance_epsilon"].f)
    return weights


def read_converted(path: Path) -> dict[str, np.ndarray]:
    """The same as `read_graph`, from a file with the converted weights; nothing in it can run."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        weights = {"softmax/weights": state["fc.weight"].numpy().T}
        for scope, name in CONVERTED_NAMES.items():
            norm = [state[f"{name}.bn.{part}"].numpy() for part in ("weight", "bias", "running_mean", "running_var")]
            _fold(weights, scope, state[f"{name}.conv.weight"].numpy(), *norm, epsilon=EPSILON)
    except KeyError as problem:
        raise UserError(f"{path} is not the converted Inception of 2015: it has no {problem}") from problem
    return weights


def _fold(
    weights: dict[str, np.ndarray],
    scope: str,
    kernel: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    epsilon: float,
) -> None:
    scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    weights[f"{scope}/weight"] = (kernel * scale[:, None, None, None]).astype(np.float32)
    weights[f"{scope}/bias"] = (beta - mean * scale).astype(np.float32)
