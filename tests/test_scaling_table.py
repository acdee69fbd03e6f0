"""Bytes on the wire and their time, by hand; and the page that is made of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT

from switchdit.moe.dispatch import bytes_per_layer
from tools import scaling_table
from tools.scaling_table import CLUSTERS, Cluster, collective_seconds, exchange_seconds, expert_groups, reckon

SMALL = Cluster(node=2, nvlink=100.0, network=20.0, latency=0.0)


def test_a_ring_within_a_node():
    """Four processes, 400 bytes: each sends three quarters."""
    one_node = Cluster(node=4, nvlink=100.0, network=1.0, latency=0.5)
    assert collective_seconds(400, [[0, 1, 2, 3]], one_node) == 3 + 3 * 0.5
    assert collective_seconds(400, [[0, 1, 2, 3]], one_node, calls=10) == 3 + 10 * 3 * 0.5


def test_two_nodes_are_as_quick_as_their_network():
    """d = 4, g = 2, n = 2. Ring: 3/4 400 / 20 = 15. Hierarchical: 1/2 400 / 100 + 1/2 400 / 20 = 12."""
    everyone = [[0, 1, 2, 3]]
    assert collective_seconds(400, everyone, SMALL) == 12
    # a network faster than NVLink: ring 3/4 400 / 100 = 3, hierarchical 2 + 1/2 400 / 1000 = 2.2
    assert collective_seconds(400, everyone, Cluster(2, 100.0, 1000.0, 0.0)) == pytest.approx(2.2)
    # hops of 9 s: ring 15 + 3 * 9 = 42, hierarchical 12 + (1 + 1) 9 = 30
    assert collective_seconds(400, everyone, Cluster(2, 100.0, 20.0, 9.0)) == 30


def test_groups_share_the_network_of_their_node():
    """Experts of ep_size 2 on two nodes of two: groups {0, 2} and {1, 3}, each with half the network: 1/2 400 / 10."""
    together, apart = expert_groups(4, 2)
    assert (together, apart) == ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    assert collective_seconds(400, apart, SMALL) == 20


def test_exchanges_in_a_node_and_between_nodes():
    one_node = exchange_seconds(300, [[0, 1], [2, 3]], SMALL, messages=0)
    assert one_node == 3.0  # all to the neighbour
    # four processes on two nodes: a third stays, two thirds of both processes of a node leave it
    assert exchange_seconds(300, [[0, 1, 2, 3]], SMALL, messages=0) == 100 / 100 + 2 * 200 / 20
    # groups of three on nodes of two, 0 1 | 2 3 | 4 5: node 1 sends 300 of process 2 and 300 of process 3
    assert exchange_seconds(300, [[0, 1, 2], [3, 4, 5]], SMALL, messages=0) == 150 / 100 + 600 / 20
    assert exchange_seconds(0, [[0, 1, 2]], Cluster(8, 1.0, 1.0, 0.25), messages=4) == 4 * 2 * 0.25


def test_alone_nothing_travels():
    row = reckon("Switch-DiT-S/2", 1, 1, 32)
    assert row["sent"] == row["per_gpu"] == row["per_node"] == 0
    assert row["per_gpu_efficiency"] == (1, 1)


def test_bytes_of_a_small_model_by_hand():
    """A model of one block: G and E from its shapes."""
    fields = {"depth": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 3, "input_size": 8}
    width, experts = 16, 4
    embedders = 16 * width + width + (256 * width + width) + (width**2 + width) + 4 * width
    block = 4 * (width**2 + width) + (8 * width**2 + 5 * width) + (6 * width**2 + 6 * width) + experts * (width + 1)
    final = 2 * width**2 + 2 * width + 32 * width + 32
    dense, per_expert = 2 * (embedders + block + final), 2 * (width**2 + width)
    row = reckon("Switch-DiT-S/2", 8, 2, 32, num_experts=experts, **fields)
    assert row["gradients"] == 2 * 7 / 8 * dense
    assert row["parameters"] == 7 / 8 * dense
    assert row["expert_gradients"] == 2 * 3 / 4 * 2 * per_expert
    assert row["expert_parameters"] == 3 / 4 * 2 * per_expert
    shape = {"samples": 32, "tokens": 16, "width": width, "num_experts": experts, "top_k": 2}
    assert row["way"] == "weights"
    assert row["dispatch"] == bytes_per_layer("weights", **shape, ep_size=2, itemsize=2) == 2 * 2 * per_expert
    half = reckon("Switch-DiT-S/2", 8, 2, 32, gradients="reduce_scatter", num_experts=experts, **fields)
    assert half["gradients"] == row["parameters"]


def test_steps_are_the_sum_and_the_larger():
    row = reckon("Switch-DiT-S/2", 64, 1, 4, mfu=0.5)
    macs = 6_514_000_000
    assert row["compute"] == pytest.approx(4 * 6 * macs / 156e12, rel=1e-3)
    for key in CLUSTERS:
        assert row[f"{key}_step"] == (row["compute"] + row[key], max(row["compute"], row[key]))
        assert row[f"{key}_efficiency"] == pytest.approx([row["compute"] / s for s in row[f"{key}_step"]])
    assert row["per_node"] > row["per_gpu"]


@given(st.integers(1, 6), st.sampled_from([1, 2, 4, 8]), st.floats(1e3, 1e12))
def test_more_bandwidth_is_never_slower(nodes, ep_size, size):
    for groups in expert_groups(8 * nodes, ep_size):
        slow, fast = (collective_seconds(size, groups, CLUSTERS[key]) for key in ("per_node", "per_gpu"))
        assert 0 <= fast <= slow
        slow, fast = (exchange_seconds(size, groups, CLUSTERS[key], 4) for key in ("per_node", "per_gpu"))
        assert 0 <= fast <= slow


@pytest.fixture
def tool(monkeypatch, capsys):
    """What the tool prints with such arguments."""

    def printed(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["scaling_table.py", *arguments])
        scaling_table.main()
        return capsys.readouterr().out

    return printed


def test_the_page_of_the_documentation_is_what_the_tool_prints(tool):
    page = tool("--markdown")
    assert page == (ROOT / "docs/scaling.md").read_text()
    assert "**Reckoned, not measured**" in page


def test_the_text_says_that_it_is_reckoned(tool):
    text = tool("--world", "8", "--ep_size", "1")
    assert text.startswith("Reckoned, not measured: Switch-DiT-XL/2, micro_batch 32, MFU 0.4")
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("1 ")] == [["1", "8"], ["1", "8"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mfu", "0"], "--mfu above 0 and at most 1"),
        (["--ep_size", "3"], "--world [8, 64, 512] has no number that is divisible by --ep_size [3]"),
        (["num_experts=8", "ep_size=2"], "'ep_size=2' must be given as --ep_size 2"),
        (["mfu=0.3"], "model field 'mfu' is unknown for Switch-DiT-XL/2"),
        (["name=x"], "model field 'name' is unknown for Switch-DiT-XL/2"),
        (["--ep_size", "0"], "--world, --ep_size and --micro_batch must be at least 1"),
        (["--ep_size", "2"], "num_experts (3) must be divisible by ep_size (2)"),
        (["--model", "Diff-MoE-S/2", "--ep_size", "8"], "ep_size above 1 is reckoned for Switch-DiT alone"),
        (["--model", "Switch-DiT-XL"], "model 'Switch-DiT-XL' is unknown; did you mean 'Switch-DiT-XL/"),
    ],
)
def test_mistakes_are_told_in_one_line(tool, capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        tool(*arguments)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert says in told
