"""Weights of the authors' code: read without running anything, renamed without loss, refused by name."""

import argparse
import builtins
import contextlib
import functools
import importlib
import io
import json
import operator
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from switchdit import build_model, load_reference_checkpoint
from switchdit.engine import inert_pickle
from switchdit.engine.reference_checkpoints import MODEL_METADATA, read_weights
from switchdit.engine.reference_names import (
    CHANNEL_MASK,
    PRIOR,
    derived_tables,
    describe_model,
    recognise_system,
    to_author_names,
    to_our_names,
)
from switchdit.errors import UserError
from switchdit.models import model_fields

GOLDEN = Path(__file__).parent / "golden"
SWITCH_DIT = ("switch_dit_M3k1", "switch_dit_M3k2", "switch_dit_M4k2", "switch_dit_M4k3")
CASES = {"dit": "DiT", "dtr": "DTR", "diff_moe": "Diff-MoE", **dict.fromkeys(SWITCH_DIT, "Switch-DiT")}
TINY = {"input_size": 8, "num_classes": 5, "depth": 3, "hidden_size": 32, "num_heads": 2}
FORMATS = {"zip": True, "legacy": False}


@functools.cache
def golden_weights(case: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {k.removeprefix("sd/"): torch.from_numpy(file[k]) for k in file.files if k.startswith("sd/")}


def weights() -> dict[str, torch.Tensor]:
    return dict(golden_weights("dtr"))


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in ours.items()
    )


def refusal(path: Path) -> str:
    """The one line that reading ``path`` ends in."""
    with pytest.raises(UserError) as info:
        read_weights(path)
    message = str(info.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# Nothing is executed.


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = {
    "posix.system": lambda marker: Call(os.system, f"touch {marker}"),
    "builtins.eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "builtins.exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"),
    "builtins.getattr": lambda marker: Call(getattr, Path(marker), "touch"),
    "builtins.__import__": lambda marker: Call(builtins.__import__, "os"),
    "io.open": lambda marker: Call(open, str(marker), "w"),
    "subprocess.Popen": lambda marker: Call(subprocess.Popen, ["touch", str(marker)]),
    "importlib.import_module": lambda marker: Call(importlib.import_module, "os"),
    "functools.partial": lambda marker: Call(functools.partial, Call(os.system, f"touch {marker}")),
    "operator.attrgetter": lambda marker: Call(operator.attrgetter, "system"),
    "sys.exit": lambda marker: Call(sys.exit, 3),
}


def module_of(name: str, monkeypatch) -> types.ModuleType:
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def omegaconf(monkeypatch) -> type:
    """A class of the name omegaconf.dictconfig.DictConfig, gone from the modules before anything is read."""
    module_of("omegaconf", monkeypatch)
    module = module_of("omegaconf.dictconfig", monkeypatch)
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})
    return module.DictConfig


@pytest.mark.parametrize("protocol", [2, 4])  # names come by GLOBAL, and by STACK_GLOBAL
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("place", ["args", "config", "ema"])
@pytest.mark.parametrize("name", CALLS)
def test_a_file_that_would_call_a_function_is_refused(
    tmp_path, omegaconf, monkeypatch, name, place, file_format, protocol
):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    call = CALLS[name](marker)
    content: dict[str, Any] = {"ema": weights(), "opt": {"state": {}}}
    if place == "args":
        content["args"] = argparse.Namespace(lr=1e-4, deep=[{"x": (call,)}])
    elif place == "config":
        config = omegaconf()
        config.__dict__ = {"_metadata": {"ref_type": Any}, "_content": {"general": [call]}}
        content["config"] = config
    else:
        content["ema"] = OrderedDict(content["ema"], surprise=call)
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[file_format], pickle_protocol=protocol)
    for module in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.delitem(sys.modules, module)
    # what an argument of the call asks for may come first
    names = ("posix.system", name) if name == "functools.partial" else (name,)
    assert any(f"refused: its pickle asks for '{asked}'" in refusal(path) for asked in names)
    assert not marker.exists()


