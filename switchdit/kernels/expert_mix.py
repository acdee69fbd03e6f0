"""The mixture of linear experts, gated per sample, and how it multiplies a block's input.

    N = samples, L = tokens of a sample, D = width, M = experts, k = experts that a sample chose

All tokens of a sample share its timestep and hence its gates, and the experts are linear, so that the mixture is
one matrix per sample, exactly::

    sum_j g_j (z W_j + b_j)  =  z (sum_j g_j W_j) + sum_j g_j b_j

which costs 1/k of the arithmetic of k separate products per token, forward and backward.

`expert_mix` is one operator, known to PyTorch as ``switchdit::expert_mix``, so that compiled graphs keep it whole. It
merges a few matrices at a time, and merges them again in the backward pass rather than keep one per sample. On CUDA
devices a fused kernel (builder.py) can stand in for that.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# bytes of merged matrices at a time: what stays in a CPU's last cache; what fills a GPU
BUFFER = {"cpu": 16 << 20, "cuda": 256 << 20}
# samples at a time all the same, where there are as many: with fewer, the product of narrow matrices that merging is
# takes a CPU more than twice as long for each, and threads are without work
MIN_ROWS = 4
_KEPT = threading.local()


def expert_mix(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply tokens by ``1 + sum_j g_nj (z_n W_j + b_j)`` (Switch-DiT, Eq. 4 and 5).

    Args:
        z: (N, L, D). N may be 0: the experts then get zero gradients rather than none.
        weight: (M, D, D), applied from the right; bias: (M, D); both of the type of ``z``.
        gates: (N, M) float32 or of the type of ``z``, zero where an expert is not chosen; (1, M) where all samples
            have the same. A gate that is zero gets no gradient.

    Returns:
        routed, mask: ``z * mask`` and ``1 + mixture``, both (N, L, D) in the type of ``z``.

    Raises:
        ValueError: for shapes or types that do not fit.
    """
    n, num_experts, width = z.shape[0], weight.shape[0], weight.shape[-1]
    fits = z.ndim == 3 and weight.shape == (num_experts, width, width) and bias.shape == (num_experts, width)
    if not (fits and z.shape[2] == width and gates.shape in ((n, num_experts), (1, num_experts))):
        shapes = ", ".join(str(tuple(x.shape)) for x in (z, weight, bias, gates))
        raise ValueError(f"z, weight, bias and gates are {shapes}; they must be (N, L, D), (M, D, D), (M, D), (N, M)")
    if torch.is_autocast_enabled(z.device.type):  # as of any product: all in its type
        z, weight, bias = (x.to(torch.get_autocast_dtype(z.device.type)) for x in (z, weight, bias))
    if not z.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"z is {z.dtype}, but the experts are {weight.dtype} and {bias.dtype}")
    return torch.ops.switchdit.expert_mix(z, weight, bias, gates)


