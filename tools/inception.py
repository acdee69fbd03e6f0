"""The Inception network of 2015 that ADM's metrics use, in PyTorch.

The function is that of the TensorFlow graph which OpenAI's evaluator runs: bilinear resize to 299 as in TensorFlow 1
(no half-pixel centres, no antialiasing, no rounding), (x - 128) / 128, batch norm with an epsilon of 1e-3, 3x3 average
pools that do not count padding, a max pool in the last block but an average in the one before, and softmax over 1,008
outputs without their bias.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from switchdit.errors import UserError
from tools.feature_network import Features
from tools.inception_weights import WeightFile, find_weights, read_converted, read_graph

# N = images, H, W = pixels; scopes are the graph's names of layers

__all__ = ["Inception", "find_weights", "load_inception", "resize_tf1"]

POOLED, SPATIAL, CLASSES = 2048, 2023, 1008
SPATIAL_CHANNELS = 7  # of the 192 of mixed_6/conv: 17 * 17 * 7 = 2023
SIDE = 299


def resize_tf1(images: Tensor, side: int = SIDE) -> Tensor:
    """(N, C, H, W) float32 -> (N, C, side, side), as TensorFlow 1's ``resize_bilinear`` with its defaults."""
    for axis in (2, 3):
        size = images.shape[axis]
        source = torch.arange(side, dtype=torch.float32, device=images.device) * (
            torch.tensor(size, dtype=torch.float32) / side
        ).to(images.device)
        low = source.floor().long()
        fraction = (source - low).view([-1 if a == axis else 1 for a in range(4)])
        below, above = images.index_select(axis, low), images.index_select(axis, (low + 1).clamp_max(size - 1))
        images = below + (above - below) * fraction
    return images


