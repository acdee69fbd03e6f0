"""Routing pictures and their numbers, from gates whose choices are known."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import save_file
from scipy.spatial.distance import jensenshannon

from switchdit import build_model
from switchdit.config import config_to_dict, load_config
from switchdit.engine.checkpoint_folder import FORMAT_VERSION
from switchdit.engine.global_state import global_state_dict
from switchdit.moe.diffusion_prior import match_columns, prior_mask
from tests.tiny_run import write_config
from tools import plot_routing
from tools.plot_routing import Gates, gate_numbers, map_numbers, map_picture, panel, paths_picture, shade, task_affinity

TINY = {"input_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 3}
DARK, LIGHT = (tuple(shade(np.array([[v]]))[0, 0].tolist()) for v in (1.0, 0.0))
SWITCH_AT = 500  # block 1 takes expert 1 from this timestep on; block 2 always expert 0


def write_checkpoint(run_dir, name, model, **fields):
    folder = run_dir / "checkpoints" / "step_0000007"
    folder.mkdir(parents=True)
    save_file(global_state_dict(model), folder / "ema.safetensors")
    config = config_to_dict(load_config(write_config(run_dir / "c.yaml", run_dir / "latents", run_dir)))
    state = {"format_version": FORMAT_VERSION, "step": 7, "model": {"name": name, **fields}, "config": config}
    (folder / "state.json").write_text(json.dumps(state))
    return run_dir


@pytest.fixture
def switching_run(tmp_path):
    """A Switch-DiT with 2 blocks, M = 2, k = 1, whose gates are set by hand."""
    fields = {**TINY, "num_experts": 2, "top_k": 1}
    model = build_model("Switch-DiT-S/2", **fields)
    first, _, last = model.t_embedder.mlp
    with torch.no_grad():
        for parameter in (*first.parameters(), *last.parameters()):
            parameter.zero_()
        # the last entry of the embedding is sin(w t), w = 10000^(-127/128): it rises from 0 to 0.107
        first.weight[0, 255], first.bias[0], last.weight[0, 0] = 1000, 20, 1  # SiLU(x) = x for such x
        threshold = 20 + 1000 * math.sin((SWITCH_AT - 0.5) * 10000 ** (-127 / 128))
        for block, (weight, bias) in zip(model.blocks, ((1.0, -threshold), (0.0, -math.log(3))), strict=True):
            gate = block.moe.gate.wg
            gate.weight.zero_()
            gate.weight[1, 0] = weight
            gate.bias.copy_(torch.tensor([0.0, bias]))
    return write_checkpoint(tmp_path / "run", "Switch-DiT-S/2", model, **fields)


@pytest.fixture
def plot(monkeypatch, capsys):
    """The program with such arguments: (exit code, what it printed, what it complained of)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["plot_routing.py", *map(str, arguments)])
        code = 0
        try:
            plot_routing.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_numbers_of_gates_set_by_hand(switching_run, tmp_path, plot):
    code, printed, _ = plot(switching_run, "--out", tmp_path / "new" / "pictures")
    assert code == 0
    assert "routing.json" in printed
    numbers = json.loads((tmp_path / "new" / "pictures" / "routing.json").read_text())
    assert numbers["map"] == [
        {"first": 0, "last": SWITCH_AT - 1, "columns": [0, 2]},
        {"first": SWITCH_AT, "last": 999, "columns": [1, 2]},
    ]
    assert numbers["tasks"] == [249, 499, 749, 999]
    half = 0.5  # of two experts, block 2's is common to all
    assert numbers["task_affinity"] == [[1, 1, half, half], [1, 1, half, half], [half, half, 1, 1], [half, half, 1, 1]]
    assert numbers["share_of_timesteps"] == [[0.5, 0.5], [1.0, 0.0]]
    assert (numbers["step"], numbers["num_blocks"], numbers["num_experts"], numbers["top_k"]) == (7, 2, 2, 1)

    chosen, prior = np.zeros((1000, 4)), prior_mask(2, 2, 1).numpy()
    chosen[:500, 0] = chosen[500:, 1] = chosen[:, 2] = 1
    costs = [np.abs(chosen - prior[:, order]).sum() for order in map(list, itertools.permutations(range(4)))]
    assert numbers["matched_cost"] == min(costs) > 0
    assert np.abs(chosen - prior[:, numbers["assignment"]]).sum() == min(costs)

    assert numbers["gate_entropy_by_block"][1] == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), rel=1e-5)
    assert numbers["gate_entropy_of_equal_gates"] == pytest.approx(math.log(2))
    for task, probs in zip(numbers["tasks"], numbers["path_probs"], strict=True):
        assert probs[1] == pytest.approx([0.75, 0.25], rel=1e-5)
        assert (probs[0][1] > 0.5) == (task >= SWITCH_AT)


