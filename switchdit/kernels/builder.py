"""Building the fused CUDA kernel of `switchdit.kernels.expert_mix`, and whether it can serve.

``python -m switchdit.kernels.builder`` builds it ahead; otherwise the first use does. It has never run on a GPU: it is
used only where the environment variable SWITCHDIT_FUSED_KERNEL is 1.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from switchdit.errors import UserError, exit_on_user_error

SWITCH = "SWITCHDIT_FUSED_KERNEL"
CSRC = Path(__file__).parent / "csrc"
SOURCES = ("expert_mix.cu", "binding.cpp")
CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))  # whose CTAs may have 132.1 KiB of shared memory
# ValueError: of architectures that DeepSpeed does not know
BUILD_FAILURES = (RuntimeError, OSError, ImportError, ValueError, subprocess.SubprocessError)
TYPES = (torch.bfloat16, torch.float16)
MAX_EXPERTS, MAX_WIDTH, VECTOR = 64, 32768, 8  # as in csrc/tiles.cuh


def supports(z: Tensor, weight: Tensor, gates: Tensor) -> bool:
    """Whether the kernel takes tensors of these shapes and types; `load_fused` tells of the device.

    Args:
        z: (N, L, D).
        weight: (M, D, D).
        gates: (N, M) or (1, M).
    """
    num_samples, num_tokens, width = z.shape
    num_experts = weight.shape[0]
    return (
        z.dtype in TYPES
        and weight.dtype == z.dtype
        and gates.dtype == torch.float32
        and gates.shape in ((num_samples, num_experts), (1, num_experts))
        and num_tokens >= 1
        and VECTOR <= width <= MAX_WIDTH
        and width % VECTOR == 0
        and 1 <= num_experts <= MAX_EXPERTS
    )


@functools.cache
def load_fused(device: torch.device) -> ModuleType | None:
    """The kernel's ``forward`` and ``backward`` (csrc/binding.cpp), or None where it is not wanted or cannot be.

    The first call builds it, which takes a minute, and tries it on the device: what was built for another one, or with
    a toolkit too new for the driver, shows only there. Where it is wanted, why it is not used is told in one warning.

    Raises:
        UserError: if SWITCHDIT_FUSED_KERNEL is neither 0 nor 1.
    """
    wanted = os.environ.get(SWITCH, "0")
    if wanted not in ("", "0", "1"):
        raise UserError(f"{SWITCH}={wanted} is neither 1 (use the fused kernel) nor 0")
    if wanted != "1" or not torch.cuda.is_available():
        return None
    capability, problem = torch.cuda.get_device_capability(device), obstacle()
    if capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        problem = f"the device's compute capability {capability[0]}.{capability[1]} is none of {known}"
    if problem is None:
        try:
            kernel = expert_mix_builder().load(verbose=False)
            try_out(kernel, device)
            return kernel
        except BUILD_FAILURES as failure:
            problem = "it does not build or run: " + str(failure).strip().partition("\n")[0]
    warnings.warn(f"the fused expert_mix kernel is not used: {problem}", stacklevel=2)
    return None


def try_out(kernel: ModuleType, device: torch.device) -> None:
    """Run all of it once, on the least there is; what the device refuses is a RuntimeError."""
    z, weight = (torch.ones(1, 1, VECTOR, dtype=TYPES[0], device=device).expand(1, n, VECTOR) for n in (1, VECTOR))
    bias, gates = z[0], torch.ones(1, 1, device=device)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _, mask = kernel.forward(z, weight, bias, gates, stream)
        kernel.backward(z, None, z, weight, bias, gates, mask, True, stream)
        torch.cuda.synchronize(device)
    if not torch.equal(mask.cpu(), torch.full_like(mask, 2.0 + VECTOR, device="cpu")):
        raise RuntimeError(f"1 + 1 + {VECTOR} * 1 is {mask.flatten()[0].item()} on {device}")


def obstacle() -> str | None:
    """Why the kernel cannot be built here, if it cannot."""
    from torch.utils import cpp_extension  # needs setuptools

    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if cpp_extension.CUDA_HOME is None or not Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists():
        return "there is no nvcc: set CUDA_HOME to a CUDA toolkit"
    if not cpp_extension.is_ninja_available():
        return "there is no ninja: pip install ninja"
    return None


def sources_hash() -> str:
    content = b"".join(path.read_bytes() for path in sorted(CSRC.iterdir())) + torch.__version__.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def expert_mix_builder():
    """DeepSpeed's builder of this kernel. A function, since importing deepspeed takes seconds."""
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    class ExpertMixBuilder(CUDAOpBuilder):
        def absolute_name(self):
            return f"switchdit.kernels.{self.name}"

        def sources(self):
            return [str(CSRC / name) for name in SOURCES]

        def include_paths(self):
            return [str(CSRC)]

        # the define makes a change of any source, or another PyTorch, build anew: torch looks at SOURCES alone
        def cxx_args(self):
            return [*super().cxx_args(), f"-DSOURCES={sources_hash()}"]

        def nvcc_args(self):  # not DeepSpeed's: --use_fast_math would flush what is small to zero
            return ["-O3", "-std=c++17", "--threads=2", f"-DSOURCES={sources_hash()}", *self.compute_capability_args()]

        def filter_ccs(self, ccs):
            return [cc for cc in super().filter_ccs(ccs) if int(cc[0]) >= CAPABILITIES[0][0]]

    return ExpertMixBuilder("expert_mix_op")


@exit_on_user_error
def main() -> None:
    problem = obstacle()
    if problem:
        raise UserError(f"the fused expert_mix kernel cannot be built: {problem}")
    try:
        built = expert_mix_builder().jit_load(verbose=False)
    except BUILD_FAILURES as failure:
        sys.stderr.write(f"{failure}\n")
        raise UserError("the fused expert_mix kernel was not built: see above") from None
    print(f"{built.__file__}: {', '.join(SOURCES)} for {os.environ.get('TORCH_CUDA_ARCH_LIST') or 'the GPUs here'}")


if __name__ == "__main__":
    main()
