"""The digits' image folder shows exactly the scans that scikit-learn ships."""

import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tools import digits


def test_images_are_the_scans_in_folders_of_their_class(tmp_path):
    digits.main(["--out", str(tmp_path / "images")])
    scans = load_digits()
    files = {int(path.stem): path for path in (tmp_path / "images").glob("*/*.png")}
    assert sorted(files) == list(range(1797))
    for index, path in files.items():
        assert path.parent.name == str(scans.target[index])
        with Image.open(path) as image:
            assert image.mode == "L"
            assert np.array_equal(np.rint(np.asarray(image) / 255 * 16), scans.images[index])


def test_second_run_writes_nothing_and_repairs_what_is_missing(tmp_path):
    out = tmp_path / "images"
    digits.main(["--out", str(out)])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    digits.main(["--out", str(out)])
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    gone = min(before)
    gone.unlink()
    digits.main(["--out", str(out)])
    assert gone.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_foreign_folder_and_missing_scikit_learn_end_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--out", str(tmp_path)])
    assert "other things" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--out", str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install scikit-learn" in error
