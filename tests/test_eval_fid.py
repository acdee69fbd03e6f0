"""The program that scores samples: its numbers, its streaming, and one line for every bad input."""

import errno
import io
import json
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from launching import launch, launched
from PIL import Image

from switchdit.errors import UserError
from tools import eval_fid
from tools.adm_metrics import inception_score, kernel_distance, precision_recall
from tools.feature_network import (
    Architecture,
    Classifier,
    ClassifierFeatures,
    Features,
    load_feature_network,
    normalised,
    save_feature_network,
)
from tools.image_sets import open_images

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    architecture = Architecture(8, [4, 8], 6, ["a", "b", "c"])
    torch.manual_seed(0)
    save_feature_network(path, Classifier(architecture), architecture)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHDIT_CACHE", str(tmp_path / "cache"))


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
    assert not {"fid", "sfid", "inception_score", "kid"} & set(scores)
    kernel = {"subsets": 100, "subset_size": 30, "seed": 0}
    assert scores["kernel_distance"] == kernel_distance(of_ref.numpy(), of_samples.numpy(), **kernel)
    assert scores["options"]["kid"] == kernel
    assert printed.index("kernel distance") > printed.index("besides these:") > printed.index("recall")
    assert scores["command"].startswith("tools/eval_fid.py --ref ")
    assert datetime.fromisoformat(scores["date"]).utcoffset().total_seconds() == 0
    assert scores["seconds"] > 0
    assert scores["device"]


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


METRICS = ("frechet_distance", "precision", "recall", "class_score", "kernel_distance")


def test_second_evaluation_takes_the_reference_from_the_cache(files, network_file, tmp_path, capsys, monkeypatch):
    score(*files, network_file, "--out", tmp_path / "1.json", "--cache", tmp_path / "mine")
    assert "from the cache" not in capsys.readouterr().out
    seen, pass_through = [], ClassifierFeatures.__call__
    monkeypatch.setattr(
        ClassifierFeatures, "__call__", lambda self, images: seen.append(len(images)) or pass_through(self, images)
    )
    score(*files, network_file, "--out", tmp_path / "2.json", "--cache", tmp_path / "mine", "--cache-samples")
    assert sum(seen) == 30  # the samples alone
    assert f"features of the reference: from the cache {tmp_path / 'mine'}" in capsys.readouterr().out
    score(*files, network_file, "--out", tmp_path / "3.json", "--cache", tmp_path / "mine", "--cache-samples")
    assert sum(seen) == 30
    assert "features of the samples: from the cache" in capsys.readouterr().out
    score(*files, network_file, "--out", tmp_path / "4.json", "--no-cache")
    assert sum(seen) == 100
    assert not (tmp_path / "cache").exists()  # the default one
    first, *others = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (1, 2, 3, 4))
    assert all(other[key] == first[key] for other in others for key in METRICS)


def test_comparison_and_markdown_row(files, network_file, tmp_path, capsys):
    score(*files, network_file, "--out", tmp_path / "old.json", "--distances", "float64")
    capsys.readouterr()
    score(files[0], files[0], network_file, "--compare", tmp_path / "old.json", "--markdown", "--name", "mine")
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith("warning: ")] == [
        "warning: not comparable: number of samples: 30 before, 40 now",
        "warning: not comparable: distances of precision and recall: float64 before, float16 now",
        'warning: not comparable: protocol of KID: {"subsets": 100, "subset_size": 30, "seed": 0} before, '
        '{"subsets": 100, "subset_size": 40, "seed": 0} now',
    ]
    old = json.loads((tmp_path / "old.json").read_text())["frechet_distance"]
    shown = " ".join(printed.out.split())
    assert f"old new difference Fréchet distance (features of net.safetensors) {old:.4f} 0.0000 {-old:+.4f}" in shown
    assert "| Name | Images | Fréchet distance (features of net.safetensors) | Precision | Recall |" in printed.out
    assert "| mine | 40 | 0.0000 | 1.0000 | 1.0000 |" in printed.out


def test_a_network_without_classes_has_no_class_score(files, network_file, tmp_path, monkeypatch):
    class Pixels:
        image_size, num_classes, statistics_sizes = 8, 0, {}
        description = {"file": "pixels", "sha256": "0" * 64}  # noqa: RUF012

        def __call__(self, images):
            return Features(images.reshape(len(images), -1)[:, :6].astype(np.float32), None, None)

    monkeypatch.setattr(eval_fid, "load_network", lambda *_: Pixels())
    score(*files, network_file, "--out", tmp_path / "m.json")
    scores = json.loads((tmp_path / "m.json").read_text())
    assert scores["frechet_distance"] > 0
    assert not {"class_score", "label_accuracy"} & set(scores)


