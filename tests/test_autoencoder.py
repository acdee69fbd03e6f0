"""Autoencoders: identity, scale, rounding, and one clear line for whatever cannot be loaded."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from switchdit.data.autoencoder import CONFIG, WEIGHTS, load_autoencoder
from switchdit.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "tiny"
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.25,
    ).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_encode_is_diffusers_posterior_and_unscaled(folder):
    ours, theirs = load_autoencoder(folder), AutoencoderKL.from_pretrained(folder)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, std = ours.encode(images)
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    assert mean.dtype == std.dtype == torch.float32
    assert (ours.scale_factor, ours.latent_channels, ours.downsampling) == (0.25, 4, 2)
    assert ours.latent_shape(16) == (4, 8, 8)


def test_decode_divides_by_the_scale_and_rounds_like_the_published_samplers(folder):
    autoencoder = load_autoencoder(folder)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(folder).decode(latents).sample
    expected = np.clip(127.5 * expected.numpy() + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    images = autoencoder.decode(latents * 0.25)
    assert images.shape == (2, 16, 16, 3)
    assert images.dtype == torch.uint8
    assert np.abs(images.numpy().astype(int) - expected).max() <= 1  # a value on the edge may fall either way


def test_every_grey_level_survives_the_way_to_floats_and_back(folder, monkeypatch):
    autoencoder = load_autoencoder(folder)
    levels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)

    class Identity:
        sample = levels / 127.5 - 1

    monkeypatch.setattr(autoencoder.model, "decode", lambda _: Identity)
    assert torch.equal(autoencoder.decode(torch.zeros(1, 4, 8, 8))[0, :, :, 0], levels[0, 0].to(torch.uint8))


def test_identity_is_the_content_not_the_path(folder, copy):
    assert load_autoencoder(folder).identity["sha256"] == load_autoencoder(copy).identity["sha256"]
    weights = load_file(copy / WEIGHTS)
    weights["quant_conv.bias"] = weights["quant_conv.bias"] + 1
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    assert load_autoencoder(folder).identity["sha256"] != load_autoencoder(copy).identity["sha256"]


def test_older_names_of_the_attention_weights_are_read(folder, copy):
    renaming = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for new, old in renaming.items():
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
        weights[name] = value
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(load_autoencoder(copy).encode(images)[0], load_autoencoder(folder).encode(images)[0])


def edit_config(path, **fields):
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **fields}))


def pickled_only(path):
    (path / WEIGHTS).rename(path / "diffusion_pytorch_model.bin")


def without_a_weight(path):
    weights = load_file(path / WEIGHTS)
    del weights["quant_conv.weight"]
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled_only, "never loaded"),
        (without_a_weight, "quant_conv.weight"),
        (lambda path: (path / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (lambda path: (path / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0{"), "damaged"),
        (lambda path: (path / CONFIG).unlink(), f"no {CONFIG}"),
        (lambda path: (path / CONFIG).write_text("{"), "not a JSON object"),
        (lambda path: edit_config(path, _class_name="AutoencoderTiny"), "AutoencoderTiny"),
        (lambda path: edit_config(path, shift_factor=0.1), "shift_factor"),
        (lambda path: edit_config(path, block_out_channels=[8, 16]), "does not fit"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_what_is_no_complete_autoencoder_ends_in_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        load_autoencoder(copy)
    assert "\n" not in str(caught.value)


def test_hub_name_without_a_network_says_what_to_do(monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(UserError, match="hf download nobody/nothing"):
        load_autoencoder("nobody/nothing")
    with pytest.raises(UserError, match="does not exist"):
        load_autoencoder("tests/nothing")  # has the form of a hub name, but the folder tests is here


def test_size_that_is_not_divisible_is_refused(folder):
    with pytest.raises(UserError, match="15 is not a multiple of 2"):
        load_autoencoder(folder).latent_shape(15)


def test_pixels_are_their_own_latents(tmp_path, monkeypatch):
    """All 255 levels come back, through float16 as files hold them; and there is nothing to download."""
    monkeypatch.chdir(tmp_path)
    pixels = load_autoencoder("pixels")
    levels = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = pixels.encode(levels / 127.5 - 1)
    assert (std == 0).all() and pixels.bounded
    assert torch.equal(pixels.decode(mean.half().float()), levels.permute(0, 2, 3, 1).to(torch.uint8))
    assert (pixels.scale_factor, pixels.latent_shape(16)) == (1.0, (3, 16, 16))
    assert pixels.identity == load_autoencoder("pixels").identity
    (tmp_path / "pixels").mkdir()
    with pytest.raises(UserError, match="autoencoder pixels has no config"):  # a folder of that name is one
        load_autoencoder("pixels")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_predicted_pixels_are_limited(sampler):
    """An untrained model under the cosine schedule foresees images of any size; pixels have none beyond 1."""
    from switchdit import build_model
    from switchdit.config import SampleConfig
    from switchdit.diffusion.gaussian import GaussianDiffusion, make_betas
    from switchdit.engine.generate import sample_latents

    torch.manual_seed(0)
    model = build_model("DiT-S/2", input_size=8, in_channels=3, depth=1, hidden_size=32, num_heads=2, num_classes=2)
    assert load_autoencoder("pixels").bounded
    options = SampleConfig(num_steps=5, sampler=sampler, cfg_scale=1.0)
    process = GaussianDiffusion(make_betas("cosine", 1000))
    limited, unlimited = (
        sample_latents(model.eval(), process, torch.tensor([0, 1]), [0, 1], options, 0, bounded).abs().max().item()
        for bounded in (True, False)
    )
    assert limited <= 1 + 1e-6 < 2 < unlimited
