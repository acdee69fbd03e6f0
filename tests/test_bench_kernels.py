"""The benchmarks of speed: what they compare with computes the same, and they measure and judge what they say."""

import json
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit import build_model
from switchdit.kernels.expert_mix import expert_mix
from switchdit.models.costs import macs
from switchdit.moe.timestep_gate import top_k_gates
from tools import bench_expert_mix, bench_sampling, bench_step, timing
from tools.baselines import StockExpertMix, grouped_expert_mix, plain_expert_mix, use_plain_mixture

FIELDS = {"depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8, "num_classes": 5}
TINY = [f"{key}={value}" for key, value in FIELDS.items()]
QUICK = ["--threads", "1", "--repeats", "3", "--warm_up", "1", "--batch_size", "2"]
TINY_LAYER = ["--hidden_size", "16", "--num_experts", "3", "4", "--top_k", "2", "3", "--tokens", "8", *QUICK]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Whatever the machine has; the benchmarks set the number of threads of this process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def inputs(n, tokens, width, num_experts, top_k, rows, dtype, seed=0):
    """z, weight, bias and gates; z holds the logarithms of the probabilities as the stock gate wants them."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    probs = normal(rows, num_experts).softmax(-1)
    z = normal(n, tokens, width)
    z[:, :, :num_experts] = probs.log().unsqueeze(1)
    weight = normal(num_experts, width, width) / width**0.5
    tensors = [z, weight, normal(num_experts, width), top_k_gates(probs, top_k)]
    return [x.to(dtype).requires_grad_() for x in tensors]


def same_outputs_and_gradients(ours, theirs, leaves, rtol, atol):
    upstream = [torch.linspace(-1, 1, ours[0].numel(), dtype=ours[0].dtype).view_as(ours[0]), ours[0].detach().cos()]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(5, 9), st.integers(1, 5), st.booleans(), st.data())
def test_the_plain_mixture_is_ours(n, tokens, width, num_experts, same_timestep, data):
    top_k = data.draw(st.integers(1, num_experts))
    leaves = inputs(n, tokens, width, num_experts, top_k, 1 if same_timestep else n, torch.float64)
    same_outputs_and_gradients(expert_mix(*leaves), plain_expert_mix(*leaves), leaves, 1e-10, 1e-10)


def test_the_plain_mixture_computes_in_float32_under_autocast():
    leaves = inputs(2, 8, 16, 3, 2, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed, _ = plain_expert_mix(*leaves)
    assert torch.equal(routed, plain_expert_mix(*leaves)[0])
    z, *experts = leaves
    exact = plain_expert_mix(z.bfloat16().double(), *[x.double() for x in experts])[1]
    mask = plain_expert_mix(z.bfloat16(), *experts)[1]
    assert torch.equal(mask, exact.float().bfloat16())


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize(("num_experts", "top_k"), [(3, 1), (3, 2), (4, 3)])
def test_the_grouped_mixture_is_ours(num_experts, top_k, rows):
    leaves = inputs(4, 8, 32, num_experts, top_k, rows, torch.float32)
    same_outputs_and_gradients(
        expert_mix(*leaves), grouped_expert_mix(*leaves, top_k=top_k), leaves, rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize(("num_experts", "top_k"), [(3, 1), (3, 2), (4, 3)])
def test_the_stock_layer_is_ours_with_renormalised_gates(num_experts, top_k, rows):
    z, weight, bias, gates = inputs(4, 8, 32, num_experts, top_k, rows, torch.float32)
    with torch.no_grad():
        gates = gates / gates.sum(1, keepdim=True) if top_k > 1 else gates
    stock = StockExpertMix(weight, bias, top_k)
    ours, theirs = expert_mix(z, weight, bias, gates), stock(z)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    experts = stock.moe.deepspeed_moe.experts.deepspeed_experts
    stacked = torch.autograd.grad(ours, [weight, bias], [torch.ones_like(z)] * 2)
    single = torch.autograd.grad(theirs, list(experts.parameters()), [torch.ones_like(z)] * 2)
    torch.testing.assert_close(torch.stack(single[::2]), stacked[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.stack(single[1::2]), stacked[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("every", [0, 1])
def test_a_model_with_the_plain_mixture_is_the_model(every):
    torch.manual_seed(0)
    model = build_model("Switch-DiT-S/2", **FIELDS, class_dropout_prob=0.0).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.activation_checkpointing = every
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.tensor([0, 500, 999]), torch.tensor([0, 1, 4])
    parameters = [p for p in model.parameters() if p.requires_grad]
    outcomes = []
    for prepare in (lambda model: None, use_plain_mixture):
        prepare(model)
        out, routing = model(x, t, y, return_routing=True)
        loss = out.square().mean() + routing.probs.square().mean()
        outcomes.append([out, *torch.autograd.grad(loss, parameters)])
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-9, atol=1e-11)
    assert all(gradient.any() for gradient in outcomes[1])


def test_candidates_take_turns():
    calls = []
    timed = timing.in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, torch.device("cpu"), 1, 3)
    assert "".join(calls) == "abcbcacababc"
    assert {name: len(t.seconds) for name, t in timed.items()} == {"a": 3, "b": 3, "c": 3}
    assert timed["a"].peak_bytes is None


def test_ratios_are_medians_over_rounds():
    ours, plain = timing.Timed([1.0, 20.0, 3.0], None), timing.Timed([2.0, 80.0, 4.0], None)
    assert ours.median == 3
    assert ours.over(plain) == statistics.median([0.5, 0.25, 0.75])


@pytest.mark.parametrize(
    ("ratio", "limit", "bar", "says"),
    [
        (0.46, 0.46, {"limit": 0.46, "met": True}, "<= 0.46 met"),
        (0.461, 0.46, {"limit": 0.46, "met": False}, "<= 0.46 missed"),
        (2.0, None, None, ""),
    ],
)
def test_bars(ratio, limit, bar, says):
    assert timing.judged(ratio, limit) == bar
    assert timing.shown_bar(bar) == says


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], True), (["--threads", "1"], False), (["--dtype", "bfloat16"], False), (["--batch_size", "4"], False)],
)
def test_bars_are_of_one_setting(options, expected):
    args = bench_expert_mix.arguments(options)
    assert timing.has_bars(args, torch.device("cpu")) is expected
    assert timing.has_bars(args, torch.device("cuda")) is False


def test_which_bars_the_layer_has(monkeypatch):
    judged = {}
    monkeypatch.setattr(timing, "in_turn", lambda calls, *_, **__: {name: timing.Timed([1.0], None) for name in calls})
    monkeypatch.setattr(bench_expert_mix, "candidates", lambda *_: dict.fromkeys(bench_expert_mix.CANDIDATES, int))
    args = bench_expert_mix.arguments([])
    for case in bench_expert_mix.BARS:
        row = bench_expert_mix.measure(args, torch.device("cpu"), {"matmul_flops_per_second": 1e9}, case, {})
        judged[case] = row["bar"]
    assert judged == {case: {"limit": limit, "met": False} for case, limit in bench_expert_mix.BARS.items()}
    args.tokens = 64
    assert (
        bench_expert_mix.measure(args, torch.device("cpu"), {"matmul_flops_per_second": 1e9}, case, {})["bar"] is None
    )


def printed(capsys) -> tuple[list[str], dict]:
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_the_layer_benchmark(capsys):
    bench_expert_mix.main(TINY_LAYER)
    lines, told = printed(capsys)
    rows = told["results"]
    assert [(row["num_experts"], row["top_k"]) for row in rows] == [(3, 2)] * 3 + [(4, 3)] * 3
    assert [row["pass"] for row in rows[:3]] == ["forward", "forward + backward", "forward, same timestep"]
    for row in rows:
        assert set(row["ratio"]) == set(row["milliseconds"]) == {"plain", "stock", "grouped", "ours"}
        assert row["ratio"]["plain"] == 1
        assert row["bar"] is None
        flops = 2 * 2 * 8 * 16**2 * (3 if row["pass"] == "forward + backward" else 1)
        per_second = flops / row["milliseconds"]["ours"] * 1e3
        assert row["matmul_share"] == pytest.approx(per_second / told["roof"]["matmul_flops_per_second"])
    body = lines[lines.index("") + 3 :][:6]
    for line, row in zip(body, rows, strict=True):
        assert line.startswith(f"16  {row['num_experts']}  {row['top_k']}  ")
        assert f"{row['ratio']['ours']:.2f}" in line.split()


def test_a_mixture_that_is_missing_is_told(capsys, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("grouped_mm is not implemented for this\nand that")

    monkeypatch.setattr(torch, "_grouped_mm", refuse)
    bench_expert_mix.main(TINY_LAYER)
    lines, told = printed(capsys)
    assert told["missing"] == {"grouped": "grouped_mm is not implemented for this"}
    assert "(c) is not available here: grouped_mm is not implemented for this" in lines
    assert set(told["results"][0]["ratio"]) == {"plain", "stock", "ours"}


def test_the_step_benchmark():
    """In a process of its own: an engine starts torch.distributed, and DeepSpeed keeps what it made of it."""
    command = [sys.executable, bench_step.__file__, *TINY, *QUICK, "--activation_checkpointing", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    *lines, last = run.stdout.splitlines()
    told = json.loads(last)
    assert told["activation_checkpointing"] == 2
    assert told["fields"] == TINY
    names = {"Switch-DiT": "Switch-DiT-S/2", "DiT": "DiT-S/2", "Switch-DiT with (a)": "Switch-DiT-S/2"}
    assert [row["system"] for row in told["results"]] == list(names)
    for row in told["results"]:
        seconds = row["milliseconds"] / 1e3
        flops = 6 * 2 * sum(macs(names[row["system"]], **FIELDS).values())
        assert row["mfu"] == pytest.approx(flops / seconds / told["matmul_flops_per_second"])
        assert row["images_per_second"] == pytest.approx(2 / seconds)
        assert row["bar"] is None
    assert told["results"][0]["ratio"] == 1
    assert [line.split("  ")[0] for line in lines[-4:-1]] == list(names)


def test_the_sampling_benchmark(capsys):
    bench_sampling.main([*TINY, *QUICK, "--num_steps", "3"])
    lines, told = printed(capsys)
    assert [row["system"] for row in told["results"]] == ["Switch-DiT", "DiT", "Switch-DiT with (a)"]
    for row in told["results"]:
        assert row["images_per_second"] == pytest.approx(2 / (3 * row["milliseconds"] / 1e3))
        assert row["bar"] is None
    assert any("for 3 steps an image, without decoding" in line for line in lines)


@pytest.mark.parametrize(
    ("tool", "options", "says"),
    [
        (bench_expert_mix, ["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (bench_expert_mix, ["--top_k", "2"], "--num_experts [3, 4] and --top_k [2] must be equally many numbers"),
        (bench_expert_mix, ["--top_k", "2", "5"], "--top_k 5 must lie between 1 and its --num_experts, 4"),
        (bench_step, ["--threads", "-1"], "--threads is -1; it must be at least 1"),
        (bench_step, ["--model", "DiT-S/2"], "--model DiT-S/2 must be a Switch-DiT; DiT of its size is measured besid"),
        (bench_step, ["depth"], "'depth' must have the form field=value, of a field of the model"),
        (bench_step, ["dept=2"], "model field 'dept' is unknown for Switch-DiT-S/2; did you mean 'depth'?"),
        (
            bench_step,
            ["depth=2", "--activation_checkpointing", "3"],
            "--activation_checkpointing is 3; the model has 2",
        ),
        (bench_step, ["integration=replace"], "model field 'integration' must be 'multiply_skip_one' here, not 'repla"),
        (bench_sampling, ["--num_steps", "0"], "--num_steps is 0; it must be at least 1"),
        (bench_sampling, ["--cfg_scale", "1"], "--cfg_scale is 1.0, which is no guidance; it must be another number"),
        (bench_sampling, [*TINY, "--num_steps", "1001"], "--num_steps is 1001; the model has 1000 timesteps"),
        (
            bench_sampling,
            [*TINY, "class_dropout_prob=0"],
            "model field 'class_dropout_prob' must be above 0 for guidan",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, tool, options, says):
    with pytest.raises(SystemExit) as stop:
        tool.main(options)
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: {says}")
    assert told.err.count("\n") == 1