def test_the_crafted_files_are_live(tmp_path):
    torch.save({"args": CALLS["posix.system"](tmp_path / "marker")}, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


HEAD = b"".join(pickle.dumps(part, 2) for part in (*inert_pickle.LEGACY_SIGNATURE, {"little_endian": True}))
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(S'touch MARKER'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch MARKER'\no.",  # OBJ
        b'c__builtin__\neval\n(S\'open("MARKER", "w")\'\ntR.',  # the name that Python 2 had for it
        b"ccommands\ngetoutput\n(S'touch MARKER'\ntR.",
        b"\x80\x04\x8c\x08argparse\x8c\x0a_os.system\x93\x8c\x0ctouch MARKER\x85R.",  # by way of a module of data
    ],
)
def test_other_ways_to_name_a_function(tmp_path, monkeypatch, opcodes):
    monkeypatch.chdir(tmp_path)
    Path("evil.pt").write_bytes(HEAD + opcodes)
    assert "refused: its pickle asks for" in refusal(Path("evil.pt"))
    assert not Path("MARKER").exists()


@pytest.mark.parametrize("target", [TENSOR, b"ccollections\nOrderedDict\n", b"cx\nY\n", b"ctorch\nFloatStorage\n"])
@pytest.mark.parametrize("state", [b"(N}S'size'\nI1\nst", b"}S'__init__'\nI1\ns", b"(}S'items'\nI1\nsNt"])
def test_a_pickle_cannot_change_the_classes_that_read_it(tmp_path, target, state):
    (tmp_path / "evil.pt").write_bytes(HEAD + target + state + b"b.")
    before = [dict(vars(c)) for c in (inert_pickle.TensorRecord, inert_pickle.StateDict, inert_pickle.Inert)]
    assert "truncated, damaged or no file of torch.save" in refusal(tmp_path / "evil.pt")
    assert before == [dict(vars(c)) for c in (inert_pickle.TensorRecord, inert_pickle.StateDict, inert_pickle.Inert)]


def test_methods_of_a_state_dict_cannot_be_shadowed(tmp_path):
    sound = weights()
    shadowed = OrderedDict(sound)
    shadowed.get = shadowed.values = shadowed.keys = 3
    torch.save({"ema": shadowed}, tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt")[0], sound)


def to_be_damaged(file_format: str) -> bytearray:
    buffer = io.BytesIO()
    content = {"ema": {"w": torch.arange(6.0).view(2, 3)}, "args": argparse.Namespace(x={1}, p=Path("q"), n=np.ones(2))}
    torch.save(content, buffer, _use_new_zipfile_serialization=FORMATS[file_format])
    return bytearray(buffer.getvalue())


@pytest.mark.parametrize("value", [0, 8, 12, 14, 255])
def test_a_wrong_byte_anywhere_in_the_directory_is_the_users_mistake_or_none(tmp_path, value):
    """Names of members, and the methods (8, 12, 14: deflated, bzip2, lzma) of those that are stored."""
    content = to_be_damaged("zip")
    for position in range(content.index(b"PK\x01\x02"), len(content)):
        damaged = content.copy()
        damaged[position] = value
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with contextlib.suppress(UserError):
            read_weights(tmp_path / "damaged.pt")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), file_format=st.sampled_from(list(FORMATS)))
def test_damage_ends_in_one_line(tmp_path, data, file_format):
    damaged = to_be_damaged(file_format)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) or len(damaged) :]
    path = tmp_path / "damaged.pt"
    path.write_bytes(damaged)
    tensors, message = {}, ""
    try:
        tensors, _ = read_weights(path)
    except UserError as problem:
        message = str(problem)
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    assert "\n" not in message


# What is read is what was written.


