"""The merged mixture against one product per expert, judged by float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from switchdit.kernels import expert_mix as kernels
from switchdit.kernels.expert_mix import (
    expert_mix,
    expert_mix_reference,
    linear_mixture,
    linear_mixture_reference,
)
from switchdit.moe.timestep_gate import gate_probs, top_k_gates, top_k_map

FORMS = {"mixture": (linear_mixture, linear_mixture_reference), "multiplied": (expert_mix, expert_mix_reference)}


def inputs(n, tokens, width, experts, top_k, dtype, seed=0, same=False):
    """``same``: one row of gates for all samples."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, tokens, width, generator=rng, dtype=torch.float64)
    weight = torch.randn(experts, width, width, generator=rng, dtype=torch.float64) / width**0.5
    bias = torch.randn(experts, width, generator=rng, dtype=torch.float64)
    rows = 1 if same else n
    gates = top_k_gates(torch.randn(rows, experts, generator=rng, dtype=torch.float64).softmax(-1), top_k)
    return [x.to(dtype).requires_grad_() for x in (z, weight, bias, gates)]


def outputs(form, args):
    out = form(*args)
    return out if isinstance(out, tuple) else (out,)


def gradients(form, args, upstream):
    """Of all arguments; of gates only where they are chosen."""
    of_all = torch.autograd.grad(outputs(form, args), args, upstream)
    return *of_all[:-1], torch.where(args[-1] == 0, 0, of_all[-1])


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_merging_is_exact(form, data):
    form, reference = FORMS[form]
    n, tokens, width, experts = (data.draw(st.integers(low, high)) for low, high in ((0, 5), (1, 7), (1, 9), (1, 5)))
    top_k, same = data.draw(st.integers(1, experts)), data.draw(st.booleans())
    args = inputs(n, tokens, width, experts, top_k, torch.float64, data.draw(st.integers(0, 2**31 - 1)), same)
    merged, plain = outputs(form, args), outputs(reference, args)
    torch.testing.assert_close(merged, plain, rtol=1e-12, atol=1e-12)
    rng = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=rng, dtype=torch.float64) for out in merged]
    ours, theirs = (gradients(f, args, upstream) for f in (form, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_separate_products(form, dtype):
    form, reference = FORMS[form]
    width = 96
    args = inputs(8, 64, width, 4, 3, dtype)
    exact = [a.detach().double().requires_grad_() for a in args]
    rng = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=rng, dtype=dtype) for out in outputs(form, args)]
    truth = *outputs(reference, exact), *gradients(reference, exact, [u.double() for u in upstream])
    ours = *outputs(form, args), *gradients(form, args, upstream)
    plain = *outputs(reference, args), *gradients(reference, args, upstream)
    for name, true, mine, theirs in zip([*["out"] * len(upstream), *"zwbg"], truth, ours, plain, strict=True):
        allowed = 2 * (theirs.double() - true).norm()
        if form is linear_mixture and name == "g":
            # one sum of D^2 terms of either sign: it is about D terms large, and its rounding, one after the other,
            # 2^-24 D^2 / sqrt(2)
            allowed = max(allowed, 2**-24 * width * true.norm())
        assert (mine.double() - true).norm() <= allowed, name


@pytest.mark.parametrize("same", [False, True])
def test_a_few_matrices_at_a_time_are_as_good_as_all(monkeypatch, same):
    """Buffers of four (the least, and one more), of six, and of all 13 samples."""
    args = inputs(13, 6, 16, 3, 2, torch.float32, same=same)
    results = []
    for matrices in (1, 6, 13):
        monkeypatch.setitem(kernels.BUFFER, "cpu", matrices * 16 * 16 * 4)
        out = expert_mix(*args)
        results.append([*out, *torch.autograd.grad(out, args, [torch.ones_like(o) for o in out])])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-6, atol=2e-6)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 40))
def test_buffers_hold_every_row_once(num_rows, fit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.BUFFER, "cpu", fit * 2 * 2 * 4)
        parts = [(rows, len(buffer)) for rows, buffer in kernels._buffers(torch.zeros(1, 2, 2), num_rows)]
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(num_rows))
    for rows, length in parts:
        assert length == rows.stop - rows.start
        assert min(num_rows, kernels.MIN_ROWS) <= length <= max(fit, 2 * kernels.MIN_ROWS - 1)


