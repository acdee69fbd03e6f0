"""Which piece of a parameter's float32 weights lives on this process under ZeRO 1 and 2."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fragment(NamedTuple):
    """``numel`` values from ``start_in_parameter`` of the flattened parameter, at ``start`` of a group's partition."""

    group: int
    start: int
    numel: int
    start_in_parameter: int


def fragment(parameter: Tensor) -> Fragment | None:
    """Of a parameter that DeepSpeed's ZeRO optimizer holds; None if it lives wholly on other processes."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    where = mapping.hp_fragment_address
    return Fragment(mapping.param_group_index, where.start, where.numel, mapping.lp_fragment_address.start)
