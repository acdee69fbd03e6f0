"""The routing pictures of the Switch-DiT paper (Fig. 3, 6, C) from a checkpoint's averaged weights.

python tools/plot_routing.py CKPT [--out DIR]

CKPT is a run's folder (its newest checkpoint) or a checkpoint of a Switch-DiT or a DTR; DIR is CKPT/routing by default.

    task_expert_map.png    which experts each timestep chooses, and the matched prior (DTR: which channels it owns)
    task_affinity.png      share of their experts (channels) that two timesteps have in common
    denoising_paths.png    chosen experts from block to block at four timesteps (Switch-DiT)
    routing.json           the numbers behind them, everything counted from 0

    T = timesteps, B = blocks, M = experts, k = top-k, C = columns of a map: B*M experts, block by block, or D channels
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image, ImageDraw

from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import atomic_write, make_folder
from tools.drawing import (
    BAR,
    FRAME,
    GAP,
    MARGIN,
    PANEL,
    PATH,
    SIDE_PATH,
    TOP,
    Box,
    Ticks,
    axes,
    colour_bar,
    dot,
    figure,
    panel,
    paste,
    shade,
)

QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of T, the tasks that the paper looks at


@dataclass
class Gates:
    """How a Switch-DiT routes.

    Attributes:
        probs: (T, B, M) gate probabilities.
        chosen: (T, B*M) of 0 and 1, k ones a block.
        prior: (T, B*M) of 0 and 1; assignment: (B*M,) the prior's column for each column of the gates.
    """

    probs: np.ndarray
    chosen: np.ndarray
    prior: np.ndarray
    assignment: np.ndarray


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run's folder or a checkpoint")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: CKPT/routing)")
    args = parser.parse_args()
    out = args.out or args.checkpoint / "routing"

    import torch

    from switchdit.engine.checkpoint_folder import find_checkpoint, read_ema, read_state
    from switchdit.engine.generate import build_averaged_model
    from switchdit.models.dtr import DTR
    from switchdit.models.switch_dit import SwitchDiT

    checkpoint = find_checkpoint(args.checkpoint)
    state = read_state(checkpoint)
    model = build_averaged_model(state["model"], read_ema(checkpoint), torch.device("cpu"))
    numbers = {"checkpoint": str(checkpoint), "model": state["model"]["name"], "step": state["step"]}
    if isinstance(model, SwitchDiT):
        gates = gates_of(model, state)
        routing, pictures = gate_numbers(gates), gate_pictures(gates)
    elif isinstance(model, DTR):
        mask = model.task_channel_map().numpy()
        routing = map_numbers(mask)
        pictures = {"task_expert_map": mask_picture(mask), "task_affinity": affinity_picture(mask, "channels")}
    else:
        raise UserError(f"'{checkpoint}' is of a {numbers['model']}; only Switch-DiT and DTR have a map to draw")
    make_folder(out)
    for name, picture in pictures.items():
        with atomic_write(out / f"{name}.png") as file:
            picture.save(file, format="PNG", dpi=(300, 300))
    write_numbers(out / "routing.json", numbers | routing)
    print(f"wrote {', '.join(f'{name}.png' for name in pictures)} and routing.json to {out}")


def gates_of(model, state: dict[str, Any]) -> Gates:
    """The gates of a `SwitchDiT` at every timestep, and the prior that ``state.json`` says it was trained towards."""
    import torch

    from switchdit.config import config_from_dict
    from switchdit.moe.diffusion_prior import match_columns, prior_mask

    config = config_from_dict(state["config"], [])
    e_t = model.t_embedder(torch.arange(model.num_timesteps))
    probs = torch.stack([block.moe.gate(e_t)[0] for block in model.blocks], dim=1)
    chosen = model.task_expert_map()
    sizes = (len(model.blocks), model.num_experts, model.top_k, model.num_timesteps)
    prior = prior_mask(*sizes, config.loss.prior)
    assignment = match_columns(chosen, prior, config.train.seed, state["step"])
    return Gates(probs.numpy(), chosen.numpy(), prior.numpy(), assignment.numpy())


def task_indices(num_timesteps: int) -> list[int]:
    """Rows of 0.25T, 0.5T, 0.75T and T; the paper counts timesteps from 1."""
    return [max(round(share * num_timesteps), 1) - 1 for share in QUARTERS]


def task_affinity(chosen: np.ndarray) -> np.ndarray:
    """``|A_t and A_s| / |A_t|``: (T, C) of 0 and 1, equally many ones in each row -> (T, T)."""
    return (chosen @ chosen.T).astype(np.float64) / chosen.sum(1, keepdims=True)


def map_numbers(chosen: np.ndarray) -> dict[str, Any]:
    """A map (T, C) as spells of timesteps that choose the same columns, and the affinity of the four tasks."""
    first = np.flatnonzero(np.r_[True, (chosen[1:] != chosen[:-1]).any(1)])
    last = np.r_[first[1:], len(chosen)] - 1
    tasks = task_indices(len(chosen))
    return {
        "num_timesteps": len(chosen),
        "tasks": tasks,
        "task_affinity": task_affinity(chosen)[np.ix_(tasks, tasks)].tolist(),
        "share_of_timesteps": chosen.mean(0, dtype=np.float64).tolist(),
        "map": [
            {"first": int(a), "last": int(b), "columns": np.flatnonzero(chosen[a]).tolist()}
            for a, b in zip(first, last, strict=True)
        ],
    }


def gate_numbers(gates: Gates) -> dict[str, Any]:
    """`map_numbers`, and how the gates compare with the prior: cost in cells of the map, divergence in nats."""
    import torch

    from switchdit.moe.diffusion_prior import diffusion_prior_loss

    num_timesteps, num_blocks, num_experts = gates.probs.shape
    matched = gates.prior[:, gates.assignment]
    tensors = [torch.from_numpy(a) for a in (gates.probs.reshape(num_timesteps, -1), gates.prior, gates.assignment)]
    divergence = diffusion_prior_loss(tensors[0], torch.arange(num_timesteps), *tensors[1:], num_blocks)
    entropy = -(gates.probs * np.log(np.maximum(gates.probs, 1e-30))).sum(2).mean(0)
    numbers = map_numbers(gates.chosen)
    return {
        "num_blocks": num_blocks,
        "num_experts": num_experts,
        "top_k": int(gates.chosen[0].sum()) // num_blocks,
        "matched_cost": int(np.abs(gates.chosen - matched).sum()),
        "map_cells": gates.chosen.size,
        "prior_jsd": float(divergence),
        "gate_entropy": float(entropy.mean()),
        "gate_entropy_by_block": entropy.tolist(),
        "gate_entropy_of_equal_gates": float(np.log(num_experts)),
        "assignment": gates.assignment.tolist(),
        **numbers,
        "share_of_timesteps": gates.chosen.mean(0, dtype=np.float64).reshape(num_blocks, num_experts).tolist(),
        "path_probs": gates.probs[numbers["tasks"]].tolist(),
    }


def write_numbers(path: Path, numbers: dict[str, Any]) -> None:
    """JSON with a line for each entry."""
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in numbers.items())
    with atomic_write(path, "w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def gate_pictures(gates: Gates) -> dict[str, Image.Image]:
    return {
        "task_expert_map": map_picture(gates),
        "task_affinity": affinity_picture(gates.chosen, "experts"),
        "denoising_paths": paths_picture(gates),
    }


def map_picture(gates: Gates) -> Image.Image:
    """The gates' map in the order of the blocks, the same in the order of the prior, and the prior; chosen is dark."""
    num_blocks = gates.probs.shape[1]
    ordered = np.empty_like(gates.chosen)
    ordered[:, gates.assignment] = gates.chosen
    by_block = [((i + 0.5) / num_blocks, str(i + 1)) for i in range(num_blocks)]
    every = -(-num_blocks // 14)  # labels that have room
    columns = column_ticks(gates.chosen.shape[1])
    picture = figure(3, bar=False)
    heat_map(picture, panel(0), gates.chosen, "Gates", "experts, by block", by_block[::every], timesteps=True)
    heat_map(picture, panel(1), ordered, "Gates, matched", "experts, in the prior's order", columns)
    heat_map(picture, panel(2), gates.prior, "Prior", "experts, in the prior's order", columns)
    left, top, right, bottom = panel(0)
    for i in range(1, num_blocks):
        x = left + round(i * (right - left) / num_blocks)
        ImageDraw.Draw(picture).line((x, top, x, bottom), fill=FRAME)
    return picture


def mask_picture(mask: np.ndarray) -> Image.Image:
    """The channels that a DTR's timesteps own; dark is owned."""
    picture = figure(1, bar=False)
    title = "Task-channel map"
    heat_map(picture, panel(0), mask, title, "channels", column_ticks(mask.shape[1]), timesteps=True)
    return picture


def affinity_picture(chosen: np.ndarray, what: str) -> Image.Image:
    """`task_affinity` of a map (T, C); light is the least that two choices of so many columns can have in common."""
    lowest = max(0.0, 2 - chosen.shape[1] / chosen[0].sum()) % 1  # with all of them chosen, from 0
    picture = figure(1, bar=True)
    scaled = (task_affinity(chosen) - lowest) / (1 - lowest)
    heat_map(picture, panel(0), scaled, "Task affinity", "timestep", timestep_ticks(len(chosen)), timesteps=True)
    colour_bar(picture, panel(0), f"share of {what} in common", lowest)
    return picture


def paths_picture(gates: Gates) -> Image.Image:
    """Blocks (downwards) by experts at four timesteps: chosen ones shaded by gate probability.

    The heavy line runs through the most probable expert of each block, light ones join all that are chosen.
    """
    num_timesteps, num_blocks, num_experts = gates.probs.shape
    cell, height = max(48, 240 // num_experts), max(36, PANEL // num_blocks)
    lefts = [MARGIN + i * (cell * num_experts + GAP) for i in range(len(QUARTERS))]
    boxes = [(left, TOP, left + cell * num_experts, TOP + height * num_blocks) for left in lefts]
    picture = Image.new("RGB", (boxes[-1][2] + BAR, boxes[-1][3] + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    experts = [((j + 0.5) / num_experts, str(j + 1)) for j in range(num_experts)]
    blocks = [((i + 0.5) / num_blocks, str(i + 1)) for i in range(num_blocks)]
    for box, share, t in zip(boxes, QUARTERS, task_indices(num_timesteps), strict=True):
        left, top, right, bottom = box
        chosen = gates.chosen[t].reshape(num_blocks, num_experts) > 0
        paste(picture, box, shade(gates.probs[t], unused=~chosen))
        for y in range(top, bottom, height):
            draw.line((left, y, right, y), fill=FRAME)
        for x in range(left, right, cell):
            draw.line((x, top, x, bottom), fill=FRAME)
        xs, ys = left + (np.arange(num_experts) + 0.5) * cell, top + (np.arange(num_blocks) + 0.5) * height
        centres = [[(x, y) for x in xs[row]] for y, row in zip(ys, chosen, strict=True)]
        for here, there in itertools.pairwise(centres):
            for step in itertools.product(here, there):
                draw.line(step, fill=SIDE_PATH, width=2)
        for centre in itertools.chain(*centres):
            dot(draw, centre, 6, SIDE_PATH)
        path = list(zip(xs[gates.probs[t].argmax(1)], ys, strict=True))
        draw.line(path, fill=PATH, width=6, joint="curve")
        for centre in path:
            dot(draw, centre, 9, PATH)
        name = "T" if share == 1 else f"{share:g}T"
        axes(picture, box, f"t = {name}", "expert", experts, "block" if box is boxes[0] else "", blocks)
    colour_bar(picture, boxes[-1], "gate probability")
    return picture


def heat_map(
    picture: Image.Image, box: Box, values: np.ndarray, title: str, label: str, ticks: Ticks, timesteps: bool = False
) -> None:
    """Values (T, W) from 0 to 1, timesteps downwards; ``timesteps`` says whether these are labelled."""
    paste(picture, box, shade(values))
    axes(picture, box, title, label, ticks, "timestep" if timesteps else "", timestep_ticks(len(values)))


def timestep_ticks(num_timesteps: int) -> Ticks:
    return [(share, str(round(share * num_timesteps))) for share in (0.0, *QUARTERS)]


def column_ticks(num_columns: int) -> Ticks:
    shown = sorted({1, *(max(1, round(share * num_columns)) for share in QUARTERS)})
    return [((i - 0.5) / num_columns, str(i)) for i in shown]


if __name__ == "__main__":
    main()
