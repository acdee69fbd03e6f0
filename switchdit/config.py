"""One YAML file plus dotted overrides describes a run; everything is checked before any work starts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from switchdit.errors import UserError, nearest

PROCESSES = ("gaussian", "rectified_flow")
SAMPLERS = {"gaussian": ("ddpm", "ddim"), "rectified_flow": ("euler",)}
LAYER_NORMS = ("torch", "apex")
BACKENDS = ("auto", "torch", "deepspeed", "apex")
DISPATCHES = ("auto", "samples", "weights")
AUXILIARIES = ("none", "load_balancing", "diffusion_prior")
WEIGHTINGS = ("constant", "min_snr", "p2", "uncertainty")


def _one_of(name: str, value: Any, valid: typing.Sequence[str]) -> None:
    _require(value in valid, name, value, " or ".join(valid))


def _require(condition: bool, name: str, value: Any, valid: str) -> None:
    if not condition:
        raise UserError(f"{name} is {value!r}; it must be {valid}")


@dataclass
class DataConfig:
    """latents: folder written by tools/extract_latents.py. image_size (pixels) and vae say what it must hold."""

    latents: str
    image_size: int
    vae: str  # folder or hub name of the autoencoder
    horizontal_flip: bool = True

    def __post_init__(self):
        _require(self.image_size > 0, "data.image_size", self.image_size, "at least 1")


@dataclass
class DiffusionConfig:
    """process: gaussian (with ``schedule``) or rectified_flow (with the other two).

    time_distribution: how a time from 0 to 1 is drawn. time_scale: what it is multiplied with before the model is told;
    1 for weights of Diff-MoE's authors.
    """

    process: str = "gaussian"
    schedule: str = "cosine"
    time_distribution: str = "logit_normal"
    time_scale: float = 1000.0

    def __post_init__(self):
        _one_of("diffusion.process", self.process, PROCESSES)
        _one_of("diffusion.schedule", self.schedule, ("cosine", "linear"))
        _one_of("diffusion.time_distribution", self.time_distribution, ("logit_normal", "uniform"))
        _require(self.time_scale > 0, "diffusion.time_scale", self.time_scale, "above 0")


@dataclass
class LossConfig:
    """What is minimised: ``weighting`` of the denoising loss, and an auxiliary loss of the gates.

    auxiliary: null for the system's own (Switch-DiT: diffusion_prior; Diff-MoE: load_balancing; others: none).
    lambda_dp, lambda_lb: weights of diffusion prior and load balancing. prior: which target table.
    Load balancing is over a process's micro-batch, so that, unlike the others, it depends on how the batch is cut.
    """

    auxiliary: str | None = None
    lambda_dp: float = 1.0
    lambda_lb: float = 0.01
    prior: str = "code"
    weighting: str = "constant"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    uncertainty_lr: float = 0.025

    def __post_init__(self):
        if self.auxiliary is not None:
            _one_of("loss.auxiliary", self.auxiliary, AUXILIARIES)
        for name in ("lambda_dp", "lambda_lb", "p2_gamma", "uncertainty_lr"):
            _require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "at least 0")
        for name in ("min_snr_gamma", "p2_k"):
            _require(getattr(self, name) > 0, f"loss.{name}", getattr(self, name), "above 0")
        _one_of("loss.prior", self.prior, ("code", "paper", "random"))
        _one_of("loss.weighting", self.weighting, WEIGHTINGS)


@dataclass
class TrainConfig:
    """global_batch = micro_batch x gradient_accumulation_steps x number of processes; micro_batch follows if null.

    The learning rate rises to lr over the first warmup_steps and falls to 0 over the last decay_steps, both linearly.
    """

    steps: int
    global_batch: int = 256
    micro_batch: int | None = None
    gradient_accumulation_steps: int = 1
    seed: int = 0
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    max_grad_norm: float = 0.0  # 0: no clipping
    ema_decay: float = 0.9999
    activation_checkpointing: int = 0  # recompute every n-th block in the backward pass; 0: none, 1: all
    compile: bool = False  # each block, by torch.compile
    layer_norm: str = "torch"  # or "apex": NVIDIA's FusedLayerNorm, for blocks that are not compiled

    def __post_init__(self):
        for name in ("steps", "global_batch", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(self.micro_batch is None or self.micro_batch >= 1, "train.micro_batch", self.micro_batch, "at least 1")
        at_least_0 = (
            "seed",
            "weight_decay",
            "warmup_steps",
            "decay_steps",
            "max_grad_norm",
            "activation_checkpointing",
        )
        for name in at_least_0:
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        _require(self.seed < 2**32, "train.seed", self.seed, "below 2^32")
        for name in ("lr", "eps"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "above 0")
        two = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        _require(two, "train.betas", self.betas, "two numbers from 0 to below 1")
        _require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "from 0 to below 1")
        _one_of("train.layer_norm", self.layer_norm, LAYER_NORMS)

    def lr_at(self, step: int) -> float:
        """Learning rate of the step after ``step`` done ones."""
        rise = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        fall = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
        return self.lr * min(1.0, rise, fall)


@dataclass
class OptimizerConfig:
    """backend: whose Adam or AdamW: torch's fused one, DeepSpeed's, NVIDIA apex's.

    auto: torch's, but DeepSpeed's for state that a GPU run offloads, and whichever the DeepSpeed config names.
    """

    backend: str = "auto"

    def __post_init__(self):
        _one_of("optimizer.backend", self.backend, BACKENDS)


@dataclass
class MoeConfig:
    """dispatch: what travels with ep_size > 1: samples to the experts, the experts' weights to the samples, or auto."""

    dispatch: str = "auto"

    def __post_init__(self):
        _one_of("moe.dispatch", self.dispatch, DISPATCHES)


