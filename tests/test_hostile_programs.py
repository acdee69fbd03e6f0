"""Exported programs that mean harm, or are damaged: one line or a valid network, and nothing that a file can do."""

import contextlib
import json
import zipfile

import numpy as np
import pytest
import torch
from exported_networks import (
    edit_json,
    refusal,
    rewrite,
    write_originals,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchdit.errors import UserError
from tools.feature_network import load_feature_network
from tools.pt2_archive import read_archive

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of torch.export's own copies
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_originals(tmp_path_factory.mktemp("originals"))


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


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


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
