"""Networks to export in tests, and ways to change the files that hold them."""

import functools
import io
import json
import math
import zipfile

import pytest
import torch
from torch import nn
from torch.nn import functional

from switchdit.errors import UserError
from tools.feature_network import load_feature_network

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(images):
    return images.permute(0, 3, 1, 2).float().div(255)


class Convolutional(nn.Module):
    """Features and probabilities; ReLU in place, a residual, channels_last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False)
        self.norm, self.drop = nn.GroupNorm(2, 8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        self.stem[1].running_mean.uniform_()

    def forward(self, images):
        x = self.stem(pixels(images).contiguous(memory_format=torch.channels_last))
        x += functional.hardswish(self.norm(self.grouped(x)))
        features = self.drop(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return features, self.head(features).softmax(dim=1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        attention = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self.scale * self.proj(attention)
        return x + self.scale * self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """As DINOv2: images resized and normalised, class and register tokens, positions interpolated, a block."""

    def __init__(self, width=16):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.std = torch.tensor(STD).view(3, 1, 1)
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.class_token, self.registers = (
            nn.Parameter(torch.randn(1, 1, width)),
            nn.Parameter(torch.randn(1, 2, width)),
        )
        self.positions = nn.Parameter(torch.randn(1, 1 + 9, width))
        self.block, self.norm = Block(width), nn.LayerNorm(width)

    def forward(self, images):
        x = functional.interpolate(pixels(images), size=(16, 16), mode="bicubic", antialias=True)
        x = self.patches((x - self.mean) / self.std).flatten(2).transpose(1, 2)
        grid = self.positions[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, scale_factor=(4.1 / 3, 4.1 / 3), mode="bicubic").flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + torch.cat([self.positions[:, :1], grid], dim=1)
        x = torch.cat([x[:, :1], self.registers.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        x = self.norm(self.block(x))
        return torch.cat([x[:, 0], x[:, 3:].mean(dim=1)], dim=1)


class Windows(nn.Module):
    """Sizes computed from the input's, shifted windows with a mask, float64, a block under no_grad."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.register_buffer("table", torch.randn(7, 2))
        self.register_buffer("index", torch.arange(16).view(4, 4) % 7)
        self.double()

    def forward(self, images):
        with torch.no_grad():
            x = images.double() / 127.5 - 1
        n, h, w, c = x.shape
        x = torch.roll(x, (-1, -1), (1, 2)).reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, 4, c)
        bias = self.table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1).unsqueeze(0)
        x = x.repeat(1, 1, 4)
        heads = x.view(-1, 4, 2, 6).transpose(1, 2)
        x = functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias).transpose(1, 2).flatten(2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x.reshape(n, (h // 2) * (w // 2), 48).masked_fill(x.reshape(n, -1, 48) > 5, -math.inf)
        return x.amax(dim=1)


class Mosaic(nn.Module):
    """Open height and width; chunks, stacks, padding, pooling, constants made on the way."""

    def forward(self, images):
        x = functional.pad(pixels(images), (1, 1, 1, 1), mode="reflect")
        red, green, blue = x.split(1, dim=1)
        x = torch.stack([red - green, torch.where(green > 0.5, blue, torch.zeros_like(blue))], dim=1).squeeze(2)
        x = functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        ramp = torch.arange(x.shape[-1], dtype=torch.float32, device=x.device) / x.shape[-1]
        x = functional.adaptive_max_pool2d(x * ramp, (2, 2)).flatten(1)
        std, mean = torch.std_mean(x, dim=1, keepdim=True)
        return torch.cat([x, std, mean, x.topk(2, dim=1).values, x.cumsum(dim=1)], dim=1)


def export(network, path, size=(16, 16), count=2, shapes=None, decompose=False):
    """Write a program; its own module is the truth."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8)
    shapes = {0: torch.export.Dim("N")} if shapes is None else shapes
    program = torch.export.export(network.eval(), (images,), dynamic_shapes=(shapes or None,) if shapes else None)
    program = program.run_decompositions() if decompose else program
    torch.export.save(program, path)
    return program.module()


OPEN = {0: torch.export.Dim("N"), 1: 2 * torch.export.Dim("h", min=4), 2: torch.export.Dim("w", min=8)}
CASES = {
    "convolutional": (Convolutional, None),
    "transformer": (Transformer, None),
    "windows": (Windows, None),
    "mosaic": (Mosaic, OPEN),
}


@functools.cache
def exported(name, decompose):
    """A case's file, as bytes, and its module; exported once for all test files."""
    make, shapes = CASES[name]
    torch.manual_seed(1)
    content = io.BytesIO()
    module = export(make(), content, shapes=shapes, decompose=decompose)
    return content.getvalue(), module


def write_originals(folder):
    """Two programs, to be changed."""
    for name in ("convolutional", "transformer"):
        (folder / f"{name}.pt2").write_bytes(exported(name, name == "transformer")[0])
    return folder


def rewrite(source, target, edit):
    """Copy an archive; ``edit`` takes the dictionary of its entries and changes it."""
    with zipfile.ZipFile(source) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    edit(entries)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return target


def edit_json(suffix, change):
    """An edit of the one entry whose name ends with ``suffix``."""

    def edit(entries):
        (name,) = (name for name in entries if name.endswith(suffix))
        content = json.loads(entries[name])
        change(content)
        entries[name] = json.dumps(content).encode()

    return edit


def refusal(path):
    with pytest.raises(UserError) as mistake:
        load_feature_network(path)
    line = str(mistake.value)
    assert str(path) in line
    assert "\n" not in line
    return line
