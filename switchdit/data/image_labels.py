"""Files that say the class of each image.

    images/1.png,cat                                      CSV, with or without a line of headings; or, as JSON,
    {"images/1.png": "cat"}
    {"labels": [["images/1.png", 3]]}                     as in the dataset.json of StyleGAN and EDM

Labels are all whole numbers, in JSON with or without quotes, which are then the class ids, or all names of classes,
whose ids follow their order.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from switchdit.errors import UserError

LARGEST_LABEL = 1_000_000
WHOLE_NUMBER = re.compile(r"\s*[0-9]{1,18}\s*", re.ASCII)


def read_labels(path: Path, extensions: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Class id of each file, and the names of the classes; `UserError` when the file is not what it should be.

    extensions: of images; a CSV whose first line does not name such a file begins with headings.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise UserError(f"--labels {path} cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise UserError(f"--labels {path} is not text in UTF-8") from problem
    pairs = list(_from_json(path, text) if text.lstrip().startswith(("{", "[")) else _from_csv(path, text, extensions))
    if not pairs:
        raise UserError(f"--labels {path} holds no labels")
    numbers = all(_is_number(label) for _, label in pairs)
    labels: dict[str, Any] = {}
    for name, label in pairs:
        if name in labels:
            raise UserError(f"--labels {path} names {name!r} twice")
        labels[name] = _valid(path, name, int(label) if numbers else label)
    if numbers:
        return labels, [str(label) for label in range(max(labels.values()) + 1)]
    if not all(isinstance(label, str) for label in labels.values()):
        raise UserError(f"--labels {path} mixes numbers and names of classes; use one of them")
    class_names = sorted(set(labels.values()))
    ids = {name: label for label, name in enumerate(class_names)}
    return {name: ids[label] for name, label in labels.items()}, class_names


def _from_csv(path: Path, text: str, extensions: Iterable[str]) -> Iterator[tuple[str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as problem:
        raise UserError(f"--labels {path}, line {reader.line_num}: not CSV ({problem})") from problem
    if rows and os.path.splitext(rows[0][1][0])[1].lower() not in extensions:
        del rows[0]
    for line, row in rows:
        if len(row) != 2:
            raise UserError(f"--labels {path}, line {line}: {len(row)} fields where 'file,label' has 2")
        yield row[0], row[1]


def _from_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(text, object_pairs_hook=list)  # pairs, so that a file named twice is noticed
    except (ValueError, RecursionError) as problem:
        raise UserError(f"--labels {path} is not JSON ({problem})") from problem
    if len(content) == 1 and isinstance(content[0], tuple) and content[0][0] == "labels":
        if content[0][1] is None:
            raise UserError(f"--labels {path} says that there are no labels; pass --unlabeled instead")
        if isinstance(content[0][1], list):
            content = content[0][1]
    for pair in content:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"--labels {path}: {str(pair)[:60]!r} is no pair of a file and a label")
        yield pair[0], pair[1]


def _is_number(label: Any) -> bool:
    """Not so for True and False, which Python takes for integers."""
    return type(label) is int or (isinstance(label, str) and WHOLE_NUMBER.fullmatch(label) is not None)


def _valid(path: Path, name: str, label: Any) -> int | str:
    number = type(label) is int and 0 <= label < LARGEST_LABEL
    if not number and not (isinstance(label, str) and label.strip()):
        raise UserError(
            f"--labels {path}: the label {str(label)[:60]!r} of {name!r} is not a whole number below {LARGEST_LABEL} "
            "nor the name of a class"
        )
    return label if number else label.strip()