def expert_mix_reference(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """`expert_mix` as the paper writes it; what the operator is tested against."""
    mask = 1 + linear_mixture_reference(z, weight, bias, gates)
    return z * mask, mask


def linear_mixture(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> Tensor:
    """``sum_j g_nj (z_n W_j + b_j)`` alone, (N, L, D): what an expert-parallel rank adds to the others', and the
    ablations that use the mixture otherwise. Arguments as for `expert_mix`."""
    gates = gates.to(weight.dtype)
    merged_weight = (gates @ weight.flatten(1)).unflatten(1, weight.shape[1:])  # (N, D, D)
    merged_bias = gates @ bias  # (N, D)
    return torch.baddbmm(merged_bias.unsqueeze(1), _per_row(z, gates), merged_weight).view_as(z)


def linear_mixture_reference(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> Tensor:
    """`linear_mixture` with one product per expert."""
    out = torch.zeros_like(z)
    for j in range(weight.shape[0]):
        out = out + gates[:, j, None, None].to(z.dtype) * (z @ weight[j] + bias[j])
    return out


def _without_autocast(function: Callable) -> Callable:
    """Autocast would go on inside of an operator, and change the type of some of its products."""

    @functools.wraps(function)
    def call(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*tensors)

    return call


@torch.library.custom_op("switchdit::expert_mix", mutates_args=())
@_without_autocast
def _forward(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    if fused := fused_kernel(z, weight, gates):
        return fused.forward(z, weight, bias, gates, torch.cuda.current_stream(z.device).cuda_stream)
    if z.device.type == "cpu" and torch.equal(gates, gates[:1].expand_as(gates)):
        gates = gates[:1]  # elsewhere, to look would be to wait for the device
    gates, z = gates.to(weight.dtype), z.contiguous()
    mask, merged_bias = torch.empty_like(z), (gates @ bias).unsqueeze(1)
    is_half = z.element_size() == 2
    if not is_half:
        merged_bias += 1
    tokens, out = _per_row(z, gates), _per_row(mask, gates)
    for rows, merged in _merged(weight, gates):
        torch.baddbmm(merged_bias[rows], tokens[rows], merged, out=out[rows])
    if is_half:  # the one comes after the product: added before, it would drown a small mixture
        return torch.addcmul(z, z, mask), mask.add_(1)
    return z * mask, mask


@_forward.register_fake
def _(z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape)


@torch.library.custom_op("switchdit::expert_mix_backward", mutates_args=())
@_without_autocast
def _backward(
    d_routed: Tensor, d_mask: Tensor | None, z: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With ``dm`` the gradient of the mask in full, and ``P_n = z_n^T dm_n``::

    dz = d_routed * mask + dm (sum_j g_j W_j)^T        dW_j = sum_n g_nj P_n
    dg_nj = <P_n, W_j> + <sum_l dm_nl, b_j>            db_j = sum_n g_nj sum_l dm_nl
    """
    if fused := fused_kernel(z, weight, gates):
        stream = torch.cuda.current_stream(z.device).cuda_stream
        deterministic = torch.are_deterministic_algorithms_enabled()
        return fused.backward(d_routed, d_mask, z, weight, bias, gates, mask, deterministic, stream)
    g = gates.to(weight.dtype)
    dm = d_routed * z if d_mask is None else torch.addcmul(d_mask, d_routed, z)
    dm, z = dm.contiguous(), z.contiguous()
    dz = (d_routed * mask).contiguous()
    dz_of, dm_of, z_of = (_per_row(x, g) for x in (dz, dm, z))
    for rows, merged in _merged(weight, g):
        dz_of[rows].baddbmm_(dm_of[rows], merged.transpose(1, 2))

    sum_type = torch.promote_types(z.dtype, torch.float32)  # of what is added up over samples
    d_weight, d_gates = None, torch.empty_like(gates, dtype=sum_type)
    for rows, buffer in _buffers(weight, len(g)):
        product = torch.bmm(z_of[rows].transpose(1, 2), dm_of[rows], out=buffer).flatten(1)
        if d_weight is None:
            d_weight = (g[rows].t() @ product).to(sum_type)
        elif product.dtype == sum_type:
            d_weight.addmm_(g[rows].t(), product)
        else:
            d_weight += g[rows].t() @ product
        # row by row of W: a single sum over D^2 products would lose an order of magnitude in accuracy
        by_row = torch.bmm(buffer.transpose(0, 1), weight.permute(1, 2, 0))
        torch.sum(by_row, 0, dtype=sum_type, out=d_gates[rows])
    sums = dm_of.sum(1, dtype=sum_type)
    d_gates = torch.where(gates == 0, 0, d_gates.addmm_(sums, bias.t().to(sum_type))).to(gates.dtype).contiguous()
    d_bias = (gates.t().to(sum_type) @ sums).to(bias.dtype)
    return dz, d_weight.to(weight.dtype).view_as(weight), d_bias, d_gates


@_backward.register_fake
def _(d_routed, d_mask, z, weight, bias, gates, mask):
    return tuple(x.new_empty(x.shape) for x in (z, weight, bias, gates))


def _setup_context(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, d_routed: Tensor | None, d_mask: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, mask = ctx.saved_tensors
    if d_routed is None and d_mask is None:
        return None, None, None, None
    if d_routed is None:
        d_routed = torch.zeros_like(mask)
    return torch.ops.switchdit.expert_mix_backward(d_routed, d_mask, *inputs, mask)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchdit.expert_mix)
def _flops(z: torch.Size, weight: torch.Size, bias: torch.Size, gates: torch.Size, **_) -> int:
    """Of the merged form: a product per sample, and the merging of the experts."""
    (n, tokens, width), (rows, num_experts) = z, gates
    return 2 * (n * tokens * width**2 + rows * num_experts * (width**2 + width))


@register_flop_formula(torch.ops.switchdit.expert_mix_backward)
def _backward_flops(d_routed, d_mask, z: torch.Size, weight: torch.Size, bias, gates: torch.Size, *_, **__) -> int:
    """Two products per sample; merging, and the sums over samples of gates and of experts."""
    (n, tokens, width), (rows, num_experts) = z, gates
    return 2 * (2 * n * tokens * width**2 + 3 * rows * num_experts * width**2 + 2 * rows * num_experts * width)


def fused_kernel(z: Tensor, weight: Tensor, gates: Tensor):
    """The fused kernel, where it is asked for, runs and fits; else None."""
    if z.device.type != "cuda":
        return None
    from switchdit.kernels import builder

    return builder.load_fused(z.device) if builder.supports(z, weight, gates) else None


def _per_row(x: Tensor, gates: Tensor) -> Tensor:
    """(N, L, D) as the tokens of each row of gates: one row for all samples has them all."""
    return x if len(gates) == len(x) else x.reshape(1, -1, x.shape[-1])


def _buffers(weight: Tensor, num_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Room for a (D, D) matrix per row, a few rows at a time: which rows, and (rows, D, D) to be written."""
    shape = weight.shape[1:]
    fit = max(1, BUFFER.get(weight.device.type, BUFFER["cuda"]) // (shape.numel() * weight.element_size()))
    parts = max(1, min(-(-num_rows // fit), num_rows // MIN_ROWS))
    bounds = [num_rows * part // parts for part in range(parts + 1)]
    most = -(-num_rows // parts)
    buffer = _scratch(weight, most * shape.numel()).view(most, *shape)
    for start, end in itertools.pairwise(bounds):
        yield slice(start, end), buffer[: end - start]


def _scratch(like: Tensor, size: int) -> Tensor:
    """(size,) to be written and forgotten. On a CPU it is the thread's own, call after call: new memory would come page
    by page from the system, which takes longer than merging; on a GPU PyTorch keeps memory itself."""
    if like.device.type != "cpu":
        return like.new_empty(size)
    kept = vars(_KEPT).setdefault(like.dtype, like.new_empty(0))
    if kept.numel() < size:
        with torch.inference_mode(False):  # what inference mode makes cannot be written outside of it
            kept = vars(_KEPT)[like.dtype] = like.new_empty(size)
    return kept[:size]


def _merged(weight: Tensor, gates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``sum_j g_nj W_j``: which rows n, and their matrices."""
    for rows, buffer in _buffers(weight, len(gates)):
        torch.mm(gates[rows], weight.flatten(1), out=buffer.flatten(1))
        yield rows, buffer
