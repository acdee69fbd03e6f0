"""The files of an extracted data set: how they are named, written, resumed and described.

    OUT/shard_00000.npy    float16 (n, V, K, C, h, w), UNscaled: n images, V views, K numbers for each latent value
    OUT/shard_00000.json   sidecar, written after its shard: the shard is whole and made by this plan from these files
    OUT/labels_00000.npy   int64 (N,), class of each image in the order of the shards
    OUT/names_00000.json   N strings, where each image came from
    OUT/manifest.json      written last: its presence means that the data set is complete

The views are the image and its mirror image (V = 2), or the image alone (V = 1). The numbers are mean and standard
deviation of the autoencoder's posterior (K = 2, ``stored: moments``) or one draw from it (K = 1, ``stored: sample``).

Which image stands where depends on the sorted list of files and the shard size alone, not on the number of
processes. Every file is whole or absent; what a killed run leaves under a temporary name is never read. Images
appended later get shards of their own, and labels and names of all images are written anew under the next number, so
that the manifest in place describes a complete data set at any moment.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import switchdit
from switchdit.errors import UserError
from switchdit.files import atomic_write, sha256_of, write_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SHARD_FILE = re.compile(r"shard_\d{5,}\.npy")
LABELS_FILE = re.compile(r"labels_\d{5,}\.npy")
NAMES_FILE = re.compile(r"names_\d{5,}\.json")
STORED = {"moments": 2, "sample": 1}  # numbers kept for each latent value: K
SHARD_BYTES = 1 << 28
CONTINUE = "run the same extraction command again to continue"


@dataclass(frozen=True)
class Plan:
    """All that decides the content of the shards. Latents of two plans never share a folder.

    The batch size is not in it: latents of other batch sizes agree within rounding, and who runs out of memory should
    be able to continue with a smaller one.
    """

    images: str  # digest of the names of all images, in order
    num_files: int
    image_size: int
    latent_shape: tuple[int, int, int]  # C, h, w
    shard_size: int
    encoder_dtype: str
    vae_sha256: str
    scale_factor: float
    transform: str
    flip: bool = True
    stored: str = "moments"
    first_shard: int = 0  # above 0 for images appended to a complete data set
    format_version: int = FORMAT_VERSION

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(V, K, C, h, w)"""
        return image_shape(self.latent_shape, self.flip, self.stored)

    def as_json(self) -> dict[str, Any]:
        """The plan as it looks after a round trip through a JSON file."""
        return {**asdict(self), "latent_shape": list(self.latent_shape)}


def image_shape(latent_shape: Sequence[int], flip: bool, stored: str) -> tuple[int, ...]:
    """(V, K, C, h, w), what is stored of one image."""
    return (2 if flip else 1, STORED[stored], *latent_shape)


