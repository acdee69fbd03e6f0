"""Train one small model in several ways and write down what came out: expert_parallel.py EP_SIZE OUT.npz

Every process sees the same global batch and takes its share of it.
"""

import itertools
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from switchdit import build_model
from switchdit.engine.ema import Ema
from switchdit.engine.engine import build_engine, grad_norm, init_processes, leave
from switchdit.engine.global_state import gather_experts, global_state_dict, load_global_state_dict, local_view
from switchdit.moe.diffusion_prior import diffusion_prior_loss, match_columns, prior_mask
from switchdit.moe.dispatch import bytes_per_layer, set_dispatch

FIELDS = {
    "input_size": 8,
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "num_classes": 3,
    "num_experts": 4,
    "top_k": 2,
}
GLOBAL_BATCH, STEPS = 16, 3

#        dispatch   fields of the model beyond FIELDS
CASES = {
    "plain": ("samples", {}),
    "noisy": ("weights", {"gate": "noisy", "integration": "multiply_skip"}),
}


def initial_weights(fields: dict) -> dict[str, torch.Tensor]:
    """The same whatever the topology, with nothing at zero."""
    rng = torch.Generator().manual_seed(7)
    weights = build_model("Switch-DiT-S/2", **fields).state_dict()
    for name, value in weights.items():
        if name != "pos_embed":
            value.copy_(0.1 * torch.randn(value.shape, generator=rng))
    return weights


def engine_of(model: torch.nn.Module, micro_batch: int):
    return build_engine(
        model,
        {
            "train_batch_size": GLOBAL_BATCH,
            "train_micro_batch_size_per_gpu": micro_batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.0, "torch_adam": True}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000, "allgather_bucket_size": 3000},
            "steps_per_print": 10**9,
        },
    )


def run(case: str, ep_size: int, processes) -> dict[str, np.ndarray]:
    dispatch, more_fields = CASES[case]
    fields = {**FIELDS, **more_fields}
    model = build_model("Switch-DiT-S/2", **fields, ep_size=ep_size)
    load_global_state_dict(model, initial_weights(fields))
    model.class_dropout_prob = 0.0
    set_dispatch(model, dispatch, samples=1, itemsize=4)
    micro_batch = GLOBAL_BATCH // processes.world_size
    mine = slice(processes.rank * micro_batch, (processes.rank + 1) * micro_batch)
    engine = engine_of(model, micro_batch)
    ema = Ema(engine, 0.5)
    prior = prior_mask(len(model.blocks), model.num_experts, model.top_k)
    rng = torch.Generator().manual_seed(11)
    losses, norms, gradients = [], [], {}
    engine.train()
    for step in range(STEPS):
        x = torch.randn(GLOBAL_BATCH, 4, 8, 8, generator=rng)
        target = torch.randn(GLOBAL_BATCH, 8, 8, 8, generator=rng)
        t = torch.randint(0, 1000, (GLOBAL_BATCH,), generator=rng)
        y = torch.randint(0, 3, (GLOBAL_BATCH,), generator=rng)
        noise = torch.randn(GLOBAL_BATCH, model.num_gates, generator=rng) if model.gate == "noisy" else None
        assignment = match_columns(model.task_expert_map(), prior, 0, step)
        options = {} if noise is None else {"gate_noise": noise[mine]}
        out, routing = engine(x[mine], t[mine], y[mine], return_routing=True, **options)
        aux = diffusion_prior_loss(routing.probs, t[mine], prior, assignment, len(model.blocks))
        loss = (out - target[mine]).square().mean() + aux
        engine.backward(loss)
        if step == 0:
            local = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
            gradients = {f"{case}/grad/{n}": g.numpy() for n, g in gather_experts(model, local).items()}
        engine.step()
        ema.update()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / processes.world_size)
        norms.append(grad_norm(engine) or 0.0)
    out = {f"{case}/losses": np.array(losses), f"{case}/norms": np.array(norms), **gradients}
    out |= {f"{case}/param/{n}": v.numpy() for n, v in global_state_dict(model).items()}
    out |= {f"{case}/ema/{n}": v.numpy() for n, v in ema.state_dict().items()}
    engine.destroy()
    return out


