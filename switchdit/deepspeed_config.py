"""DeepSpeed's JSON from ds_configs/: fills "auto" from the run's config, rejects what cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from switchdit.config import Config
from switchdit.errors import UserError

ADAMS = ("adam", "adamw")  # DeepSpeed's types of which there are several implementations


def micro_batch_of(config: Config, world_size: int) -> int:
    """Samples per process and forward pass; checks that ``train.global_batch`` divides.

    Raises:
        UserError: if global_batch != micro_batch x gradient_accumulation_steps x world_size.
    """
    train = config.train
    per_sample = train.gradient_accumulation_steps * world_size
    described = (
        f"gradient_accumulation_steps ({train.gradient_accumulation_steps}) x number of processes ({world_size})"
    )
    if train.global_batch % per_sample:
        raise UserError(f"train.global_batch ({train.global_batch}) must be divisible by {described}")
    micro_batch = train.global_batch // per_sample
    if train.micro_batch not in (None, micro_batch):
        raise UserError(
            f"train.global_batch ({train.global_batch}) must equal micro_batch ({train.micro_batch}) x {described}; "
            f"leave micro_batch null to get {micro_batch}"
        )
    return micro_batch


def resolve_deepspeed_config(path: str | Path, config: Config, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration as a dictionary with every "auto" replaced.

    As in the Hugging Face integration, "auto" takes the value that the run's own config implies, and a value that is
    given in both places must agree.

    Raises:
        UserError: unreadable file, an "auto" that nothing can fill, a contradiction, or a setting that does not work
            with timestep-routed experts.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"DeepSpeed config '{path}' does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise UserError(f"DeepSpeed config '{path}' is not valid JSON: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"DeepSpeed config '{path}' must be a JSON object")

    train, backend = config.train, config.optimizer.backend
    known = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch_of(config, world_size),
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "optimizer.params.lr": train.lr,
        "optimizer.params.betas": train.betas,
        "optimizer.params.eps": train.eps,
        "optimizer.params.weight_decay": train.weight_decay,
    }
    # torch's fused AdamW needs no compiler and does not make the host wait; on a host DeepSpeed's is the faster
    torch_adam = backend == "torch" or (backend == "auto" and not (on_gpu and _offloads(values)))
    # what it overlaps with is other processes, and it waits for the device in every backward pass
    free = {"optimizer.params.torch_adam": torch_adam, "zero_optimization.overlap_comm": world_size > 1}
    if backend != "auto":
        known["optimizer.params.torch_adam"] = torch_adam
    _fill(values, "", {**known, **free}, known, path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        values.setdefault(key, known[key])
    values.setdefault("gradient_clipping", known["gradient_clipping"])
    _reject(values, path, config, world_size)
    params = values["optimizer"].setdefault("params", {})
    for key in ("lr", "betas", "eps", "weight_decay"):  # DeepSpeed's own defaults are not the run's
        if (key != "betas" and key != "eps") or "adam" in _type_of_optimizer(values):
            params.setdefault(key, known[f"optimizer.params.{key}"])
    if _type_of_optimizer(values) in ADAMS:
        params.setdefault("torch_adam", torch_adam)
    return values


def _type_of_optimizer(values: dict[str, Any]) -> str:
    return str(values.get("optimizer", {}).get("type", "")).lower()


def _offloads(values: dict[str, Any]) -> bool:
    """Whether optimizer state is to be in host memory; of a config that may still turn out to be malformed."""
    zero = values.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    return isinstance(offload, dict) and offload.get("device") == "cpu"


def _fill(section: dict, prefix: str, fillers: dict[str, Any], known: dict[str, Any], path: Path) -> None:
    for key, value in section.items():
        name = prefix + key
        if isinstance(value, dict):
            _fill(value, name + ".", fillers, known, path)
        elif value == "auto":
            if name not in fillers:
                raise UserError(f"DeepSpeed config '{path}': nothing in the run's config fills \"auto\" of '{name}'")
            section[key] = fillers[name]
        elif name in known and value != known[name]:
            raise UserError(
                f"DeepSpeed config '{path}': '{name}' is {value}, but the run's config implies {known[name]}; "
                'write "auto" there or make them agree'
            )


def _reject(values: dict[str, Any], path: Path, config: Config, world_size: int) -> None:
    for key in ("zero_optimization", "bf16", "fp16", "optimizer", "data_types", "checkpoint", "torch_autocast"):
        if not isinstance(values.get(key, {}), dict):
            raise UserError(f"DeepSpeed config '{path}': '{key}' must be an object, not {values[key]!r}")
    zero = values.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if not isinstance(offload, dict):
        raise UserError(f"DeepSpeed config '{path}': 'offload_optimizer' must be an object, not {offload!r}")
    device = offload.get("device", "none")
    stage = zero.get("stage", 0)
    bf16 = values.get("bf16", {}).get("enabled", False)
    fp16 = values.get("fp16", {}).get("enabled", False)
    ep_size, backend = config.model.get("ep_size", 1), config.optimizer.backend
    kind = values.get("optimizer", {}).get("type")
    problems = [
        ("optimizer" not in values, "needs an 'optimizer' section, e.g. of type AdamW"),
        (
            backend != "auto" and _type_of_optimizer(values) not in ADAMS,
            f"optimizer.type is {kind!r}; with optimizer.backend '{backend}' it must be Adam or AdamW",
        ),
        (backend == "apex" and device == "cpu", "offload_optimizer needs optimizer.backend auto, torch or deepspeed"),
        (
            not isinstance(values.get("optimizer", {}).get("params", {}), dict),
            f"optimizer.params must be an object, not {values.get('optimizer', {}).get('params')!r}",
        ),
        (
            bool((values.get("torch_autocast") or {}).get("enabled")),
            "torch_autocast is not supported: use bf16, whose master weights are float32",
        ),
        ("scheduler" in values, "must have no 'scheduler': train.{lr,warmup_steps,decay_steps} set the learning rate"),
        (stage not in (0, 1, 2), f"zero_optimization.stage is {stage}; with DeepSpeed's MoE it must be 0, 1 or 2"),
        (stage == 2 and not zero.get("contiguous_gradients", True), "ZeRO-2 with MoE needs contiguous_gradients"),
        (stage == 2 and not zero.get("reduce_scatter", True), "ZeRO-2 with MoE needs reduce_scatter"),
        (device not in ("cpu", "none"), f"offload_optimizer.device is {device!r}; it must be 'cpu' or 'none'"),
        (stage == 0 and device == "cpu", "offload_optimizer needs zero_optimization.stage 1 or 2"),
        (bool(zero.get("offload_param")), "offload_param needs zero_optimization.stage 3, which MoE cannot have"),
        (bool(zero.get("zenflow")), "zenflow is not supported: the average would follow weights that lag behind"),
        (
            values.get("bf16", {}).get("bf16_master_weights_and_grads", False),
            "bf16_master_weights_and_grads is not supported: masters and their average are float32",
        ),
        (stage == 0 and bf16, "bf16 needs zero_optimization.stage 1 or 2, which keep float32 master weights"),
        (
            stage == 1 and bf16 and values.get("data_types", {}).get("grad_accum_dtype") == "fp32",
            "ZeRO-1 with bf16 cannot accumulate gradients in float32; use stage 2, or drop data_types",
        ),
        (
            zero.get("round_robin_gradients", False),
            "round_robin_gradients must be off: DeepSpeed's table of where weights stand is not true with it",
        ),
        (zero.get("elastic_checkpoint", False), "elastic_checkpoint must be off: such checkpoints cannot be resumed"),
        (
            not zero.get("load_from_fp32_weights", True),
            "load_from_fp32_weights must be true: a run would go on from rounded weights",
        ),
        (
            values.get("checkpoint", {}).get("load_universal", False),
            "checkpoint.load_universal must be off: universal checkpoints lose experts; any checkpoint resumes on any "
            "number of processes without it",
        ),
        (fp16, "fp16 is not supported: use bf16, or neither for float32"),
        (values.get("use_data_before_expert_parallelism", False), "use_data_before_expert_parallelism must be off"),
        (world_size % ep_size != 0, f"number of processes ({world_size}) must be divisible by ep_size ({ep_size})"),
    ]
    for wrong, message in problems:
        if wrong:
            raise UserError(f"DeepSpeed config '{path}': {message}" if "ep_size" not in message else message)
