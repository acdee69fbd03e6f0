"""Processes, ZeRO, accumulation, clipping, precision, recomputation and routing change nothing that is learned.

All combinations: python tests/gradient_parity.py
"""

import pytest
import torch
from gradient_parity import SETTINGS, TOPOLOGIES, Table, combinations, covering, pairs

from switchdit.models import SYSTEMS, build_model
from switchdit.moe import routes

TINY = {"input_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 3}
QUICK = [(2, 2)]


@pytest.fixture(scope="module")
def table():
    return Table()


def in_time(topology: tuple[int, int]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.world_size(topology[0]), *([] if topology in QUICK else [pytest.mark.slow])]


@pytest.mark.parametrize("topology", [pytest.param(t, marks=in_time(t)) for t in TOPOLOGIES])
def test_same_as_a_plain_loop(table, topology):
    rows = table.rows(topology, covering(combinations(topology[1])))
    wrong = [str(row) for row in rows if not row.is_right]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_the_sample_has_every_pair_of_settings(ep_size):
    candidates = combinations(ep_size)
    sample = covering(candidates)
    assert len(sample) <= 16
    assert {pair for how in sample for pair in pairs(how)} == {pair for how in candidates for pair in pairs(how)}
    for name, values in SETTINGS.items():
        if name != "dispatch" or ep_size > 1:
            assert {how[name] for how in sample} == set(values)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("system", SYSTEMS)
def test_recomputed_blocks_change_no_bit(system, every):
    torch.manual_seed(0)
    model = build_model(f"{system}-S/2", **TINY, **({"num_denoisers": 2} if system == "Multi-Expert-DiT" else {}))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape))
    blocks = [block for module in model.modules() for block in getattr(module, "blocks", [])]
    calls = []
    for block in blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))

    def gradients(activation_checkpointing: int) -> dict[str, torch.Tensor]:
        model.activation_checkpointing = activation_checkpointing
        model.zero_grad()
        rng = torch.Generator().manual_seed(1)
        x, t, y = torch.randn(6, 4, 8, 8, generator=rng), torch.arange(6) * 190, torch.arange(6) % 3
        model(x, t, y, drop_label=torch.arange(6) == 4).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    kept, recomputed = gradients(0), gradients(every)
    assert len(calls) == 2 * len(blocks) + len(blocks) // every
    assert all(torch.equal(recomputed[name], value) for name, value in kept.items())
    assert any(value.any() for value in kept.values())


def test_experts_are_gathered_again_where_their_layer_is_computed_again(monkeypatch):
    gathered = []
    monkeypatch.setattr(routes, "begin_gather", lambda local, _: gathered.append(local) or (lambda: local))
    layer = build_model("Switch-DiT-S/2", **TINY, num_experts=2, top_k=1).blocks[0].moe.deepspeed_moe.experts
    coming = routes.ExpertsOnTheirWay(layer.deepspeed_experts, None)
    coming.begin_ahead()
    coming.begin()
    weight, bias = coming.take()
    assert (weight.shape, bias.shape, len(gathered)) == ((2, 32, 32), (2, 32), 1)
    coming.begin_ahead()
    assert len(gathered) == 1  # the layer before it is computed again
    again, _ = coming.take()
    assert torch.equal(again, weight) and len(gathered) == 2


def test_nothing_is_recomputed_in_evaluation():
    model = build_model("Switch-DiT-S/2", **TINY).eval()
    model.activation_checkpointing = 1
    assert model.block_calls() == list(model.blocks)
