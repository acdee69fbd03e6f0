"""The design space of the Switch-DiT paper: what each option computes."""

import math

import pytest
import torch
import torch.nn.functional as F

from switchdit import build_model
from switchdit.errors import UserError
from switchdit.models.dit import DiTBlock
from switchdit.models.switch_dit import GATES, INTEGRATIONS
from switchdit.moe.layer import TimestepGate
from switchdit.moe.load_balance import load_balance_loss
from switchdit.moe.timestep_gate import gate_probs, top_k_map

TINY = {"input_size": 8, "num_classes": 3, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_experts": 4, "top_k": 2}


def randomised(**fields) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model("Switch-DiT-S/2", **TINY, **fields)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.2)
    return model


FORMULAE = {
    "replace": lambda block, z, c, mix: DiTBlock.forward(block, mix, c),
    "multiply": lambda block, z, c, mix: DiTBlock.forward(block, z * mix, c),
    "multiply_skip": lambda block, z, c, mix: DiTBlock.forward(block, z * mix, c) + z * (1 - mix),
    "multiply_skip_one": lambda block, z, c, mix: DiTBlock.forward(block, z * (1 + mix), c) - z * mix,
}


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_integration(integration):
    block = randomised(integration=integration).double().blocks[0]
    z, c, e_t = torch.randn(3, 16, 32).double(), torch.randn(3, 32).double(), torch.randn(3, 32).double()
    gates = gate_probs(e_t, block.moe.gate.wg.weight, block.moe.gate.wg.bias)
    gates = gates * top_k_map(gates, 2)
    experts = block.moe.deepspeed_moe.experts.deepspeed_experts
    mixture = sum(gates[:, j, None, None] * (z @ e.weight + e.bias) for j, e in enumerate(experts))
    expected = FORMULAE[integration](block, z, c, mixture)
    torch.testing.assert_close(block(z, c, e_t), expected, rtol=1e-12, atol=1e-12)


def test_experts_start_at_zero_only_where_the_mask_starts_at_one():
    for integration in INTEGRATIONS:
        model = build_model("Switch-DiT-S/2", **TINY, integration=integration)
        for expert in model.blocks[0].moe.deepspeed_moe.experts.deepspeed_experts:
            assert (expert.weight.abs().max() == 0) == (integration == "multiply_skip_one")


def test_noise_is_added_to_the_logits_in_training_alone():
    gate = TimestepGate(8, 4, 2, noisy=True)
    torch.nn.init.normal_(gate.wg_noise.weight)
    e_t, noise = torch.randn(5, 8), torch.randn(5, 4)
    probs, gates = gate.train()(e_t, noise)
    hidden = F.silu(e_t)
    logits = gate.wg(hidden) + noise * F.softplus(gate.wg_noise(hidden))
    torch.testing.assert_close(probs, logits.softmax(-1))
    torch.testing.assert_close(gates, probs * top_k_map(probs, 2))
    assert not torch.equal(gate(e_t)[0], gate(e_t)[0])  # drawn where it is not given
    torch.testing.assert_close(gate.eval()(e_t, noise)[0], gate.wg(hidden).softmax(-1))
    assert torch.equal(gate(e_t)[0], gate(e_t)[0])


def test_noise_starts_with_the_size_of_softplus_of_zero():
    model = build_model("Switch-DiT-S/2", **TINY, gate="noisy").train()
    gate = model.blocks[1].moe.gate
    e_t = torch.randn(1, 32).expand(20_000, 32)
    noisy = gate(e_t, torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)))[0].log()
    spread = (noisy[:, 0] - noisy[:, 1]).std()  # of the difference of two logits
    assert abs(spread - math.sqrt(2) * math.log(2)) < 0.02


def test_gate_noise_is_cut_by_block():
    model = randomised(gate="noisy").train()
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 900]), torch.tensor([0, 1, 2])
    noise = torch.randn(3, model.num_gates)
    model.class_dropout_prob = 0.0
    _, routing = model(x, t, y, return_routing=True, gate_noise=noise)
    e_t = model.t_embedder(t)
    for i, block in enumerate(model.blocks):
        expected = block.moe.gate(e_t, noise[:, 4 * i : 4 * i + 4])[0]
        torch.testing.assert_close(routing.probs[:, 4 * i : 4 * i + 4], expected)


@pytest.mark.parametrize("gate", GATES)
def test_load_balance_of_timestep_gates(gate):
    model = randomised(gate=gate)
    t = torch.tensor([1, 500, 900, 30])
    _, routing = model.eval()(torch.randn(4, 4, 8, 8), t, torch.zeros(4, dtype=torch.long), return_routing=True)
    for i, loss in enumerate(routing.load_balance):
        probs = routing.probs[:, 4 * i : 4 * i + 4]
        counts = torch.zeros(4)
        for row in probs:
            counts[row.topk(2).indices] += 1
        torch.testing.assert_close(loss, 4 * (counts / 8 * probs.mean(0)).sum())
    routing.load_balance.sum().backward()
    assert model.blocks[0].moe.gate.wg.weight.grad.abs().max() > 0


def test_load_balance_is_one_when_balanced_and_most_when_collapsed():
    balanced = torch.full((8, 4), 0.25)
    chosen = torch.eye(4).repeat(2, 1)
    assert load_balance_loss(balanced, chosen).item() == pytest.approx(1)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1)
    assert load_balance_loss(collapsed, collapsed).item() == pytest.approx(4)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("gate", "noise", "model field 'gate' must be one of plain, noisy, not 'noise'"),
        ("integration", "add", "model field 'integration' must be one of replace, multiply, multiply_skip, "),
        ("num_denoisers", 3, "model field 'num_denoisers' is unknown for Switch-DiT-S/2"),
    ],
)
def test_options_that_do_not_exist(field, value, says):
    with pytest.raises(UserError, match=says):
        build_model("Switch-DiT-S/2", **TINY, **{field: value})
