"""Turn the authors' published weights into ours, or ours into theirs.

    python tools/convert_checkpoint.py --from authors.pt --out ours.safetensors [--which ema|model]
                                       [--system auto|DiT|DTR|Switch-DiT|Diff-MoE] [--num-heads N] [field=value ...]
    python tools/convert_checkpoint.py --to-authors ours.safetensors|RUN_DIR --out authors.pt [--masks-of-blocks]

The first reads a state dict or a training checkpoint of DiT, DTR, Switch-DiT or Diff-MoE (.pt or .safetensors; nothing
in it is executed) and writes our names, with experts one by one. Its metadata say what the model is (switchdit_model:
the arguments of build_model, in JSON) and where it comes from (source, source_sha256, which). Depth, widths, experts
and the like are read off the weights; what they do not tell is that of the published size, or given: --num-heads, or
field=value, e.g. top_k=1.

The second takes such a file, or the averaged weights of a run's newest checkpoint, and writes what the authors'
sample.py loads: {"ema": state dict, "model": the same}, buffers included. DTR's channel mask is one for all blocks, as
Switch-DiT's repository has it; with --masks-of-blocks it is in every block, as in DTR's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

import yaml

from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import atomic_write, sha256_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="authors", type=Path, help="weights of the authors' code")
    direction.add_argument("--to-authors", dest="ours", type=Path, help="converted weights, a run or its checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--which", choices=("ema", "model"), default="ema", help="entry of a training checkpoint")
    systems = ("auto", "DiT", "DTR", "Switch-DiT", "Diff-MoE")
    parser.add_argument("--system", choices=systems, default="auto", help="auto: told from the names")
    parser.add_argument("--masks-of-blocks", action="store_true", help="names of DTR's own repository")
    parser.add_argument("--num-heads", type=int, help="attention heads, if the size is not a published one")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="model fields that weights do not tell")
    args = parser.parse_intermixed_args(argv)
    suffix = ".safetensors" if args.authors else ".pt"
    if args.out.suffix != suffix or args.out.is_dir():
        raise UserError(f"--out is '{args.out}'; it must be a file that ends in {suffix}")
    unused = (
        {"--masks-of-blocks": args.masks_of_blocks}
        if args.authors
        else {
            "--which": args.which != "ema",
            "--system": args.system != "auto",
            "--num-heads": args.num_heads is not None,
            "field=value": bool(args.fields),
        }
    )
    if given := [name for name, is_given in unused.items() if is_given]:
        raise UserError(f"{given[0]} has no meaning with {'--from' if args.authors else '--to-authors'}")
    if args.ours:
        model = to_authors(args.ours, args.out, args.masks_of_blocks)
    else:
        known = _fields(args.fields) | ({"num_heads": args.num_heads} if args.num_heads is not None else {})
        model = from_authors(args.authors, args.out, args.which, args.system, known)
    print(f"wrote {args.out}: {json.dumps(model)}")


def from_authors(
    path: Path, out: Path, which: str = "ema", system: str = "auto", known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the authors' weights under our names and return the arguments of `build_model`.

    Raises:
        UserError: unreadable or unknown weights, by name; see `load_reference_checkpoint` and `describe_model`.
    """
    from safetensors.torch import save

    from switchdit.engine.reference_checkpoints import MODEL_METADATA, check_fit, read_weights
    from switchdit.engine.reference_names import (
        describe_model,
        recognise_system,
        to_our_names,
        with_one_channel_mask,
    )

    weights, described = read_weights(path, which)
    if described is not None:
        raise UserError(f"'{path}' has our names already; --to-authors gives it the authors'")
    weights = with_one_channel_mask(weights, f"checkpoint '{path}'")
    system = recognise_system(weights) if system == "auto" else system
    model = describe_model(system, weights, **(known or {}))
    check_fit(_unfilled(model), system, weights, f"checkpoint '{path}'")
    metadata = {
        "format": "pt",
        MODEL_METADATA: json.dumps(model),
        "source": path.name,
        "source_sha256": sha256_of(path),
        "which": which,
    }
    ours = {name: value.contiguous() for name, value in to_our_names(system, weights).items()}
    with atomic_write(out) as file:
        file.write(save(ours, metadata))
    return model


def to_authors(path: Path, out: Path, masks_of_blocks: bool = False) -> dict[str, Any]:
    """Write our weights as the authors' code loads them and return the arguments of `build_model`.

    Args:
        path: a file of `from_authors`, or a run's folder or checkpoint, of which the averaged weights are taken.

    Raises:
        UserError: unreadable weights, or a model that the authors' code cannot express.
    """
    from switchdit.engine.checkpoint_writer import tensor_file, write_hashed
    from switchdit.engine.reference_names import (
        check_known_to_authors,
        derived_tables,
        to_author_names,
        with_masks_of_blocks,
    )
    from switchdit.models import model_fields, system_of

    model, weights = _our_weights(path)
    system, fields = system_of(model["name"]), model_fields(**model)
    check_known_to_authors(system, fields)
    state_dict = {**to_author_names(system, weights), **derived_tables(system, fields)}
    if masks_of_blocks:
        if system != "DTR":
            raise UserError(f"--masks-of-blocks is for DTR; '{path}' is {system}")
        state_dict = with_masks_of_blocks(state_dict, fields["depth"])
    write_hashed(out, tensor_file({"ema": state_dict, "model": state_dict}))
    return model


def _our_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from switchdit.engine.checkpoint_folder import find_checkpoint, read_ema, read_state
    from switchdit.engine.global_state import load_global_state_dict
    from switchdit.engine.reference_checkpoints import read_weights

    if path.is_dir():
        checkpoint = find_checkpoint(path)
        model, weights = read_state(checkpoint)["model"], read_ema(checkpoint)
    else:
        weights, model = read_weights(path)
        if model is None:
            raise UserError(f"'{path}' was not written by --from: it has no metadata that say what the model is")
    load_global_state_dict(_unfilled(model), {n: v.to("meta") for n, v in weights.items()}, f"'{path}'")
    return model, weights


def _unfilled(model: dict[str, Any]) -> nn.Module:
    """The model without memory for its parameters: names and shapes to compare with."""
    import torch

    from switchdit.models import build_model

    with torch.device("meta"):
        return build_model(**model).to("meta")


def _fields(assignments: list[str]) -> dict[str, Any]:
    fields = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or name == "name":  # the name follows from the fields
            raise UserError(f"'{assignment}' is no field=value of a model")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"'{assignment}' is no field=value of a model") from None
    return fields


if __name__ == "__main__":
    main()
