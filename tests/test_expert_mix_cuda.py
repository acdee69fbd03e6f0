"""The fused CUDA kernel of the expert mix, without a GPU: its own sources run on an emulated multiprocessor.

The emulation follows the PTX ISA's layouts of fragments and checks each access to memory: bounds, alignment, whether
anything was written there, and whether a barrier or a wait orders it after what it needs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_emulation.emulator import (
    BACKWARD,
    COMPILE,
    CSRC,
    SOURCES,
    Problem,
    build,
    differentiated,
    formula,
    relative_errors,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchdit.errors import UserError
from switchdit.kernels import builder, expert_mix

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled with g++")

HALF, BRAIN = torch.float16, torch.bfloat16
CUDA = torch.device("cuda", 0)
CASES = {
    "few tokens": Problem(3, 33, 104),
    "few tokens, k=3": Problem(2, 20, 136, M=4, k=3, dtype=HALF),
    "96 columns": Problem(3, 70, 40, dtype=HALF),
    "128 columns, two tiles of tokens": Problem(2, 270, 104, M=5, k=1, multiprocessors=1),
    "two tiles of columns": Problem(2, 65, 200, M=4, k=3),
    "the samples in splits": Problem(5, 33, 40, multiprocessors=12),
    "the gates of all samples in one row": Problem(3, 70, 72, shared=True),
    "one row of gates, k=1": Problem(4, 17, 72, M=5, k=1, dtype=HALF, shared=True),
    "64 experts, 6 chosen": Problem(2, 34, 72, M=64, k=6),
    "the mask unused": Problem(2, 33, 40, mask_used=False),
    "S/2": Problem(1, 256, 384, multiprocessors=108),
}
LARGER = {
    "B/2": Problem(1, 256, 768, dtype=HALF, multiprocessors=108),
    "L/2": Problem(1, 256, 1024, multiprocessors=108),
    "XL/2": Problem(1, 256, 1152, M=4, k=3, multiprocessors=132),
}
# on a real device, which fills it: the widest tiles, and several samples for each CTA of the weight gradient
FULL = {"a full device": Problem(100, 65, 128)}
# between them they come to every line of the kernels that a fault can be planted in
FAULTY_CASES = [
    Problem(3, 33, 104, M=4),
    Problem(4, 33, 40, M=10, k=5, multiprocessors=12),
    Problem(1, 20, 8, M=9, k=1),
]
MAY_BE_LEFT_OUT = r"\b(__sync\w+|wait_for_copies<.*>|commit_copies|copy_async|write_shared|write_global)\("


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulation"))


def shortcomings(problem: Problem, outputs: dict, floor: float = 0.0) -> dict[str, tuple[float, float]]:
    """Outputs whose error is more than twice that of plain PyTorch in the same type: (error, PyTorch's).

    PyTorch's is the larger of two, with merged experts and with a product for each: of few numbers one may be right by
    luck.
    """
    exact = differentiated(problem, formula, torch.float64)
    ours, *theirs = (
        relative_errors(result, exact)
        for result in (
            outputs,
            differentiated(problem, expert_mix.expert_mix, problem.dtype),
            differentiated(problem, expert_mix.expert_mix_reference, problem.dtype),
        )
    )
    plain = {name: max(of[name] for of in theirs) for name in ours}
    return {name: (ours[name], plain[name]) for name in ours if not ours[name] <= max(2 * plain[name], floor)}


@needs_compiler
@pytest.mark.parametrize("problem", CASES.values(), ids=CASES)
def test_error_is_at_most_twice_that_of_plain_pytorch(emulation, problem):
    outputs, complaints = run(emulation, problem)
    assert complaints == ""
    assert shortcomings(problem, outputs) == {}
    assert torch.equal(outputs["d_gates"] == 0, problem.draw()["gates"] == 0)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("problem", LARGER.values(), ids=LARGER)
def test_published_sizes(emulation, problem):
    outputs, complaints = run(emulation, problem)
    assert complaints == ""
    assert shortcomings(problem, outputs) == {}


@needs_compiler
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size(emulation, data):
    experts = data.draw(st.integers(1, 7), "M")
    problem = Problem(
        N=data.draw(st.integers(1, 4), "N"),
        L=data.draw(st.integers(1, 70), "L"),
        D=8 * data.draw(st.integers(1, 13), "D / 8"),
        M=experts,
        k=data.draw(st.integers(1, experts), "k"),
        dtype=data.draw(st.sampled_from([BRAIN, HALF]), "dtype"),
        shared=data.draw(st.booleans(), "shared"),
        multiprocessors=data.draw(st.integers(1, 40), "multiprocessors"),
    )
    outputs, complaints = run(emulation, problem)
    assert complaints == ""
    # of few elements, PyTorch's can by chance be exact: one rounding is granted
    assert shortcomings(problem, outputs, floor=torch.finfo(problem.dtype).eps / 2) == {}


@needs_compiler
def test_no_samples(emulation):
    outputs, complaints = run(emulation, Problem(0, 5, 16))
    assert complaints == ""
    assert all(not outputs[name].any() for name in ("d_weight", "d_bias"))  # zero, and not NaN


@needs_compiler
@pytest.mark.parametrize("problem", FAULTY_CASES[:2])
def test_same_bits_in_whatever_order_threads_run(emulation, problem):
    first, _ = run(emulation, problem, order=0)
    for order in range(1, 4):
        again, complaints = run(emulation, problem, order=order)
        assert complaints == ""
        assert all(torch.equal(first[name], again[name]) for name in first)


@needs_compiler
@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [({"cut": 2}, "no buffer of device memory holds this access"), ({"shift": 2}, "device memory is not aligned")],
)
def test_accesses_outside_or_unaligned_are_seen(emulation, wrong, complaint):
    _, complaints = run(emulation, Problem(1, 5, 16), **wrong)
    assert complaint in complaints


@needs_compiler
def test_each_planted_fault_is_seen(emulation):
    """A barrier, wait, copy or write left out, fragments in the wrong order: one at a time, at every place there is."""
    for problem in FAULTY_CASES:
        outputs, complaints = run(emulation, problem)
        assert (complaints, shortcomings(problem, outputs)) == ("", {})
    reached = emulation.machine_sites().decode().splitlines()
    places = {
        f"{path.name}:{number}"
        for path in CSRC.glob("*.cuh")
        if path.name != "ptx.cuh"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(MAY_BE_LEFT_OUT, line)
    }
    assert {site.rpartition(" ")[2] for site in reached if " left out @" in site} == places

    def seen(fault: str, problem: Problem) -> bool:
        outputs, complaints = run(emulation, problem, fault=fault)
        return bool(complaints) or bool(shortcomings(problem, outputs))

    assert [fault for fault in reached if not any(seen(fault, problem) for problem in FAULTY_CASES)] == []


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_nvcc_compiles_without_spills(tmp_path):
    """For compute capabilities 8.0 and 9.0: every kernel in registers alone."""
    targets = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]
    command = [NVCC, "-std=c++17", "-O3", "--threads", "2", "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{CSRC}"]
    command += [f"-gencode={target}" for target in targets]
    done = subprocess.run(
        [*command, "-c", CSRC / "expert_mix.cu", "-o", tmp_path / "expert_mix.o"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = re.findall(
        r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stdout + done.stderr,
        re.DOTALL,
    )
    kernels = {(name, target): tuple(map(int, numbers)) for name, target, *numbers in report}
    per_type = 6 + 2 + 4  # tiles of both products, of the weight gradient, reductions
    for target in ("sm_80", "sm_90"):
        assert sum(t == target for _, t in kernels) == 2 * per_type
    assert {numbers[:3] for numbers in kernels.values()} == {(0, 0, 0)}
    assert all(numbers[3] <= 255 for numbers in kernels.values())


@pytest.mark.slow
@needs_compiler
def test_binding_over_emulated_kernels(tmp_path, monkeypatch):
    """binding.cpp compiles without CUDA, checks what it is given and passes everything on in the right order."""
    torch_folder = Path(torch.__file__).parent
    includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    includes += [sysconfig.get_paths()["include"]]
    library = tmp_path / "emulated_binding.so"
    flags = ["-std=c++20", "-DTORCH_EXTENSION_NAME=emulated_binding", *[f"-isystem{folder}" for folder in includes]]
    libraries = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu"]
    libraries += ["-lc10", "-ltorch_python"]
    subprocess.run(
        [*COMPILE, *flags, *SOURCES, CSRC / "binding.cpp", "-x", "none", *libraries, "-o", library], check=True
    )
    spec = importlib.util.spec_from_file_location("emulated_binding", library)
    binding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(binding)

    # as PyTorch's operator calls it, with tensors that are not contiguous
    def mix(z, weight, *others):
        return expert_mix.expert_mix(z.mT.contiguous().mT, weight.mT.contiguous().mT, *others)

    for problem in (Problem(3, 20, 40, mask_used=False), Problem(3, 20, 40)):
        with monkeypatch.context() as patch:
            patch.setattr(expert_mix, "fused_kernel", lambda *tensors: binding)
            patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
            fused = differentiated(problem, mix, problem.dtype)
        assert shortcomings(problem, fused) == {}
        assert not torch.equal(fused["d_weight"], differentiated(problem, mix, problem.dtype)["d_weight"])

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        builder.try_out(binding, torch.device("cpu"))

    inputs = problem.draw()
    forward = [inputs[name] for name in ("z", "weight", "bias", "gates")]
    odd = torch.empty(inputs["z"].numel() + 1, dtype=problem.dtype)[1:].view_as(inputs["z"]).copy_(inputs["z"])
    aligned, misaligned = (binding.forward(z, *forward[1:], 0) for z in (inputs["z"], odd))
    assert all(map(torch.equal, aligned, misaligned))
    with pytest.raises(RuntimeError, match=r"weight is \[3, 40, 8\], expected \[3, 40, 40\]"):
        binding.forward(inputs["z"], inputs["weight"][..., :8], inputs["bias"], inputs["gates"], 0)
    with pytest.raises(RuntimeError, match="z is Float, expected bfloat16 or float16"):
        binding.forward(inputs["z"].float(), *forward[1:], 0)
    with pytest.raises(RuntimeError, match=r"invalid value \(N = 3, L = 20, D = 4, M = 3\)"):
        binding.forward(inputs["z"][..., :4], inputs["weight"][:, :4, :4], inputs["bias"][:, :4], inputs["gates"], 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("problem", (CASES | LARGER | FULL).values(), ids=CASES | LARGER | FULL)
def test_on_a_gpu(monkeypatch, problem):
    monkeypatch.setenv(builder.SWITCH, "1")
    kernel = builder.load_fused.__wrapped__(CUDA)
    assert kernel is not None
    inputs = {name: tensor.cuda() for name, tensor in problem.draw().items()}
    forward = [inputs[name] for name in ("z", "weight", "bias", "gates")]
    upstream = [inputs["d_routed"], inputs["d_mask"] if problem.mask_used else None]

    def once() -> dict[str, torch.Tensor]:
        stream = torch.cuda.current_stream().cuda_stream
        routed, mask = kernel.forward(*forward, stream)
        gradients = kernel.backward(*upstream, *forward, mask, True, stream)
        return {"routed": routed, "mask": mask, **dict(zip(BACKWARD, gradients, strict=True))}

    first, again = once(), once()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert shortcomings(problem, {name: tensor.cpu() for name, tensor in first.items()}) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_operator_on_a_gpu(monkeypatch):
    """As models call it: under autocast, by autograd, on another stream, and replayed as a graph."""
    kernel = builder.load_fused.__wrapped__
    monkeypatch.setenv(builder.SWITCH, "1")
    monkeypatch.setattr(builder, "load_fused", functools.cache(kernel))
    inputs = {name: tensor.float().cuda() for name, tensor in Problem(4, 70, 136).draw().items()}
    leaves = [inputs[name].requires_grad_() for name in ("z", "weight", "bias", "gates")]

    def mixed() -> list[torch.Tensor]:
        with torch.autocast("cuda", dtype=BRAIN):
            assert expert_mix.fused_kernel(leaves[0].bfloat16(), leaves[1].bfloat16(), leaves[3]) is not None
            routed, _ = expert_mix.expert_mix(*leaves)
        return [routed, *torch.autograd.grad(routed, leaves, inputs["d_routed"].to(routed.dtype))]

    expected = mixed()
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        on_a_stream = mixed()
    torch.cuda.synchronize()
    assert all(map(torch.equal, on_a_stream, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = mixed()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, replayed, expected))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"dtype": HALF}, True),
        ({"dtype": torch.float32}, False),
        ({"weight_dtype": torch.float32}, False),
        ({"gates_dtype": BRAIN}, False),
        ({"D": 8}, True),
        ({"D": 20}, False),
        ({"D": 32776}, False),
        ({"L": 0}, False),
        ({"N": 0}, True),
        ({"M": 64}, True),
        ({"M": 65}, False),
        ({"gate_rows": 1}, True),
        ({"gate_rows": 3}, False),
    ],
)
def test_supports(change, expected):
    size = {"N": 2, "L": 5, "D": 16, "M": 3, "dtype": BRAIN, "gates_dtype": torch.float32} | change
    meta = torch.device("meta")
    z = torch.empty(size["N"], size["L"], size["D"], dtype=size["dtype"], device=meta)
    weight_type = size.get("weight_dtype", size["dtype"])
    weight = torch.empty(size["M"], size["D"], size["D"], dtype=weight_type, device=meta)
    gates = torch.empty(size.get("gate_rows", size["N"]), size["M"], dtype=size["gates_dtype"], device=meta)
    assert builder.supports(z, weight, gates) is expected


def test_limits_are_those_of_the_kernel():
    tiles = (CSRC / "tiles.cuh").read_text()
    for name, value in {
        "kMaxExperts": builder.MAX_EXPERTS,
        "kMaxWidth": builder.MAX_WIDTH,
        "kVector": builder.VECTOR,
    }.items():
        assert f"constexpr int {name} = {value};" in tiles


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_load_is_quiet_where_it_cannot_be(monkeypatch, value):
    monkeypatch.delenv(builder.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(builder.SWITCH, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert builder.load_fused.__wrapped__(CUDA) is None


@pytest.mark.parametrize(
    ("capability", "obstacle", "reason"),
    [
        ((9, 0), None, "it does not build or run: Error building extension 'expert_mix_op'"),
        ((9, 0), "there is no nvcc", "there is no nvcc"),
        ((8, 6), None, "the device's compute capability 8.6 is none of 8.0, 9.0, 10.0, 10.3"),
    ],
)
def test_what_a_gpu_cannot_have_is_one_warning(monkeypatch, capability, obstacle, reason):
    class Broken:
        def load(self, verbose):
            raise RuntimeError("Error building extension 'expert_mix_op'\nninja: build stopped")

    monkeypatch.setenv(builder.SWITCH, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(builder, "obstacle", lambda: obstacle)
    monkeypatch.setattr(builder, "expert_mix_builder", Broken)
    message = f"the fused expert_mix kernel is not used: {reason}"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        assert builder.load_fused.__wrapped__(CUDA) is None
    assert len(caught) == 1


def test_a_kernel_that_does_not_run_is_not_used(monkeypatch):
    """Built, but for another device or driver."""

    def refuse(kernel, device):
        raise RuntimeError("expert_mix failed: no kernel image is available for execution on the device (N = 1, ...)")

    monkeypatch.setenv(builder.SWITCH, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(builder, "obstacle", lambda: None)
    monkeypatch.setattr(builder, "expert_mix_builder", lambda: SimpleNamespace(load=lambda verbose: SimpleNamespace()))
    monkeypatch.setattr(builder, "try_out", refuse)
    with pytest.warns(UserWarning, match="it does not build or run: expert_mix failed: no kernel image is available"):
        assert builder.load_fused.__wrapped__(CUDA) is None


def test_switch_is_0_or_1(monkeypatch):
    monkeypatch.setenv(builder.SWITCH, "yes")
    with pytest.raises(UserError, match="SWITCHDIT_FUSED_KERNEL=yes is neither 1"):
        builder.load_fused.__wrapped__(CUDA)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch could build it")
def test_building_ahead_says_why_not(capsys):
    with pytest.raises(SystemExit) as ended:
        builder.main()
    assert ended.value.code == 2
    reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
    assert capsys.readouterr().err == f"error: the fused expert_mix kernel cannot be built: {reason}\n"


def test_builder_names_what_there_is():
    made = builder.expert_mix_builder()
    assert all(Path(path).is_file() for path in made.sources())
    assert all(Path(path).is_dir() for path in made.include_paths())
    assert made.filter_ccs(["7.5", "8.0", "9.0+PTX"]) == [["8", "0"], ["9", "0+PTX"]]
