"""Image folders packed as ADM's .npz."""

import numpy as np
import pytest
from PIL import Image

from switchdit.data.image_pixels import load_image
from tools import pack_images


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for label, (width, height) in (("cat", (40, 30)), ("ant", (9, 9))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        pack_images.main([*map(str, arguments)])
    assert ended.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if "|" not in line][-1]


def test_images_and_labels_are_in_the_order_of_classes_and_names(folder, tmp_path, capsys):
    out = tmp_path / "new" / "ref.npz"
    pack_images.main(["--data", str(folder), "--out", str(out), "--image-size", "16"])
    packed = np.load(out, allow_pickle=False)
    assert packed["arr_1"].tolist() == [0, 0, 0, 1, 1, 1]
    assert packed["arr_0"].dtype == np.uint8
    names = [f"{label}/{i}.png" for label in ("ant", "cat") for i in range(3)]
    np.testing.assert_array_equal(packed["arr_0"], [load_image(folder / name, 16) for name in names])
    assert "6 images of 16 x 16, labels of 2 classes" in capsys.readouterr().out


def test_loose_images_get_no_labels_and_packing_is_deterministic(folder, tmp_path):
    for name in ("a.npz", "b.npz"):
        assert pack_images.pack_images(folder / "cat", tmp_path / name, 8) == (3, 0)
    assert np.load(tmp_path / "a.npz").files == ["arr_0"]
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["arr_0"], np.load(tmp_path / "b.npz")["arr_0"])


def test_an_unreadable_image_is_named_and_nothing_is_left_or_lost(folder, tmp_path, capsys):
    out = tmp_path / "ref.npz"
    out.write_text("before")
    (folder / "cat" / "1.png").write_bytes(b"no image")
    assert "cat/1.png cannot be read" in failure(capsys, "--data", folder, "--out", out, "--image-size", 8)
    assert out.read_text() == "before"
    assert not list(tmp_path.glob(".*partial"))


def test_bad_options_end_in_one_line(folder, tmp_path, capsys):
    out = tmp_path / "ref.npz"
    assert "is not there" in failure(capsys, "--data", tmp_path / "absent", "--out", out)
    assert "ends in .npz" in failure(capsys, "--data", folder, "--out", tmp_path / "ref.zip")
    assert "--image-size is 0" in failure(capsys, "--data", folder, "--out", out, "--image-size", 0)
    assert "--workers is 0" in failure(capsys, "--data", folder, "--out", out, "--workers", 0)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in failure(capsys, "--data", tmp_path / "empty", "--out", out)
    assert not out.exists()
