"""What a step minimises: the denoising loss with its weighting, and the auxiliary loss of the gates.

N = samples of a micro-batch, T = timesteps, B = blocks, M = experts
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchdit.config import Config, DiffusionConfig
from switchdit.data.training_batches import Batch
from switchdit.diffusion.gaussian import GaussianDiffusion, make_betas
from switchdit.diffusion.losses import noise_losses
from switchdit.diffusion.rectified_flow import RectifiedFlow
from switchdit.diffusion.weightings import NUM_CLUSTERS, UncertaintyWeighting, loss_weights
from switchdit.errors import UserError
from switchdit.models import system_of
from switchdit.models.switch_dit import SwitchDiT
from switchdit.moe.diffusion_prior import begin_matching, diffusion_prior_loss, prior_mask

TERMS = ("total", "mse", "vlb", "prior", "balance")

# the first is a system's own
AUXILIARIES_OF = {
    "Switch-DiT": ("diffusion_prior", "load_balancing", "none"),
    "Diff-MoE": ("load_balancing", "none"),
}


# settings, and what must be in use for them to mean anything
NEEDS = (
    ("loss", "lambda_dp", "diffusion_prior"),
    ("loss", "prior", "timestep gates"),
    ("loss", "lambda_lb", "load_balancing"),
    ("loss", "min_snr_gamma", "min_snr"),
    ("loss", "p2_gamma", "p2"),
    ("loss", "p2_k", "p2"),
    ("loss", "uncertainty_lr", "uncertainty"),
    ("diffusion", "schedule", "gaussian"),
    ("diffusion", "time_distribution", "rectified_flow"),
    ("diffusion", "time_scale", "rectified_flow"),
)


def auxiliary_of(config: Config) -> str:
    """The auxiliary loss of a run: ``loss.auxiliary``, or the system's own.

    Raises:
        UserError: if the system's gates have no such loss.
    """
    system = system_of(config.model_name)
    valid = AUXILIARIES_OF.get(system, ("none",))
    chosen = config.loss.auxiliary or valid[0]
    if chosen not in valid:
        raise UserError(f"loss.auxiliary is '{chosen}'; for {system} it must be {' or '.join(valid)}")
    return chosen


def check_objective(config: Config, num_timesteps: int) -> None:
    """Raise `UserError` for losses and processes that the config's system cannot have, or that do not go together.

    A setting of something that is not in use is refused as well, unless it has its default.
    """
    build_process(config.diffusion, num_timesteps)
    if config.loss.weighting == "uncertainty" and num_timesteps < NUM_CLUSTERS:
        raise UserError(f"loss.weighting 'uncertainty' needs {NUM_CLUSTERS} timesteps, the model has {num_timesteps}")
    in_use = {auxiliary_of(config), config.loss.weighting, config.diffusion.process}
    if "Switch-DiT" == system_of(config.model_name):
        in_use.add("timestep gates")
    for section, field, needed in NEEDS:
        values = getattr(config, section)
        if needed not in in_use and getattr(values, field) != getattr(type(values)(), field):
            raise UserError(
                f"{section}.{field} is {getattr(values, field)!r}, but it is of {needed}, which is not in use"
            )
    system, scale = system_of(config.model_name), config.diffusion.time_scale
    routes_by_time = system in ("DTR", "Switch-DiT", "Multi-Expert-DiT")
    if config.diffusion.process == "rectified_flow" and routes_by_time and scale != num_timesteps:
        raise UserError(
            f"diffusion.time_scale is {scale:g}; {system} routes by timesteps, so it must be num_timesteps "
            f"({num_timesteps})"
        )


def build_process(config: DiffusionConfig, num_timesteps: int) -> GaussianDiffusion | RectifiedFlow:
    if config.process == "rectified_flow":
        return RectifiedFlow(num_timesteps, config.time_scale)
    return GaussianDiffusion(make_betas(config.schedule, num_timesteps))


def time_distribution(config: Config) -> str:
    """How `make_batch` draws the times of a run."""
    if config.diffusion.process == "rectified_flow":
        return f"flow_{config.diffusion.time_distribution}"
    return "clusters" if config.loss.weighting == "uncertainty" else "uniform"


@dataclass
class Losses:
    """Of a micro-batch: scalars by name (`TERMS`); per sample the squared error and the timestep, both (N,)."""

    terms: dict[str, Tensor]
    mse: Tensor
    timestep: Tensor

    @property
    def total(self) -> Tensor:
        return self.terms["total"]


class Objective:
    """The loss of a run.

    Attributes:
        process: the diffusion process.
        prior, task_expert_map: of the diffusion prior loss and of the pictures; None without timestep gates. The map is
            that of the step that `start_step` began, and so is `assignment`.
        token_share: (B, E) share of the last micro-batch's tokens at each expert; None without token gates.
        identity: what must be the same on resume.
    """

    def __init__(self, config: Config, model: nn.Module, device: torch.device):
        self.loss, self.seed = config.loss, config.train.seed
        self.model, self.num_timesteps = model, model.num_timesteps
        self.process = build_process(config.diffusion, model.num_timesteps)
        self.auxiliary = auxiliary_of(config)
        self.weighting = UncertaintyWeighting(config.loss.uncertainty_lr, model.num_timesteps, device)
        self.identity = {"weighting": config.loss.weighting, "auxiliary": self.auxiliary, "prior": config.loss.prior}
        self.prior = self.task_expert_map = self.token_share = None
        if isinstance(model, SwitchDiT):
            sizes = (len(model.blocks), model.num_experts, model.top_k, model.num_timesteps)
            self.prior = prior_mask(*sizes, config.loss.prior).to(device)
            self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="matching")

    def start_step(self, step: int) -> None:
        """Match the prior with the gates as they are, once for all micro-batches of the step: begun here, done beside
        the first forward pass."""
        if self.prior is not None:
            self.task_expert_map = self.model.task_expert_map()
            self.finish_matching = begin_matching(self.worker, self.task_expert_map, self.prior, self.seed, step)

    @property
    def assignment(self) -> Tensor:
        """(C,) the prior's column for each column of the gates, on the CPU."""
        return self.finish_matching()

    def __call__(self, engine: nn.Module, batch: Batch) -> Losses:
        """The losses of a micro-batch; ``engine`` is the model as it is trained."""
        x_t = self.process.interpolate(batch.x0, batch.t, batch.noise)
        time = self.process.model_time(batch.t)
        timestep = self._timestep(batch.t)
        none = x_t.new_zeros(())
        prior = balance = none
        if self.prior is None and self.auxiliary == "none":
            out = engine(x_t, time, batch.y, drop_label=batch.drop_label)
        else:
            options = {} if batch.gate_noise is None else {"gate_noise": batch.gate_noise}
            out, routing = engine(x_t, time, batch.y, drop_label=batch.drop_label, return_routing=True, **options)
            self.token_share = getattr(routing, "token_share", None)
            if self.auxiliary == "load_balancing":
                balance = routing.load_balance.sum()
            if self.prior is not None:  # watched also where it is not minimised
                assignment = self.assignment.to(x_t.device, non_blocking=True)
                prior = diffusion_prior_loss(routing.probs, timestep, self.prior, assignment, len(self.model.blocks))
        losses = self._denoising(out, batch, x_t)
        total = self._weighted(losses, batch.t)
        if self.auxiliary == "diffusion_prior":
            total = total + self.loss.lambda_dp * prior
        elif self.auxiliary == "load_balancing":
            total = total + self.loss.lambda_lb * balance
        mse, vlb = losses["mse"].mean(), losses["vlb"].mean()
        terms = dict(zip(TERMS, (total, mse, vlb, prior, balance), strict=True))
        return Losses(terms, losses["mse"], timestep)

    def finish_step(self, add_over_processes: Callable[[Tensor], None]) -> None:
        """After the optimizer's step: the log-variances of uncertainty weighting take theirs."""
        if self.loss.weighting == "uncertainty":
            self.weighting.step(add_over_processes)

    def skip_step(self) -> None:
        """In place of `finish_step`, where the optimizer took no step."""
        self.weighting.forget()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of this."""
        return self.weighting.state() if self.loss.weighting == "uncertainty" else {}

    def restore(self, state: dict[str, Any]) -> None:
        if self.loss.weighting == "uncertainty":
            self.weighting.restore(state)

    def _denoising(self, out: Tensor, batch: Batch, x_t: Tensor) -> dict[str, Tensor]:
        if isinstance(self.process, RectifiedFlow):
            return self.process.losses(out, batch.x0, x_t, batch.t, batch.noise)
        return noise_losses(self.process, out, batch.x0, x_t, batch.t, batch.noise)

    def _weighted(self, losses: dict[str, Tensor], t: Tensor) -> Tensor:
        if self.loss.weighting == "uncertainty":
            return self.weighting.loss(losses["mse"] + losses["vlb"], t)
        if self.loss.weighting == "constant":
            return losses["mse"].mean() + losses["vlb"].mean()
        options = {"min_snr_gamma": self.loss.min_snr_gamma, "p2_gamma": self.loss.p2_gamma, "p2_k": self.loss.p2_k}
        weights = loss_weights(self.loss.weighting, self.process, t, **options)
        return (weights * losses["mse"]).mean() + losses["vlb"].mean()

    def _timestep(self, t: Tensor) -> Tensor:
        """The timestep 0 .. T-1 that a time stands for, to count it under."""
        return (t * self.num_timesteps).long().clamp(max=self.num_timesteps - 1) if t.is_floating_point() else t