def trained(**entries: Any) -> dict[str, Any]:
    """A training checkpoint with about all that people put into one."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        **entries,
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="DTR-S/2", results_dir=Path("results"), image_size=256),
        "ref_type": Any,
        "types": [dict, int, torch.float32, torch.device("cpu"), torch.Size([2])],
        "numpy": [np.float64(3), np.arange(3)],
        "sets": {1, frozenset({2})},
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("file_format", FORMATS)
def test_training_checkpoints_with_objects(tmp_path, omegaconf, monkeypatch, file_format, protocol):
    ema, model = OrderedDict(weights()), {name: value + 1 for name, value in weights().items()}
    ema._metadata = OrderedDict({"": {"version": 1}})
    config = omegaconf()
    config.__dict__ = {"_content": {"a": [1, 2.5, None]}, "_parent": config}
    content = trained(model=model, ema=ema, config=config)
    path = tmp_path / "0400000.pt"
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[file_format], pickle_protocol=protocol)
    for module in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.delitem(sys.modules, module)
    assert same(read_weights(path)[0], ema)
    assert same(read_weights(path, "model")[0], model)


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_kind_of_tensor(tmp_path, file_format):
    base = torch.arange(24.0).view(4, 6)
    kinds = {
        "view": base[1:3],
        "transposed": base.t(),
        "whole": base,
        "parameter": nn.Parameter(torch.randn(2, 3)),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        **{
            str(dtype): torch.arange(-3, 3).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8)
        },
        "uint8": torch.arange(6, dtype=torch.uint8),
    }
    torch.save(kinds, tmp_path / "w.pt", _use_new_zipfile_serialization=FORMATS[file_format])
    read, _ = read_weights(tmp_path / "w.pt")
    assert same(read, {name: value.detach() for name, value in kinds.items()})
    assert all(value.is_contiguous() for value in read.values())
    assert len({value.data_ptr() for name, value in read.items() if name != "empty"}) == len(read) - 1


def test_only_what_is_wanted_is_read_and_its_bytes_are_checked(tmp_path):
    whole, missing, flipped = tmp_path / "whole.pt", tmp_path / "missing.pt", tmp_path / "flipped.pt"
    torch.save({"ema": {"w": torch.ones(64)}, "opt": {"exp_avg": torch.full((64,), 2.0)}}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(missing, "w") as target:
        for member in source.infolist():
            if not member.filename.endswith("/data/1"):
                target.writestr(member, source.read(member))
    assert torch.equal(read_weights(missing)[0]["w"], torch.ones(64))
    content = whole.read_bytes()
    at = content.index(torch.ones(64).numpy().tobytes())
    flipped.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    assert "truncated, damaged" in refusal(flipped)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"ema": w},
        lambda w: {"state_dict": w},
        lambda w: {"module": w, "global_steps": 3},
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {"ema": {f"_orig_mod.module.{k}": v for k, v in w.items()}},
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrap):
    torch.save(wrap(weights()), tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt")[0], weights())
    model = build_model("DTR-S/2", **TINY)
    load_reference_checkpoint(model, wrap(weights()))
    assert torch.equal(model.pos_embed, weights()["pos_embed"])


def test_a_prefix_stays_unless_all_names_have_it(tmp_path):
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt")[0], mixed)


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "notes.pt").write_text("a text\n" * 100)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 100)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    torch.save(trained(model=weights()), tmp_path / "other.pt")
    torch.save({"ema": {"a": torch.ones(1), "b": 3, "c": "x"}}, tmp_path / "mixed.pt")
    torch.save({"ema": {"a\nb": torch.ones(1)}}, tmp_path / "lines.pt")
    torch.save({3: torch.ones(1)}, tmp_path / "numbers.pt")
    torch.save(weights(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(content[: len(content) // 2])
    for name, message in {
        "notes.pt": "no file of torch.save",
        "empty.pt": "no file of torch.save",
        "truncated.pt": "is truncated",
        "folder.pt": "is a folder",
        "absent.pt": "does not exist",
        "broken.safetensors": "cannot be read",
        "list.pt": "holds no state dict",
        "nothing.pt": "it is empty",
        "other.pt": "has no entry 'ema'; it has: model, opt, args",
        "lines.pt": "holds no state dict under 'ema': it has other keys",
        "numbers.pt": "holds no state dict",
        "mixed.pt": "holds no state dict under 'ema': b, c are no tensors",
    }.items():
        assert message in refusal(tmp_path / name)
    with pytest.raises(UserError, match="which is 'best'; it must be ema or model"):
        read_weights(tmp_path / "whole.pt", "best")


# Names.


@pytest.mark.parametrize("case", CASES)
def test_names_go_there_and_back(case):
    theirs, system = golden_weights(case), CASES[case]
    assert recognise_system(theirs) == system
    ours = to_our_names(system, theirs)
    described = describe_model(system, theirs, num_heads=2)
    model = build_model(**described)
    assert ours.keys() == model.state_dict().keys()
    back = {**to_author_names(system, ours), **derived_tables(system, model_fields(**described))}
    assert same(back, theirs)


@settings(max_examples=20, deadline=None)
@given(depth=st.integers(1, 12), num_experts=st.integers(1, 13), width=st.integers(1, 3))
def test_any_number_of_stacked_experts(depth, num_experts, width):
    theirs = {f"routers.{i}.experts.w": torch.randn(num_experts, width, width) for i in range(depth)}
    theirs |= {f"routers.{i}.experts.b": torch.randn(num_experts, width) for i in range(depth)}
    ours = to_our_names("Switch-DiT", theirs)
    assert len(ours) == 2 * depth * num_experts
    shuffled = dict(sorted(ours.items()))  # as files order them: expert 10 before expert 2
    assert same(to_author_names("Switch-DiT", shuffled), theirs)


PUBLISHED = ["DiT-B/4", "DiT-XL/2", "DTR-S/8", "Switch-DiT-L/2", "Diff-MoE-S/2", "Diff-MoE-S/2_v2"]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("num_classes", [1000, 1])
def test_a_published_size_is_read_off_its_weights(name, num_classes):
    system, fields = name.rsplit("-", 1)[0], model_fields(name, num_classes=num_classes)
    with torch.device("meta"):
        ours = build_model(name, num_classes=num_classes).state_dict()
    theirs = {**to_author_names(system, ours), **derived_tables(system, fields)}
    described = describe_model(system, theirs)
    assert described == {**{k: v for k, v in fields.items() if k != "ep_size"}, "name": name.removesuffix("_v2")}


@pytest.mark.parametrize(("alpha", "beta"), [(4.0, 0.8), (2.0, 0.5), (4.0, 0.79), (1.0, 1.0)])
def test_channel_masks_are_recognised(alpha, beta):
    fields = model_fields("DTR-S/2", **TINY, alpha=alpha, beta=beta)
    theirs = golden_weights("dtr") | derived_tables("DTR", fields)
    described = describe_model("DTR", theirs, num_heads=2)
    assert torch.equal(derived_tables("DTR", model_fields(**described))[CHANNEL_MASK], theirs[CHANNEL_MASK])


@pytest.mark.parametrize("case", CASES)
def test_half_precision_weights(case):
    theirs = {name: v.half() if v.is_floating_point() else v for name, v in golden_weights(case).items()}
    model = build_model(**describe_model(CASES[case], theirs, num_heads=2))
    load_reference_checkpoint(model, theirs)
    assert torch.equal(model.x_embedder.proj.weight.half(), theirs["x_embedder.proj.weight"])


def test_the_authors_prior_is_one_short_where_its_share_rounds_down():
    fields = {"num_timesteps": 1000, "depth": 5, "num_experts": 11, "top_k": 3}
    assert derived_tables("Switch-DiT", fields)[PRIOR].sum(1).unique().item() == 14  # int(55 * (3 / 11))


def test_what_weights_do_not_tell_must_be_given():
    theirs = golden_weights("switch_dit_M3k2")
    with pytest.raises(UserError, match="num_heads cannot be told from weights"):
        describe_model("Switch-DiT", theirs)
    with pytest.raises(UserError, match="top_k cannot be told"):
        describe_model("Switch-DiT", {k: v for k, v in theirs.items() if k != PRIOR}, num_heads=2)
    with pytest.raises(UserError, match=r"no weights of DTR: 'pos_embed', of 3 dimensions, is missing"):
        describe_model("DTR", {k: v for k, v in weights().items() if k != "pos_embed"})
    with pytest.raises(UserError, match=r"'routers.0._unit_mapping' of the weights is not the published table"):
        describe_model("DTR", weights() | {CHANNEL_MASK: weights()[CHANNEL_MASK].flip(0)}, num_heads=2)
    with pytest.raises(UserError, match=r"'routers.0._unit_mapping' of the weights is not the published table"):
        describe_model("DTR", weights() | {CHANNEL_MASK: torch.full((1000, 32), torch.nan)}, num_heads=2)
    with pytest.raises(UserError, match=r"'prior._unit_mapping' of the weights .* 'top_k': 1}"):
        describe_model("Switch-DiT", theirs, num_heads=2, top_k=1)
    with pytest.raises(UserError, match="of no known system"):
        recognise_system({"conv1.weight": torch.ones(1)})


# Into a model.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loading(tmp_path, case, suffix):
    theirs, system, path = golden_weights(case), CASES[case], tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(trained(ema=theirs, model={}), path)
    else:
        save_file(theirs, path)
    model = build_model(**describe_model(system, theirs, num_heads=2))
    load_reference_checkpoint(model, path)
    assert same(model.state_dict(), to_our_names(system, theirs))


def test_what_does_not_fit_is_listed_by_the_authors_names():
    theirs = golden_weights("diff_moe")
    model = build_model(**describe_model("Diff-MoE", theirs, num_heads=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {name: value + 1 for name, value in theirs.items() if name != "blocks.1.moe.gate.weight"}
    wrong["blocks.0.moe.experts.3.up_proj.weight"] = torch.zeros(64, 31)
    wrong["blocks.0.moe.experts.4.up_proj.weight"] = torch.zeros(64, 32)
    with pytest.raises(UserError) as info:
        load_reference_checkpoint(model, wrong)
    assert str(info.value) == (
        "the state dict does not fit the model; missing: blocks.1.moe.gate.weight; "
        "extra: blocks.0.moe.experts.4.up_proj.weight; "
        "misshapen: blocks.0.moe.experts.3.up_proj.weight (64, 31) instead of (64, 32)"
    )
    assert same(model.state_dict(), before)


def test_weights_of_another_routing_are_refused():
    model = build_model("Switch-DiT-S/2", **TINY, num_experts=3, top_k=1)
    with pytest.raises(UserError, match=r"trained with top_k 2 .*, the model has 1"):
        load_reference_checkpoint(model, golden_weights("switch_dit_M3k2"))
    with pytest.raises(UserError, match=r"another channel mask .* than that of alpha \(4.0\) and beta \(0.5\)"):
        load_reference_checkpoint(build_model("DTR-S/2", **TINY, beta=0.5), weights())
    with pytest.raises(UserError, match="Multi-Expert-DiT has no weights of other authors"):
        load_reference_checkpoint(build_model("Multi-Expert-DiT-S/2", **TINY), weights())
    with pytest.raises(UserError, match="gate is 'noisy'; the authors' code of Switch-DiT knows 'plain' alone"):
        load_reference_checkpoint(build_model("Switch-DiT-S/2", **TINY, gate="noisy"), weights())


@pytest.mark.parametrize("described", ["{", "[]", '{"name": 3}', '{"name": "DiT-S/2", "depht": 3}', "{}"])
def test_metadata_that_describe_no_model(tmp_path, described):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", {MODEL_METADATA: described})
    assert "describe no model" in refusal(tmp_path / "w.safetensors")


def test_converted_weights_of_another_model(tmp_path):
    theirs = golden_weights("switch_dit_M3k2")
    described = describe_model("Switch-DiT", theirs, num_heads=2)
    ours, path = to_our_names("Switch-DiT", theirs), tmp_path / "ours.safetensors"
    save_file({name: value.contiguous() for name, value in ours.items()}, path, {MODEL_METADATA: json.dumps(described)})
    model = build_model(**described)
    load_reference_checkpoint(model, path)
    assert same(model.state_dict(), ours)
    with pytest.raises(UserError, match="of another model: num_heads 2 instead of 4; top_k 2 instead of 1"):
        load_reference_checkpoint(build_model(**described | {"num_heads": 4, "top_k": 1}), path)
    with pytest.raises(UserError, match="of another model: system Switch-DiT instead of DiT"):
        load_reference_checkpoint(build_model("DiT-S/2", **TINY), path)
