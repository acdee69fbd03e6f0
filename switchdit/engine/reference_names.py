"""The authors' parameter names and ours, both ways, on state dicts alone; and the model, read off the weights.

D = width, B = blocks, M = experts, k = top-k, T = timesteps, C = latent channels, p = patch size
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch
from torch import Tensor

from switchdit.engine.global_state import EXPERTS
from switchdit.errors import UserError
from switchdit.models import PATCH_SIZES, SIZES, SYSTEM_FIELDS, model_fields
from switchdit.models.dtr import channel_mask
from switchdit.moe.diffusion_prior import ALPHA

MIXTURE = "blocks.{i}.moe.deepspeed_moe."
EXPERT = "blocks.{i}.moe." + EXPERTS

# authors' names and ours; all others are equal
RENAMED: dict[str, dict[str, str]] = {
    "DiT": {},
    "DTR": {},
    "Switch-DiT": {"routers.{i}.f_gate.1.{rest}": MIXTURE + "gate.wg.{rest}"},
    "Diff-MoE": {
        "blocks.{i}.moe.gate.{rest}": MIXTURE + "gate.wg.{rest}",
        "blocks.{i}.moe.experts.{rest}": EXPERT + "{rest}",
        "blocks.{i}.moe.se.{rest}": "blocks.{i}.recalibration.{rest}",
        "blocks.{i}.moe.shared_experts.{rest}": "blocks.{i}.shared_expert.{rest}",
    },
}
# one tensor of all experts there, one for each expert here
STACKED: dict[str, dict[str, str]] = {
    "Switch-DiT": {"routers.{i}.experts.w": EXPERT + "{j}.weight", "routers.{i}.experts.b": EXPERT + "{j}.bias"}
}
# tables that the authors' models keep as buffers and ours compute
CHANNEL_MASK, PRIOR, TIMESTEPS = "routers.0._unit_mapping", "prior._unit_mapping", "full_time"
MASK_OF_BLOCK = (
    "blocks.{i}.routing._unit_mapping"  # as DTR's own repository has it; Switch-DiT's has one for all blocks
)
DERIVED: dict[str, set[str]] = {"DTR": {CHANNEL_MASK}, "Switch-DiT": {PRIOR, TIMESTEPS}}

# variants of ours that the authors' code does not know, and the value that it does
ONLY_OURS = {"gate": "plain", "integration": "multiply_skip_one"}
ALPHAS = (4.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0)  # of channel masks; 4 is the published one


def with_one_channel_mask(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of DTR's repository, with a mask in every block, as Switch-DiT's repository has them.

    Raises:
        UserError: masks that differ from block to block.
    """
    masks = {name: value for name, value in weights.items() if _pattern(MASK_OF_BLOCK).fullmatch(name)}
    if not masks:
        return weights
    first = next(iter(masks))
    if differing := [name for name, mask in masks.items() if not torch.equal(mask, masks[first])]:
        raise UserError(f"{source}: channel mask '{differing[0]}' differs from '{first}'")
    return {**{n: v for n, v in weights.items() if n not in masks}, CHANNEL_MASK: masks[first]}


