"""Which implementation of the optimizer trains a run, and steps of it that the host does not wait for.

    optimizer.backend   implementation of Adam and AdamW                             skips on the device
    torch               torch.optim's as one fused kernel                            yes, unless offloaded
    deepspeed           FusedAdam, or DeepSpeedCPUAdam offloaded: need a compiler    no
    apex                apex.optimizers.FusedAdam                                    no

A step whose gradient is not finite must change nothing. An optimizer that skips it on the device is given the verdict
as a tensor; for all others, SGD among them, the host reads it in every step and waits until the device has come there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.moe.utils import configure_moe_param_groups, is_moe_param
from torch import nn

from switchdit.engine.clipping import clipping_divisor, global_norm
from switchdit.errors import UserError

# of DeepSpeed's ZeRO optimizer, all that `skip_on_device` and `global_norm` reach into
PATCHED = ("averaged_gradients", "check_grad_overflow", "scaled_global_norm", "step", "unscale_and_clip_grads")
IMPLEMENTATION = ("fused", "foreach")  # settings of torch.optim.Adam that say how, not what it computes


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The one that ZeRO's wraps, if it does."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() > 0 else engine.optimizer


def apex_fused_adam() -> type[torch.optim.Optimizer]:
    """NVIDIA's.

    Raises:
        UserError: if it is not installed; the package named apex on the package index is another project.
    """
    try:
        from apex.optimizers import FusedAdam
    except (ImportError, AttributeError) as problem:
        raise UserError(
            f"optimizer.backend is 'apex', but there is no apex.optimizers.FusedAdam ({problem}): install NVIDIA's "
            "apex from its source, not the index's package of that name, or set auto, torch or deepspeed"
        ) from None
    return FusedAdam


def apex_adam(section: dict[str, Any]) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """For `deepspeed.initialize`: apex's FusedAdam as the ``optimizer`` section of DeepSpeed's config describes it."""
    fused_adam = apex_fused_adam()
    params = {key: value for key, value in section["params"].items() if key != "torch_adam"}
    by_default = params.pop("adam_w_mode", True)  # as in DeepSpeed's FusedAdam

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = configure_moe_param_groups(parameters) if any(map(is_moe_param, parameters)) else parameters
        try:
            return fused_adam(groups, adam_w_mode=section["type"].lower() == "adamw" or by_default, **params)
        except RuntimeError as problem:
            raise UserError(f"optimizer.backend is 'apex', whose FusedAdam cannot be built: {problem}") from None

    return build


def choose_fused(section: dict[str, Any]) -> None:
    """Have torch's Adam, where DeepSpeed's ``optimizer`` section asks for it, run as one kernel."""
    params = section.get("params", {})
    if params.get("torch_adam") and not set(IMPLEMENTATION) & set(params):
        params["fused"] = True


def keep_implementation(optimizer: torch.optim.Optimizer) -> None:
    """Let loading a checkpoint change an Adam's state and settings, but not to what wrote it: fused, or not."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        ours = {key: optimizer.defaults[key] for key in IMPLEMENTATION}
        optimizer.register_load_state_dict_pre_hook(
            lambda _, state: {**state, "param_groups": [{**group, **ours} for group in state["param_groups"]]}
        )


def skips_on_device(engine: DeepSpeedEngine) -> bool:
    """Whether the optimizer can skip a step by a tensor: torch's fused Adam and AdamW can, if not offloaded."""
    optimizer = base_optimizer(engine)
    fused = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and bool(optimizer.defaults["fused"])
    return fused and not engine.zero_cpu_offload()


def skip_on_device(engine: DeepSpeedEngine) -> None:
    """Make `engine.step` one without a wait: norm, clipping and verdict stay on the device, with torch's fused Adam.

    Its kernel divides the gradient by ``grad_scale``, and changes no weight, moment or count where ``found_inf`` is 1.

    Raises:
        UserError: if this DeepSpeed has other insides than are known.
    """
    outer, optimizer, limit = engine.optimizer, base_optimizer(engine), engine.gradient_clipping()
    if outer is optimizer:
        engine.clip_fp32_gradients = lambda: None  # the kernel does
    else:
        if missing := [name for name in PATCHED if not hasattr(outer, name)]:
            raise UserError(
                f"deepspeed {deepspeed.__version__} cannot be used: its ZeRO optimizer has no {', '.join(missing)}, "
                "which 0.19.8 has"
            )
        outer.check_grad_overflow = False  # reads whether any gradient is not finite
        outer.scaled_global_norm = lambda: 0.0  # what it reads to know whether the norm is: a number needs no wait
        outer.unscale_and_clip_grads = lambda *_: None  # reads the norm again; the kernel divides
    take_step = outer.step

    def step(*_: Any) -> None:
        norm = global_norm(engine)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.grad_scale = clipping_divisor(norm, limit) if limit else None
        take_step()
        outer._global_grad_norm = norm  # where the engine looks for it

    outer.step = step


def described(engine: DeepSpeedEngine) -> str:
    """A line for the log."""
    optimizer = base_optimizer(engine)
    package, fused = type(optimizer).__module__.partition(".")[0], optimizer.defaults.get("fused")
    how = "on the device" if skips_on_device(engine) else "by the host, which waits for the device in every step"
    return (
        f"optimizer: {type(optimizer).__name__} of {package}{' as a fused kernel' if fused else ''}; a step that is "
        f"not finite is skipped {how}"
    )