@dataclass
class MonitorConfig:
    """Every how many steps; 0 switches the thing off. sample_every and sample_classes need data.vae at hand.

    keep_last: checkpoints to keep, 0 for all. keep_every: those of every n-th step are kept besides, 0 for none.
    """

    log_every: int = 100
    checkpoint_every: int = 10_000
    keep_last: int = 0
    keep_every: int = 0
    sample_every: int = 0
    routing_every: int = 1_000
    sample_classes: int = 10

    def __post_init__(self):
        for f in dataclasses.fields(self):
            _require(getattr(self, f.name) >= 0, f"monitor.{f.name}", getattr(self, f.name), "at least 0")
        _require(self.log_every >= 1, "monitor.log_every", self.log_every, "at least 1")


@dataclass
class FaultsConfig:
    """When a run is in trouble; 0 switches a check off, but for the first.

    max_skipped_steps: in a row, for a loss or gradient that is not finite; then the run stops.
    hash_every: steps between comparisons of the parameters over all processes; also before each checkpoint.
    spike_sigma: a step whose loss lies this many standard deviations above the recent mean is written down.
    hang_timeout, peer_timeout: seconds without progress of a process, or without a sign of life, until all others end.
    """

    max_skipped_steps: int = 20
    hash_every: int = 100
    spike_sigma: float = 6.0
    hang_timeout: float = 600.0
    peer_timeout: float = 60.0

    def __post_init__(self):
        for f in dataclasses.fields(self):
            _require(getattr(self, f.name) >= 0, f"faults.{f.name}", getattr(self, f.name), "at least 0")
        _require(self.max_skipped_steps >= 1, "faults.max_skipped_steps", self.max_skipped_steps, "at least 1")


@dataclass
class SampleConfig:
    """guided_channels: latent channels under guidance, null for all (Switch-DiT, DTR), 3 for DiT's published numbers.

    guidance_interval: first and last timestep with guidance, null for all. dtype: of the model's arithmetic.
    compile: the model, by torch.compile; on a GPU with CUDA graphs.
    """

    cfg_scale: float = 1.5
    guided_channels: int | None = None
    guidance_interval: list[float] | None = None
    num_steps: int = 250
    sampler: str = "ddpm"
    eta: float = 0.0
    dtype: str = "float32"
    compile: bool = False  # by sample.py; pictures during training are not

    def __post_init__(self):
        _require(self.cfg_scale >= 0, "sample.cfg_scale", self.cfg_scale, "at least 0")
        _require(self.num_steps >= 1, "sample.num_steps", self.num_steps, "at least 1")
        _one_of("sample.sampler", self.sampler, [s for samplers in SAMPLERS.values() for s in samplers])
        _one_of("sample.dtype", self.dtype, ("float32", "bfloat16"))
        if (interval := self.guidance_interval) is not None:
            ordered = len(interval) == 2 and 0 <= interval[0] <= interval[1]
            _require(ordered, "sample.guidance_interval", interval, "two timesteps in order, or null")
        _require(0 <= self.eta <= 1, "sample.eta", self.eta, "from 0 to 1 (of DDIM; 0 is deterministic)")
        _require(not self.eta or self.sampler == "ddim", "sample.eta", self.eta, f"0 for {self.sampler}: it is of ddim")
        channels = self.guided_channels
        _require(channels is None or channels >= 1, "sample.guided_channels", channels, "at least 1, or null for all")


