"""Tokens routed for themselves, on one process, against plain loops; the load-balance loss against hand-made values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from switchdit.moe.load_balance import load_balance_loss
from switchdit.moe.token_layer import TokenMoE


class Doubling(nn.Module):
    """An expert that is told two things of a sample."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, dtype=torch.float64))

    def forward(self, x, shift, factor, sample):
        return x + factor[sample] * torch.tanh(x @ self.weight + shift[sample])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixture_is_the_sum_over_tokens_and_experts(top_k):
    torch.manual_seed(0)
    layer = TokenMoE(8, 4, top_k, 1, Doubling(8)).double()
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    layer.initialize_experts(lambda expert: nn.init.normal_(expert.weight))
    x, shift, factor = torch.randn(3, 5, 8).double(), torch.randn(3, 8).double(), torch.randn(3, 1).double()
    known = [x.requires_grad_(), shift.requires_grad_(), factor.requires_grad_()]
    mixture, probs, chosen = layer(*known)

    expected = torch.zeros_like(x)
    for n in range(3):
        for i in range(5):
            p = torch.softmax(layer.gate.wg.weight @ x[n, i], 0)
            for j in p.topk(top_k).indices.tolist():
                out = experts[j](x[n, i][None], shift[n][None], factor[n][None], torch.tensor([0]))[0]
                expected[n, i] = expected[n, i] + p[j] * out
    torch.testing.assert_close(mixture, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(chosen.sum(1), torch.full((15,), float(top_k), dtype=torch.float64))
    torch.testing.assert_close(probs.sum(1), torch.ones(15, dtype=torch.float64))
    leaves = [*known, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(out.sin().sum(), leaves, retain_graph=True) for out in (mixture, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("samples", [0, 2])
def test_an_expert_without_tokens_has_a_gradient_of_zero(samples):
    layer = TokenMoE(8, 3, 1, 1, Doubling(8)).double()
    with torch.no_grad():
        layer.gate.wg.weight.copy_(torch.tensor([1.0, 0.0, -1.0])[:, None].expand(3, 8))
    x = torch.rand(samples, 4, 8).double()  # positive: expert 0 wins
    mixture, _, _ = layer(x, torch.zeros(samples, 8).double(), torch.ones(samples, 1).double())
    mixture.sum().backward()
    norms = [expert.weight.grad.norm().item() for expert in layer.deepspeed_moe.experts.deepspeed_experts]
    assert norms[1] == norms[2] == 0
    assert (norms[0] > 0) == (samples > 0)


def test_a_choice_whose_probability_underflows_is_harmless():
    layer = TokenMoE(8, 3, 2, 1, Doubling(8).float())
    with torch.no_grad():
        layer.gate.wg.weight.copy_(torch.tensor([300.0, -300.0, -400.0])[:, None].expand(3, 8))
    x = torch.ones(1, 4, 8)
    mixture, probs, chosen = layer(x, torch.zeros(1, 8), torch.ones(1, 1))
    assert torch.equal(probs[0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(chosen.sum(1), torch.full((4,), 2.0))
    mixture.sum().backward()
    assert layer.gate.wg.weight.grad.isfinite().all()


def test_gates_are_float32_in_half_precision():
    torch.manual_seed(0)
    gate, tokens = TokenMoE(32, 8, 2, 1, Doubling(32)).gate, torch.randn(40, 32).bfloat16()
    expected = torch.softmax(F.linear(tokens.float(), gate.wg.weight), -1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(tokens)[0], expected)
    gate.bfloat16()
    probs, chosen = gate(tokens)
    assert torch.equal(probs, torch.softmax(F.linear(tokens.float(), gate.wg.weight.float()), -1))
    assert torch.equal(chosen.sum(1), torch.full((40,), 2.0))


def test_load_balance_loss():
    even = torch.eye(4).repeat(3, 1)
    assert load_balance_loss(torch.full((12, 4), 0.25), even) == 1
    same = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(5, 1)
    assert load_balance_loss(same / 2, same) == 2  # E / k
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]], requires_grad=True)
    chosen = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    loss = load_balance_loss(probs, chosen)
    torch.testing.assert_close(loss, torch.tensor(3 * (0.5 * 0.5 + 0.5 * 0.4)))
    loss.backward()
    torch.testing.assert_close(probs.grad, torch.tensor([[0.75, 0.75, 0.0]]).expand(2, 3))
