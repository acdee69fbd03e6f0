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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import switchdit
from switchdit.data.manifest_fields import LABELS_FILE, MANIFEST_FIELDS, NAMES_FILE, SIDECAR_FIELDS, STORED, fault_in
from switchdit.data.npy_header import write_npy
from switchdit.errors import UserError
from switchdit.files import atomic_write, inside, sha256_of, write_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 28
CONTINUE = "run the same extraction command again to continue"
IN_ORDER = "run the first extraction and every --append again in their order: their shards are kept"


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
    vae_name: str | None = None  # of an autoencoder that is known by its name alone
    format_version: int = FORMAT_VERSION

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(V, K, C, h, w)"""
        return image_shape(self.latent_shape, self.flip, self.stored)

    def as_json(self) -> dict[str, Any]:
        """The plan as it looks after a round trip through a JSON file."""
        content = {**asdict(self), "latent_shape": list(self.latent_shape)}
        return {key: value for key, value in content.items() if value is not None}


def image_shape(latent_shape: Sequence[int], flip: bool, stored: str) -> tuple[int, ...]:
    """(V, K, C, h, w), what is stored of one image."""
    return (2 if flip else 1, STORED[stored], *latent_shape)


def default_shard_size(shape: Sequence[int]) -> int:
    """Images of `image_shape` that make a shard of about 256 MB."""
    return max(1, SHARD_BYTES // (2 * math.prod(shape)))


def digest_of(names: Sequence[str], *numbers: Sequence[int]) -> str:
    """SHA-256 of a list of file names and, where given, of numbers of each file, such as its size."""
    rows = ("\0".join(map(str, row)) for row in zip(names, *numbers, strict=True))
    return hashlib.sha256("".join(f"{row}\0" for row in rows).encode("utf-8", "surrogateescape")).hexdigest()


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


def finished_shard(out: Path, index: int, plan: Plan, source: str, skip_bad: bool) -> dict[str, Any] | None:
    """The sidecar of a shard that is whole and still valid, or None when it is to be made (again).

    source: `digest_of` the shard's files with their sizes and stamps, so an image that was replaced since is noticed.
    A shard with skipped images counts only when ``skip_bad`` holds now too. Raises `UserError` for a damaged sidecar.
    """
    path = sidecar_path(out, index)
    if not path.is_file():
        return None
    sidecar, fault = _read_json(path)
    if fault is None:
        if sidecar.get("plan") != plan.as_json() or sidecar.get("source") != source:
            return None
        fault = fault_in(sidecar, SIDECAR_FIELDS)
    if fault is None:
        begin = (index - plan.first_shard) * plan.shard_size
        expected = min(plan.shard_size, plan.num_files - begin)
        if sidecar["file"] != shard_name(index) or sidecar["num"] + len(sidecar["skipped"]) != expected:
            fault = f"it does not describe the {expected} files of {shard_name(index)}"
    if fault:
        raise UserError(f"{path} is damaged: {fault}; delete it, then {CONTINUE}")
    shard = out / shard_name(index)
    if not shard.is_file() or shard.stat().st_size != sidecar["bytes"] or (sidecar["skipped"] and not skip_bad):
        return None
    return sidecar


def shard_source(out: Path, index: int) -> str | None:
    """From which files the shard was made, as its sidecar says; None where there is none."""
    return _read_json(sidecar_path(out, index))[0].get("source")


def plans_there(out: Path) -> dict[str, dict[str, Any]]:
    """The plans of the shards in a folder by the names of their sidecars; damaged ones are left out."""
    plans = {path.name: _read_json(path)[0].get("plan") for path in sorted(out.glob("shard_*.json"))}
    return {name: plan for name, plan in plans.items() if isinstance(plan, dict)}


def how_to_complete(out: Path) -> str:
    """What to do about a data set whose manifest is missing or has to be deleted."""
    appended = any(plan.get("first_shard") != 0 for plan in plans_there(out).values())
    return IN_ORDER if appended else CONTINUE


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
        write_npy(file, moments)
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
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write labels and names, then ``manifest.json``, and remove what the former manifest named; return the new one.

    sidecars: of the plan's shards, in order. labels: integers (N,), names: N strings, both of all images but skipped
    ones. earlier: the manifest that the plan's images are appended to; its images come first in labels and names.
    """
    before = earlier or {"sources": [], "shards": [], "skipped": []}
    shards = [*before["shards"], *(_shard_entry(sidecar) for sidecar in sidecars)]
    assert len(labels) == len(names) == sum(shard["num"] for shard in shards)
    number = f"{len(before['sources']):05d}"
    labels_path, names_path = out / f"labels_{number}.npy", out / f"names_{number}.json"
    remove_leftovers(out, labels_path.name, names_path.name, MANIFEST)
    with atomic_write(labels_path) as file:
        write_npy(file, labels.astype(np.int64))
    with atomic_write(names_path) as file:
        file.write(json.dumps(list(names)).encode())
    source = {key: getattr(plan, key) for key in ("images", "num_files", "first_shard", "shard_size")}
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
        "sources": [*before["sources"], source],
        "shards": shards,
        "skipped": [*before["skipped"], *(name for sidecar in sidecars for name in sidecar["skipped"])],
    }
    write_json(out / MANIFEST, manifest)
    remove_outdated(out, manifest)
    return manifest


