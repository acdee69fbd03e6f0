"""Compile the CUDA sources of the fused expert mix with g++ and run them on tensors, every access to memory checked.

``ptx.cuh`` and ``cuda_runtime.h`` beside this stand in for the kernels' own; ``machine.cpp`` gives the threads turns,
``memory.cpp`` watches what they read and write.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "switchdit" / "kernels" / "csrc"
# fortified, a jump from one thread's stack to another's would be taken for an attack
COMPILE = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", f"-I{HERE}", f"-I{CSRC}"]
SOURCES = ["-x", "c++", CSRC / "expert_mix.cu", HERE / "machine.cpp", HERE / "memory.cpp"]
TYPES = {torch.bfloat16: 0, torch.float16: 1}
BACKWARD = ("dz", "d_weight", "d_bias", "d_gates")


class Sizes(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("samples", "tokens", "width", "experts", "gate_rows", "type")]


@dataclass(frozen=True)
class Problem:
    """Inputs drawn from ``seed``: N samples of L tokens, D wide, M experts, top k; one row of gates if ``shared``."""

    N: int
    L: int
    D: int
    M: int = 3
    k: int = 2
    dtype: torch.dtype = torch.bfloat16
    shared: bool = False
    seed: int = 0
    multiprocessors: int = 4
    mask_used: bool = True  # whether the mask has a gradient of its own

    def draw(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        probs = normal(1 if self.shared else self.N, self.M).softmax(-1)
        top = probs.topk(self.k)
        drawn = {name: normal(self.N, self.L, self.D) for name in ("z", "d_routed", "d_mask")}
        drawn |= {"weight": normal(self.M, self.D, self.D) / self.D**0.5, "bias": normal(self.M, self.D)}
        drawn = {name: tensor.to(self.dtype) for name, tensor in drawn.items()}
        return drawn | {"gates": torch.zeros_like(probs).scatter(1, top.indices, top.values)}


def build(folder: Path) -> ctypes.CDLL:
    library = folder / "expert_mix_emulation.so"
    subprocess.run([*COMPILE, *SOURCES, "-o", library], check=True)
    emulation = ctypes.CDLL(str(library))
    emulation.machine_errors.restype = emulation.machine_sites.restype = ctypes.c_char_p
    emulation.machine_add_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    emulation.expert_mix_workspace.argtypes = [Sizes]
    emulation.expert_mix_workspace.restype = ctypes.c_size_t
    return emulation


def run(
    emulation: ctypes.CDLL, problem: Problem, order: int = 0, fault: str = "", cut: int = 0, shift: int = 0
) -> tuple[dict[str, Tensor], str]:
    """Outputs of the forward and the backward pass, and what the machine has to complain of.

    Outputs that are not written are NaN. Threads take turns in an ``order``; a ``fault`` is one of the machine's sites;
    all tensors are said to end ``cut`` bytes early, and to begin ``shift`` bytes late.
    """
    given = problem.draw()
    emulation.machine_reset(order, problem.multiprocessors, fault.encode())

    def buffer(tensor: Tensor, writable: bool) -> ctypes.c_void_p:
        emulation.machine_add_buffer(tensor.data_ptr(), tensor.numel() * tensor.element_size() - cut, writable)
        return ctypes.c_void_p(tensor.data_ptr() + shift)

    sizes = Sizes(problem.N, problem.L, problem.D, problem.M, len(given["gates"]), TYPES[problem.dtype])
    like = {"routed": "z", "mask": "z", "dz": "z", "d_weight": "weight", "d_bias": "bias", "d_gates": "gates"}
    made = {name: torch.empty_like(given[source]) for name, source in like.items()}
    z, weight, bias, gates = (buffer(given[name], False) for name in ("z", "weight", "bias", "gates"))
    forward = [buffer(made[name], True) for name in ("routed", "mask")]
    error = emulation.expert_mix_forward(sizes, z, weight, bias, gates, *forward, None)
    assert error == 0

    mask = made["mask"].clone()
    upstream = [buffer(given["d_routed"], False), buffer(given["d_mask"], False) if problem.mask_used else None]
    workspace = torch.empty(emulation.expert_mix_workspace(sizes), dtype=torch.uint8)
    backward = [buffer(made[name], True) for name in BACKWARD] + [buffer(workspace, True)]
    inputs = [*upstream, z, weight, bias, gates, buffer(mask, False)]
    error = emulation.expert_mix_backward(sizes, *inputs, *backward, None)
    assert error == 0
    return made, emulation.machine_errors().decode()


def differentiated(problem: Problem, mix: Callable, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same outputs by ``mix(z, weight, bias, gates)`` and autograd in ``dtype``; gates are at least float32."""
    given = problem.draw()
    leaves = [given[name].to(dtype) for name in ("z", "weight", "bias")]
    leaves.append(given["gates"].to(torch.promote_types(dtype, torch.float32)))
    routed, mask = mix(*(leaf.requires_grad_() for leaf in leaves))
    used = 2 if problem.mask_used else 1
    upstream = (given["d_routed"].to(dtype), given["d_mask"].to(dtype))[:used]
    gradients = torch.autograd.grad((routed, mask)[:used], leaves, upstream)
    return {"routed": routed.detach(), "mask": mask.detach(), **dict(zip(BACKWARD, gradients, strict=True))}


def formula(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """What is computed, for float64: a gate that is zero gets no gradient."""
    gates = torch.where(gates == 0, 0, gates).expand(len(z), -1)
    mask = 1 + z @ torch.einsum("nm,mij->nij", gates, weight) + (gates @ bias).unsqueeze(1)
    return z * mask, mask


def relative_errors(outputs: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm; NaN where anything is NaN."""
    return {
        name: ((outputs[name].double() - value).norm() / value.norm().clamp(min=1e-30)).item()
        for name, value in exact.items()
    }
