"""Networks of torch.export, run without torch.export.load: the same numbers, and nothing that a file can do."""

import contextlib
import functools
import json
import math
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from switchdit.errors import UserError
from tools import eval_fid
from tools.feature_network import load_feature_network
from tools.pt2_archive import read_archive

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of torch.export's own copies
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
ROOT = Path(__file__).resolve().parents[1]
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
    """As DINOv2: images resized and normalised, class and register tokens, positions interpolated, two blocks."""

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
        self.blocks, self.norm = nn.ModuleList([Block(width), Block(width)]), nn.LayerNorm(width)

    def forward(self, images):
        x = functional.interpolate(pixels(images), size=(16, 16), mode="bicubic", antialias=True)
        x = self.patches((x - self.mean) / self.std).flatten(2).transpose(1, 2)
        grid = self.positions[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, scale_factor=(4.1 / 3, 4.1 / 3), mode="bicubic").flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + torch.cat([self.positions[:, :1], grid], dim=1)
        x = torch.cat([x[:, :1], self.registers.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(name, decompose) -> file and module of a case, each exported once."""

    @functools.cache
    def of(name, decompose):
        make, shapes = CASES[name]
        torch.manual_seed(1)
        path = tmp_path_factory.mktemp("programs") / "net.pt2"
        return path, export(make(), path, shapes=shapes, decompose=decompose)

    return of


@pytest.mark.parametrize("decompose", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_program(exported, name, decompose):
    shapes = CASES[name][1]
    path, module = exported(name, decompose)
    network = load_feature_network(path)
    sizes = [(3, 16, 16), (5, 24, 19)] if shapes else [(3, 16, 16), (7, 16, 16), (1, 16, 16)]
    for size in sizes:
        images = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
        before = images.clone()
        with torch.no_grad():
            expected = module(images)
        expected = expected if isinstance(expected, tuple) else (expected,)
        outputs = network.run(images)
        assert torch.equal(images, before)
        assert len(outputs) == len(expected)
        assert all(torch.equal(o, e) and o.dtype == e.dtype for o, e in zip(outputs, expected, strict=True))
        features = network(images.numpy())
        assert features.spatial is None
        assert np.array_equal(features.pooled, expected[0].float().numpy(), equal_nan=True)
        assert (features.probabilities is None) == (len(expected) == 1)
    assert network.image_size == (None if shapes else 16)
    assert network.num_classes == (5 if name == "convolutional" else 0)


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    """Two of the programs, to be changed."""
    folder = tmp_path_factory.mktemp("originals")
    for name in ("convolutional", "transformer"):
        shutil.copy(exported(name, name == "transformer")[0], folder / f"{name}.pt2")
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


def test_fixed_and_bounded_batches_are_filled_and_cut(tmp_path):
    fixed = export(Convolutional(), tmp_path / "fixed.pt2", count=4, shapes={})
    bounded = {0: torch.export.Dim("N", min=3, max=4)}
    export(Convolutional(), tmp_path / "bounded.pt2", count=3, shapes=bounded)
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    last = images[[4, 5, 5, 5]]
    with torch.no_grad():
        expected = [torch.cat([a, b[:2]]).numpy() for a, b in zip(fixed(images[:4]), fixed(last), strict=True)]
    network = load_feature_network(tmp_path / "fixed.pt2")
    features = network(images.numpy())
    assert np.array_equal(features.pooled, expected[0])
    assert np.array_equal(features.probabilities, expected[1])
    for count in (1, 3, 5):
        pooled = load_feature_network(tmp_path / "bounded.pt2")(images[:count].numpy()).pooled
        assert pooled.shape == (count, 8)


class Wrong(nn.Module):
    """A network that breaks the contract in the way of ``how``."""

    def __init__(self, how):
        super().__init__()
        self.how, self.norm = how, nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images, other=None):
        x = images.float().mean(dim=(1, 2))
        if self.how == "counts":
            self.calls.add_(1)
        return {
            "map": lambda: images.float(),
            "three": lambda: (x, x.softmax(1), x),
            "integers": lambda: images.amax(dim=(1, 2)),
            "logits": lambda: (x, x),
            "random": lambda: x + torch.rand_like(x),
            "dropout": lambda: functional.dropout(x, 0.5),
            "training": lambda: self.norm(x),
            "halves": lambda: (
                images.reshape(images.shape[0], images.shape[1] // 2, 2, -1, 3).float().mean(dim=(1, 2, 3))
            ),
            "flat": lambda: images.float().flatten(1),
            "two inputs": lambda: x + (0 if other is None else other),
            "large": lambda: x.repeat(1, 2**24).unsqueeze(2).expand(-1, -1, 2**24).contiguous().mean(dim=2),
        }.get(self.how, lambda: x)()


CONTRACT = {
    "map": "returns float32 (2, 8, 8, 3) for 2 images; expected images uint8 (N, H, W, 3) -> features (N, F)",
    "three": "returns float32 (2, 3), float32 (2, 3), float32 (2, 3) for 2 images",
    "integers": "returns uint8 (2, 3) for 2 images",
    "random": "calls 'torch.ops.aten.rand_like.default', which is not among",
    "dropout": "it is in training mode: call .eval()",
    "training": "it is in training mode: call .eval()",
    "counts": "writes to its own 'calls'",
    "two inputs": "takes 2 inputs; expected images uint8",
    "large": "GiB of memory at once",
}


@pytest.mark.parametrize("how", CONTRACT)
def test_a_program_that_breaks_the_contract_is_refused_when_it_is_loaded(tmp_path, how):
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    given = (images, torch.zeros(2, 3)) if how == "two inputs" else (images,)
    network = Wrong(how).train(how == "training")
    torch.export.save(torch.export.export(network, given), tmp_path / "wrong.pt2")
    assert CONTRACT[how] in refusal(tmp_path / "wrong.pt2")


def test_images_that_the_program_does_not_take(tmp_path):
    torch.export.save(torch.export.export(Wrong(""), (torch.zeros(2, 3, 8, 8),)), tmp_path / "float.pt2")
    assert "takes float32 (2, 3, 8, 8); expected images uint8 (N, H, W, 3)" in refusal(tmp_path / "float.pt2")
    export(Wrong(""), tmp_path / "oblong.pt2", size=(8, 16))
    assert "takes images of 16 x 8; only square or open" in refusal(tmp_path / "oblong.pt2")
    export(Wrong("logits"), tmp_path / "logits.pt2", size=(8, 8))
    network = load_feature_network(tmp_path / "logits.pt2")
    with pytest.raises(UserError, match="second output whose rows sum to"):
        network(np.full((2, 8, 8, 3), 9, np.uint8))
    with pytest.raises(UserError, match="takes images with sides of 8 pixels, not of 9 x 8"):
        network(np.zeros((2, 8, 9, 3), np.uint8))
    export(Wrong("halves"), tmp_path / "open.pt2", shapes=OPEN)
    network = load_feature_network(tmp_path / "open.pt2")
    assert network(np.zeros((2, 10, 9, 3), np.uint8)).pooled.shape == (2, 3)
    with pytest.raises(UserError, match=r"node 'reshape' \(torch.ops.aten.reshape.default\) fails: shape '.*invalid"):
        network(np.zeros((2, 11, 9, 3), np.uint8))
    export(Wrong("flat"), tmp_path / "flat.pt2", shapes=OPEN)
    network = load_feature_network(tmp_path / "flat.pt2")
    assert network(np.zeros((2, 10, 9, 3), np.uint8)).pooled.shape == (2, 270)
    with pytest.raises(UserError, match=r"returns 300 features for images \(2, 10, 10, 3\), 270 before"):
        network(np.zeros((2, 10, 10, 3), np.uint8))
    with pytest.raises(UserError, match="takes images with sides of 8 or more pixels, not of 1 x 10"):
        network(np.zeros((2, 10, 1, 3), np.uint8))


class Touch:
    """A pickle that leaves a trace."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_other_archives_are_refused_and_not_opened(tmp_path, folder):
    net, marker = folder / "convolutional.pt2", tmp_path / "executed"
    torch.save(Touch(marker), tmp_path / "pickle.pt2")
    assert "pickles can run code when they are opened; export the network" in refusal(tmp_path / "pickle.pt2")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt2")
    assert "TorchScript" in refusal(tmp_path / "script.pt2")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    assert "older PyTorch" in refusal(tmp_path / "old.pt2")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("a/b.txt", "")
    assert "without an exported program" in refusal(tmp_path / "other.pt2")
    with zipfile.ZipFile(net) as source, zipfile.ZipFile(tmp_path / "z.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert "more bytes than the file has" in refusal(tmp_path / "z.pt2")
    example = pickle.dumps(Touch(marker))

    def replace_example(entries):
        (name,) = (name for name in entries if "sample_inputs" in name)
        entries[name] = example

    load_feature_network(rewrite(net, tmp_path / "example.pt2", replace_example))
    assert not marker.exists()


def test_schema_of_another_version_is_refused(tmp_path, folder):
    def version(major, minor):
        return edit_json("models/model.json", lambda p: p["schema_version"].update(major=major, minor=minor))

    net = folder / "convolutional.pt2"
    line = refusal(rewrite(net, tmp_path / "new.pt2", version(9, 0)))
    assert "has schema version 9; this program reads version 8" in line
    newer = load_feature_network(rewrite(net, tmp_path / "minor.pt2", version(8, 999)))
    assert newer.description["schema"] == "8.999"
    assert newer.description["kind"] == "exported program"
    assert newer.description["torch"] == torch.__version__


def payload(**changes):
    def change(content):
        next(p for p in content["config"].values() if p["tensor_meta"]["sizes"]).update(changes)

    return edit_json("weights_config.json", change)


def tensor_meta(**changes):
    def change(content):
        next(p for p in content["config"].values() if len(p["tensor_meta"]["sizes"]) == 4)["tensor_meta"] |= changes

    return edit_json("weights_config.json", change)


def whole(*numbers):
    return [{"as_int": number} for number in numbers]


def node(target, **arguments):
    """Put a call in the place of the first node with tensors; its arguments are JSON values, self is the input."""

    def change(program):
        first = next(n for n in program["graph_module"]["graph"]["nodes"] if n["outputs"])
        given = {"self": {"as_tensor": {"name": "images"}}} | arguments
        first["target"] = target
        first["inputs"] = [{"name": name, "arg": value, "kind": 1} for name, value in given.items()]

    return edit_json("models/model.json", change)


ATEN = "torch.ops.aten."
HOSTILE = {
    "pickled": (payload(use_pickle=True), "as a pickle, which can run code"),
    "outside": (payload(path_name="../../models/model.json"), "no item named"),
    "dtype": (tensor_meta(dtype=99), "unsupported type or layout"),
    "layout": (tensor_meta(layout=6), "unsupported type or layout"),
    "sizes": (tensor_meta(sizes=whole(2**20, 3, 3, 3)), "its sizes and strides need"),
    "negative sizes": (tensor_meta(sizes=whole(8, -3, 3, -3)), "impossible sizes"),
    "strides": (tensor_meta(strides=whole(2**39, 1, 1, 1)), "its sizes and strides need"),
    "zero strides": (tensor_meta(sizes=whole(*[2**12] * 4), strides=whole(0, 0, 0, 0)), "impossible sizes"),
    "offset": (tensor_meta(storage_offset={"as_int": 1}), "its sizes and strides need"),
    "os": (node("os.system"), "calls 'os.system', which is not among the operators"),
    "eval": (node("builtins.eval"), "calls 'builtins.eval', which is not among"),
    "main": (node("__main__.x"), "calls '__main__.x', which is not among"),
    "attribute": (node("torch.ops.aten.add.__class__"), "which this PyTorch"),
    "method": (node("torch.ops.aten.add._op"), "which this PyTorch"),
    "load": (node("torch.load"), "calls 'torch.load', which is not among"),
    "library": (node("torch.ops.load_library"), "is not among"),
    "custom": (node("torch.ops.mine.op.default"), "is not among"),
    "file": (node(ATEN + "from_file.default"), "is not among"),
    "storage": (node(ATEN + "set_.source_Storage"), "is not among"),
    "out": (node(ATEN + "neg.out"), "is not among"),
    "list": (node(ATEN + "mul.left_t"), "is not among"),
    "condition": (node("torch.ops.higher_order.cond"), "is not among"),
    "argument": (node(ATEN + "neg.default", more={"as_int": 1}), "has no argument 'more'"),
    "bare dtype": (node(ATEN + "to.dtype", dtype={"as_int": 200}), "its argument 'dtype' is a int"),
    "view": (
        node(ATEN + "as_strided.default", size={"as_ints": [2**30]}, stride={"as_ints": [1]}),
        "it looks outside of its tensor",
    ),
    "view back": (
        node(ATEN + "as_strided.default", size={"as_ints": [2]}, stride={"as_ints": [-1]}),
        "it looks outside of its tensor",
    ),
    "scale": (
        node(
            ATEN + "upsample_bilinear2d.default",
            output_size={"as_ints": [99, 99]},
            align_corners={"as_bool": False},
            scales_h={"as_float": 1e-300},
            scales_w={"as_float": 1e-300},
        ),
        "its scale 1e-300 does not take",
    ),
    "memory": (node(ATEN + "repeat.default", repeats={"as_ints": [2**20, 2**15, 1, 1]}), "GiB of memory at once"),
    "overflow": (node(ATEN + "repeat.default", repeats={"as_ints": [2**40, 1, 1, 1]}), "out of range"),
    "unnamed": (node(ATEN + "neg.default", self={"as_tensor": {"name": "absent"}}), "fails: 'absent'"),
    "unknown kind": (node(ATEN + "neg.default", self={"as_custom_obj": {"name": "x"}}), "as_custom_obj"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_refused_in_one_line(tmp_path, folder, name):
    edit, message = HOSTILE[name]
    assert message in refusal(rewrite(folder / "convolutional.pt2", tmp_path / "net.pt2", edit))


# each of these arguments crashed the interpreter, or read outside of its inputs, when the operator was called as it is
KERNELS = """
f32 = torch.randn
cases = {
    "_native_batch_norm_legit_no_training.default": dict(input=f32(2, 9999, 2, 2), weight=f32(1), bias=f32(1),
        running_mean=f32(1), running_var=f32(1), momentum=0.1, eps=1e-5),
    "_scaled_dot_product_flash_attention_for_cpu.default": dict(query=f32(64, 2, 8, 16), key=f32(1, 2, 8, 16),
        value=f32(1, 2, 99999, 16)),
    "scaled_dot_product_attention.default": dict(query=f32(1, 2, 8, 16), key=f32(1, 2, 8, 16),
        value=f32(1, 2, 99999, 16)),
    "div.Tensor_mode": dict(self=torch.tensor([-2**63]), other=torch.tensor([-1]), rounding_mode="trunc"),
    "to.dtype": dict(self=f32(2), dtype=200),
    "convolution.default": dict(input=f32(1, 1, 4, 4), weight=f32(1, 1, 3, 3), bias=None, stride=[1, 1],
        padding=[2**62, 2**62], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1),
}
for name, arguments in cases.items():
    try:
        find_operator("torch.ops.aten." + name)(arguments)
    except ValueError:
        print("refused")
"""


def test_kernels_that_trust_their_arguments_are_not_reached():
    code = f"import torch\nfrom tools.program_operators import find_operator\n{KERNELS}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.split()) == (0, ["refused"] * 6), ended.stderr


def test_bytes_that_are_no_bool_become_one(tmp_path, folder):
    def change(content):
        meta = next(p["tensor_meta"] for p in content["config"].values() if len(p["tensor_meta"]["sizes"]) == 4)
        meta.update(dtype=12, strides=whole(*np.cumprod([1, 3, 3, 3])[::-1].tolist()))

    rewrite(folder / "convolutional.pt2", tmp_path / "net.pt2", edit_json("weights_config.json", change))
    (values,) = (t for t in read_archive(tmp_path / "net.pt2").tensors.values() if t.dtype == torch.bool)
    assert set(values.view(torch.uint8).unique().tolist()) <= {0, 1}


VALUES = st.one_of(
    st.sampled_from(
        [-1, 0, 1, 2, 7, 64, 2**31, 2**31 - 1, 2**63 - 1, -(2**63), 10**30, 1e-300, 1e300, -0.5, "Infinity"]
    ),
    st.sampled_from(
        [None, True, False, "", "a\nb", "images", "os.system", [], {}, [[]], {"as_int": 3}, {"as_name": "images"}]
    ),
    st.sampled_from(
        [ATEN + name for name in ("neg.default", "t.default", "mm.default", "relu_.default", "stack.default")]
    ),
)


def places(value, path=()):
    """The paths of all that is in a JSON value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def interpreted(path):
    """The parts of the JSON that are read at all."""
    return not {"metadata", "module_call_graph", "guards_code"} & set(path)


@pytest.fixture(scope="module")
def texts(folder):
    """Of each program: its file, and its JSON with all places in it."""
    found = []
    for net in sorted(folder.glob("*.pt2")):
        with zipfile.ZipFile(net) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    content = json.loads(archive.read(name))
                    found.append((net, name, content, [p for p in places(content) if p and interpreted(p)]))
    return found


@contextlib.contextmanager
def one_line():
    try:
        yield
    except UserError as mistake:
        lines = str(mistake).splitlines()
        if len(lines) != 1:
            raise AssertionError(lines) from mistake
        raise


def survives(path):
    """Load and run: `UserError` in one line or features, nothing else."""
    with contextlib.suppress(UserError), one_line():
        assert load_feature_network(path)(np.full((2, 16, 16, 3), 100, np.uint8)).pooled.ndim == 2


FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=st.data())
def test_changed_json_is_refused_or_runs(tmp_path_factory, texts, data):
    net, name, original, all_places = data.draw(st.sampled_from(texts))
    content = json.loads(json.dumps(original))
    for place in data.draw(st.lists(st.sampled_from(all_places), min_size=1, max_size=2)):
        within = content
        try:
            for key in place[:-1]:
                within = within[key]
            within[place[-1]] = data.draw(VALUES)
        except (KeyError, IndexError, TypeError):
            continue  # the first change took the second's place away
    survives(rewrite(net, net.parent / "changed.bin", lambda entries: entries.update({name: json.dumps(content)})))


@FUZZ
@given(data=st.data())
def test_changed_bytes_are_refused_or_run(folder, data):
    content = bytearray((folder / "convolutional.pt2").read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(1, 4))):
        if content:
            # half of them in the table at the end, where the sizes are declared
            low = data.draw(st.sampled_from([0, max(0, len(content) - 1500)]))
            content[data.draw(st.integers(low, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "changed.bin").write_bytes(content)
    survives(folder / "changed.bin")


def test_evaluation_with_a_program(tmp_path, folder, capsys):
    rng = np.random.default_rng(0)
    for name, count in (("ref", 40), ("samples", 30)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))
    out = tmp_path / "metrics.json"
    arguments = ["--ref", tmp_path / "ref.npz", "--samples", tmp_path / "samples.npz", "--out", out, "--no-cache"]
    arguments += ["--features", folder / "transformer.pt2", "--features-name", "test features"]
    eval_fid.main([*map(str, arguments)])
    scores = json.loads(out.read_text())
    assert "Fréchet distance (test features)" in capsys.readouterr().out
    assert scores["network"]["kind"] == "exported program"
    assert math.isfinite(scores["frechet_distance"])
    assert scores["frechet_distance"] > 0
    assert "class_score" not in scores
