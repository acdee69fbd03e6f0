"""Networks of torch.export, run without torch.export.load: the same numbers, and what breaks the contract is told."""

import json
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_networks import (
    CASES,
    OPEN,
    Convolutional,
    edit_json,
    export,
    exported,
    refusal,
    rewrite,
    write_originals,
)
from torch import nn
from torch.nn import functional

from switchdit.errors import UserError
from tools import eval_fid
from tools.feature_network import load_feature_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of torch.export's own copies
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_originals(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("decompose", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_program(tmp_path, name, decompose):
    shapes = CASES[name][1]
    content, module = exported(name, decompose)
    (tmp_path / "net.pt2").write_bytes(content)
    network = load_feature_network(tmp_path / "net.pt2")
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
