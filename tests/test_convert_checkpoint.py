"""The authors' weights to ours and back, bit for bit, and the authors' numbers from what was converted."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from switchdit import build_model, load_reference_checkpoint
from switchdit.engine.checkpoint_folder import FORMAT_VERSION
from switchdit.engine.reference_checkpoints import MODEL_METADATA
from switchdit.errors import UserError
from switchdit.files import sha256_of
from tests.launching import ROOT
from tools.convert_checkpoint import from_authors, main, to_authors

GOLDEN = Path(__file__).parent / "golden"
CASES = ["dit", "dtr", "diff_moe", "switch_dit_M3k1", "switch_dit_M3k2", "switch_dit_M4k2", "switch_dit_M4k3"]


def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return dict(file)


def weights(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("sd/"): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("sd/")}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_and_the_authors_output(tmp_path, case):
    g = golden(case)
    theirs, authors, ours, back = weights(g), tmp_path / "a.pt", tmp_path / "ours.safetensors", tmp_path / "back.pt"
    other = {name: value + 1 for name, value in theirs.items()}
    torch.save({"ema": theirs, "model": other, "opt": {}, "args": argparse.Namespace(out=Path("x"))}, authors)
    main(["--from", str(authors), "--out", str(ours), "--num-heads", "2"])
    about = metadata(ours)
    assert (about["source"], about["source_sha256"], about["which"]) == ("a.pt", sha256_of(authors), "ema")

    main(["--to-authors", str(ours), "--out", str(back)])
    read = torch.load(back, weights_only=True)
    assert read.keys() == {"ema", "model"}
    for entry in read.values():
        assert entry.keys() == theirs.keys()
        assert all(entry[k].dtype == v.dtype and torch.equal(entry[k], v) for k, v in theirs.items())

    model = build_model(**json.loads(about[MODEL_METADATA])).eval()
    load_reference_checkpoint(model, ours)
    times, out = ("in/t_int", "eval/out_t_int") if case == "diff_moe" else ("in/t", "eval/out")
    with torch.no_grad():
        made = model(*(torch.from_numpy(g[k]) for k in ("in/x", times, "in/y")))
    assert np.abs(made.numpy() - g[out]).max() <= 1e-5 * np.abs(g[out]).max()


def test_names_of_the_repository_of_dtr(tmp_path):
    """There, every block has the channel mask; in Switch-DiT's repository it stands once."""
    once = weights(golden("dtr"))
    mask = once.pop("routers.0._unit_mapping")
    theirs = {**once, **{f"blocks.{i}.routing._unit_mapping": mask for i in range(3)}}
    authors, ours, back = tmp_path / "a.pt", tmp_path / "ours.safetensors", tmp_path / "back.pt"
    torch.save({"ema": theirs}, authors)
    main(["--from", str(authors), "--out", str(ours), "--num-heads", "2"])
    main(["--to-authors", str(ours), "--out", str(back), "--masks-of-blocks"])
    read = torch.load(back, weights_only=True)["ema"]
    assert read.keys() == theirs.keys()
    assert all(torch.equal(read[name], value) for name, value in theirs.items())
    load_reference_checkpoint(build_model(**json.loads(metadata(ours)[MODEL_METADATA])), theirs)
    theirs["blocks.1.routing._unit_mapping"] = 1 - mask
    with pytest.raises(UserError, match=r"'blocks.1.routing._unit_mapping' differs from 'blocks.0.routing._unit_map"):
        load_reference_checkpoint(build_model(**json.loads(metadata(ours)[MODEL_METADATA])), theirs)


def test_the_other_entry_and_other_fields(tmp_path):
    theirs, ours = weights(golden("diff_moe")), tmp_path / "ours.safetensors"
    torch.save({"model": theirs, "ema": {}}, tmp_path / "a.pt")
    options = ["--which", "model", "--system", "Diff-MoE", "num_heads=2", "top_k=1"]
    main(["--from", str(tmp_path / "a.pt"), "--out", str(ours), *options])
    assert json.loads(metadata(ours)[MODEL_METADATA])["top_k"] == 1
    assert metadata(ours)["which"] == "model"
    assert torch.equal(load_file(ours)["pos_embed"], theirs["pos_embed"])


