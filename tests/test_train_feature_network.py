"""The classifier whose features score the demo."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tools import train_feature_network
from tools.feature_network import load_feature_network
from tools.train_feature_network import held_out_images


@pytest.fixture
def folder(tmp_path):
    """Three classes that differ in colour."""
    rng = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 100, (10, 10, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{i:02d}.png")
    return tmp_path / "images"


def train(folder, out, *more):
    train_feature_network.main(["--data", str(folder), "--out", str(out), "--image-size", "8", *map(str, more)])


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        train_feature_network.main([*map(str, arguments)])
    assert ended.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if "|" not in line][-1]


def test_digits_are_recognised(tmp_path, capsys):
    digits = load_digits()  # as tools/digits.py writes them, without its syncs to disk
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (tmp_path / "digits" / str(label)).mkdir(parents=True, exist_ok=True)
        levels = np.floor(image * 255 / 16 + 0.5).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "digits" / str(label) / f"{i:04d}.png")
    arguments = ["--data", str(tmp_path / "digits"), "--out", str(tmp_path / "digits.safetensors"), "--steps", "60"]
    train_feature_network.main(arguments)
    network = load_feature_network(tmp_path / "digits.safetensors")
    assert network.architecture.training["held_out_accuracy"] >= 0.985
    assert network.architecture.class_names == [str(i) for i in range(10)]
    assert "of the 355 held-out images recognised" in capsys.readouterr().out


def test_same_images_and_settings_are_not_trained_again(folder, tmp_path, capsys):
    out = tmp_path / "network.safetensors"
    train(folder, out, "--steps", 2)
    first = out.read_bytes()
    assert "wrote" in capsys.readouterr().out
    train(folder, out, "--steps", 2)
    assert "is up to date" in capsys.readouterr().out
    assert out.read_bytes() == first
    train(folder, out, "--steps", 3)
    assert "wrote" in capsys.readouterr().out
    (folder / "0" / "00.png").write_bytes((folder / "0" / "01.png").read_bytes())
    train(folder, out, "--steps", 3)
    assert "wrote" in capsys.readouterr().out
    out.write_bytes(b"damaged")
    train(folder, out, "--steps", 3)
    assert "wrote" in capsys.readouterr().out


def test_training_depends_on_the_seed_alone(folder, tmp_path):
    torch.manual_seed(1)
    train(folder, tmp_path / "a.safetensors", "--steps", 3, "--seed", 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    train(folder, tmp_path / "b.safetensors", "--steps", 3, "--seed", 3)
    assert torch.equal(torch.get_rng_state(), before)
    a, b = (load_feature_network(tmp_path / f"{name}.safetensors").classifier.state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_tar_of_the_images_gives_the_same_network(folder, tmp_path):
    train(folder, tmp_path / "a.safetensors", "--steps", 2)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, arcname=".")
    train(tmp_path / "images.tar", tmp_path / "b.safetensors", "--steps", 2)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_fifth_of_every_class_is_held_out():
    labels = np.repeat([0, 1, 2], [5, 10, 23])
    assert [int(held_out_images(labels)[labels == i].sum()) for i in range(3)] == [1, 2, 4]


def test_bad_input_ends_in_one_line_and_leaves_the_file(folder, tmp_path, capsys):
    out = tmp_path / "network.safetensors"
    out.write_text("before")
    assert "multiple of 8" in failure(capsys, "--data", folder, "--out", out, "--image-size", 20)
    assert "--steps is 0" in failure(capsys, "--data", folder, "--out", out, "--steps", 0)
    assert "--seed is -1" in failure(capsys, "--data", folder, "--out", out, "--seed", -1)
    assert "is a folder" in failure(capsys, "--data", folder, "--out", tmp_path)
    assert "fewer than two class folders" in failure(capsys, "--data", folder / "0", "--out", out)
    (folder / "1" / "zz.png").symlink_to("nowhere")
    assert "1/zz.png: " in failure(capsys, "--data", folder, "--out", out)
    (folder / "1" / "zz.png").unlink()
    (folder / "2" / "07.png").write_bytes(b"no image")
    assert "2/07.png: it is none of BMP" in failure(capsys, "--data", folder, "--out", out)
    for path in list((folder / "2").iterdir())[4:]:
        path.unlink()
    (folder / "2" / "07.png").unlink(missing_ok=True)
    assert "images; at least 5 are needed" in failure(capsys, "--data", folder, "--out", out)
    assert out.read_text() == "before"