@dataclass
class Config:
    """model: ``name`` and any field of `switchdit.models.model_fields`. run_dir: where everything of the run goes."""

    run_dir: str
    model: dict[str, Any]
    data: DataConfig
    train: TrainConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        _require(
            isinstance(self.model.get("name"), str), "model.name", self.model.get("name"), "a name: Switch-DiT-S/2"
        )
        _require(all(isinstance(key, str) for key in self.model), "model", self.model, "a section of named fields")
        process = self.diffusion.process
        valid = SAMPLERS[process]
        _require(
            self.sample.sampler in valid, "sample.sampler", self.sample.sampler, f"{' or '.join(valid)} ({process})"
        )
        if process == "rectified_flow":
            _require(self.loss.weighting == "constant", "loss.weighting", self.loss.weighting, f"constant ({process})")

    @property
    def model_name(self) -> str:
        return self.model["name"]

    @property
    def model_overrides(self) -> dict[str, Any]:
        return {k: v for k, v in self.model.items() if k != "name"}


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as ``train.lr=3e-4`` (the value is YAML too).

    ``base: OTHER.yaml`` in the file (relative to it) starts from that file's values instead of from the defaults.

    Raises:
        UserError: unreadable file, unknown key (with the nearest valid one), wrong type, or a value out of range.
    """
    return config_from_dict(_read_yaml(Path(path)), overrides)


def config_from_dict(values: dict[str, Any], overrides: typing.Sequence[str] = ()) -> Config:
    """As `load_config`, from nested dictionaries."""
    return _build(Config, _apply(values, overrides), "")


def config_to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise UserError(f"config file '{path}' is its own base")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file '{path}' does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise UserError(f"config file '{path}' cannot be read: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file '{path}' must hold sections such as model: and train:")
    base = values.pop("base", None)
    if base is None:
        return values
    _require(isinstance(base, str), f"base of config file '{path}'", base, "the path of another YAML file")
    return _merged(_read_yaml(path.parent / base, (*above, path.resolve())), values)


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``values`` over ``base``, section by section."""
    out = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = _merged(base[key], value) if both else value
    return out


def _apply(values: dict[str, Any], overrides: typing.Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override '{override}' must have the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"override '{override}': the value is not valid YAML") from None
        section = values
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"override '{override}': '{parent}' is a value, not a section")
        section[last] = value
    return values


def _build(cls: type, values: Any, path: str) -> Any:
    """A dataclass from a dictionary, with every key known and every value of the annotated type."""
    if not isinstance(values, dict):
        raise UserError(f"config section '{path.rstrip('.')}' must hold keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"config key '{path}{key}' is unknown{_nearest_key(str(key), path, hints)}")
    arguments = {}
    for f in dataclasses.fields(cls):
        if f.name in values:
            hint, value = hints[f.name], values[f.name]
            nested = dataclasses.is_dataclass(hint)
            arguments[f.name] = (
                _build(hint, value, f"{path}{f.name}.") if nested else _typed(hint, value, path + f.name)
            )
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"config key '{path}{f.name}' is missing")
    return cls(**arguments)


def _nearest_key(key: str, path: str, hints: dict[str, Any]) -> str:
    """The nearest key of this section; else the section of another that has exactly this key."""
    for name, section in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(section) and key in typing.get_type_hints(section):
            return f"; did you mean '{name}.{key}'?"
    hint = nearest(key, hints)
    return hint.replace("did you mean '", f"did you mean '{path}") if "did you" in hint else hint


def _typed(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _typed(arguments[0], value, name)
    if origin is list and isinstance(value, list):
        return [_typed(arguments[0], v, name) for v in value]
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4, without a dot, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise UserError(f"config key '{name}' must be of type {expected}, not {value!r}")