def test_pictures_show_the_choices(switching_run, tmp_path, plot):
    plot(switching_run, "--out", tmp_path)
    maps, affinity, paths = (
        Image.open(tmp_path / f"{name}.png") for name in ("task_expert_map", "task_affinity", "denoising_paths")
    )
    assert all(picture.info["dpi"] == pytest.approx((300, 300), abs=0.1) for picture in (maps, affinity, paths))

    def at(picture, index, across, down):
        left, top, right, bottom = panel(index)
        return picture.getpixel((int(left + across * (right - left)), int(top + down * (bottom - top))))

    columns = [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    assert [at(maps, 0, x, 0.49) for x in columns] == [DARK, LIGHT, DARK, LIGHT]
    assert [at(maps, 0, x, 0.51) for x in columns] == [LIGHT, DARK, DARK, LIGHT]
    assignment = json.loads((tmp_path / "routing.json").read_text())["assignment"]
    for column, shown in enumerate(assignment):  # the matched panel has the same columns elsewhere
        for down in (0.1, 0.9):
            assert at(maps, 1, columns[shown], down) == at(maps, 0, columns[column], down)
    assert [at(affinity, 0, x, 0.25) for x in (0.1, 0.49)] == [DARK, DARK]
    middle = tuple(shade(np.array([[0.5]]))[0, 0].tolist())  # the scale starts at 0: two choices may be disjoint
    assert [at(affinity, 0, x, y) for x, y in ((0.51, 0.25), (0.25, 0.51), (0.9, 0.1))] == [middle] * 3


def gates(probs: np.ndarray, k: int) -> Gates:
    """The largest k of each block; probs (T, B, M)."""
    chosen = np.zeros_like(probs)
    np.put_along_axis(chosen, probs.argsort(2)[:, :, -k:], 1, axis=2)
    chosen = chosen.reshape(len(probs), -1)
    prior = prior_mask(probs.shape[1], probs.shape[2], k, len(probs)).numpy()
    assignment = match_columns(torch.from_numpy(chosen), torch.from_numpy(prior)).numpy()
    return Gates(probs, chosen, prior, assignment)


def random_gates(num_timesteps=40, num_blocks=3, num_experts=4, k=2) -> Gates:
    probs = np.random.default_rng(0).dirichlet(np.ones(num_experts), (num_timesteps, num_blocks))
    return gates(probs.astype(np.float32), k)


def test_divergence_is_that_of_scipy_but_for_the_epsilon():
    g = random_gates()
    matched = g.prior[:, g.assignment]
    distances = jensenshannon(g.probs.reshape(40, -1) / 3, matched / matched.sum(1, keepdims=True), axis=1)
    assert gate_numbers(g)["prior_jsd"] == pytest.approx((distances**2).mean(), abs=3e-5)


def test_gates_that_are_their_prior_cost_nothing():
    prior = prior_mask(4, 3, 2).numpy()
    order = np.array([c for pair in zip(range(4), range(4, 8), range(8, 12), strict=True) for c in pair])
    probs = (prior[:, order] / 2).reshape(1000, 4, 3)
    g = gates(probs + 1e-3 * np.arange(3), 2)
    # columns 4 to 7 are always chosen; of 0 to 3 and 8 to 11 one each, so that every block takes two of three
    assert np.array_equal(g.chosen, prior[:, order])
    assert gate_numbers(g)["matched_cost"] == 0
    picture = np.asarray(map_picture(g))
    (left, top, right, bottom), (other, *_) = panel(1), panel(2)
    shown = picture[top + 2 : bottom - 2, left + 2 : right - 2]
    assert np.array_equal(shown, picture[top + 2 : bottom - 2, other + 2 : other + right - left - 2])


def test_paths_shade_chosen_experts_by_their_probability_and_leave_others_white():
    g = random_gates()
    picture = paths_picture(g)
    cell, height = 60, 240  # 4 experts, 3 blocks
    for place, t in enumerate((9, 19, 29, 39)):
        for i, j in itertools.product(range(3), range(4)):
            x = plot_routing.MARGIN + place * (4 * cell + plot_routing.GAP) + j * cell
            colours = picture.crop((x, plot_routing.TOP + i * height, x + cell, plot_routing.TOP + (i + 1) * height))
            most_common = max(colours.getcolors(cell * height))[1]
            chosen = g.chosen[t].reshape(3, 4)[i, j]
            assert most_common == (tuple(shade(g.probs[t, i : i + 1, j : j + 1])[0, 0]) if chosen else (255, 255, 255))
    best = g.probs[9, 1].argmax()
    centre = (plot_routing.MARGIN + int((best + 0.5) * cell), plot_routing.TOP + int(1.5 * height))
    assert picture.getpixel(centre) == plot_routing.PATH


@given(arrays(np.float32, (7, 5), elements=st.floats(0, 1, width=32)), st.integers(1, 5))
def test_spells_rebuild_the_map_and_affinity_counts_common_columns(draw, ones):
    chosen = (draw.argsort(axis=1, kind="stable").argsort(axis=1) < ones).astype(np.float32)
    rebuilt = np.zeros_like(chosen)
    for spell in map_numbers(chosen)["map"]:
        rebuilt[spell["first"] : spell["last"] + 1, spell["columns"]] = 1
    assert np.array_equal(rebuilt, chosen)
    sets = [set(np.flatnonzero(row)) for row in chosen]
    counted = [[len(a & b) / ones for b in sets] for a in sets]
    assert np.allclose(task_affinity(chosen), counted)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 5, 5), (1000, 28, 8, 2)])
