"""The program that scores samples: its numbers, its streaming, and one line for every bad input."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from switchdit.errors import UserError
from tools import eval_fid
from tools.adm_metrics import inception_score, precision_recall
from tools.feature_network import Architecture, Classifier, load_feature_network, normalised, save_feature_network
from tools.image_sets import open_images

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    architecture = Architecture(8, [4, 8], 6, ["a", "b", "c"])
    torch.manual_seed(0)
    save_feature_network(path, Classifier(architecture), architecture)
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def files(tmp_path, rng):
    np.savez(tmp_path / "ref.npz", rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    images, labels = rng.integers(0, 200, (30, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 30)
    np.savez_compressed(tmp_path / "samples.npz", images, labels)
    return tmp_path / "ref.npz", tmp_path / "samples.npz"


def score(ref, samples, network_file, *more):
    eval_fid.main(["--ref", str(ref), "--samples", str(samples), "--features", str(network_file), *map(str, more)])


def failure(capsys, *arguments):
    """The one line on stderr with which the program ends."""
    with pytest.raises(SystemExit) as ended:
        eval_fid.main([*map(str, arguments)])
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "|" not in line]  # without progress bars
    assert len(lines) == 1, lines
    return lines[0]


def test_numbers_are_those_of_the_features(files, network_file, tmp_path, capsys):
    out = tmp_path / "new" / "metrics.json"
    score(*files, network_file, "--features-name", "toy features", "--out", out, "--batch-size", 7)
    with open(out) as file:
        scores = json.load(file)
    classifier = load_feature_network(network_file).classifier
    ref, samples = np.load(files[0])["arr_0"], np.load(files[1])["arr_0"]
    with torch.no_grad():
        of_ref, _ = classifier(normalised(ref))
        of_samples, logits = classifier(normalised(samples))
    a, b = of_ref.double(), of_samples.double()
    root = np.linalg.eigvals(torch.cov(a.T).numpy() @ torch.cov(b.T).numpy())
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
    expected = expected.item() - 2 * np.sqrt(np.clip(root.real, 0, None)).sum()
    assert scores["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert (scores["precision"], scores["recall"]) == precision_recall(of_ref, of_samples)
    assert scores["class_score"] == pytest.approx(inception_score(logits.softmax(1).numpy()), rel=1e-6)
    accuracy = (logits.argmax(1).numpy() == np.load(files[1])["arr_1"]).mean()
    assert scores["label_accuracy"] == pytest.approx(accuracy)
    assert scores["feature_space"] == "toy features"
    assert scores["samples"]["count"] == 30
    assert len(scores["network"]["sha256"]) == len(scores["reference"]["sha256"]) == 64
    printed = capsys.readouterr().out
    assert "Fréchet distance (toy features)" in printed
    assert "FID" not in printed
    assert not {"fid", "sfid", "inception_score"} & set(scores)


def test_batch_size_does_not_change_the_numbers(files, network_file, tmp_path):
    results = []
    for batch in (3, 64):
        score(*files, network_file, "--out", tmp_path / "m.json", "--batch-size", batch, "--distances", "float64")
        results.append(json.loads((tmp_path / "m.json").read_text()))
    for key in ("frechet_distance", "precision", "recall", "class_score"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5)


def test_a_folder_scores_as_the_npz_of_its_images(files, network_file, tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, image in enumerate(np.load(files[1])["arr_0"]):
        Image.fromarray(image).save(tmp_path / "folder" / "deep" / f"{i:03d}.png")
    score(*files, network_file, "--out", tmp_path / "npz.json")
    score(files[0], tmp_path / "folder", network_file, "--out", tmp_path / "folder.json")
    of_npz, of_folder = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("npz", "folder"))
    assert of_folder["frechet_distance"] == of_npz["frechet_distance"]
    assert "label_accuracy" in of_npz
    assert "label_accuracy" not in of_folder


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    batch=st.integers(1, 50),
    compressed=st.booleans(),
    labels=st.booleans(),
)
def test_streaming_gives_what_was_saved(tmp_path_factory, count, height, width, batch, compressed, labels):
    path = tmp_path_factory.getbasetemp() / "streamed.npz"
    rng = np.random.default_rng(count)
    arrays = {"arr_0": rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)}
    if labels:
        arrays["arr_1"] = rng.integers(0, 9, count)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    images = open_images(path, "--ref")
    batches = list(images.batches(batch))
    assert (images.count, images.shape) == (count, (height, width))
    assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), arrays["arr_0"])
    assert (images.labels is not None) == labels
    if labels:
        np.testing.assert_array_equal(images.labels, arrays["arr_1"])


def good(n=10):
    return np.zeros((n, 8, 8, 3), np.uint8)


BAD_ARRAYS = {
    "no arr_0": ({"images": good()}, r"has no array arr_0 .*it holds images"),
    "float": ({"arr_0": good().astype(np.float32)}, r"arr_0 has dtype float32, not uint8; .*0 to 255"),
    "int64": ({"arr_0": good().astype(np.int64)}, r"arr_0 has dtype int64, not uint8"),
    "channels first": ({"arr_0": good().transpose(0, 3, 1, 2).copy()}, r"arr_0 has shape \(10, 3, 8, 8\)"),
    "three dimensions": ({"arr_0": good()[0]}, r"arr_0 has shape \(8, 8, 3\), not \(N, height, width, 3\)"),
    "no images": ({"arr_0": good(0)}, r"arr_0 holds no images"),
    "too few": ({"arr_0": good(3)}, r"holds 3 images; the 3 nearest neighbours .* need at least 4"),
    "Fortran order": ({"arr_0": np.asfortranarray(good())}, r"arr_0 lies in Fortran order"),
    "labels too many": ({"arr_0": good(), "arr_1": np.zeros(9, int)}, r"arr_1 \(labels\) has .*expected 10 integers"),
    "labels float": ({"arr_0": good(), "arr_1": np.zeros(10)}, r"arr_1 \(labels\) has dtype float64"),
    "label unknown": ({"arr_0": good(), "arr_1": np.full(10, 3)}, r"holds the label 3; .* knows classes 0 to 2"),
    "other size": ({"arr_0": np.zeros((10, 16, 8, 3), np.uint8)}, r"holds images of 8 x 16; .* takes 8 x 8"),
    "statistics only": ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"holds statistics but no array arr_0"),
    "mu shape": ({"arr_0": good(), "mu": np.zeros((5, 5))}, r"mu has dtype float64 and shape \(5, 5\)"),
    "sigma not finite": ({"arr_0": good(), "sigma": np.eye(2) * np.nan}, r"sigma holds values that are not finite"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_end_in_one_line(case, tmp_path, files, network_file, capsys):
    arrays, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    out = tmp_path / "metrics.json"
    out.write_text("before")
    arguments = ["--samples", tmp_path / "bad.npz", "--features", network_file, "--out", out]
    line = failure(capsys, "--ref", files[0], *arguments)
    assert line.startswith("error: ")
    import re

    assert re.search(message, line), line
    assert out.read_text() == "before"
    assert not list(tmp_path.glob(".*partial"))


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("member", ["arr_0", "arr_1", "mu"])
def test_pickled_arrays_are_refused_unread(member, tmp_path, files, network_file, capsys):
    marker = tmp_path / "executed"

    class Touch:
        def __reduce__(self):
            return (Path.touch, (marker,))

    pickled = np.empty(10, object)
    pickled[0] = Touch()
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        if member != "arr_0":
            archive.writestr("arr_0.npy", npy(good()))
        archive.writestr(f"{member}.npy", npy(pickled, allow_pickle=True))
    line = failure(capsys, "--ref", files[0], "--samples", tmp_path / "bad.npz", "--features", network_file)
    assert "would have to be unpickled" in line
    assert not marker.exists()


def damaged_files(path, kind):
    np.savez_compressed(path, np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "flipped":
        content[len(content) // 2] ^= 0xFF
    elif kind == "no zip":
        content = b"hello, not a zip"
    elif kind == "empty":
        content = b""
    elif kind == "short array":
        header = npy(np.zeros((50, 8, 8, 3), np.uint8))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", header[:2000])
        return
    elif kind == "bomb":  # claims a million million images
        header = io.BytesIO()
        shape = (10**12, 8, 8, 3)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", header.getvalue())
        return
    elif kind == "encrypted":
        content[6] |= 1
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "no zip", "empty", "short array", "bomb", "encrypted"])
def test_damaged_npz_ends_in_one_line(kind, tmp_path, files, network_file, capsys):
    damaged_files(tmp_path / "bad.npz", kind)
    arguments = ["--ref", files[0], "--samples", tmp_path / "bad.npz", "--features", network_file]
    line = failure(capsys, *arguments, "--out", tmp_path / "metrics.json")
    assert "bad.npz" in line
    assert not (tmp_path / "metrics.json").exists()


def test_folders_that_cannot_be_scored(tmp_path, files, network_file, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments = ["--ref", files[0], "--samples", folder, "--features", network_file]
    assert "holds no images (.png, .jpg, .jpeg)" in failure(capsys, *arguments)
    for i in range(5):
        Image.fromarray(good(1)[0]).save(folder / f"{i}.png")
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(folder / "5.png")
    assert "5.png is 8 x 9, but 0.png is 8 x 8" in failure(capsys, *arguments)
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes()[:44])
    assert "5.png cannot be read" in failure(capsys, *arguments)


def test_options_that_cannot_work(tmp_path, files, network_file, capsys, monkeypatch):
    monkeypatch.setenv("SWITCHDIT_CACHE", str(tmp_path / "cache"))
    sets = ["--ref", files[0], "--samples", files[1]]
    assert "no Inception weights in" in failure(capsys, *sets)
    assert "give one of them" in failure(capsys, *sets, "--features", network_file, "--inception", "auto")
    assert "which is missing" in failure(capsys, *sets, "--features-name", "x")
    assert "it must be at least 1" in failure(capsys, *sets, "--batch-size", 0)
    assert "is a folder" in failure(capsys, *sets, "--out", tmp_path)
    assert "cannot be written" in failure(capsys, *sets, "--out", files[0] / "metrics.json")
    assert "does not exist" in failure(capsys, "--ref", tmp_path / "absent.npz", "--samples", files[1])
    assert "does not exist" in failure(capsys, *sets, "--features", tmp_path / "absent")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    only = ["--ref", tmp_path / "stats.npz", "--samples", files[1], "--features", network_file]
    assert "no images (arr_0), which --features needs" in failure(capsys, *only)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5))
    assert "neither images (arr_0) nor both of mu and sigma" in failure(capsys, *only[:4])


def test_features_that_are_not_finite(tmp_path, files, capsys):
    architecture = Architecture(8, [4], 6, ["a", "b", "c"])
    classifier = Classifier(architecture)
    torch.nn.init.constant_(classifier.features[0].bias, torch.nan)
    save_feature_network(tmp_path / "nan.safetensors", classifier, architecture)
    arguments = ["--ref", files[0], "--samples", files[1], "--features", tmp_path / "nan.safetensors"]
    assert "makes features that are not finite of images 0 to 39 of --ref" in failure(capsys, *arguments)


def test_wrong_option_ends_in_exit_code_2_and_help_is_quick():
    command = [sys.executable, "tools/eval_fid.py"]
    done = subprocess.run([*command, "--distances", "float8"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    code = "import sys, tools.eval_fid; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_foreign_network_files_are_refused_unread(tmp_path, network_file):
    marker = tmp_path / "executed"

    class Touch:
        def __reduce__(self):
            return (Path.touch, (marker,))

    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Touch()))
    torch.save(Touch(), tmp_path / "program.pt2")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    content = network_file.read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "large.safetensors").write_bytes(content.replace(b'\\"num_features\\": 6', b'\\"num_features\\": 9'))
    (tmp_path / "version.safetensors").write_bytes(content.replace(b'\\"version\\": 1', b'\\"version\\": 7'))
    (tmp_path / "size.safetensors").write_bytes(content.replace(b'\\"image_size\\": 8', b'\\"image_size\\": 7'))
    expected = {
        "pickle.pt": "is not readable as a feature network",
        "program.pt2": "can run code when they are opened",
        "plain.safetensors": "does not describe a feature network",
        "short.safetensors": "is not readable as a feature network",
        "large.safetensors": "the weights do not fit",
        "version.safetensors": "format version 7",
        "size.safetensors": "image_size 7 is not divisible",
    }
    for name, message in expected.items():
        with pytest.raises(UserError) as mistake:
            load_feature_network(tmp_path / name)
        assert message in str(mistake.value), name
        assert "\n" not in str(mistake.value)
    assert not marker.exists()
