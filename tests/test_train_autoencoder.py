"""The small autoencoder: it learns, its channels come out alike, and a second run finds it done."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from switchdit.data.autoencoder import WEIGHTS, load_autoencoder
from switchdit.data.image_pixels import read_all_images
from switchdit.data.image_source import list_images
from tools import train_autoencoder as tool


@pytest.fixture(scope="module", autouse=True)
def keep_number_of_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """48 grey pictures of smooth blobs, 16 x 16, in two classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(48):
        path = root / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4), np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(path)
    return root


def run(pictures, out, *more):
    tool.main(["--data", str(pictures), "--out", str(out), "--image-size", "16", "--channels", "8,8", *more])


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "vae"
    run(pictures, out, "--steps", "150")
    return out


def test_reconstructs_far_better_than_it_began_and_is_in_diffusers_format(pictures, trained):
    autoencoder = load_autoencoder(trained)
    images = read_all_images(list_images(pictures), 16)
    mean, _ = autoencoder.encode(tool.as_batch(images))
    assert mean.shape == (48, 4, 8, 8)
    error = np.abs(autoencoder.decode(mean * autoencoder.scale_factor).numpy().astype(float) - images).mean()
    record = json.loads((trained / tool.RECORD).read_text())
    deviation = np.abs(images - images.mean(0)).mean()  # of the best constant picture
    assert error < 0.5 * deviation
    assert record["latents"]["mean_absolute_error"] == pytest.approx(error, rel=0.1)


def test_scaled_latents_have_mean_0_and_deviation_1_in_every_channel(pictures, trained):
    autoencoder = load_autoencoder(trained)
    batch = tool.as_batch(read_all_images(list_images(pictures), 16))
    mean, std = autoencoder.encode(torch.cat([batch, batch.flip(-1)]))
    average = mean.mean((0, 2, 3))
    deviation = ((mean**2 + std**2).mean((0, 2, 3)) - average**2).sqrt()
    torch.testing.assert_close(average * autoencoder.scale_factor, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation * autoencoder.scale_factor, torch.ones(4), atol=1e-4, rtol=0)


def test_equalizing_changes_no_reconstruction():
    torch.manual_seed(0)
    model = tool.build_model(tool.Settings(16, 1, 0, (8, 8))).eval()
    batch = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        before = model.encode(batch).latent_dist
        decoded = model.decode(before.mean).sample
        statistics = {"mean": [0.5, -1.0, 0.0, 2.0], "std": [0.5, 1.0, 2.0, 3.0]}
        common = tool.equalize_channels(model, statistics)
        after = model.encode(batch).latent_dist
        gain = common / torch.tensor(statistics["std"]).view(1, 4, 1, 1)
        expected = (before.mean - torch.tensor(statistics["mean"]).view(1, 4, 1, 1)) * gain
        torch.testing.assert_close(after.mean, expected)
        torch.testing.assert_close(after.std, before.std * gain)
        torch.testing.assert_close(model.decode(after.mean).sample, decoded)


def test_same_settings_find_it_done_and_others_or_damage_train_anew(pictures, tmp_path, capsys):
    out = tmp_path / "vae"
    run(pictures, out, "--steps", "2")
    first = (out / WEIGHTS).read_bytes()
    capsys.readouterr()
    run(pictures, out, "--steps", "2")
    assert "already holds" in capsys.readouterr().out
    (out / WEIGHTS).write_bytes(first[:-1])
    run(pictures, out, "--steps", "2")
    assert (out / WEIGHTS).read_bytes() == first  # the same seed gives the same weights
    run(pictures, out, "--steps", "2", "--seed", "1")
    assert (out / WEIGHTS).read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_failed_write_leaves_nothing(pictures, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool, "write_json", full)
    with pytest.raises(SystemExit, match="2"):
        run(pictures, tmp_path / "vae", "--steps", "1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--channels", "8,x"], "must be whole numbers"),
        (["--image-size", "15"], "multiple of 2"),
        (["--steps", "0"], "at least 1"),
        (["--data", "nowhere"], "not there"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_input_ends_in_one_line(pictures, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit, match="2"):
        run(pictures, tmp_path / "vae", *more)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_folder_with_other_things_is_not_replaced(pictures, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        run(pictures, tmp_path)
    assert "something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