def with_masks_of_blocks(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The inverse of `with_one_channel_mask`."""
    out = {name: value for name, value in weights.items() if name != CHANNEL_MASK}
    return out | {MASK_OF_BLOCK.replace("{i}", str(i)): weights[CHANNEL_MASK] for i in range(depth)}


def to_our_names(system: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict as ours with ``ep_size=1``: stacked experts taken apart, derived tables left out."""
    out = {}
    for name, value in weights.items():
        if name in DERIVED.get(system, ()):
            continue
        if (ours := _rename(name, STACKED.get(system, {}))) is not None:
            out.update({ours.replace("{j}", str(j)): expert for j, expert in enumerate(value)})
        else:
            out[_rename(name, RENAMED[system]) or name] = value
    return out


def to_author_names(system: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_our_names`, but for the derived tables (`derived_tables`)."""
    stacks = {ours: authors for authors, ours in STACKED.get(system, {}).items()}
    renamed = {ours: authors for authors, ours in RENAMED[system].items()}
    out: dict[str, Any] = {}
    for name, value in weights.items():
        if (authors := _rename(name, stacks)) is not None:
            expert = int(name.rsplit(".", 2)[1])
            out.setdefault(authors, {})[expert] = value
        else:
            out[_rename(name, renamed) or name] = value
    return {n: torch.stack([v[j] for j in sorted(v)]) if isinstance(v, dict) else v for n, v in out.items()}


def derived_tables(system: str, fields: dict[str, Any]) -> dict[str, Tensor]:
    """The buffers of the authors' models, to the last bit.

    Args:
        fields: as `model_fields` returns them.
    """
    num_timesteps = fields["num_timesteps"]
    if system == "DTR":
        mask = (fields["hidden_size"], num_timesteps, fields["alpha"], fields["beta"], fields["channel_mask"])
        return {CHANNEL_MASK: channel_mask(*mask)}
    if system == "Switch-DiT":
        # the table of `prior_mask`, but for widths such as (5, 11, 3) where the authors' int() rounds down
        columns, share = fields["depth"] * fields["num_experts"], fields["top_k"] / fields["num_experts"]
        prior = channel_mask(columns, num_timesteps, ALPHA, share)
        return {PRIOR: prior, TIMESTEPS: torch.arange(num_timesteps)}
    return {}


def check_known_to_authors(system: str, fields: dict[str, Any]) -> None:
    """Raise `UserError` for a model that the authors' code cannot express."""
    if system not in RENAMED:
        raise UserError(f"{system} has no weights of other authors; systems that have: {', '.join(RENAMED)}")
    for field, known in ONLY_OURS.items():
        if fields.get(field, known) != known:
            raise UserError(f"{field} is {fields[field]!r}; the authors' code of {system} knows {known!r} alone")


def recognise_system(weights: dict[str, Tensor]) -> str:
    """Whose names these are, e.g. ``"Switch-DiT"``. DTR differs from DiT by its table alone.

    Raises:
        UserError: names of none of the systems.
    """
    signs = {
        "Switch-DiT": "routers.0.f_gate.1.weight",
        "DTR": CHANNEL_MASK,
        "Diff-MoE": "blocks.0.moe.gate.weight",
        "DiT": "blocks.0.mlp.fc1.weight",
    }
    for system, sign in signs.items():
        if sign in weights:
            return system
    raise UserError(f"the weights are of no known system: none of their names is among {', '.join(signs.values())}")


def describe_model(system: str, weights: dict[str, Tensor], /, **known: Any) -> dict[str, Any]:
    """``name`` and fields for `build_model`, from the shapes and tables of an authors' state dict.

    Args:
        known: fields that shapes do not tell or tell wrong, e.g. ``num_heads``, which is otherwise taken from the
            published size of this depth and width. A table of labels is taken to hold a null label, unless it has one
            row; ``top_k`` of Diff-MoE is taken to be the published one.

    Raises:
        UserError: a field that cannot be told, or shapes that contradict each other.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim != ndim or 0 in weights[name].shape:
            found = f"has shape {tuple(weights[name].shape)}" if name in weights else "is missing"
            raise UserError(f"these are no weights of {system}: '{name}', of {ndim} dimensions, {found}")
        return tuple(weights[name].shape)

    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    grid_size = math.isqrt(shape("pos_embed", 3)[1])
    labels = shape("y_embedder.embedding_table.weight", 2)[0]
    out_channels = shape("final_layer.linear.weight", 2)[0] // patch_size**2
    fields: dict[str, Any] = {
        "depth": depth,
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "input_size": grid_size * patch_size,
        "learn_sigma": out_channels == 2 * in_channels,
        "num_classes": max(labels - 1, 1),
        "class_dropout_prob": 0.1 if labels > 1 else 0.0,
    }
    if system == "Diff-MoE":
        fields["num_experts"] = shape("blocks.0.moe.gate.weight", 2)[0]
        fields["num_shared_experts"] = shape("blocks.0.moe.shared_experts.gate_proj.weight", 2)[0] // hidden_size
        inner_size = shape("blocks.0.moe.experts.0.gate_proj.weight", 2)[0]
    else:
        inner_size = shape("blocks.0.mlp.fc1.weight", 2)[0]
    fields["mlp_ratio"] = _share(inner_size, hidden_size, 5 / 3)
    if system == "DTR" and CHANNEL_MASK in weights:
        fields["num_timesteps"] = shape(CHANNEL_MASK, 2)[0]
        fields |= _channel_mask_fields(weights[CHANNEL_MASK].float())
    if system == "Switch-DiT":
        fields["num_experts"] = shape("routers.0.f_gate.1.weight", 2)[0]
        if PRIOR in weights:
            fields["num_timesteps"] = shape(PRIOR, 2)[0]
            fields["top_k"] = top_k_of_prior(weights[PRIOR], depth)
        elif "top_k" not in known:
            raise UserError(f"top_k cannot be told: the weights have no '{PRIOR}'; it must be given")

    fields |= known
    size = next((s for s, row in SIZES.items() if all(fields.get(k, v) == v for k, v in row.items())), None)
    if "num_heads" not in fields:
        if size is None:
            raise UserError(
                f"num_heads cannot be told from weights, and no published size has depth {fields['depth']} and "
                f"hidden_size {fields['hidden_size']}; it must be given"
            )
        fields["num_heads"] = SIZES[size]["num_heads"]
    name = f"{system}-{size or 'S'}/{patch_size if patch_size in PATCH_SIZES else PATCH_SIZES[0]}"
    model = {"name": name, **{k: v for k, v in model_fields(name, **fields).items() if k != "ep_size"}}
    for table, value in derived_tables(system, model).items():
        if table in weights and not torch.equal(weights[table].to(value), value):
            settings = {k: model[k] for k in ("depth", "num_experts", "top_k", "alpha", "beta") if k in model}
            raise UserError(f"'{table}' of the weights is not the published table for {settings}")
    return model


def top_k_of_prior(prior: Tensor, depth: int) -> int:
    """k of a prior (T, B*M), each of whose rows has B*k ones, or one fewer where the authors' code rounds down."""
    return round(int(prior[0].count_nonzero()) / depth)


def _channel_mask_fields(mask: Tensor) -> dict[str, float]:
    """alpha and beta of a channel mask (T, D): the published ones where they give it, and where none do."""
    num_timesteps, hidden_size = mask.shape
    beta = _share(int(mask[0].count_nonzero()), hidden_size, SYSTEM_FIELDS["DTR"]["beta"])
    masks = ((alpha, channel_mask(hidden_size, num_timesteps, alpha, beta)) for alpha in ALPHAS)
    return {"alpha": next((alpha for alpha, like in masks if torch.equal(like, mask)), ALPHAS[0]), "beta": beta}


def _share(count: int, total: int, published: float) -> float:
    """The share of which ``int(total * share)`` is count."""
    shares = (published, count / total, (count + 0.5) / total)
    return next(share for share in shares if int(total * share) == count)


@functools.cache
def _pattern(template: str) -> re.Pattern:
    fields = {"i": r"(?P<i>\d+)", "j": r"\d+", "rest": r"(?P<rest>.+)"}
    return re.compile("".join(fields[p] if k % 2 else re.escape(p) for k, p in enumerate(re.split("[{}]", template))))


def _rename(name: str, templates: dict[str, str]) -> str | None:
    """What the table makes of ``name`` (``{j}`` is left standing), or None if no template fits."""
    for source, target in templates.items():
        if match := _pattern(source).fullmatch(name):
            for field, value in match.groupdict().items():
                target = target.replace(f"{{{field}}}", value)
            return target
    return None