class Inception(nn.Module):
    """The network with the weights of `read_graph` or `read_converted`; a `FeatureNetwork`."""

    image_size: int | None = None
    num_classes = CLASSES
    statistics_sizes = {"mu": POOLED, "sigma": POOLED, "mu_s": SPATIAL, "sigma_s": SPATIAL}  # noqa: RUF012

    def __init__(self, weights: Mapping[str, np.ndarray], description: dict[str, Any]):
        super().__init__()
        self.description = description
        self.names = {name: name.replace("/", "__") for name in weights}  # buffers may have no slash
        for name, array in weights.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            # channels last is ten times as fast on a CPU
            tensor = tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
            self.register_buffer(self.names[name], tensor)

    def conv(self, x: Tensor, scope: str, stride: int = 1, valid: bool = False) -> Tensor:
        weight = getattr(self, self.names[f"{scope}/weight"])
        padding = (0, 0) if valid else (weight.shape[2] // 2, weight.shape[3] // 2)
        return functional.conv2d(x, weight, getattr(self, self.names[f"{scope}/bias"]), stride, padding).relu_()

    def chain(self, x: Tensor, scope: str, length: int) -> Tensor:
        """conv, conv_1, ... of a scope, one after the other."""
        for i in range(length):
            x = self.conv(x, f"{scope}/conv_{i}" if i else f"{scope}/conv")
        return x

    def block_a(self, x: Tensor, scope: str) -> Tensor:
        branches = [self.chain(x, scope, 1), self.chain(x, f"{scope}/tower", 2), self.chain(x, f"{scope}/tower_1", 3)]
        return torch.cat([*branches, self.chain(average_pool(x), f"{scope}/tower_2", 1)], dim=1)

    def block_b(self, x: Tensor, scope: str) -> Tensor:
        tower = self.conv(self.chain(x, f"{scope}/tower", 2), f"{scope}/tower/conv_2", stride=2, valid=True)
        return torch.cat(
            [self.conv(x, f"{scope}/conv", stride=2, valid=True), tower, functional.max_pool2d(x, 3, 2)], dim=1
        )

    def block_c(self, x: Tensor, scope: str) -> tuple[Tensor, Tensor]:
        """The block's output, and that of its 1x1 branch (the spatial features come from it)."""
        first = self.chain(x, scope, 1)
        branches = [first, self.chain(x, f"{scope}/tower", 3), self.chain(x, f"{scope}/tower_1", 5)]
        return torch.cat([*branches, self.chain(average_pool(x), f"{scope}/tower_2", 1)], dim=1), first

    def block_d(self, x: Tensor, scope: str) -> Tensor:
        tower = self.conv(self.chain(x, f"{scope}/tower", 1), f"{scope}/tower/conv_1", stride=2, valid=True)
        tower_1 = self.conv(self.chain(x, f"{scope}/tower_1", 3), f"{scope}/tower_1/conv_3", stride=2, valid=True)
        return torch.cat([tower, tower_1, functional.max_pool2d(x, 3, 2)], dim=1)

    def block_e(self, x: Tensor, scope: str, pooled: Tensor) -> Tensor:
        branches = [self.chain(x, scope, 1)]
        for tower, length in ((f"{scope}/tower", 1), (f"{scope}/tower_1", 2)):
            stem = self.chain(x, tower, length)
            branches += [self.conv(stem, f"{tower}/mixed/conv"), self.conv(stem, f"{tower}/mixed/conv_1")]
        return torch.cat([*branches, self.chain(pooled, f"{scope}/tower_2", 1)], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, H, W), 0..255 -> pool_3 (N, 2048), mixed_6/conv (N, 2023), probabilities (N, 1008)."""
        x = (resize_tf1(images.float()) - 128) * 0.0078125
        x = self.conv(x, "conv", stride=2, valid=True)  # (N, 32, 149, 149)
        x = self.conv(self.conv(x, "conv_1", valid=True), "conv_2")
        x = functional.max_pool2d(x, 3, 2)  # (N, 64, 73, 73)
        x = self.conv(self.conv(x, "conv_3", valid=True), "conv_4", valid=True)
        x = functional.max_pool2d(x, 3, 2)  # (N, 192, 35, 35)
        for scope in ("mixed", "mixed_1", "mixed_2"):
            x = self.block_a(x, scope)
        x = self.block_b(x, "mixed_3")  # (N, 768, 17, 17)
        for scope in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
            x, first = self.block_c(x, scope)
            if scope == "mixed_6":
                spatial = first[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.block_d(x, "mixed_8")  # (N, 1280, 8, 8)
        x = self.block_e(x, "mixed_9", average_pool(x))
        x = self.block_e(x, "mixed_10", functional.max_pool2d(x, 3, 1, 1))
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, (pooled @ getattr(self, self.names["softmax/weights"])).softmax(dim=1)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        """Images (N, H, W, 3) uint8 -> `Features`, in float32 throughout (TF32 would move them by 3.5e-3)."""
        device = getattr(self, self.names["conv/bias"]).device
        with exact_float32():
            outputs = super().__call__(torch.from_numpy(images).to(device).permute(0, 3, 1, 2))
        return Features(*(output.cpu().numpy() for output in outputs))


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Neither convolutions nor matrix products of a GPU round their factors to TF32.

    Nor does cuDNN choose algorithms by timing them: several processes would then not find the same features as one.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def average_pool(x: Tensor) -> Tensor:
    """3x3, stride 1, over the pixels that exist."""
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def load_inception(weights: WeightFile) -> Inception:
    """The network of a file of `find_weights`, on a GPU where there is one. Raises `UserError` for a damaged file."""
    arrays = read_graph(weights.path) if weights.is_graph else read_converted(weights.path)
    description = {"kind": "Inception 2015-12-05", "file": str(weights.path), "sha256": weights.sha256}
    network = Inception(arrays, {**description, "published": weights.published})
    try:
        network(np.zeros((1, 8, 8, 3), np.uint8))
    except RuntimeError as problem:
        raise UserError(f"{weights.path} is not the Inception of 2015: its tensors have other shapes") from problem
    return network.to("cuda" if torch.cuda.is_available() else "cpu")