def numbers(path):
    scores = json.loads(path.read_text())
    return {key: scores[key] for key in METRICS}


@pytest.mark.world_size(2)
def test_several_processes_find_what_one_finds(files, network_file, tmp_path):
    with np.load(files[1]) as arrays:
        safetensors.numpy.save_file(dict(arrays), tmp_path / "samples.safetensors")
    sets = ["--ref", files[0], "--samples", tmp_path / "samples.safetensors", "--features", network_file]
    sets += ["--batch-size", 4, "--distances", "float64"]
    eval_fid.main([*map(str, sets), "--out", str(tmp_path / "one.json"), "--no-cache"])
    done = launched(2, "tools/eval_fid.py", *sets, "--out", tmp_path / "two.json", "--cache", tmp_path / "kept")
    assert numbers(tmp_path / "two.json") == pytest.approx(numbers(tmp_path / "one.json"), rel=1e-9)
    assert json.loads((tmp_path / "two.json").read_text())["options"]["processes"] == 2
    assert done.stdout.count("precision") == 1
    # what they kept is what one process takes up
    eval_fid.main([*map(str, sets), "--out", str(tmp_path / "again.json"), "--cache", str(tmp_path / "kept")])
    assert numbers(tmp_path / "again.json") == pytest.approx(numbers(tmp_path / "one.json"), rel=1e-9)


@pytest.mark.world_size(2)
def test_a_mistake_that_one_process_meets_ends_all_in_one_line(files, network_file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(good(1)[0]).save(folder / f"{i:02d}.png")
    (folder / "11.png").write_bytes(b"no picture")  # the second process's part
    sets = ["--ref", files[0], "--samples", folder, "--features", network_file, "--batch-size", 4]
    done = launch(2, "tools/eval_fid.py", *sets, "--out", tmp_path / "metrics.json")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "11.png cannot be read" in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "metrics.json").exists()


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


def foreign_json(folder):
    (folder / "foreign.json").write_text('{"loss": [1, 2]}')
    return folder / "foreign.json"


def test_options_that_cannot_work(tmp_path, files, network_file, capsys):
    sets = ["--ref", files[0], "--samples", files[1]]
    assert "no Inception weights in" in failure(capsys, *sets)
    assert "give one of them" in failure(capsys, *sets, "--features", network_file, "--inception", "auto")
    assert "which is missing" in failure(capsys, *sets, "--features-name", "x")
    assert "it must be at least 1" in failure(capsys, *sets, "--batch-size", 0)
    assert "is a folder" in failure(capsys, *sets, "--out", tmp_path)
    own = [*sets, "--features", network_file]
    assert "another network is named" in failure(capsys, *own, "--download")
    assert "--no-cache and --cache contradict" in failure(capsys, *own, "--no-cache", "--cache", tmp_path / "c")
    assert "--no-cache and --cache-samples contradict" in failure(capsys, *own, "--no-cache", "--cache-samples")
    assert "--markdown, which is missing" in failure(capsys, *own, "--name", "x")
    assert "does not exist" in failure(capsys, *own, "--compare", tmp_path / "absent.json")
    assert "it is no metrics.json" in failure(capsys, *own, "--compare", foreign_json(tmp_path))
    assert not (tmp_path / "cache").exists()
    assert "cannot be written" in failure(capsys, *sets, "--out", files[0] / "metrics.json")
    assert "does not exist" in failure(capsys, "--ref", tmp_path / "absent.npz", "--samples", files[1])
    assert "does not exist" in failure(capsys, *sets, "--features", tmp_path / "absent")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    only = ["--ref", tmp_path / "stats.npz", "--samples", files[1], "--features", network_file]
    assert "no images (arr_0), which --features needs" in failure(capsys, *only)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5))
    assert "neither images (arr_0) nor both of mu and sigma" in failure(capsys, *only[:4])


def test_numbers_are_shown_even_if_they_cannot_be_written(tmp_path, files, network_file, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.json")

    monkeypatch.setattr(eval_fid, "write_json", full)
    with pytest.raises(SystemExit) as ended:
        score(*files, network_file, "--out", tmp_path / "metrics.json")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "label accuracy" in printed.out
    assert "wrote" not in printed.out
    assert printed.err.endswith("no space left on the disk that holds metrics.json; nothing half-written was kept\n")


def test_a_mean_alone_is_no_statistics(tmp_path, files):
    images = np.load(files[0])["arr_0"]
    statistics = {"mu": np.zeros(5)}
    for stored in (False, True):
        np.savez(tmp_path / "ref.npz", arr_0=images, **statistics)
        reference = open_images(tmp_path / "ref.npz", "--ref")
        assert eval_fid.uses_stored(Namespace(features=None), reference) is stored
        statistics["sigma"] = np.eye(5)


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
