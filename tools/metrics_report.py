"""What `tools/eval_fid.py` makes of its numbers: a table, a row of Markdown, a comparison, and where they come from."""

from __future__ import annotations

import argparse
import json
import math
import platform
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

import switchdit
from switchdit.errors import UserError
from tools import feature_cache
from tools.feature_network import FeatureNetwork
from tools.image_sets import ImageSet, describe

# Key in metrics.json -> name in the table, and in Markdown. The order is that of the table.
ADM = {
    "fid": ("FID", "FID"),
    "sfid": ("sFID", "sFID"),
    "inception_score": ("Inception Score", "IS"),
    "precision": ("precision", "Precision"),
    "recall": ("recall", "Recall"),
}
OWN = {
    "frechet_distance": ("Fréchet distance ({space})", "Fréchet distance ({space})"),
    "precision": ADM["precision"],
    "recall": ADM["recall"],
    "class_score": ("class score", "Class score"),
    "label_accuracy": ("label accuracy", "Label accuracy"),
}
BESIDES = {
    "kid": ("KID", "KID"),
    "kernel_distance": ("kernel distance ({space})", "Kernel distance ({space})"),
}
LARGEST_FILE = 1 << 20  # bytes; a metrics.json has two thousand

# What must agree for numbers to be compared: what it is called, and where metrics.json has it.
CONDITIONS = {
    "network": ("network", "sha256"),
    "reference": ("reference", "sha256"),
    "statistics of the reference": ("reference", "statistics"),
    "number of samples": ("samples", "count"),
    "distances of precision and recall": ("options", "distances"),
    "nearest neighbours": ("options", "nearest_neighbours"),
    "feature space": ("feature_space",),
}


def provenance(
    command: str, network: FeatureNetwork, reference: ImageSet, samples: ImageSet, stored: bool
) -> dict[str, Any]:
    """What is needed to repeat the numbers. stored: the statistics that the reference holds were used."""
    return {
        "reference": {**describe(reference), "statistics": "stored" if stored else "computed"},
        "samples": describe(samples),
        "network": network.description,
        "versions": {
            "switchdit": switchdit.__version__,
            "features": feature_cache.VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "command": command,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def print_report(
    results: dict[str, Any],
    old: dict[str, Any] | None,
    args: argparse.Namespace,
    reference: ImageSet,
    samples: ImageSet,
) -> None:
    """The table, and what --compare and --markdown ask for."""
    print(f"{samples.count} samples of {samples.path}, reference {reference.path} ({reference.count} images)")
    print("\n".join(table(results)))
    if old:
        print(f"beside {args.compare}:")
        print("\n".join(comparison(old, results)), flush=True)
        for line in incomparable(old, results):
            warnings.warn(line, stacklevel=1)
    if args.markdown:
        print("\n".join(markdown(args.name or samples.path.stem, samples.count, results)))


def table(results: dict[str, Any]) -> list[str]:
    """Lines: the metrics of a metrics.json, ADM's five apart from what is not among them."""
    main = ADM if "fid" in results else OWN
    names = {key: _name(main | BESIDES, key, results) for key in main | BESIDES if key in results}
    width = max(map(len, names.values()))
    lines = [f"  {names[key]:<{width}}  {_shown(results[key]):>12}" for key in main if key in names]
    lines += ["besides ADM's five:" if main is ADM else "besides these:"] if names.keys() & BESIDES else []
    kid = results["options"]["kid"] or {}
    subsets = f"  ({kid.get('subsets')} subsets of {kid.get('subset_size')} images)"
    for key in BESIDES:
        if key in names:
            lines.append(
                f"  {names[key]:<{width}}  {_shown(results[key], 6):>12}{subsets if results[key] is not None else ''}"
            )
    return lines


def markdown(name: str, images: int, results: dict[str, Any]) -> list[str]:
    """Header, rule and row of a Markdown table: name, images, and the metrics of ADM or of the own network."""
    main = ADM if "fid" in results else OWN
    keys = [key for key in main if key in results]
    titles = ["Name", "Images", *(_name(main, key, results, 1) for key in keys)]
    values = [_cell(name), str(images)]
    values += ["" if results[key] is None else _shown(results[key], 4) for key in keys]
    rule = "|".join(["---", *["---:"] * (len(titles) - 1)])
    return [f"| {' | '.join(map(_cell, titles))} |", f"|{rule}|", f"| {' | '.join(values)} |"]


def read_results(path: Path, option: str = "--compare") -> dict[str, Any]:
    """A metrics.json. Raises `UserError` for a file that is none."""
    if not path.is_file():
        raise UserError(f"{option} {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
        results = json.loads(text) if len(text) <= LARGEST_FILE else None
    except (OSError, ValueError, RecursionError) as problem:
        reason = str(problem).split("\n")[0][:200]
        raise UserError(f"{option} {path} is not readable as JSON ({reason})") from problem
    metrics = ADM | OWN | BESIDES
    if not isinstance(results, dict) or not any(_is_number(results.get(key)) for key in metrics):
        raise UserError(f"{option} {path} holds no metrics ({', '.join(ADM)}, ...): it is no metrics.json")
    for key in metrics:
        if key in results and results[key] is not None and not _is_number(results[key]):
            raise UserError(f"{option} {path}: {key} is {json.dumps(results[key])[:80]}, not a number")
    return results


def comparison(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines: old, new and their difference for each metric that either has."""
    titles = (ADM | OWN if "fid" in new else OWN | ADM) | BESIDES
    names = {key: _name(titles, key, new if key in new else old) for key in titles if key in old or key in new}
    width = max(map(len, names.values()))
    lines = [f"  {'':<{width}}  {'old':>13} {'new':>13} {'difference':>13}"]
    for key, name in names.items():
        digits = 6 if key in BESIDES else 4
        a, b = old.get(key), new.get(key)
        change = f"{b - a:+.{digits}f}" if a is not None and b is not None else ""
        lines.append(f"  {name:<{width}}  {_shown(a, digits):>13} {_shown(b, digits):>13} {change:>13}")
    return lines


def incomparable(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why the two do not compare, a line each."""
    lines = []
    for name, keys in CONDITIONS.items():
        a, b = _at(old, keys), _at(new, keys)
        if a != b:
            lines.append(f"not comparable: {name}: {_brief(a)} before, {_brief(b)} now")
    a, b = _at(old, ("options", "kid")), _at(new, ("options", "kid"))
    if a and b and a != b:
        lines.append(f"not comparable: protocol of KID: {_brief(a)} before, {_brief(b)} now")
    return lines


def _at(results: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = results
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _brief(value: Any) -> str:
    text = "unknown" if value is None else value if isinstance(value, str) else json.dumps(value)
    return " ".join((text if len(text) <= 80 else f"{text[:80]}...").split())


def _name(names: dict[str, tuple[str, str]], key: str, results: dict[str, Any], which: int = 0) -> str:
    return names[key][which].format(space=_brief(results.get("feature_space")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: float | None, digits: int = 4) -> str:
    return "not available" if value is None else f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