def check_initialisation(ep_size: int) -> None:
    """A seed gives the same experts on whatever rank they live."""
    fields = {**FIELDS, **CASES["noisy"][1]}
    torch.manual_seed(3)
    whole = build_model("Switch-DiT-S/2", **fields).state_dict()
    torch.manual_seed(3)
    model = build_model("Switch-DiT-S/2", **fields, ep_size=ep_size)
    mine = local_view(model, whole)
    for name, value in model.state_dict().items():
        assert torch.equal(value, mine[name]), name


def counted(dispatch: str, ep_size: int, processes) -> dict[str, np.ndarray]:
    """Bytes of tokens or experts that a rank sends per layer, as predicted and as counted, and what happens in order:
    m a block's modulation, a its attention, > an exchange sets out."""
    model = build_model("Switch-DiT-S/2", **FIELDS, ep_size=ep_size)
    load_global_state_dict(model, initial_weights(FIELDS))
    every_choice = list(itertools.combinations(range(FIELDS["num_experts"]), FIELDS["top_k"]))
    samples, grid = 2 * len(every_choice), FIELDS["input_size"] // 2
    engine = engine_of(model, GLOBAL_BATCH // processes.world_size)  # which also makes the ranks' groups
    set_dispatch(model, dispatch, samples=samples, itemsize=4)
    gates = torch.zeros(samples, FIELDS["num_experts"])
    for sample in range(samples):
        gates[sample, list(every_choice[sample // 2])] = 0.5
    order, sent = [], 0
    for block in model.blocks:
        block.moe.gate.forward = lambda *_: (gates, gates)  # all choices equally often
        block.adaLN_modulation.register_forward_hook(lambda *_: order.append("m"))
        block.attn.register_forward_hook(lambda *_: order.append("a"))

    def watch(collective, elsewhere):
        def watched(out, tensor, *splits, **options):
            nonlocal sent
            if tensor.dim() == 3:  # neither counts nor gates
                order.append(">")
                sent += elsewhere(tensor, *splits) * tensor[0].numel() * tensor.element_size()
            return collective(out, tensor, *splits, **options)

        return watched

    def rows_elsewhere(tensor, receive=None, send=None) -> int:
        here = processes.rank % ep_size
        return len(tensor) - (len(tensor) // ep_size if send is None else send[here])

    dist = torch.distributed
    unwatched = dist.all_to_all_single, dist.all_gather_into_tensor
    dist.all_to_all_single = watch(unwatched[0], rows_elsewhere)
    dist.all_gather_into_tensor = watch(unwatched[1], lambda tensor: len(tensor) * (ep_size - 1))
    rng = torch.Generator().manual_seed(5)
    x, t, y = torch.randn(samples, 4, 8, 8, generator=rng), torch.arange(samples), torch.zeros(samples).long()
    out = model(x, t, y, drop_label=y > 0)
    forward = "".join(order)
    torch.autograd.grad(out.square().mean(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    dist.all_to_all_single, dist.all_gather_into_tensor = unwatched
    sizes = {name: FIELDS[name] for name in ("num_experts", "top_k")}
    sizes |= {"samples": samples, "tokens": grid**2, "width": FIELDS["hidden_size"], "ep_size": ep_size, "itemsize": 4}
    engine.destroy()
    total = torch.tensor(float(sent))  # of samples, ranks send what these choose: the model is of their mean
    dist.all_reduce(total)
    mean = total.item() / (processes.world_size * FIELDS["depth"])
    return {f"sent/{dispatch}": np.array([bytes_per_layer(dispatch, **sizes), mean]), f"order/{dispatch}": forward}


def main():
    ep_size, path = int(sys.argv[-2]), sys.argv[-1]
    processes = init_processes()
    check_initialisation(ep_size)
    results = {}
    for case in CASES:
        results |= run(case, ep_size, processes)
    if ep_size > 1:
        for dispatch in ("samples", "weights"):
            results |= counted(dispatch, ep_size, processes)
    if processes.is_first:
        np.savez(path, **results)
    leave()


main()