def test_memory_kept_between_calls_is_no_tie_between_them():
    """Inference mode, threads and other types and sizes do not see each other's buffers."""

    def mixed(dtype, width):
        args = inputs(3, 4, width, 3, 2, dtype)
        return [*expert_mix(*args), *torch.autograd.grad(expert_mix(*args)[0].sum(), args)]

    cases = [(torch.float32, 16), (torch.float64, 32), (torch.float32, 32), (torch.float32, 8)]
    alone = [mixed(*case) for case in cases]
    with torch.inference_mode():
        expert_mix(*inputs(9, 4, 64, 3, 2, torch.float32))
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(lambda case: mixed(*case), cases * 20))
    for i, results in enumerate(beside):
        assert all(torch.equal(a, b) for a, b in zip(results, alone[i % len(cases)], strict=True))


def test_rows_of_gates_that_are_equal_count_as_one():
    z, weight, bias, gates = inputs(4, 8, 16, 3, 2, torch.float32, same=True)
    one_row, four_rows = (expert_mix(z, weight, bias, g) for g in (gates, gates.expand(4, 3)))
    assert all(torch.equal(a, b) for a, b in zip(one_row, four_rows, strict=True))


@pytest.mark.parametrize("form", [linear_mixture, lambda *args: expert_mix(*args)[0]])
def test_no_samples_give_zero_gradients_not_none(form):
    z, weight, bias, gates = inputs(0, 4, 8, 3, 2, torch.float32)
    form(z, weight, bias, gates).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("same", [False, True])
def test_gradients_numerically(same):
    args = inputs(2, 3, 4, 3, 3, torch.float64, same=same)
    assert torch.autograd.gradcheck(linear_mixture, args)
    assert torch.autograd.gradcheck(expert_mix, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same", [False, True])
def test_operator_is_known_to_pytorch(same, dtype):
    """Its schema, shapes, autograd and tracing are what PyTorch's compiler takes them to be."""
    *tensors, gates = inputs(2, 4, 8, 3, 2, dtype, same=same)
    gates = gates.detach().float().requires_grad_()
    torch.library.opcheck(torch.ops.switchdit.expert_mix.default, (*tensors, gates))
    routed, mask = expert_mix(*tensors, gates)
    backward = (torch.ones_like(routed), None, *(x.detach() for x in (*tensors, gates, mask)))
    torch.library.opcheck(torch.ops.switchdit.expert_mix_backward.default, backward)


def test_a_small_mixture_is_rounded_once_in_half_precision():
    """1 + 3/512 would be 1 + 4/512 in bfloat16, before the product is rounded."""
    z, mixture = torch.rand(1, 512, 8).bfloat16() + 1, 3 / 512
    weight, bias = torch.zeros(1, 8, 8).bfloat16(), torch.full((1, 8), mixture).bfloat16()
    routed, _ = expert_mix(z, weight, bias, torch.ones(1, 1))
    assert torch.equal(routed, (z.double() * (1 + mixture)).bfloat16())


@pytest.mark.parametrize("form", [expert_mix, lambda *args: expert_mix(*args)[0]])
def test_arithmetic_is_one_product_per_sample(form):
    n, tokens, width, experts = 3, 8, 16, 4
    args = inputs(n, tokens, width, experts, 2, torch.float32)
    with FlopCounterMode(display=False) as forward:
        out = outputs(form, args)
    with FlopCounterMode(display=False) as backward:
        sum(o.sum() for o in out).backward()
    product = 2 * n * tokens * width**2
    merging = 2 * n * experts * width**2
    small = 2 * n * experts * width
    assert forward.get_total_flops() == product + merging + small
    assert backward.get_total_flops() == 2 * product + 3 * merging + 2 * small


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"z": (2, 4, 6)}, r"z, weight, bias and gates are \(2, 4, 6\)"),
        ({"gates": (3, 3)}, r"\(3, 3\); they must be \(N, L, D\)"),
        ({"bias": (2, 8)}, "must be"),
        ({"weight": (3, 8, 9)}, "must be"),
    ],
)
def test_shapes_that_do_not_fit_are_told(change, told):
    shapes = {"z": (2, 4, 8), "weight": (3, 8, 8), "bias": (3, 8), "gates": (2, 3)} | change
    with pytest.raises(ValueError, match=told):
        expert_mix(*map(torch.zeros, shapes.values()))


def test_types_that_do_not_fit_are_told():
    z, weight, bias, gates = inputs(2, 4, 8, 3, 2, torch.float32)
    with pytest.raises(ValueError, match=r"z is torch\.bfloat16, but the experts are torch\.float32"):
        expert_mix(z.bfloat16(), weight, bias, gates)


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
