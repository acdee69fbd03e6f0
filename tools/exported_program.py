"""Networks as exported programs (`torch.export.save`, .pt2): any architecture, run without trusting the file.

`torch.export.load` unpickles with ``weights_only=False``, evaluates strings as sympy expressions and loads compiled
libraries, so it hands the machine to whoever wrote the file. The graph itself is data, and here it is interpreted node
by node: tensors come from `tools/pt2_archive.py` as bytes, each node calls one operator of the list in
`tools/program_operators.py`, after its arguments are checked, and sizes that depend on the input are integers that the
nodes compute. No string of the file is evaluated and no name of it imported. Before images of a new size are passed,
the graph runs without data (on the meta device): so a program that fits together badly is refused when it is loaded,
as is one that asks for a tensor larger than the memory of the machine, or writes to its own weights. That this holds
with data, too, is not left to the kernels: each number and each shape that a node makes is compared with the one that
it made without. What is left to the author of a file: to take long, to fill the memory that there is, and to give wrong
features.

The program is of a network in evaluation mode, normalises the images by itself, and may be decomposed:

    inputs    images uint8 (N, H, W, 3), N a dynamic dimension or fixed (a batch is filled up to it), H and W likewise
    outputs   features (N, F), or a tuple of features (N, F) and class probabilities (N, K)

    program = torch.export.export(network.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, "network.pt2")
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from switchdit.engine.inert_pickle import DAMAGE
from switchdit.errors import UserError
from switchdit.files import sha256_of
from tools.feature_network import Features
from tools.program_graph import Graph, Sizes, first_line, parse_graph, run_graph
from tools.program_operators import check_memory
from tools.pt2_archive import DTYPES, read_archive

# N = images, F = features, K = classes

KIND = "exported program"
EXPECTED = "expected images uint8 (N, H, W, 3) -> features (N, F), or a tuple of features and probabilities (N, K)"
LARGEST = 4096  # images of a batch that is fixed, and pixels of a side
EXAMPLE = (2, 224, 224, 3)  # sizes that a program leaves open, for the first run without data


@dataclass
class Program:
    """images: the name of the input. sizes: of its dimensions, as (smallest, largest). example: sizes that are valid.
    weights: by the name of their input; full_names: what the author of the network called them.
    """

    graph: Graph
    images: str
    sizes: list[tuple[int, float]]
    example: tuple[int, ...]
    weights: dict[str, Tensor]
    full_names: dict[str, str]
    torch_version: str
    schema: str


def read_program(path: Path) -> Program:
    """Read a .pt2 file whose graph takes images. Raises `UserError`, or any of `inert_pickle.DAMAGE`."""
    archive = read_archive(path)
    module, ranges = archive.program["graph_module"], archive.program["range_constraints"]
    graph = parse_graph(module["graph"])
    full_names, images = {}, []
    for name, spec in zip(graph.inputs, module["signature"]["input_specs"], strict=True):
        ((kind, value),) = spec.items()
        if kind == "user_input":
            images.append(name)
        elif kind in ("parameter", "buffer", "tensor_constant"):
            full_names[name] = value[f"{kind}_name"]
        else:
            raise UserError(f"has an input of the kind {kind}, which is not supported; {EXPECTED}")
    if absent := set(full_names.values()) - archive.tensors.keys():
        raise UserError(f"does not hold its weight '{min(absent)}'")
    if written := [kind for spec in module["signature"]["output_specs"] for kind in spec if kind != "user_output"]:
        raise UserError(f"has an output of the kind {written[0]}; call .eval() on the network before it is exported")
    if len(images) != 1:
        raise UserError(f"takes {len(images)} inputs; {EXPECTED}")
    meta = module["graph"]["tensor_values"][images[0]]
    sizes = [size_range(size, ranges) for size in meta["sizes"]]
    if DTYPES.get(meta["dtype"]) != torch.uint8 or len(sizes) != 4 or sizes[3] != (3, 3):
        shown = ", ".join(str(low) if low == high else "any" for low, high in sizes)
        dtype = str(DTYPES.get(meta["dtype"], "of an unknown type")).removeprefix("torch.")
        raise UserError(f"takes {dtype} ({shown}); {EXPECTED}")
    example = tuple(
        low if low == high else (size["as_expr"]["hint"] or {"as_int": usual})["as_int"]
        for size, (low, high), usual in zip(meta["sizes"], sizes, EXAMPLE, strict=True)
    )
    if not all(type(size) is int and 1 <= size <= LARGEST for size in example) or sizes[0][0] > LARGEST:
        raise UserError(f"takes images of the sizes {example}; up to {LARGEST} is supported")
    version = archive.program["schema_version"]
    weights = {name: archive.tensors[full_name] for name, full_name in full_names.items()}
    described = str(archive.program.get("torch_version", "unknown"))[:50], f"{version['major']}.{version['minor']}"
    return Program(graph, images[0], sizes, example, weights, full_names, *described)


def size_range(size: dict[str, Any], ranges: dict[str, dict]) -> tuple[int, float]:
    """The smallest and the largest value of a dimension. One that is a product or a sum is left to the nodes."""
    if "as_int" in size:
        return size["as_int"], size["as_int"]
    symbol = re.fullmatch(r"Symbol\('(\w+)'[^()]*\)", size["as_expr"]["expr_str"])
    limits = ranges.get(symbol[1], {}) if symbol else {}
    low, high = limits.get("min_val"), limits.get("max_val")
    return max(1, low) if type(low) is int else 1, max(1, high) if type(high) is int else math.inf


class TensorLimit(TorchDispatchMode):
    """Refuses any tensor larger than the memory, those inside of composite operators included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                check_memory(tensor.untyped_storage().nbytes())
        return out