def default_shard_size(shape: Sequence[int]) -> int:
    """Images of `image_shape` that make a shard of about 256 MB."""
    return max(1, SHARD_BYTES // (2 * math.prod(shape)))


def digest_of(names: Sequence[str], sizes: Sequence[int] = ()) -> str:
    """SHA-256 of a list of file names, and of the files' sizes in bytes where given."""
    digest = hashlib.sha256()
    for index, name in enumerate(names):
        digest.update(name.encode("utf-8", "surrogateescape"))
        digest.update(f"\0{sizes[index]}\0".encode() if sizes else b"\0")
    return digest.hexdigest()


def shard_ranges(num_files: int, shard_size: int) -> list[range]:
    """The files of each shard, as ranges of positions in the sorted list of files."""
    return [range(start, min(start + shard_size, num_files)) for start in range(0, num_files, shard_size)]


def owned_shards(num_shards: int, rank: int, world_size: int) -> range:
    """The shards that process ``rank`` writes: every ``world_size``-th."""
    return range(rank, num_shards, world_size)


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.npy"


def sidecar_path(out: Path, index: int) -> Path:
    return (out / shard_name(index)).with_suffix(".json")


def to_float16(moments: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Cast float32 moments (n, ...) of the images ``names`` to float16; `UserError` naming one that does not fit."""
    with np.errstate(over="ignore"):
        half = moments.astype(np.float16)
    finite = np.isfinite(half).reshape(len(half), -1).all(axis=1)
    if not finite.all():
        name = names[int(np.argmin(finite))]
        raise UserError(
            f"the latents of {name} exceed float16 (65504) or are not numbers; "
            "is the autoencoder sound, and --dtype float32?"
        )
    return half


def check_same_plan(out: Path, plan: Plan) -> None:
    """Raise `UserError` naming what differs when ``out`` holds shards of another plan."""
    wanted = plan.as_json()
    for path in sorted(out.glob("shard_*.json")):
        found = _read_json(path).get("plan", wanted)
        differing = [
            f"{key} {found.get(key)} there, {wanted[key]} now" for key in wanted if found.get(key) != wanted[key]
        ]
        if differing:
            raise UserError(
                f"{out} holds latents of another extraction ({'; '.join(differing)}); "
                "choose another output folder or delete that one"
            )


def finished_shard(out: Path, index: int, plan: Plan, source: str, skip_bad: bool) -> dict[str, Any] | None:
    """The sidecar of a shard that is whole and still valid, or None when it is to be made (again).

    source: `digest_of` the shard's files with their sizes, so an image that was replaced since is noticed. A shard
    with skipped images counts only when ``skip_bad`` holds now too.
    """
    path = sidecar_path(out, index)
    if not path.is_file():
        return None
    sidecar = _read_json(path)
    if sidecar.get("plan") != plan.as_json() or sidecar.get("source") != source:
        return None
    shard = out / shard_name(index)
    if not shard.is_file() or shard.stat().st_size != sidecar["bytes"] or (sidecar["skipped"] and not skip_bad):
        return None
    return sidecar


def write_shard(
    out: Path, index: int, moments: np.ndarray, plan: Plan, source: str, skipped: Sequence[str] = ()
) -> dict[str, Any]:
    """Write one shard, then the sidecar that makes it count; return the sidecar.

    moments: float16 (n, V, K, C, h, w), the images of the shard in order, without those named in ``skipped``.
    """
    assert moments.dtype == np.float16, moments.dtype
    assert moments.shape[1:] == plan.image_shape, moments.shape
    shard, sidecar = out / shard_name(index), sidecar_path(out, index)
    remove_leftovers(out, shard.name, sidecar.name)
    sidecar.unlink(missing_ok=True)  # of an earlier, no longer valid shard
    with atomic_write(shard) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(moments), allow_pickle=False)
    content = {
        "file": shard.name,
        "num": len(moments),
        "bytes": shard.stat().st_size,
        "sha256": sha256_of(shard),
        "skipped": list(skipped),
        "source": source,
        "plan": plan.as_json(),
    }
    write_json(sidecar, content)
    return content


def write_manifest(
    out: Path,
    plan: Plan,
    sidecars: Sequence[dict[str, Any]],
    labels: np.ndarray,
    names: Sequence[str],
    class_names: Sequence[str],
    vae: dict[str, str],
    earlier: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write labels and names, then ``manifest.json``, and remove what the former manifest named; return the new one.

    sidecars: of all shards, in order. labels: integers (N,), names: N strings, both without skipped images.
    earlier: ``sources`` of the manifest that these images are appended to.
    """
    assert len(labels) == len(names) == sum(sidecar["num"] for sidecar in sidecars)
    number = f"{len(earlier):05d}"
    labels_path, names_path = out / f"labels_{number}.npy", out / f"names_{number}.json"
    remove_leftovers(out, labels_path.name, names_path.name, MANIFEST)
    with atomic_write(labels_path) as file:
        np.lib.format.write_array(file, labels.astype(np.int64), allow_pickle=False)
    with atomic_write(names_path) as file:
        file.write(json.dumps(list(names)).encode())
    source = {"images": plan.images, "num_files": plan.num_files, "first_shard": plan.first_shard}
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_images": len(labels),
        "num_classes": len(class_names),
        "class_names": list(class_names),
        "image_size": plan.image_size,
        "latent_shape": list(plan.latent_shape),
        "dtype": "float16",
        "flip": plan.flip,
        "stored": plan.stored,
        "scale_factor": plan.scale_factor,
        "vae": dict(vae),
        "encoder_dtype": plan.encoder_dtype,
        "transform": plan.transform,
        "code_version": switchdit.__version__,
        "labels": {"file": labels_path.name, "sha256": sha256_of(labels_path)},
        "names": {"file": names_path.name, "sha256": sha256_of(names_path)},
        "sources": [*earlier, source],
        "shards": [{key: sidecar[key] for key in ("file", "num", "bytes", "sha256")} for sidecar in sidecars],
        "skipped": [name for sidecar in sidecars for name in sidecar["skipped"]],
    }
    write_json(out / MANIFEST, manifest)
    for path in out.iterdir():
        outdated = path.name not in (labels_path.name, names_path.name)
        if outdated and (LABELS_FILE.fullmatch(path.name) or NAMES_FILE.fullmatch(path.name)):
            path.unlink()
    return manifest


def read_manifest(out: Path) -> dict[str, Any]:
    """The checked manifest of a complete data set; `UserError` when it is missing, damaged or of another version."""
    path = out / MANIFEST
    if not out.is_dir():
        raise UserError(f"there is no folder {out}; make it with tools/extract_latents.py --out {out}")
    if not path.is_file():
        if any(out.glob("shard_*")):
            raise UserError(f"the extraction into {out} is not complete (no {MANIFEST}): {CONTINUE}")
        raise UserError(f"{out} holds no extracted latents (no {MANIFEST}); make them with tools/extract_latents.py")
    manifest = _read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, this program reads {FORMAT_VERSION}"
        )
    fault = _fault_of(manifest)
    if fault:
        raise UserError(f"{path} is damaged: {fault}")
    return manifest


