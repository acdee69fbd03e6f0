"""The operators that an exported program may call, and what is checked before each call.

The author of a file chooses the operators, their arguments and the tensors. Operators reach the machine in two ways:
by what they do (read files, start threads, change storages), and by kernels that trust their arguments and read or
write out of bounds. Against the first there is a list: an operator that is not on it is refused, and all on it only
compute. Of the list's operators these trust their arguments, and here they are not trusted:

- dtypes and layouts given as bare numbers reach types without a name: only names of known ones pass, and the overloads
  of `to` that take a dtype as a number are left out;
- sizes near 2**63 overflow, and convolutions and pools compute with 32 bits: integers are bounded, and so are, counted
  here where numbers cannot overflow, the elements of what they ask for;
- `native_group_norm` believes the sizes that it is given beside its input, and compares only their product, modulo
  2**64: these, and the shapes that other norms are told, are compared with the input;
- `_native_batch_norm_legit_no_training` and attention for the CPU do not compare the sizes of their inputs;
- interpolation with scales that contradict the sizes takes weights and pixels from outside;
- rounded division of the smallest integer by -1 is a fault of the processor;
- as_strided may look at any part of its storage: what it looks at is compared with the storage here, too;
- kernels with windows are not made for tensors without elements.

Left out: set_, resize_, view of another dtype, empty, unpooling, sparse, quantised and random operators, and all that
makes a number of data (item) or of strides, which differ with data and without: so the numbers of a program follow from
the sizes of the images alone.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from switchdit.errors import UserError

ELEMENTWISE = """
    abs neg exp expm1 log log1p log2 sqrt rsqrt reciprocal square sin cos tan tanh sigmoid erf floor ceil round trunc
    sign log10 relu relu6 gelu silu mish hardswish hardsigmoid hardtanh leaky_relu elu selu celu softplus log_sigmoid
    prelu _prelu_kernel glu logical_not logical_and logical_or logical_xor bitwise_not bitwise_and bitwise_or
    bitwise_xor isnan isinf add sub rsub mul div pow.Tensor_Scalar pow.Scalar pow.Tensor_Tensor floor_divide remainder
    fmod maximum minimum atan2 eq ne lt le gt ge clamp clamp_min clamp_max where masked_fill lerp addcmul addcdiv
    nan_to_num
"""
REDUCTIONS = """
    sum mean amax amin max min var std var_mean std_mean prod any all argmax argmin logsumexp softmax _softmax
    _safe_softmax log_softmax _log_softmax linalg_vector_norm norm.Scalar norm.ScalarOpt_dim cumsum topk sort argsort
"""
PRODUCTS = "mm bmm mv dot matmul linear addmm baddbmm einsum.default scaled_dot_product_attention"
WINDOWS = """
    conv1d conv2d conv3d convolution max_pool1d max_pool2d max_pool2d_with_indices avg_pool1d avg_pool2d
    adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d batch_norm layer_norm group_norm
    instance_norm rms_norm _native_batch_norm_legit_no_training native_layer_norm native_group_norm _fused_rms_norm
    upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa pixel_shuffle pixel_unshuffle channel_shuffle pad constant_pad_nd reflection_pad2d
    replication_pad2d scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
"""
SHAPES = """
    view.default reshape _unsafe_view as_strided.default view_as reshape_as expand expand_as broadcast_to
    broadcast_tensors repeat tile repeat_interleave.self_int permute transpose.int t numpy_T mT adjoint flatten
    unflatten.int squeeze unsqueeze select.int slice narrow.default split split_with_sizes chunk unbind.int
    cat.default stack concat.default concatenate.default hstack vstack movedim moveaxis swapaxes swapdims roll flip
    unfold triu tril meshgrid index index_select gather embedding index_put slice_scatter select_scatter diagonal fill
    _unsafe_index to.dtype to.dtype_layout to.device to.other type_as _to_copy contiguous clone copy.default detach
    alias lift_fresh_copy dropout native_dropout feature_dropout alpha_dropout feature_alpha_dropout