def test_averaged_weights_of_a_run(tmp_path):
    theirs = weights(golden("switch_dit_M4k3"))
    torch.save(theirs, tmp_path / "a.pt")
    model = from_authors(tmp_path / "a.pt", tmp_path / "ours.safetensors", known={"num_heads": 2})
    checkpoint = tmp_path / "run/checkpoints/step_0000012"
    checkpoint.mkdir(parents=True)
    save_file(load_file(tmp_path / "ours.safetensors"), checkpoint / "ema.safetensors")
    (checkpoint / "state.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "model": model}))
    for source in (tmp_path / "run", checkpoint):
        to_authors(source, tmp_path / "back.pt")
        read = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
        assert read.keys() == theirs.keys()
        assert all(torch.equal(read[name], value) for name, value in theirs.items())
    fresh = build_model(**model)
    load_reference_checkpoint(fresh, tmp_path / "back.pt")

    (checkpoint / "state.json").write_text(
        json.dumps({"format_version": FORMAT_VERSION, "model": model | {"integration": "replace"}})
    )
    with pytest.raises(UserError, match="integration is 'replace'; the authors' code of Switch-DiT knows"):
        to_authors(tmp_path / "run", tmp_path / "never.pt")
    assert not (tmp_path / "never.pt").exists()


def test_mistakes_are_told_and_nothing_is_written(tmp_path, capsys):
    theirs = weights(golden("dit"))
    save_file(theirs, tmp_path / "theirs.safetensors")
    torch.save(theirs, tmp_path / "a.pt")
    extra = theirs | {"surprise": torch.ones(1)}
    torch.save({k: v for k, v in extra.items() if k != "blocks.1.mlp.fc1.bias"}, tmp_path / "b.pt")
    from_authors(tmp_path / "a.pt", tmp_path / "ours.safetensors", known={"num_heads": 2})
    there, back = str(tmp_path / "out.safetensors"), str(tmp_path / "out.pt")
    a, ours = str(tmp_path / "a.pt"), str(tmp_path / "ours.safetensors")
    for arguments, message in (
        (["--from", a, "--out", back], "must be a file that ends in .safetensors"),
        (["--to-authors", ours, "--out", there], "must be a file that ends in .pt"),
        (["--from", a, "--out", there], "num_heads cannot be told"),
        (["--from", a, "--out", there, "--num-heads", "3"], "must be divisible by num_heads (3)"),
        (["--from", a, "--out", there, "--masks-of-blocks"], "--masks-of-blocks has no meaning with --from"),
        (["--to-authors", ours, "--out", back, "--which", "model"], "--which has no meaning with --to-authors"),
        (["--to-authors", ours, "--out", back, "top_k=3"], "field=value has no meaning with --to-authors"),
        (["--to-authors", ours, "--out", back, "--masks-of-blocks"], "--masks-of-blocks is for DTR"),
        (["--from", a, "--num-heads", "2", "--out", a + "/x.safetensors"], "a.pt' cannot be made"),
        (["--from", a, "--out", there, "num_heads"], "'num_heads' is no field=value"),
        (["--from", a, "--out", there, "num_heads=["], "'num_heads=[' is no field=value"),
        (["--from", a, "--out", there, "name=DiT-S/2"], "'name=DiT-S/2' is no field=value"),
        (["--from", a, "--out", there, "num_heads=2", "weights=2"], "'weights' is unknown for DiT"),
        (["--from", a, "--out", there, "num_heads=2", "top_k=2"], "'top_k' is unknown for DiT"),
        (["--from", a, "--out", there, "--num-heads", "2", "--system", "Switch-DiT"], "no weights of Switch-DiT"),
        (
            ["--from", str(tmp_path / "b.pt"), "--out", there, "--num-heads", "2"],
            "does not fit the model; missing: blocks.1.mlp.fc1.bias; extra: surprise",
        ),
        (["--from", ours, "--out", there], "has our names already"),
        (["--from", str(tmp_path / "absent.pt"), "--out", there], "does not exist"),
        (["--to-authors", str(tmp_path / "theirs.safetensors"), "--out", back], "was not written by --from"),
        (["--to-authors", str(tmp_path), "--out", back], "holds no complete checkpoint"),
    ):
        with pytest.raises(SystemExit) as info:
            main(arguments)
        assert info.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()
    assert not (tmp_path / "out.pt").exists()


def test_the_program_starts_as_a_file(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tools/convert_checkpoint.py"),
        "--from",
        "absent.pt",
        "--out",
        "x.safetensors",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: checkpoint 'absent.pt' does not exist"
