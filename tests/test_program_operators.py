"""The operators that a file may call, called with what makes kernels fault: in a process of its own, which survives."""

import concurrent.futures
import contextlib
import math
import multiprocessing
from unittest import mock

import numpy as np
import pytest
import torch
from exported_networks import edit_json, rewrite, write_originals
from torch.utils._pytree import tree_leaves

from switchdit.engine.inert_pickle import DAMAGE
from switchdit.errors import UserError
from tools import program_operators
from tools.feature_network import load_feature_network
from tools.program_operators import find_operator

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of torch.export's own copies
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

ATEN = "torch.ops.aten."


@pytest.fixture(scope="module")
def apart():
    """Calls a function of this file in a process of its own: a fault there ends that process, and fails the test."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


def crashing_calls():
    """Each of these crashed the interpreter, or read outside of its inputs, when the operator was called as it is."""
    f32 = torch.randn
    vectors = {name: f32(1) for name in ("weight", "bias", "running_mean", "running_var")}
    long = {"key": f32(1, 2, 8, 16), "value": f32(1, 2, 99999, 16)}
    convolution = {"bias": None, "stride": [1, 1], "dilation": [1, 1], "transposed": False, "output_padding": [0, 0]}
    groups = {"input": f32(2, 4, 8, 8), "weight": None, "bias": None, "group": 1, "eps": 1e-5}
    return [
        ("_native_batch_norm_legit_no_training.default", {"input": f32(2, 999, 2, 2), "momentum": 0.1} | vectors),
        ("_scaled_dot_product_flash_attention_for_cpu.default", {"query": f32(64, 2, 8, 16)} | long),
        ("scaled_dot_product_attention.default", {"query": f32(1, 2, 8, 16)} | long),
        ("div.Tensor_mode", {"self": torch.tensor([-(2**63)]), "other": torch.tensor([-1]), "rounding_mode": "trunc"}),
        ("to.dtype", {"self": f32(2), "dtype": 200}),
        ("to.prim_dtype", {"self": f32(2), "dtype": 200}),
        (
            "convolution.default",
            {"input": f32(1, 1, 4, 4), "weight": f32(1, 1, 3, 3), "padding": [2**62] * 2, "groups": 1} | convolution,
        ),
        ("native_group_norm.default", {"N": 522896, "C": 721248, "HxW": 48912491} | groups),  # 512, modulo 2**64
    ]


def refused_calls():
    """The names of the crashing calls that are refused before they reach a kernel."""
    refused = []
    for name, arguments in crashing_calls():
        with contextlib.suppress(UserError, ValueError):
            find_operator(ATEN + name)(arguments)
            continue
        refused.append(name)
    return refused


def test_kernels_that_trust_their_arguments_are_not_reached(apart):
    assert apart(refused_calls) == [name for name, _ in crashing_calls()]


def call(target, outputs, **arguments):
    """A node; arguments and outputs: JSON of each value, or the name of a tensor."""
    as_json = {name: {"as_tensor": {"name": v}} if isinstance(v, str) else v for name, v in arguments.items()}
    inputs = [{"name": name, "arg": value, "kind": 1} for name, value in as_json.items()]
    outputs = [{"as_tensor": {"name": v}} if isinstance(v, str) else v for v in outputs]
    return {"target": target, "name": target, "inputs": inputs, "outputs": outputs, "metadata": {}}


def symbol(name):
    return {"as_sym_int": {"as_name": name}}


def two_faced(program):
    """Reflection of an NHWC view has other strides with data than without: 2, 4, 64 become sizes of another tensor."""
    graph = program["graph_module"]["graph"]
    one = {"as_int": 1}
    nodes = [
        call(ATEN + "_to_copy.default", ["f"], self="images", dtype={"as_scalar_type": 7}),
        call(ATEN + "permute.default", ["p"], self="f", dims={"as_ints": [0, 3, 1, 2]}),
        call(ATEN + "reflection_pad2d.default", ["q"], self="p", padding={"as_ints": [1, 1, 1, 1]}),
        call(ATEN + "sym_stride.int", [symbol("stride")], self="q", dim=one),
        call("_operator.sub", [symbol("less")], a={"as_int": 18 * 18}, b=symbol("stride")),
        call("_operator.floordiv", [symbol("evil")], a=symbol("less"), b={"as_int": 18 * 18 - 1}),
        call(ATEN + "zeros.default", ["z"], size={"as_ints": [2, 4, 8, 8]}),
    ]
    for name, harmless, hostile in (("N", 2, 522896), ("C", 4, 721248), ("HxW", 64, 48912491)):
        nodes.append(call("_operator.mul", [symbol("x" + name)], a=symbol("evil"), b={"as_int": hostile - harmless}))
        nodes.append(call("_operator.add", [symbol(name)], a=symbol("x" + name), b={"as_int": harmless}))
    sizes = {name: symbol(name) for name in ("N", "C", "HxW")} | {"group": one, "eps": {"as_float": 1e-5}}
    none = {"as_none": True}
    nodes.append(call(ATEN + "native_group_norm.default", ["g", "m", "r"], input="z", weight=none, bias=none, **sizes))
    out = graph["outputs"][0]["as_tensor"]["name"]
    nodes.append(call(ATEN + "flatten.using_ints", [out], self="g", start_dim=one))
    graph["nodes"], graph["outputs"] = nodes, graph["outputs"][:1]


def told(path, *trusted):
    """What the evaluator says of a file, with more operators on the list."""
    more = program_operators.TENSOR_OPERATORS | set(trusted)
    with mock.patch.object(program_operators, "TENSOR_OPERATORS", more), pytest.raises(UserError) as mistake:
        load_feature_network(path)(np.zeros((2, 16, 16, 3), np.uint8))
    return str(mistake.value)


def test_a_program_that_computes_other_sizes_with_data_is_refused(apart, tmp_path):
    path = write_originals(tmp_path) / "convolutional.pt2"
    rewrite(path, path, edit_json("models/model.json", two_faced))
    assert "calls 'torch.ops.aten.sym_stride.int', which is not among" in apart(told, path)
    assert "node 'torch.ops.aten.sym_stride.int' computes other sizes with data" in apart(told, path, "sym_stride.int")


def test_no_operator_makes_numbers_of_data():
    makers = set()
    for name in program_operators.TENSOR_OPERATORS:
        base, _, only = name.partition(".")
        packet = getattr(torch.ops.aten, base)
        for overload in [only] if only else packet.overloads():
            with contextlib.suppress(UserError):
                find_operator(f"{ATEN}{base}.{overload}")
                made = getattr(packet, overload)._schema.returns
                makers |= {base for value in made if "Tensor" not in str(value.type)}
    assert makers == {"sym_size", "sym_numel"}


# per operator: what it is given, and one of the arguments that hold its sizes, a valid value of it
IMAGE, VECTOR = (2, 4, 8, 8), (8,)
SIZED = {
    "native_group_norm.default": {"input": IMAGE, "weight": None, "bias": None, "eps": 1e-5}
    | {"N": 2, "C": 4, "HxW": 64, "group": 2},
    "native_layer_norm.default": {"input": IMAGE, "weight": VECTOR, "bias": VECTOR, "eps": 1e-5}
    | {"normalized_shape": [8]},
    "_fused_rms_norm.default": {"input": IMAGE, "weight": VECTOR, "eps": 1e-5, "normalized_shape": [8]},
    "group_norm.default": {"input": IMAGE, "num_groups": 2},
    "zeros.default": {"size": [2, 3]},
    "new_full.default": {"self": VECTOR, "size": [2, 3], "fill_value": 1.0},
    "repeat.default": {"self": VECTOR, "repeats": [2, 3]},
    "tile.default": {"self": VECTOR, "dims": [2, 3]},
    "repeat_interleave.self_int": {"self": IMAGE, "repeats": 2, "dim": 1},
    "expand.default": {"self": (2, 1), "size": [2, 3]},
    "as_strided.default": {"self": IMAGE, "size": [2, 3], "stride": [3, 1], "storage_offset": 5},
    "view.default": {"self": IMAGE, "size": [2, 256]},
    "unflatten.int": {"self": IMAGE, "dim": 1, "sizes": [2, 2]},
    "unfold.default": {"self": IMAGE, "dimension": 2, "size": 3, "step": 2},
    "adaptive_avg_pool2d.default": {"self": IMAGE, "output_size": [3, 3]},
    "adaptive_max_pool2d.default": {"self": IMAGE, "output_size": [3, 3]},
    "max_pool2d_with_indices.default": {"self": IMAGE, "kernel_size": [3, 2], "padding": [1, 0], "dilation": [1, 2]},
    "avg_pool2d.default": {"self": IMAGE, "kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0]},
    "conv2d.default": {"input": IMAGE, "weight": (4, 2, 3, 3), "padding": [1, 1], "dilation": [1, 2], "groups": 2},
    "upsample_bicubic2d.default": {"self": IMAGE, "output_size": [5, 7], "align_corners": False},
    "pixel_shuffle.default": {"self": IMAGE, "upscale_factor": 2},
    "channel_shuffle.default": {"self": IMAGE, "groups": 2},
    "pad.default": {"self": IMAGE, "pad": [1, 2, 0, 3], "mode": "reflect"},
    "replication_pad2d.default": {"self": IMAGE, "padding": [1, 2, 0, 3]},
    "slice.Tensor": {"self": IMAGE, "dim": 2, "start": 1, "end": 4, "step": 2},
    "narrow.default": {"self": IMAGE, "dim": 2, "start": 1, "length": 4},
    "split_with_sizes.default": {"self": IMAGE, "split_sizes": [1, 3], "dim": 1},
    "roll.default": {"self": IMAGE, "shifts": [1, 2], "dims": [1, 2]},
    "diagonal.default": {"self": IMAGE, "offset": 1, "dim1": 1, "dim2": 2},
    "topk.default": {"self": IMAGE, "k": 3, "dim": 2},
    "eye.m": {"n": 3, "m": 4},
    "linspace.default": {"start": 0, "end": 1, "steps": 5},
}
EDGES = [-(2**63), -(2**31), -9, -1, 0, 1, 2, 3, 5, 7, 16, 65, 4096, 48912491, 2**31 - 1, 2**32, 2**62, 2**63 - 1]


def changed(value, rng):
    """Another whole number, alone or within a list, or a list of another length."""
    if not isinstance(value, list):
        return int(rng.choice(EDGES))
    at = int(rng.integers(len(value) + 1))
    return value[:-1] if at == len(value) else [*value[:at], int(rng.choice(EDGES)), *value[at + 1 :]]


def shapes_of(operator, arguments, device):
    """The shapes of what a call makes, or None if it is refused; the inputs are random and of the given shapes."""
    given = {
        name: torch.rand(value, device=device) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }
    if device == "meta" and "device" in operator.arguments:
        given["device"] = torch.device("meta")
    try:
        return [tuple(tensor.shape) for tensor in tree_leaves(operator(given))]
    except (*DAMAGE, UserError):
        return None


def call_with_changed_sizes(count):
    """Of ``count`` calls per operator: those that ran, those refused, and those that a run without data misjudges."""
    rng, ran, refused, misjudged = np.random.default_rng(0), [], [], []
    for name, arguments in SIZED.items():
        operator = find_operator(ATEN + name)
        numbers = [key for key, value in arguments.items() if type(value) in (int, list)]
        for _ in range(count):
            hostile = dict(arguments)
            for key in rng.choice(numbers, int(rng.integers(3))):
                hostile[key] = changed(hostile[key], rng)
            rehearsed = shapes_of(operator, hostile, "meta")
            if rehearsed is not None and max(map(math.prod, rehearsed)) > 2**22:
                continue  # too large for a test
            happened = shapes_of(operator, hostile, "cpu")
            (ran if happened is not None else refused).append(name)
            if None not in (rehearsed, happened) and rehearsed != happened:
                misjudged.append((name, hostile))
    return set(ran), set(refused), misjudged


def test_sizes_of_any_value_are_refused_or_those_of_the_run_without_data(apart):
    ran, refused, misjudged = apart(call_with_changed_sizes, 60)
    assert ran == set(SIZED)
    assert refused == set(SIZED)
    assert not misjudged
