"""Nothing from outside is executed, no name out of a file leaves its folder, nothing is shown to the network."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import write_latents

from switchdit.data.latent_dataset import LatentDataset
from switchdit.data.latent_shards import MANIFEST
from switchdit.errors import UserError
from switchdit.files import inside

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for package in ("switchdit", "tools") for path in (ROOT / package).rglob("*.py"))

# The one place that opens pickles of others, with an unpickler that knows no function
INERT = "switchdit/engine/inert_pickle.py"

# Calls that can run what a file or a user says, by the end of their name, and the argument that makes them harmless
DANGEROUS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "read_array": ("allow_pickle", False),
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "marshal.loads": None,
    "shelve.open": None,
    "yaml.load": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "jit.load": None,
    "export.load": None,
    "extractall": None,
    "extract": None,
    "unpack_archive": None,
    "os.system": None,
    "os.popen": None,
    "eval": None,
    "exec": None,
    "compile": None,
    "__import__": None,
}
BUILTINS = {"eval", "exec", "compile", "__import__"}  # as methods, such as a model's, these are others


def is_call_of(name: str, ending: str) -> bool:
    if ending in BUILTINS:
        return name == ending
    return name.endswith(f".{ending}") or ("." in ending and name == ending)


def dangerous_calls(path: Path) -> list[str]:
    found = []
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        if given.get("shell"):
            found.append(f"{path.name}:{call.lineno} {name}(shell=True)")
        for ending, harmless in DANGEROUS.items():
            if is_call_of(name, ending) and (harmless is None or given.get(harmless[0]) is not harmless[1]):
                found.append(f"{path.name}:{call.lineno} {name}")
    return found


def test_no_source_runs_what_it_reads():
    assert len(SOURCES) > 60
    found = {str(path.relative_to(ROOT)): calls for path in SOURCES if (calls := dangerous_calls(path))}
    assert found == {}
    unpicklers = [path for path in SOURCES if "pickle.Unpickler" in path.read_text()]
    assert [str(path.relative_to(ROOT)) for path in unpicklers] == [INERT]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path, allow_pickle=True)",
        "numpy.lib.format.read_array(file)",
        "pickle.loads(data)",
        "yaml.load(text, Loader)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
        "tar.extractall(folder)",
        "torch.jit.load(path)",
    ],
)
def test_the_search_finds_what_it_is_for(tmp_path, line):
    (tmp_path / "a.py").write_text(f"import x\n{line}\n")
    assert len(dangerous_calls(tmp_path / "a.py")) == 1


def test_classes_that_checkpoints_may_hold_are_listed_once():
    listed = [path.name for path in SOURCES if "safe_globals" in path.read_text()]
    assert len(listed) == 1
    assert listed[0].startswith("checkpoint")


OUTSIDE = ["../passwd", "a/../../passwd", "/etc/passwd", "..", ".", "", "a\0b", "..\\passwd", "a//../../b", "C:\\x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_out_of_a_file_stays_in_its_folder(tmp_path, name):
    with pytest.raises(UserError) as refused:
        inside(tmp_path, name)
    assert str(refused.value).count("\n") == 0
    assert repr(name) in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@given(st.text(max_size=20) | st.lists(st.sampled_from(["..", ".", "a", "", "b.pt"]), max_size=5).map("/".join))
def test_whatever_the_name_the_path_is_below_the_folder(name):
    try:
        path = inside("/data/run", name)
    except UserError:
        return
    assert os.path.normpath(path).startswith("/data/run/")
    assert path == Path("/data/run") / name


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}])
def test_a_name_is_text(tmp_path, value):
    with pytest.raises(UserError):
        inside(tmp_path, value)


@pytest.mark.parametrize("entry", ["labels", "names", "shards"])
@pytest.mark.parametrize("name", ["../secret.npy", "/etc/passwd", "shard_00000.npy/../../secret.npy"])
def test_a_manifest_cannot_point_out_of_the_latents(tmp_path, entry, name):
    latents = write_latents(tmp_path / "latents", num_images=4)
    manifest = json.loads((latents / MANIFEST).read_text())
    described = manifest[entry][0] if entry == "shards" else manifest[entry]
    (tmp_path / "secret.npy").write_bytes((latents / described["file"]).read_bytes())
    described["file"] = name
    (latents / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"'{entry}' is missing or not valid"):
        LatentDataset(latents)


def test_tensorboard_is_shown_to_this_machine_alone():
    done = subprocess.run(["make", "-n", "tensorboard"], cwd=ROOT, capture_output=True, text=True, check=True)
    (command,) = (line for line in done.stdout.splitlines() if "--logdir" in line)
    assert "--host localhost" in command
    assert "--bind_all" not in command
