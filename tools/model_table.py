"""Parameters and multiply-adds of every system and size, beside the papers' figures.

python tools/model_table.py [--patch {2,4,8}] [--markdown | --json]     (docs/models.md: --markdown > docs/models.md)
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from switchdit.errors import exit_on_user_error

# As printed. DiT: Peebles & Xie 2023, Table 4, but 131 and 6.74: Park et al. 2024 (Switch-DiT).
PAPER_MACS = {"DiT-S/2": "6.06", "DiT-B/2": "23.01", "DiT-L/2": "80.71", "DiT-XL/2": "118.64", "Switch-DiT-S/2": "6.74"}
PAPER_PARAMETERS = {"DiT-S/2": "33", "DiT-B/2": "131", "DiT-L/2": "458", "DiT-XL/2": "675"}
# Switch-DiT, Table 1: (M, k) -> activated parameters in millions, on a DiT-B/2 for FFHQ
PAPER_ACTIVATED = {(3, 1): "137", (2, 2): "144", (3, 2): "144", (4, 2): "144", (4, 3): "151"}

COLUMNS = {
    "name": "model",
    "total": "parameters, M",
    "active": "activated, M",
    "paper_parameters": "paper, M",
    "dense": "GMACs, dense",
    "published": "as published",
    "here": "here",
    "merging": "(merging)",
    "paper_macs": "paper",
    "notes": "notes",
}
SMALL_COLUMNS = {"m": "M", "k": "k", "total": "parameters, M", "active": "activated, M", "paper": "paper, M"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patch", type=int, default=2, choices=(2, 4, 8), help="patch size (default: 2)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the page docs/models.md")
    form.add_argument("--json", action="store_true", help="exact counts, by component")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    args = arguments()
    rows = model_rows(args.patch)
    if args.json:
        print(json.dumps({"models": rows, "ffhq_base": design_space_rows()}, indent=2))
        return
    shown = [shown_row(row) for row in rows]
    small = [{**row, **{key: f"{row[key] / 1e6:.1f}" for key in ("total", "active")}} for row in design_space_rows()]
    table = markdown_table if args.markdown else text_table
    heading = "# " if args.markdown else ""
    print(f"{heading}Numbers of the models\n")
    if args.markdown:
        print(f"Made by `python tools/model_table.py{f' --patch {args.patch}' * (args.patch != 2)} --markdown`.\n")
    print(
        "Latents of 4 x 32 x 32 (images of 256 x 256), 1000 classes and the null class; one image, one forward pass.\n"
    )
    print(table(COLUMNS, shown) + "\n")
    for number, text in footnotes(args.patch).items():
        print(textwrap.fill(f"{number}. {text}", 120, subsequent_indent="   ", break_on_hyphens=False))
    print()
    print(f"{'#' + heading if heading else ''}Switch-DiT-B/2 with one class (FFHQ), as in Table 1 of its paper\n")
    print(table(SMALL_COLUMNS, small) + "\n")
    remark = (
        "Activated are all parameters but M - k experts of every block. That table's 131 M of the DiT itself is the "
        f"count with 1000 classes; with one it is {one_class_dit() / 1e6:.1f} M."
    )
    print(textwrap.fill(remark, 120, break_on_hyphens=False))


def model_rows(patch: int) -> list[dict[str, Any]]:
    """A row of exact counts for every model of this patch size."""
    from switchdit.models import MODEL_NAMES, SYSTEMS, system_of
    from switchdit.models.costs import EXECUTIONS, macs, parameters

    names = [name for name in MODEL_NAMES if name.split("/")[1].removesuffix("_v2") == str(patch)]
    rows = []
    for name in sorted(names, key=lambda name: list(SYSTEMS).index(system_of(name))):
        total, active = parameters(name)
        components = {execution: macs(name, execution) for execution in EXECUTIONS}
        rows.append(
            {
                "name": name,
                "total": total,
                "active": active,
                "paper_parameters": PAPER_PARAMETERS.get(name),
                **{execution: sum(counts.values()) for execution, counts in components.items()},
                "merging": components["here"].get("expert merging", 0),
                "paper_macs": PAPER_MACS.get(name),
                "notes": notes_of(system_of(name), name),
                "components": components,
            }
        )
    return rows


def notes_of(system: str, name: str) -> list[int]:
    """The footnotes of a row."""
    notes = {"DiT": [2], "DTR": [3], "Switch-DiT": [4, 5], "Diff-MoE": [7], "Multi-Expert-DiT": [8]}[system]
    return [*notes, 6] if name == "Switch-DiT-S/2" else notes


def shown_row(row: dict[str, Any]) -> dict[str, str]:
    out = {key: "" if row[key] is None else str(row[key]) for key in ("name", "paper_parameters", "paper_macs")}
    out |= {key: f"{row[key] / 1e6:.3f}" for key in ("total", "active")}
    out |= {key: f"{row[key] / 1e9:.3f}" for key in ("dense", "published", "here")}
    out["merging"] = f"{row['merging'] / 1e9:.3f}" if row["merging"] else ""
    out["notes"] = " ".join(map(str, row["notes"]))
    return out


def design_space_rows() -> list[dict[str, Any]]:
    """Switch-DiT-B/2 for one class at each (M, k) of the paper's Table 1."""
    from switchdit.models.costs import parameters

    rows = []
    for (m, k), paper in PAPER_ACTIVATED.items():
        total, active = parameters("Switch-DiT-B/2", num_classes=1, num_experts=m, top_k=k)
        rows.append({"m": m, "k": k, "total": total, "active": active, "paper": paper})
    return rows