"""
NEW = """
    zeros.default ones.default full.default zeros_like ones_like full_like new_zeros new_ones new_full arange
    linspace.default eye scalar_tensor
"""
ASSERTIONS = "_assert_tensor_metadata _assert_scalar _assert_async.msg sym_constrain_range sym_constrain_range_for_size"
SIZES = "sym_size.int sym_numel"
IN_PLACE = """
    relu_ relu6_ gelu_ silu_ mish_ elu_ celu_ selu_ leaky_relu_ hardtanh_ hardswish_ hardsigmoid_ sigmoid_ tanh_ add_
    sub_ mul_ div_ pow_ exp_ sqrt_ rsqrt_ neg_ clamp_ clamp_min_ clamp_max_ masked_fill_ fill_ zero_ copy_ index_put_
    detach_ dropout_ addcmul_
"""
TENSOR_OPERATORS = frozenset(
    " ".join((ELEMENTWISE, REDUCTIONS, PRODUCTS, WINDOWS, SHAPES, NEW, ASSERTIONS, SIZES, IN_PLACE)).split()
)


def power(base: float, exponent: float) -> float:
    if abs(exponent) > 64:
        raise ValueError(f"a power of {exponent}")
    return base**exponent


NUMBER_OPERATORS: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "truediv")},
    **{f"_operator.{name}": getattr(operator, name) for name in ("neg", "pos", "and_", "or_", "not_")},
    **{f"_operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    "_operator.pow": power,
    "torch.sym_float": float,
    "torch.sym_int": int,
    "torch.sym_ite": lambda condition, yes, no: yes if condition else no,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
    "torch.sym_sqrt": math.sqrt,
    "torch._sym_sqrt": math.sqrt,
}

# what an argument may be, by what its type in the operator's schema mentions; the first type that fits counts
LEAVES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (Tensor, ("Tensor",)),
    (bool, ("bool", "number")),
    (int, ("int", "float", "number")),
    (float, ("float", "number")),
    (str, ("str",)),
    (torch.dtype, ("ScalarType",)),
    (torch.layout, ("Layout",)),
    (torch.memory_format, ("MemoryFormat",)),
    (torch.device, ("Device",)),
)
LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = 2**63 - 1
BOUNDS = dict.fromkeys(("stride", "padding", "dilation", "kernel_size"), 4096)
BOUNDS |= dict.fromkeys(("start", "end"), LARGEST_NUMBER)  # of a slice, which stays within its tensor


class Operator(NamedTuple):
    """target: its name in the file. arguments: of its schema, by name; None for one of `NUMBER_OPERATORS`."""

    target: str
    function: Callable[..., Any]
    arguments: dict[str, Any] | None

    def __call__(self, bound: dict[str, Any]) -> Any:
        """Check the arguments and call. Raises what the operator does, and ValueError for what it must not see."""
        if self.arguments is None:
            return checked_number(self.function(*map(checked_number, bound.values())))
        for name, value in bound.items():
            check_argument(value, name, str(self.arguments[name].real_type))
        if bound.get("training") or bound.get("train") or bound.get("dropout_p"):
            raise ValueError("it is in training mode: call .eval() on the network before it is exported")
        base = self.target.split(".")[3]
        if base in WINDOW_OPERATORS and any(isinstance(v, Tensor) and 0 in v.shape for v in bound.values()):
            raise ValueError("it is given a tensor without elements")
        if base in CHECKS:
            CHECKS[base](bound)
        if base in ELEMENTS:
            check_memory(ELEMENTS[base](bound))
        return self.function(**bound)


def find_operator(target: str) -> Operator:
    """The operator of that name; `UserError` for one that is not on the list."""
    if target in NUMBER_OPERATORS:
        return Operator(target, NUMBER_OPERATORS[target], None)
    refusal = f"calls {target[:100]!r}, which is not among the operators that are run from a file"
    match = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if not match or not {match[1], f"{match[1]}.{match[2]}"} & TENSOR_OPERATORS:
        raise UserError(refusal)
    packet = getattr(torch.ops.aten, match[1], None)
    if packet is None or match[2] not in packet.overloads():
        raise UserError(f"calls {target[:100]!r}, which this PyTorch ({torch.__version__}) does not have")
    function = getattr(packet, match[2])
    arguments = {argument.name: argument for argument in function._schema.arguments}
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments.values())
    makes_tensors = all("Tensor" in str(made.type) for made in function._schema.returns)
    # some names have overloads for numbers, texts and lists, which TorchScript uses: a list can be multiplied
    if (writes and not match[1].endswith("_")) or not (makes_tensors or match[1].startswith("sym_")):
        raise UserError(refusal)
    return Operator(target, REPLACED.get(match[1], function), arguments)


def checked_number(value: Any) -> int | float:
    if type(value) not in (bool, int, float) or (abs(value) > LARGEST_NUMBER and not math.isinf(value)):
        raise ValueError("its numbers are out of range")
    return value


def check_argument(value: Any, name: str, kind: str) -> None:
    """ValueError unless ``value`` is of a type that the schema's ``kind``, e.g. ``Optional[List[int]]``, allows."""
    for leaf in value if isinstance(value, list) else [value]:
        expected = next((words for leaf_type, words in LEAVES if isinstance(leaf, leaf_type)), ())
        wrapped = kind == "Tensor" and name in ("self", "other") and isinstance(leaf, (int, float))  # x / 255
        if leaf is not None and not wrapped and not any(word in kind for word in expected):
            raise ValueError(f"its argument '{name}' is a {type(leaf).__name__}, expected {kind}")
        if type(leaf) is int and "int" in kind and abs(leaf) > BOUNDS.get(name, LARGEST_SIZE):
            raise ValueError(f"its argument '{name}' is {leaf}, which is out of range")
        if isinstance(leaf, Tensor):
            check_memory(leaf.numel())  # views with strides of 0 have any number of elements; a byte each at least