class ProgramFeatures:
    """A `FeatureNetwork` made of a `Program`, on a GPU where there is one, in float32 as it is (without TF32)."""

    def __init__(self, program: Program, description: dict[str, Any]):
        self.program, self.description = program, description
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rehearsed: dict[tuple[int, ...], list[Sizes]] = {}  # by the shape of the images
        self.widths: list[int] = []
        self.rehearsal_weights = {
            name: torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
            for name, weight in program.weights.items()
        }
        outputs = self.rehearse(program.example)
        self.weights = {name: weight.to(self.device) for name, weight in program.weights.items()}
        height, width = program.sizes[1:3]
        open_sides = height[0] != height[1] or width[0] != width[1]
        if not open_sides and height != width:
            raise UserError(f"takes images of {width[0]} x {height[0]}; only square or open sizes are supported")
        self.image_size: int | None = None if open_sides else int(height[0])
        self.num_classes = outputs[1].shape[1] if len(outputs) == 2 else 0
        self.statistics_sizes: dict[str, int] = {}

    def rehearse(self, shape: tuple[int, ...]) -> list[Tensor]:
        """Run without data. `UserError` for a graph that fails, takes too much memory, or writes to its weights."""
        sizes: list[Sizes] = []
        with torch.no_grad(), TensorLimit():
            images = torch.empty(shape, dtype=torch.uint8, device="meta")
            given = {**self.rehearsal_weights, self.program.images: images}
            outputs = run_graph(self.program.graph, given, images.device, sizes.append)
        written = [self.program.full_names[name] for name, weight in self.rehearsal_weights.items() if weight._version]
        if written:
            raise UserError(f"writes to its own '{written[0]}'; call .eval() on the network before it is exported")
        check_outputs(outputs, shape[0])
        self.rehearsed[shape] = sizes
        return outputs

    def run(self, images: Tensor) -> list[Tensor]:
        """Images (N, H, W, 3) uint8 -> the outputs of the program as they are, on its device."""
        if tuple(images.shape) not in self.rehearsed:
            self.rehearse(tuple(images.shape))
        given = {**self.weights, self.program.images: images.to(self.device, copy=True)}
        rehearsed = iter(self.rehearsed[tuple(images.shape)])

        def compare(sizes: Sizes) -> None:
            if sizes != next(rehearsed):
                raise UserError(f"node '{sizes[0]}' computes other sizes with data than without")

        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = run_graph(self.program.graph, given, self.device, compare)
        check_outputs(outputs, len(images))
        widths = [output.shape[1] for output in outputs]
        if self.widths and widths != self.widths:
            raise UserError(f"returns {widths[0]} features for images {tuple(images.shape)}, {self.widths[0]} before")
        self.widths = widths
        return outputs

    def __call__(self, images: np.ndarray) -> Features:
        """Images (N, H, W, 3) uint8 -> `Features`. Raises `UserError` where the program does not take them."""
        with naming(self.description["file"]):
            for side, (low, high) in zip(images.shape[1:3], self.program.sizes[1:3], strict=True):
                if not low <= side <= high:
                    takes = f"{low}" if low == high else f"{low} or more" if high == math.inf else f"{low} to {high}"
                    given = f"{images.shape[2]} x {images.shape[1]}"
                    raise UserError(f"takes images with sides of {takes} pixels, not of {given}")
            smallest, largest = self.program.sizes[0]
            parts = []
            for part in torch.from_numpy(images).split(int(min(largest, len(images)))):
                filled = part[torch.arange(max(len(part), smallest)).clamp_(max=len(part) - 1)]
                parts.append([output[: len(part)].float().cpu() for output in self.run(filled)])
            pooled, *probabilities = (torch.cat(outputs).numpy() for outputs in zip(*parts, strict=True))
            if probabilities and not np.allclose(total := probabilities[0].sum(axis=1), 1, atol=1e-2):
                raise UserError(f"returns a second output whose rows sum to {total[0]:.3g}; probabilities sum to 1")
            return Features(pooled, None, probabilities[0] if probabilities else None)


def check_outputs(outputs: list[Tensor], count: int) -> None:
    fits = all(o.ndim == 2 and len(o) == count and o.shape[1] and o.is_floating_point() for o in outputs)
    if not fits or len(outputs) not in (1, 2):
        shown = ", ".join(f"{str(output.dtype).removeprefix('torch.')} {tuple(output.shape)}" for output in outputs)
        raise UserError(f"returns {shown or 'nothing'} for {count} images; {EXPECTED}")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A `UserError` inside comes out as one printable line that names the file."""
    try:
        yield
    except UserError as mistake:
        told = "".join(letter if letter.isprintable() else " " for letter in str(mistake))
        raise UserError(f"--features {path} {told}") from mistake.__cause__


def load_exported_program(path: Path) -> ProgramFeatures:
    """The network of a .pt2 file. Raises `UserError` for anything but a program as above, running nothing of it."""
    with naming(path):
        try:
            program = read_program(path)
            description = {"kind": KIND, "file": str(path), "sha256": sha256_of(path)}
            return ProgramFeatures(program, {**description, "torch": program.torch_version, "schema": program.schema})
        except UserError:
            raise
        except (OSError, *DAMAGE) as problem:
            shown = f"{type(problem).__name__}: {first_line(problem)}"
            raise UserError(f"is damaged, or no exported program ({shown})") from problem