def one_class_dit() -> int:
    from switchdit.models.costs import parameters

    return parameters("DiT-B/2", num_classes=1)[0]


def footnotes(patch: int) -> dict[int, str]:
    """Why numbers differ, with the numbers of this patch size."""
    from switchdit.models.costs import gating_all_timesteps, macs, normalised_numbers

    def total(name: str, execution: str = "here") -> float:
        return sum(macs(f"{name}/{patch}", execution).values()) / 1e9

    small = f"Switch-DiT-S/{patch}"
    merging, experts = (macs(small, "here")[part] / 1e9 for part in ("expert merging", "experts"))
    every_call = total("Switch-DiT-S", "published") + gating_all_timesteps(small) / 1e9
    again, once = (macs(f"Diff-MoE-S/{patch}", way)["conditioning"] / 1e9 for way in ("published", "here"))
    with_norms = ", ".join(
        f"{size} {total(f'DiT-{size}') + normalised_numbers(f'DiT-{size}/{patch}') / 1e9:.2f}"
        for size in ("S", "B", "L", "XL")
    )
    notes = {
        1: "One MAC is a multiplication with its addition; the papers call it a FLOP. Counted are matrix products and "
        "convolutions. Fixed positions count as parameters. Dense: every expert works on every token. As published: "
        "the chosen ones, as the authors' code applies them. Here: what this package executes; (merging) is part of "
        "it.",
        2: "One operation for every number that a LayerNorm reads explains by how much the DiT paper's figures are "
        f"higher: {with_norms} with them. The 131 M of DiT-B is the Switch-DiT paper's.",
        3: "DTR is a DiT whose channels are masked by the timestep: no parameters and no matrix products more.",
        4: "M = 3, k = 2. Experts are linear and all tokens of an image share its gates, so that here the chosen ones "
        "are merged into one matrix an image and block. Forming it takes M (D^2 + D) MACs, the column (merging); "
        f"without it {small} executes {total('Switch-DiT-S') - merging:.3f}. Activated: without the M - k experts of "
        "every block that are not chosen.",
        5: f"In every call, whatever its batch, the authors' code also embeds and gates all 1000 timesteps: {small} "
        f"with a batch of one then executes {every_call:.3f} GMACs. That is not in the column.",
        6: f"The paper's 6.74 cannot be reproduced: k = 2 gives {total('Switch-DiT-S', 'published'):.3f}; DiT-S/2 and "
        f"one and a half experts a block would be {total('DiT-S') + 1.5 * experts:.3f}.",
        7: "8 experts, k = 2, chosen by each token; activated is what one token uses. The authors compute an expert's "
        f"shift, scale and gate for every token again ({again:.3f} GMACs of Diff-MoE-S/{patch}); here once for every "
        f"image and expert ({once:.3f}). Experts have inner width 4 D and there are 2 shared ones; _v2: 5/3 D and 1.",
        8: "Four DiT, each for a quarter of the timesteps: four times the parameters, of which an image uses a "
        "quarter.",
    }
    if patch != 2:
        del notes[6]
    return notes


def cells_of(columns: dict[str, str], rows: list[dict[str, Any]]) -> list[list[str]]:
    return [list(columns.values()), *([str(row[key]) for key in columns] for row in rows)]


def text_table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """The first column left, the others right."""
    cells = cells_of(columns, rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    head, *body = cells_of(columns, rows)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


if __name__ == "__main__":
    main()
