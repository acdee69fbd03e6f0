"""Write the weights of a checkpoint, however many processes wrote it, into one safetensors file.

tools/consolidate_checkpoint.py --checkpoint runs/x [--which ema|model] --out x.safetensors

All experts stand under global ids, float32, with the arguments of `build_model` in the metadata. The file is what
`sample.py --weights`, `load_reference_checkpoint` and `convert_checkpoint.py --to-authors` take, and
`safetensors.torch.load_file` reads it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import atomic_write, check_writable

if TYPE_CHECKING:
    from torch import Tensor


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[2], usage=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's folder (its newest) or a checkpoint")
    parser.add_argument("--which", choices=("ema", "model"), default="ema", help="averaged or trained weights")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out {args.out} must end in .safetensors")
    check_writable(args.out, "--out")
    checkpoint, state, weights = consolidated(args.checkpoint, args.which)
    write(args.out, weights, state["model"], args.which, checkpoint)
    total = sum(value.numel() for value in weights.values())
    print(f"wrote {args.out}: {args.which} weights of {checkpoint}, {len(weights)} tensors, {total:,} values")


def consolidated(path: Path, which: str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The checkpoint that ``path`` stands for, its state.json, and its weights by global name.

    Raises:
        UserError: if there is no whole checkpoint, or its files are not what was written.
    """
    from switchdit.engine.checkpoint_folder import damage, find_checkpoint, read_ema, read_state

    checkpoint = find_checkpoint(path)
    if problem := damage(checkpoint):
        raise UserError(f"checkpoint '{checkpoint}' is damaged: {problem}")
    state = read_state(checkpoint)
    return checkpoint, state, read_ema(checkpoint) if which == "ema" else trained_weights(checkpoint, state)


def trained_weights(checkpoint: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The float32 weights that the optimizer works on."""
    import torch

    from switchdit.engine.resharding import MASTER, read_saved_run
    from switchdit.models import build_model

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_model(**state["model"]).state_dict().items()}
    saved = read_saved_run(checkpoint, state)
    weights = {name: saved.whole(name, MASTER).view(shapes[name]) for name in saved.pieces}
    weights |= {name: saved.other[name].float() for name in shapes if name in saved.other}
    if missing := sorted(shapes.keys() - weights.keys()):
        raise UserError(f"checkpoint '{checkpoint}' does not hold {', '.join(missing)}")
    return {name: weights[name].contiguous() for name in shapes}


def write(out: Path, weights: dict[str, Tensor], model: dict[str, Any], which: str, checkpoint: Path) -> None:
    from safetensors.torch import save_file

    from switchdit.engine.checkpoint_folder import MODEL_METADATA

    metadata = {"format": "pt", MODEL_METADATA: json.dumps(model), "which": which, "source": checkpoint.name}
    with atomic_write(out) as file:
        save_file(weights, file.name, metadata)  # by name: it needs no second copy in memory


if __name__ == "__main__":
    main()
