"""The diffusion prior against the authors' tables, matchings and losses."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.errors import UserError
from switchdit.moe.diffusion_prior import begin_matching, diffusion_prior_loss, match_columns, matching_cost, prior_mask

GOLDEN = Path(__file__).parent / "golden"
MASKS = dict(np.load(GOLDEN / "prior_masks.npz"))
MATCHING = dict(np.load(GOLDEN / "prior_matching.npz"))
MASK_CASES = sorted({name.split("/")[0] for name in MASKS})
MATCHING_CASES = sorted({name.split("/")[0] for name in MATCHING})


def numbers(case: str) -> tuple[int, int, int]:
    blocks, experts, top_k = (int(part[1:]) for part in case.split("_")[:3])
    return blocks, experts, top_k


def unpacked(packed: np.ndarray, columns: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(packed, axis=1)[:, :columns]).float()


@pytest.mark.parametrize("case", MASK_CASES)
@pytest.mark.parametrize(("variant", "key"), [("code", "packed"), ("paper", "paper_packed")])
def test_mask_tables(case, variant, key):
    blocks, experts, top_k = numbers(case)
    expected = unpacked(MASKS[f"{case}/{key}"], blocks * experts)
    assert torch.equal(prior_mask(blocks, experts, top_k, variant=variant), expected)


def test_where_paper_and_code_differ():
    difference = (prior_mask(12, 3, 2) != prior_mask(12, 3, 2, variant="paper")).any(1).nonzero().flatten() + 1
    assert difference.tolist() == [452, 595, 676, 735, 783, 823, 858, 890, 918, 944, 968, 990]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 11), st.data())
def test_mask_rows(blocks, experts, data):
    top_k = data.draw(st.integers(1, experts))
    mask = prior_mask(blocks, experts, top_k, num_timesteps=50)
    assert (mask.sum(1) == blocks * top_k).all()
    assert mask.min(0).values.sum() == max(blocks * (2 * top_k - experts), 0)  # always active
    start = mask.argmax(1)
    assert (start.diff() >= 0).all()
    assert start[-1] == blocks * (experts - top_k)


def test_unknown_variant():
    with pytest.raises(UserError, match="code, paper"):
        prior_mask(2, 3, 2, variant="papr")


@pytest.mark.parametrize("case", MATCHING_CASES)
def test_cost_and_optimal_total(case):
    blocks, experts, top_k = numbers(case)
    gates = unpacked(MATCHING[f"{case}/gate_map_packed"], blocks * experts)
    prior = prior_mask(blocks, experts, top_k)
    cost = matching_cost(gates, prior)
    assert np.array_equal(cost.numpy(), MATCHING[f"{case}/cost"])
    for step in range(5):
        assignment = match_columns(gates, prior, seed=3, step=step)
        assert sorted(assignment.tolist()) == list(range(len(cost)))
        assert cost[torch.arange(len(cost)), assignment].sum() == MATCHING[f"{case}/optimal_total_cost"]


@pytest.mark.parametrize("case", MATCHING_CASES)
def test_loss_and_gradient(case):
    blocks, experts, top_k = numbers(case)
    probs = torch.from_numpy(MATCHING[f"{case}/probs"]).requires_grad_()
    loss = diffusion_prior_loss(
        probs,
        torch.from_numpy(MATCHING[f"{case}/t"]),
        prior_mask(blocks, experts, top_k),
        torch.from_numpy(MATCHING[f"{case}/assign"]),
        blocks,
    )
    loss.backward()
    assert loss.item() == pytest.approx(float(MATCHING[f"{case}/jsd_f64"]), abs=2e-7)
    np.testing.assert_allclose(probs.grad.numpy(), MATCHING[f"{case}/grad_probs_f64"], atol=1e-8)


def test_ties_are_broken_the_same_way_on_every_rank_and_differently_at_every_step():
    collapsed = torch.zeros(1000, 12)
    collapsed[:, [0, 1, 3, 4, 6, 7, 9, 10]] = 1
    prior = prior_mask(4, 3, 2)
    assert torch.equal(match_columns(collapsed, prior, 0, 5), match_columns(collapsed, prior, 0, 5))
    assert len({tuple(match_columns(collapsed, prior, 0, step).tolist()) for step in range(5)}) > 1


def test_matching_on_a_worker_is_that_of_the_caller_and_runs_beside_it():
    prior = prior_mask(12, 3, 2)
    gates = prior[:, torch.randperm(36, generator=torch.Generator().manual_seed(0))]
    may_begin = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as worker:
        worker.submit(may_begin.wait)  # the worker is busy
        pending = [begin_matching(worker, gates, prior, 3, step) for step in range(3)]
        may_begin.set()  # not reached if the caller had to wait
        for step, finish in enumerate(pending):
            assert torch.equal(finish(), match_columns(gates, prior, 3, step))
            assert torch.equal(finish(), finish())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_matching_on_a_gpu_is_that_of_the_cpu():
    prior = prior_mask(12, 3, 2)
    gates = prior[:, torch.randperm(36, generator=torch.Generator().manual_seed(0))]
    with ThreadPoolExecutor(max_workers=1) as worker:
        pending = [begin_matching(worker, gates.cuda(), prior.cuda(), 3, step) for step in range(20)]
        for step, finish in enumerate(pending):
            assert torch.equal(finish(), match_columns(gates, prior, 3, step))


def test_a_mistake_on_the_worker_is_told_to_who_asks():
    with ThreadPoolExecutor(max_workers=1) as worker:
        finish = begin_matching(worker, torch.full((10, 6), torch.nan), prior_mask(2, 3, 2, 10))
        with pytest.raises(ValueError, match="invalid"):
            finish()


def test_loss_is_zero_for_the_prior_itself_and_ln_2_for_the_opposite():
    prior = prior_mask(3, 2, 1, num_timesteps=10)
    t, identity = torch.arange(10), torch.arange(6)
    assert diffusion_prior_loss(prior, t, prior, identity, 3).item() == pytest.approx(0, abs=1e-6)
    assert diffusion_prior_loss(1 - prior, t, prior, identity, 3).item() == pytest.approx(0.693147, abs=2e-5)


def test_descending_the_loss_teaches_gates_the_prior():
    torch.manual_seed(0)
    blocks, experts, top_k, timesteps = 4, 3, 1, 40
    prior = prior_mask(blocks, experts, top_k, timesteps)
    logits = (0.1 * torch.randn(timesteps, blocks, experts)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    t = torch.arange(timesteps)
    start = None
    for step in range(200):
        probs = logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter(-1, probs.topk(top_k).indices, 1).flatten(1)
        assignment = match_columns(chosen, prior, 0, step)
        loss = diffusion_prior_loss(probs.flatten(1), t, prior, assignment, blocks)
        start = loss.item() if start is None else start
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * start


def test_a_random_prior_gives_neighbours_nothing_in_common():
    mask = prior_mask(12, 3, 2, variant="random")
    assert torch.equal(mask, prior_mask(12, 3, 2, variant="random"))
    assert (mask.sum(1) == 24).all()
    shared = (mask[1:] * mask[:-1]).sum(1).mean() / 24
    assert abs(shared - 2 / 3) < 0.02  # what chance gives
    assert (prior_mask(12, 3, 2)[1:] * prior_mask(12, 3, 2)[:-1]).sum(1).mean() / 24 > 0.99