def test_extreme_shapes_are_drawn(shape):
    g = random_gates(*shape)
    for picture in plot_routing.gate_pictures(g).values():
        assert min(picture.size) > plot_routing.MARGIN
    assert gate_numbers(g)["top_k"] == shape[3]


def test_channels_of_a_dtr(tmp_path, plot):
    model = build_model("DTR-S/2", **TINY)
    run = write_checkpoint(tmp_path, "DTR-S/2", model, **TINY)
    assert plot(run)[0] == 0
    written = tmp_path / "routing"
    assert sorted(p.name for p in written.iterdir()) == ["routing.json", "task_affinity.png", "task_expert_map.png"]
    numbers = json.loads((written / "routing.json").read_text())
    assert numbers["map"][0]["columns"] == list(range(25))  # int(0.8 * 32) channels
    assert numbers["map"][-1] == {"first": numbers["map"][-1]["first"], "last": 999, "columns": list(range(7, 32))}
    assert numbers["task_affinity"][0][3] == pytest.approx((25 - 7) / 25)


def test_mistakes_are_told_in_one_line(switching_run, tmp_path, plot):
    dense = write_checkpoint(tmp_path / "dense", "DiT-S/2", build_model("DiT-S/2", **TINY), **TINY)
    (tmp_path / "file").write_text("")
    for arguments, expected in (
        ([tmp_path / "nowhere"], "nowhere' holds no complete checkpoint"),
        ([dense], "is of a DiT-S/2; only Switch-DiT and DTR have a map to draw"),
        ([switching_run, "--out", tmp_path / "file"], "file' cannot be made: File exists"),
        ([switching_run, "--out", tmp_path / "file" / "below"], "below' cannot be made: Not a directory"),
    ):
        code, printed, complaint = plot(*arguments)
        assert (code, printed) == (2, "")
        assert complaint.startswith("error: ")
        assert complaint.count("\n") == 1
        assert expected in complaint
