"""What a step minimises is the sum that its terms and settings say, for every system and weighting."""

import numpy as np
import pytest
import torch

from switchdit import build_model
from switchdit.config import config_from_dict
from switchdit.data.training_batches import Batch
from switchdit.diffusion.losses import noise_losses
from switchdit.engine.objective import Objective, check_objective, time_distribution
from switchdit.errors import UserError
from switchdit.moe.diffusion_prior import diffusion_prior_loss

TINY = {"input_size": 8, "num_classes": 3, "depth": 2, "hidden_size": 32, "num_heads": 2}
N = 6


def objective(name: str = "Switch-DiT-S/2", **sections: dict) -> tuple[Objective, torch.nn.Module]:
    values = {
        "run_dir": "r",
        "model": {"name": name, **TINY},
        "data": {"latents": "l", "image_size": 64, "vae": "v"},
        "train": {"steps": 1, "seed": 5},
        **sections,
    }
    config = config_from_dict(values)
    torch.manual_seed(0)
    model = build_model(name, **TINY)
    model.class_dropout_prob = 0.0
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    return Objective(config, model, torch.device("cpu")), model


def batch(flow: bool = False) -> Batch:
    rng = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, N, 4, 8, 8, generator=rng)
    t = torch.rand(N, generator=rng) if flow else torch.tensor([3, 100, 300, 500, 700, 900])
    none = torch.zeros(N, dtype=torch.bool)
    return Batch(x0, noise, t, torch.arange(N) % 3, none, torch.arange(N))


def per_sample(of: Objective, model: torch.nn.Module, b: Batch) -> dict[str, torch.Tensor]:
    x_t = of.process.q_sample(b.x0, b.t, b.noise)
    return noise_losses(of.process, model(x_t, b.t, b.y), b.x0, x_t, b.t, b.noise)


def test_terms_add_up():
    of, model = objective(loss={"lambda_dp": 0.7})
    of.start_step(0)
    losses = of(model, batch())
    expected = per_sample(of, model, batch())
    torch.testing.assert_close(losses.mse, expected["mse"])
    torch.testing.assert_close(losses.terms["mse"], expected["mse"].mean())
    torch.testing.assert_close(losses.terms["vlb"], expected["vlb"].mean())
    x_t = of.process.q_sample(batch().x0, batch().t, batch().noise)
    _, routing = model(x_t, batch().t, batch().y, return_routing=True)
    prior = diffusion_prior_loss(routing.probs, batch().t, of.prior, of.assignment, 2)
    torch.testing.assert_close(losses.terms["prior"], prior)
    torch.testing.assert_close(losses.total, (expected["mse"] + expected["vlb"]).mean() + 0.7 * prior)


@pytest.mark.parametrize("name", ["Switch-DiT-S/2", "Diff-MoE-S/2"])
def test_load_balancing(name):
    of, model = objective(name, loss={"auxiliary": "load_balancing", "lambda_lb": 0.3})
    of.start_step(0)
    losses = of(model, batch())
    expected = per_sample(of, model, batch())
    x_t = of.process.q_sample(batch().x0, batch().t, batch().noise)
    _, routing = model(x_t, batch().t, batch().y, return_routing=True)
    torch.testing.assert_close(losses.terms["balance"], routing.load_balance.sum())
    torch.testing.assert_close(losses.total, (expected["mse"] + expected["vlb"]).mean() + 0.3 * losses.terms["balance"])


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_weights_of_timesteps_meet_the_squared_error_alone(weighting):
    settings = {"weighting": weighting, "min_snr_gamma": 3.0, "p2_k": 2.0, "p2_gamma": 0.5}
    of, model = objective("DiT-S/2", loss=settings)
    losses = of(model, batch())
    expected = per_sample(of, model, batch())
    abar = of.process.alphas_cumprod[batch().t.numpy()]
    snr = abar / (1 - abar)
    weights = np.minimum(snr, 3) / snr if weighting == "min_snr" else 1 / np.sqrt(2 + snr)
    total = (torch.from_numpy(weights) * expected["mse"] + expected["vlb"]).mean()
    torch.testing.assert_close(losses.total, total.float())
    torch.testing.assert_close(losses.mse, expected["mse"])  # what is watched is not weighted


def test_uncertainty_weighting_learns_beside_the_model():
    of, model = objective("DiT-S/2", loss={"weighting": "uncertainty", "uncertainty_lr": 0.1})
    b = batch()
    losses = of(model, b)
    expected = per_sample(of, model, b)
    torch.testing.assert_close(losses.total, 0.5 * (expected["mse"] + expected["vlb"]).mean())  # all start at zero
    before = of.state()
    of.finish_step(lambda tensor: None)
    of_state = of.state()
    assert of_state != before
    other, _ = objective("DiT-S/2", loss={"weighting": "uncertainty", "uncertainty_lr": 0.1})
    other.restore(of_state)
    torch.testing.assert_close(other(model, b).total, of(model, b).total, rtol=0, atol=0)


def test_rectified_flow_tells_the_model_thousandths():
    flow = {"diffusion": {"process": "rectified_flow"}, "sample": {"sampler": "euler"}}
    of, model = objective("DiT-S/2", **flow)
    b = batch(flow=True)
    told = []

    def watched(x_t, time, y, drop_label):
        told.append(time)
        return model(x_t, time, y)

    losses = of(watched, b)
    torch.testing.assert_close(told[0], 1000 * b.t)
    t = b.t.view(-1, 1, 1, 1)
    velocity = model((1 - t) * b.x0 + t * b.noise, 1000 * b.t, b.y)[:, :4]
    torch.testing.assert_close(losses.total, (velocity - (b.noise - b.x0)).square().mean())
    assert losses.timestep.tolist() == [int(1000 * float(value)) for value in b.t]


def test_times_are_drawn_as_the_loss_wants_them():
    def drawn(**sections: dict) -> str:
        values = {"run_dir": "r", "model": {"name": "DiT-S/2"}, "train": {"steps": 1}, **sections}
        return time_distribution(config_from_dict({**values, "data": {"latents": "l", "image_size": 64, "vae": "v"}}))

    assert drawn() == "uniform"
    assert drawn(loss={"weighting": "uncertainty"}) == "clusters"
    euler = {"sample": {"sampler": "euler"}}
    assert drawn(diffusion={"process": "rectified_flow"}, **euler) == "flow_logit_normal"
    uniform = {"process": "rectified_flow", "time_distribution": "uniform"}
    assert drawn(diffusion=uniform, **euler) == "flow_uniform"


@pytest.mark.parametrize("system", ["DTR", "Switch-DiT", "Multi-Expert-DiT"])
def test_routing_by_time_needs_the_scale_of_timesteps(system):
    values = {"run_dir": "r", "train": {"steps": 1}, "data": {"latents": "l", "image_size": 64, "vae": "v"}}
    flow = {"diffusion": {"process": "rectified_flow", "time_scale": 1.0}, "sample": {"sampler": "euler"}}
    check_objective(config_from_dict({**values, **flow, "model": {"name": "Diff-MoE-S/2"}}), 1000)
    with pytest.raises(UserError, match=r"diffusion.time_scale is 1; .* must be num_timesteps \(1000\)"):
        check_objective(config_from_dict({**values, **flow, "model": {"name": f"{system}-S/2"}}), 1000)
