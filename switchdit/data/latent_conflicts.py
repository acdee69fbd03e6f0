"""What stands against writing latents into a folder that holds some: another plan, other settings, changed files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switchdit.data.latent_shards import (
    IN_ORDER,
    MANIFEST,
    Plan,
    how_to_complete,
    plans_there,
    shard_name,
    shard_ranges,
    shard_source,
    sidecar_path,
)
from switchdit.errors import UserError

# fields of a plan that all images of a data set share, and that its manifest tells
SETTINGS = ("vae_sha256", "image_size", "latent_shape", "encoder_dtype", "transform", "flip", "stored", "scale_factor")


def check_same_plan(out: Path, plan: Plan) -> None:
    """Raise `UserError` naming what differs when ``out`` holds shards of another plan in the place of this one's."""
    wanted = plan.as_json()
    last = plan.first_shard + len(shard_ranges(plan.num_files, plan.shard_size))
    places = {sidecar_path(out, index).name for index in range(plan.first_shard, last)}
    for name, found in plans_there(out).items():
        if found.get("first_shard") != plan.first_shard and name not in places:
            continue
        differing = _differing(found, wanted, wanted)
        if differing and plan.first_shard:
            raise UserError(
                f"{out} holds an unfinished --append of another kind ({differing}); finish it, or delete "
                f"{shard_name(plan.first_shard)} and all shards after it"
            )
        if differing:
            raise UserError(
                f"{out} holds latents of another extraction ({differing}); choose another output folder or delete "
                "that one"
            )


def check_same_settings(out: Path, manifest: dict[str, Any], plan: Plan) -> None:
    """Raise `UserError` naming what differs between a complete data set and the plan of what is to be added to it."""
    found = {**manifest, "vae_sha256": manifest["vae"]["sha256"]}
    differing = _differing(found, plan.as_json(), SETTINGS)
    if differing:
        raise UserError(f"{out} holds latents made in another way ({differing}); new ones must be made as those are")


def _differing(found: dict[str, Any], wanted: dict[str, Any], keys: Iterable[str]) -> str:
    return "; ".join(
        f"{key} {found.get(key)} there, {wanted[key]} now" for key in keys if found.get(key) != wanted[key]
    )


def changed_shards(out: Path, digests: dict[int, str]) -> list[int]:
    """Those of the shards that lie there made of other files than now, or of files that have changed since."""
    return [index for index, digest in digests.items() if shard_source(out, index) not in (None, digest)]


def check_unchanged(out: Path, digests: dict[int, str]) -> None:
    """Raise `UserError` when shards of a complete data set would be overwritten, as other files are there now."""
    changed = changed_shards(out, digests)
    if changed:
        again = how_to_complete(out)
        raise UserError(
            f"{len(changed)} of {len(digests)} shards in {out} are of files that have changed since (by size or date; "
            "a copy without its dates counts as changed) or of others of the same names; delete "
            f"{out / MANIFEST} and {again if again == IN_ORDER else 'run this again'} to make them anew, or choose "
            "another folder"
        )
