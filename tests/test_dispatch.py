"""What travels between expert-parallel ranks: the cost model by enumeration, and what is chosen and said."""

from itertools import combinations
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.errors import UserError
from switchdit.models import build_model
from switchdit.moe.dispatch import bytes_per_layer, check_dispatch, choose_dispatch, expected_remote_ranks, set_dispatch

XL = {"samples": 32, "tokens": 256, "width": 1152, "num_experts": 3, "top_k": 2, "ep_size": 3, "itemsize": 2}


@st.composite
def topologies(draw, max_ranks=4):
    """num_experts, top_k, ep_size that fit."""
    ep_size = draw(st.integers(1, max_ranks))
    num_experts = ep_size * draw(st.integers(1, 3))
    return num_experts, draw(st.integers(1, num_experts)), ep_size


@st.composite
def sizes(draw):
    num_experts, top_k, ep_size = draw(topologies())
    small = st.integers(1, 64)
    return {
        "samples": draw(small),
        "tokens": draw(small),
        "width": draw(small),
        "num_experts": num_experts,
        "top_k": top_k,
        "ep_size": ep_size,
        "itemsize": draw(st.sampled_from((2, 4))),
    }


@settings(deadline=None, max_examples=60)
@given(topologies())
def test_expected_ranks_by_enumeration(topology):
    num_experts, top_k, ep_size = topology
    on_each = num_experts // ep_size
    visits = [len({e // on_each for e in chosen} - {0}) for chosen in combinations(range(num_experts), top_k)]
    assert expected_remote_ranks(*topology) == pytest.approx(sum(visits) / len(visits), rel=1e-12)


@settings(deadline=None)
@given(sizes(), st.sampled_from(("samples", "tokens", "width", "itemsize", "top_k")))
def test_more_of_anything_never_costs_less(given_sizes, name):
    more = {**given_sizes, name: given_sizes[name] + 1}
    if name == "top_k" and more["top_k"] > more["num_experts"]:
        return
    for dispatch in ("samples", "weights"):
        assert bytes_per_layer(dispatch, **more) >= bytes_per_layer(dispatch, **given_sizes)


@settings(deadline=None)
@given(sizes())
def test_auto_is_the_cheaper_and_others_stay(given_sizes):
    cost = {way: bytes_per_layer(way, **given_sizes) for way in ("samples", "weights")}
    assert cost[choose_dispatch("auto", **given_sizes)] == min(cost.values())
    assert all(choose_dispatch(way, **given_sizes) == way for way in cost)
    assert (cost["samples"] == 0) == (cost["weights"] == 0) == (given_sizes["ep_size"] == 1)


def test_the_paper_s_model_moves_weights():
    """A sample of XL/2 visits 2/3 of each of two remote ranks."""
    assert bytes_per_layer("samples", **XL) == pytest.approx(4 * 32 * 4 / 3 * 256 * 1152 * 2)
    assert bytes_per_layer("weights", **XL) == 2 * 2 * (1152**2 + 1152) * 2
    assert choose_dispatch("auto", **XL) == "weights"
    assert choose_dispatch("auto", **{**XL, "samples": 2}) == "samples"


def model_of(ep_size: int):
    """What `set_dispatch` reads of a model on several ranks."""
    mixtures = [
        SimpleNamespace(dispatch="samples", num_experts=3, ep_size=ep_size, gate=SimpleNamespace(k=2)) for _ in range(2)
    ]
    pos_embed = SimpleNamespace(shape=(1, 256, 1152))
    return SimpleNamespace(modules=lambda: mixtures, pos_embed=pos_embed, hidden_size=1152), mixtures


@pytest.mark.parametrize(
    ("dispatch", "samples", "chosen", "line"),
    [
        ("auto", 32, "weights", "weights travel, 10.6 MB {}; samples would be 101 MB"),
        ("auto", 2, "samples", "samples travel, 6.29 MB {}; weights would be 10.6 MB"),
        ("samples", 32, "samples", "samples travel, 101 MB {}; weights would be 10.6 MB"),
    ],
)
def test_every_layer_is_set_and_the_costs_are_told(dispatch, samples, chosen, line):
    model, mixtures = model_of(ep_size=3)
    expected = "expert parallelism: " + line.format("per layer, process and micro-batch")
    assert set_dispatch(model, dispatch, samples=samples, itemsize=2) == expected
    assert [moe.dispatch for moe in mixtures] == [chosen, chosen]


@pytest.mark.parametrize("name", ["DiT-S/8", "Switch-DiT-S/8", "Diff-MoE-S/8"])
def test_nothing_is_said_where_nothing_travels(name):
    model = build_model(name, input_size=8, depth=1, hidden_size=32, num_heads=2)
    assert set_dispatch(model, "weights", samples=4, itemsize=4) is None


def test_only_timestep_experts_have_a_choice():
    check_dispatch("weights", "Switch-DiT")
    check_dispatch("auto", "Diff-MoE")
    with pytest.raises(UserError, match=r"moe\.dispatch is 'weights'.*for Diff-MoE it must be 'auto'"):
        check_dispatch("weights", "Diff-MoE")