def check_memory(needed: int) -> None:
    """`UserError` for more bytes than the machine has, in the memory that the network will use."""
    if torch.cuda.is_available():
        present = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise UserError(f"needs {needed / 2**30:.3g} GiB of memory at once; there are {present / 2**30:.3g}")


def check_channels(bound: dict[str, Any]) -> None:
    image = bound["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = bound.get(name)
        if vector is not None and (image.ndim < 2 or tuple(vector.shape) != (image.shape[1],)):
            raise ValueError(f"its {name} is of shape {tuple(vector.shape)}, its input of {tuple(image.shape)}")


def check_groups(bound: dict[str, Any]) -> None:
    check_channels(bound)
    shape, groups = bound["input"].shape, bound.get("group", bound.get("num_groups"))
    told = [bound.get(name, size) for name, size in zip(("N", "C"), shape, strict=False)]
    told.append(bound.get("HxW", math.prod(shape[2:])))
    if len(shape) < 2 or told != [*shape[:2], math.prod(shape[2:])] or groups < 1 or shape[1] % groups:
        raise ValueError(f"its sizes {told} in {groups} groups are not those of its input {tuple(shape)}")


def check_normalized(bound: dict[str, Any]) -> None:
    image, normalized = bound["input"], tuple(bound["normalized_shape"])
    if not normalized or tuple(image.shape[-len(normalized) :]) != normalized:
        raise ValueError(f"it normalizes the sizes {normalized} of an input of {tuple(image.shape)}")
    for name in ("weight", "bias"):
        if bound.get(name) is not None and tuple(bound[name].shape) != normalized:
            raise ValueError(f"its {name} is of shape {tuple(bound[name].shape)}, expected {normalized}")


def check_attention(bound: dict[str, Any]) -> None:
    query, key, value = (bound[name] for name in ("query", "key", "value"))
    mask = bound.get("attn_mask")
    scores = (*query.shape[:-1], key.shape[-2])
    fits = query.ndim == key.ndim == value.ndim >= 3 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    fits = fits and query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    fits = fits and query.dtype == key.dtype == value.dtype and not bound.get("enable_gqa")
    if fits and mask is not None:
        pairs = zip(reversed(mask.shape), reversed(scores), strict=False)
        fits = mask.ndim <= len(scores) and all(n in (1, m) for n, m in pairs)
        fits = fits and mask.ndim >= 2 and mask.dtype in (torch.bool, query.dtype)
    if not fits:
        raise ValueError("its query, key, value and mask do not fit each other")


def check_scales(bound: dict[str, Any]) -> None:
    scales = [bound.get(name) for name in ("scales_h", "scales_w")]  # of the overloads that are told the size as well
    sizes = bound.get("output_size") or (0, 0)
    for before, after, scale in zip(bound.get("self", bound.get("input")).shape[-2:], sizes, scales, strict=True):
        if scale is not None and not (math.isfinite(scale) and math.floor(before * scale) == after):
            raise ValueError(f"its scale {scale} does not take {before} pixels to {after}")


def check_divisor(bound: dict[str, Any]) -> None:
    numbers = [v if isinstance(v, Tensor) else torch.tensor(v) for v in (bound["self"], bound["other"])]
    whole = not any(number.is_floating_point() or number.is_meta for number in numbers)
    if bound.get("rounding_mode") == "trunc" and whole and (numbers[1] < 0).any():
        raise ValueError("it divides integers by a negative number")


def check_view(bound: dict[str, Any]) -> None:
    source, sizes, strides = bound["self"], bound["size"], bound["stride"]
    offset = bound.get("storage_offset")
    offset = source.storage_offset() if offset is None else offset
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    there = source.untyped_storage().nbytes() // source.dtype.itemsize
    if min([0, offset, *sizes, *strides]) < 0 or (0 not in sizes and last >= there):
        raise ValueError("it looks outside of its tensor")


def check_not_transposed(bound: dict[str, Any]) -> None:
    if bound.get("transposed"):
        raise ValueError("it is a transposed convolution, which is not run from a file")


def check_padding(bound: dict[str, Any]) -> None:
    if bound.get("mode", "reflect") != "constant" and min([0, *(bound.get("padding") or bound.get("pad") or [])]) < 0:
        raise ValueError("its padding is negative")


def elements_asked(bound: dict[str, Any]) -> int:
    return math.prod(map(abs, bound["size"]))  # -1 keeps a size


def elements_repeated(bound: dict[str, Any]) -> int:
    repeats = bound.get("repeats", bound.get("dims"))
    return bound["self"].numel() * math.prod(repeats if isinstance(repeats, list) else [repeats])


def flash_attention_for_cpu(
    query: Tensor, key: Tensor, value: Tensor, *more, **options
) -> tuple[Tensor, Tensor | None]:
    """What a decomposed program holds that was exported on a CPU; elsewhere the same by the device's own kernel."""
    if query.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, *more, **options)
    return functional.scaled_dot_product_attention(query, key, value, *more, **options), None


WINDOW_OPERATORS = frozenset(WINDOWS.split())
REPLACED = {"_scaled_dot_product_flash_attention_for_cpu": flash_attention_for_cpu}
ELEMENTS: dict[str, Callable[[dict[str, Any]], int]] = {
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), elements_asked),
    **dict.fromkeys(("expand", "broadcast_to", "as_strided"), elements_asked),
    **dict.fromkeys(("repeat", "tile", "repeat_interleave"), elements_repeated),
}
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    **dict.fromkeys(("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training"), check_channels),
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"), check_attention),
    **{name: check_scales for name in WINDOW_OPERATORS if "upsample" in name},
    **dict.fromkeys(("div", "div_"), check_divisor),
    **dict.fromkeys(("pad", "reflection_pad2d", "replication_pad2d"), check_padding),
    **dict.fromkeys(("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"), check_normalized),
    **dict.fromkeys(("native_group_norm", "group_norm"), check_groups),
    "as_strided": check_view,
    "convolution": check_not_transposed,
}
