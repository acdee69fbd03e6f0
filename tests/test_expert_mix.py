"""The merged mixture against one product per expert, judged by float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.kernels.expert_mix import linear_mixture, linear_mixture_reference
from switchdit.moe.timestep_gate import gate_probs, top_k_gates, top_k_map


def inputs(n, tokens, width, experts, top_k, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, tokens, width, generator=rng, dtype=torch.float64)
    weight = torch.randn(experts, width, width, generator=rng, dtype=torch.float64) / width**0.5
    bias = torch.randn(experts, width, generator=rng, dtype=torch.float64)
    gates = top_k_gates(torch.randn(n, experts, generator=rng, dtype=torch.float64).softmax(-1), top_k)
    return [x.to(dtype).requires_grad_() for x in (z, weight, bias, gates)]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 5), st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.data(), st.integers(0, 2**31 - 1))
def test_merging_is_exact(n, tokens, width, experts, data, seed):
    top_k = data.draw(st.integers(1, experts))
    args = inputs(n, tokens, width, experts, top_k, torch.float64, seed)
    merged, reference = linear_mixture(*args), linear_mixture_reference(*args)
    torch.testing.assert_close(merged, reference, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(merged)
    for ours, theirs in zip(
        torch.autograd.grad(merged, args, upstream), torch.autograd.grad(reference, args, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_separate_products(dtype):
    args = inputs(8, 64, 96, 4, 3, dtype)
    truth = linear_mixture_reference(*(a.double() for a in args))
    ours = (linear_mixture(*args).double() - truth).norm()
    plain = (linear_mixture_reference(*args).double() - truth).norm()
    assert ours <= 2 * plain


def test_no_samples_give_zero_gradients_not_none():
    z, weight, bias, gates = inputs(0, 4, 8, 3, 2, torch.float32)
    linear_mixture(z, weight, bias, gates).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_gradients_numerically():
    assert torch.autograd.gradcheck(linear_mixture, inputs(2, 3, 4, 3, 2, torch.float64))


def test_gates_are_the_raw_largest_probabilities():
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    assert torch.equal(top_k_gates(probs, 2), torch.tensor([[0.0, 0.6, 0.3], [0.0, 0.3, 0.5]]))
    assert torch.equal(top_k_map(torch.full((1, 4), 0.25), 3).sum(1), torch.tensor([3.0]))


def test_gate_ignores_autocast_and_half_precision_inputs():
    e_t, weight, bias = torch.randn(5, 16), torch.randn(3, 16), torch.randn(3)
    expected = torch.softmax(torch.nn.functional.linear(torch.nn.functional.silu(e_t), weight, bias), -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate_probs(e_t, weight, bias), expected)
    assert gate_probs(e_t.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.float32