def remove_leftovers(out: Path, *names: str) -> None:
    """Remove what killed runs left of the files ``names``; only the process that writes these files may call it."""
    for name in names:
        for partial in out.glob(f".{name}.*.partial"):
            partial.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is gone, since another process may be making that shard again."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as problem:
        raise UserError(f"{path} is damaged: not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return content


def _fault_of(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest's fields, or None."""

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def text(value: Any) -> bool:
        return isinstance(value, str)

    def described(value: Any, name: re.Pattern) -> bool:
        # Any other name could point outside the folder.
        return (
            isinstance(value, dict)
            and text(value.get("file"))
            and name.fullmatch(value["file"]) is not None
            and text(value.get("sha256"))
        )

    def shard(value: Any) -> bool:
        return described(value, SHARD_FILE) and count(value.get("num")) and count(value.get("bytes"))

    checks = {
        "num_images": count,
        "num_classes": count,
        "class_names": lambda v: isinstance(v, list) and all(map(text, v)) and len(v) == manifest.get("num_classes"),
        "image_size": count,
        "latent_shape": lambda v: isinstance(v, list) and len(v) == 3 and all(map(count, v)),
        "dtype": lambda v: v == "float16",
        "flip": lambda v: isinstance(v, bool),
        "stored": lambda v: text(v) and v in STORED,
        "scale_factor": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < float("inf"),
        "vae": lambda v: isinstance(v, dict) and text(v.get("name")) and text(v.get("sha256")),
        "labels": lambda v: described(v, LABELS_FILE),
        "names": lambda v: described(v, NAMES_FILE),
        "sources": lambda v: isinstance(v, list) and all(isinstance(entry, dict) for entry in v),
        "shards": lambda v: isinstance(v, list) and all(map(shard, v)),
        "skipped": lambda v: isinstance(v, list),
    }

    for key, valid in checks.items():
        if not valid(manifest.get(key)):
            return f"'{key}' is missing or not valid"
    total = sum(entry["num"] for entry in manifest["shards"])
    return None if total == manifest["num_images"] else f"its shards hold {total} images, not {manifest['num_images']}"