def _shard_entry(sidecar: dict[str, Any]) -> dict[str, Any]:
    return {key: sidecar[key] for key in ("file", "num", "bytes", "sha256")}


def lists_shards(manifest: dict[str, Any], sidecars: Sequence[dict[str, Any]]) -> bool:
    """Whether the manifest tells of these shards, as they are now."""
    return all(_shard_entry(sidecar) in manifest["shards"] for sidecar in sidecars)


def relist_shards(out: Path, manifest: dict[str, Any], sidecars: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the manifest anew after some of its shards were made again, from the same images."""
    renewed = {sidecar["file"]: _shard_entry(sidecar) for sidecar in sidecars}
    shards = [renewed.get(entry["file"], entry) for entry in manifest["shards"]]
    for old, new in zip(manifest["shards"], shards, strict=True):
        if old["num"] != new["num"]:
            raise UserError(
                f"{out / new['file']} made again holds {new['num']} images, {MANIFEST} says {old['num']}; "
                "extract all images anew into another folder"
            )
    manifest = {**manifest, "shards": shards}
    write_json(out / MANIFEST, manifest)
    return manifest


def damaged_list(out: Path, manifest: dict[str, Any]) -> Path | None:
    """The first of the files of labels and names that is missing or not what the manifest says."""
    for entry in (manifest["labels"], manifest["names"]):
        path = inside(out, entry["file"])
        try:
            if not path.is_file() or sha256_of(path) != entry["sha256"]:
                return path
        except OSError as problem:
            raise UserError(f"{path} cannot be read: {problem.strerror}") from problem
    return None


def damaged_shard(out: Path, manifest: dict[str, Any]) -> Path | None:
    """The first of the shards that is missing or has not the size that the manifest says."""
    for entry in manifest["shards"]:
        path = inside(out, entry["file"])
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return path
    return None


def unlisted_shards(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Names of shards that lie in the folder and are not part of the data set."""
    listed = {entry["file"] for entry in manifest["shards"]}
    return sorted(path.name for path in out.glob("shard_*.npy") if path.name not in listed)


def remove_outdated(out: Path, manifest: dict[str, Any]) -> None:
    """Remove labels and names of former manifests."""
    current = (manifest["labels"]["file"], manifest["names"]["file"])
    for path in out.iterdir():
        if path.name not in current and (LABELS_FILE.fullmatch(path.name) or NAMES_FILE.fullmatch(path.name)):
            path.unlink(missing_ok=True)


def read_manifest(out: Path) -> dict[str, Any]:
    """The checked manifest of a complete data set; `UserError` when it is missing, damaged or of another version."""
    path = out / MANIFEST
    if not out.is_dir():
        raise UserError(f"there is no folder {out}; make it with tools/extract_latents.py --out {out}")
    if not path.is_file():
        if any(out.glob("shard_*")):
            raise UserError(f"the extraction into {out} is not complete (no {MANIFEST}): {how_to_complete(out)}")
        raise UserError(f"{out} holds no extracted latents (no {MANIFEST}); make them with tools/extract_latents.py")
    manifest, fault = _read_json(path)
    if fault is None and manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, this program reads {FORMAT_VERSION}"
        )
    fault = fault or _fault_of(manifest)
    if fault:
        raise UserError(f"{path} is damaged: {fault}; delete it, then {how_to_complete(out)}")
    return manifest


def remove_leftovers(out: Path, *names: str) -> None:
    """Remove what killed runs left of the files ``names``; only the process that writes these files may call it."""
    for name in names:
        for partial in out.glob(f".{name}.*.partial"):
            partial.unlink(missing_ok=True)


def _read_json(path: Path) -> tuple[dict[str, Any], str | None]:
    """A JSON object, and what is wrong with the file, or None. `UserError` when it may not be read.

    The object is empty when the file is damaged, or gone, since another process may be making that shard again.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, None
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        return {}, f"not JSON ({problem})"
    return (content, None) if isinstance(content, dict) else ({}, "not a JSON object")


def _fault_of(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest's fields, or None."""
    fault = fault_in(manifest, MANIFEST_FIELDS)
    if fault:
        return fault
    if len(manifest["class_names"]) != manifest["num_classes"]:
        return f"it has {len(manifest['class_names'])} class_names but num_classes {manifest['num_classes']}"
    total = sum(entry["num"] for entry in manifest["shards"])
    return None if total == manifest["num_images"] else f"its shards hold {total} images, not {manifest['num_images']}"
