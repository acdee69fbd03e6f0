"""What Switch-DiT is compared with: DiT and DTR against the authors' numbers, and the multi-expert model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit import build_model, load_reference_checkpoint
from switchdit.diffusion.samplers import guided
from switchdit.errors import UserError
from switchdit.models.dtr import channel_mask

GOLDEN = Path(__file__).parent / "golden"
NAMES = {"dit": "DiT-S/2", "dtr": "DTR-S/2"}
TINY = {"input_size": 8, "num_classes": 5, "depth": 3, "hidden_size": 32, "num_heads": 2}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SUFFIX = {torch.float32: "", torch.float64: "64"}


@pytest.fixture(params=NAMES)
def case(request) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        return {"name": NAMES[request.param], **file}


def golden_model(case: dict, dtype: torch.dtype) -> torch.nn.Module:
    model = build_model(case["name"], **TINY)
    load_reference_checkpoint(model, {k[3:]: torch.from_numpy(v) for k, v in case.items() if k.startswith("sd/")})
    model.class_dropout_prob = 0.0
    return model.to(dtype)


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    tolerance = TOLERANCE[ours.dtype]
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", SUFFIX)
def test_forward_and_gradients(case, dtype):
    model, bits = golden_model(case, dtype), SUFFIX[dtype]
    x, t, y = (torch.from_numpy(case[f"in/{name}"]) for name in "xty")
    x = x.to(dtype)
    close(model.eval()(x, t, y), case[f"eval/out{bits}"])
    out = model.train()(x, t, y)
    close(out, case[f"train/out{bits}"])
    loss = out.square().mean()
    close(loss, case[f"train/loss{bits}"])
    loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, case[f"grad{bits}/{name}"])
            compared += 1
    assert compared == sum(key.startswith(f"grad{bits}/") for key in case)


@pytest.mark.parametrize("dtype", SUFFIX)
def test_guidance(case, dtype):
    """DiT guides the first 3 of 4 channels, DTR all of them."""
    model = golden_model(case, dtype).eval()
    x = torch.from_numpy(case["cfg/x_half"]).to(dtype)
    t, y = (torch.from_numpy(case[f"cfg/{name}"])[: len(x)] for name in "ty")
    channels = 3 if case["name"].startswith("DiT") else None
    with torch.no_grad():
        out = guided(model, y, model.null_label, float(case["cfg/scale"]), guided_channels=channels)(x, t)
    close(out, case[f"cfg/out{SUFFIX[dtype]}"][: len(x)])


def test_the_channel_mask_is_the_published_one():
    with np.load(GOLDEN / "dtr.npz") as file:
        assert np.array_equal(channel_mask(32, 1000, 4.0, 0.8).numpy(), file["sd/routers.0._unit_mapping"])


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(4, 300),
    num_timesteps=st.integers(2, 300),
    alpha=st.floats(0.1, 10),
    beta=st.floats(0.3, 1),
    kind=st.sampled_from(["dtr", "random"]),
)
def test_every_timestep_owns_as_many_channels(width, num_timesteps, alpha, beta, kind):
    mask = channel_mask(width, num_timesteps, alpha, beta, kind)
    assert mask.shape == (num_timesteps, width)
    assert (mask.sum(1) == int(width * beta)).all()
    if kind == "dtr":
        starts = mask.argmax(1)
        assert starts[0] == 0 and starts[-1] == width - int(width * beta)
        assert (starts.diff() >= 0).all()


def test_neighbours_share_channels_unless_they_are_random():
    def shared(kind: str) -> float:
        mask = channel_mask(384, 1000, 4.0, 0.5, kind)
        return float((mask[1:] * mask[:-1]).sum(1).mean() / 192)

    assert shared("dtr") > 0.99
    assert 0.45 < shared("random") < 0.55


def test_channels_that_are_not_owned_pass_through():
    torch.manual_seed(0)
    model = build_model("DTR-S/2", **TINY, beta=0.5).double()
    torch.nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight)
    z, c, mask = torch.randn(1, 16, 32).double(), torch.randn(1, 32).double(), model.mask[[10]].unsqueeze(1)
    owned = mask.bool().expand_as(z)
    other = torch.where(owned, z, torch.randn_like(z))
    change = model.blocks[0](other, c, mask) - model.blocks[0](z, c, mask)
    torch.testing.assert_close(change[~owned], (other - z)[~owned], rtol=1e-12, atol=1e-12)
    assert (change[owned] == 0).all()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"beta": 0.0}, r"beta \(0.0\) must lie between"),
        ({"beta": 1.5}, r"beta \(1.5\) must lie between"),
        ({"beta": float("nan")}, "model field 'beta' must be of type float, not nan"),
        ({"alpha": float("inf")}, "model field 'alpha' must be of type float, not inf"),
        ({"mlp_ratio": 0.001}, r"mlp_ratio \(0.001\) must be a number above 0 that gives the MLP a width"),
        ({"alpha": 0}, r"alpha \(0.0\) must be above 0"),
        ({"channel_mask": "rand"}, "model field 'channel_mask' must be one of dtr, random, not 'rand'"),
    ],
)
def test_masks_that_cannot_be(fields, says):
    with pytest.raises(UserError, match=says):
        build_model("DTR-S/2", **TINY, **fields)


def test_each_denoiser_has_its_quarter_of_the_timesteps():
    model = build_model("Multi-Expert-DiT-S/2", **TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    t = torch.tensor([999, 0, 250, 249, 500, 749, 750, 499])
    x, y = torch.randn(8, 4, 8, 8), torch.arange(8) % 5
    with torch.no_grad():
        together = model(x, t, y)
        for i, owner in enumerate([3, 0, 1, 0, 2, 2, 3, 1]):
            alone = model.denoisers[owner](x[[i]], t[[i]], y[[i]])
            assert torch.allclose(together[[i]], alone, atol=1e-5)


def test_idle_denoisers_have_zero_gradients():
    model = build_model("Multi-Expert-DiT-S/2", **TINY).train()
    t = torch.tensor([10, 20, 900])
    model(torch.randn(3, 4, 8, 8), t, torch.zeros(3, dtype=torch.long)).sum().backward()
    for i, denoiser in enumerate(model.denoisers):
        gradients = [p.grad for p in denoiser.parameters() if p.requires_grad]
        assert all(g is not None for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients) == (i in (0, 3))


def test_idle_denoisers_take_no_part_in_what_comes_out():
    """In training they see a sample, so that backward passes are alike on all ranks; without gradients they rest."""
    model = build_model("Multi-Expert-DiT-S/2", **TINY).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for i in (1, 2):
        torch.nn.init.constant_(model.denoisers[i].final_layer.linear.bias, float("nan"))
    model.class_dropout_prob = 0.0
    seen = [0] * 4
    for i, denoiser in enumerate(model.denoisers):
        denoiser.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, len(args[0])))
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([900, 10, 20]), torch.arange(3)
    trained = model(x, t, y)
    assert seen == [2, 1, 1, 1]
    trained.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    seen[:] = [0] * 4
    with torch.no_grad():
        for mode in (True, False):
            assert torch.equal(model.train(mode)(x, t, y), trained)
    assert torch.equal(model.eval()(x, t, y), trained)
    assert seen == [2, 0, 0, 1]


def test_gradients_come_in_the_same_order_whoever_is_idle():
    model = build_model("Multi-Expert-DiT-S/2", **TINY).train()
    order = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))

    def ready(*t: int) -> list[str]:
        order.clear()
        model(torch.randn(len(t), 4, 8, 8), torch.tensor(t), torch.zeros(len(t), dtype=torch.long)).sum().backward()
        return list(order)

    busy = ready(10, 300, 600, 900)
    assert len(busy) == sum(p.requires_grad for p in model.parameters())
    for t in ((10, 20), (900, 300), (600, 999, 10)):
        assert ready(*t) == busy


def test_label_dropout_of_the_multi_expert_model_can_be_switched_off():
    model = build_model("Multi-Expert-DiT-S/2", **TINY).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 900]), torch.arange(4)
    model.class_dropout_prob = 0.0
    assert torch.equal(model(x, t, y), model(x, t, y))
    dropped = model(x, t, y, drop_label=torch.tensor([True, False, False, True]))
    assert torch.equal(dropped, model(x, t, y))  # switched off means never
    model.class_dropout_prob = 0.1
    dropped = model(x, t, y, drop_label=torch.tensor([True, False, False, True]))
    differs = (dropped - model(x, t, y, drop_label=torch.zeros(4, dtype=torch.bool))).flatten(1).abs().amax(1) > 0
    assert differs.tolist() == [True, False, False, True]
