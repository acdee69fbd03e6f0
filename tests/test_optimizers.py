"""Which optimizer trains, that it skips to the last bit what is not finite, and that another goes on with its state."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import deepspeed.runtime.zero.utils as zero_utils
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from launching import ROOT, free_port

from switchdit import build_model
from switchdit.config import config_from_dict
from switchdit.deepspeed_config import resolve_deepspeed_config
from switchdit.engine.checkpoint import Checkpoints, load_checkpoint
from switchdit.engine.clipping import global_norm
from switchdit.engine.ema import Ema
from switchdit.engine.engine import build_engine, grad_norm, init_processes
from switchdit.engine.faults import Updates, poisoned
from switchdit.engine.optimizers import apex_fused_adam, base_optimizer, described, skip_on_device, skips_on_device
from switchdit.errors import UserError

STAGES = (0, 1, 2)
LR, DECAY = 1e-2, 0.1


@pytest.fixture(scope="module", autouse=True)
def alone():
    """The one process of a group."""
    with pytest.MonkeyPatch.context() as environment:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for variable, value in {**place, "MASTER_PORT": str(free_port())}.items():
            environment.setenv(variable, value)
        init_processes()
        yield
        dist.destroy_process_group()


class Apex(torch.optim.Optimizer):
    """As apex's FusedAdam is seen from outside: its settings, and its steps counted in those."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
                p.mul_(1 - lr * group["weight_decay"])
                mean = state["exp_avg"].lerp_(p.grad, 1 - beta1) / (1 - beta1**step)
                square = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2) / (1 - beta2**step)
                p.sub_(lr * mean / (square.sqrt() + group["eps"]))


@pytest.fixture
def apex(monkeypatch):
    Apex.__module__, Apex.__qualname__, Apex.__name__ = "apex.optimizers.fused_adam", "FusedAdam", "FusedAdam"
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    package.optimizers, optimizers.FusedAdam = optimizers, Apex
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    supported = [*zero_utils.ZERO_SUPPORTED_OPTIMIZERS, Apex]  # DeepSpeed looks for apex when it is imported
    monkeypatch.setattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", supported)


def make_engine(stage: int, backend: str = "auto", clip: float = 0.0, bf16: bool = False, **params):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.SiLU(), torch.nn.Linear(5, 2))
    settings = {"lr": LR, "weight_decay": DECAY, "torch_adam": backend in ("auto", "torch"), **params}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": settings},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    if bf16:
        config["bf16"] = {"enabled": True}
    return build_engine(model, config, backend)


def loss_of(model, number: int):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
    return model(x.to(next(model.parameters()).dtype)).float().square().sum()


def train(engine, numbers, updates: Updates | None = None) -> None:
    for number in numbers:
        engine.backward(loss_of(engine, number))
        if updates:
            updates.step(number)
            assert updates.hear() == (number, True)
        else:
            engine.step()


def bits(engine) -> list[bytes]:
    """Of weights, masters, moments and counts."""
    optimizer = base_optimizer(engine)
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for master in masters for value in optimizer.state[master].values()]
    assert len(state) == 3 * len(masters)
    tensors = [*engine.module.parameters(), *masters, *state]
    return [t.detach().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]


def weights(engine) -> list[torch.Tensor]:
    return [p.detach().float().clone() for p in engine.module.parameters()]


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_what_is_not_finite_changes_no_bit(stage, bf16, clip):
    engine = make_engine(stage, clip=clip, bf16=bf16)
    updates = Updates(engine)
    assert skips_on_device(engine)
    train(engine, [1, 2], updates)
    before = bits(engine)
    for number, bad in enumerate((math.nan, math.inf, -math.inf), 3):
        engine.backward(poisoned(loss_of(engine, number) + bad))
        updates.step(number)
        assert updates.hear() == (number, False)
        assert updates.hear() is None
        assert bits(engine) == before
        assert grad_norm(engine) is None
        assert engine.skipped_steps == number - 2
    loss = loss_of(engine, 6)
    first = next(engine.module.parameters())
    hook = first.register_hook(lambda grad: torch.where(torch.arange(grad.numel()).view_as(grad) == 7, math.inf, grad))
    engine.backward(loss)  # finite itself; a single value of its gradient is not
    hook.remove()
    updates.step(6)
    assert updates.hear() == (6, False)
    assert bits(engine) == before
    train(engine, [7], updates)
    assert all(a != b for a, b in zip(bits(engine), before, strict=True))
    assert engine.skipped_steps == 4


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("stage", STAGES)
def test_the_fused_kernel_clips_and_steps_as_pytorch_does(stage, clip):
    engine = make_engine(stage, clip=clip)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.SiLU(), torch.nn.Linear(5, 2))
    model.load_state_dict(engine.module.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, eps=1e-3)
    base_optimizer(engine).param_groups[0]["eps"] = 1e-3  # else the gradient's scale is divided out
    for number in range(4):
        train(engine, [number])
        optimizer.zero_grad()
        loss_of(model, number).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        assert norm > clip
        assert grad_norm(engine) == pytest.approx(float(norm), rel=1e-6)
        optimizer.step()
    for ours, theirs in zip(weights(engine), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_millions_of_values_is_right(dtype):
    """PyTorch's own norm of as many on the CPU is off by 5e-4."""
    gradient = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    zero = SimpleNamespace(averaged_gradients={0: [gradient[:1000], gradient[1000:]], 1: [gradient]})
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2, optimizer=zero, device=gradient.device)
    expected = 2**0.5 * torch.linalg.vector_norm(gradient.double())
    assert global_norm(engine).item() == pytest.approx(expected.item(), rel=1e-6)


def saved(engine, folder: Path, step: int) -> tuple[Path, dict]:
    folder.mkdir()
    checkpoints = Checkpoints(folder, engine, Ema(engine, 0.9))
    checkpoints.save(step, {"model": {"name": "tiny"}}, {})
    checkpoints.finish()
    return folder / f"step_{step:07d}", {"model": {"name": "tiny"}}


def state_of(engine) -> dict[str, list[torch.Tensor]]:
    optimizer = base_optimizer(engine)
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return {kind: [state[kind].detach().clone() for state in states] for kind in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("to_fused", [True, False])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_saved_with_the_plain_adam_goes_on_with_the_fused_one(tmp_path, stage, to_fused):
    source = make_engine(stage, clip=0.5, fused=not to_fused)
    train(source, range(3))
    path, about = saved(source, tmp_path / "checkpoints", 3)
    resumed = make_engine(stage, clip=0.5, fused=to_fused)
    assert load_checkpoint(path, resumed, Ema(resumed, 0.9), about)[0] == 3
    for group in base_optimizer(resumed).param_groups:
        assert group["fused"] is to_fused
    assert skips_on_device(resumed) is to_fused
    for kind, tensors in state_of(source).items():
        assert all(map(torch.equal, state_of(resumed)[kind], tensors))
    assert all(map(torch.equal, weights(resumed), weights(source)))
    train(source, [3, 4])
    train(resumed, [3, 4], Updates(resumed))
    for ours, theirs in zip(weights(resumed), weights(source), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("stage", "backend"), [(0, "apex"), (2, "apex"), (0, "auto"), (2, "auto")])
def test_a_run_of_apex_goes_on_elsewhere(tmp_path, apex, stage, backend):
    """Its count of steps included, without which the moments would be corrected as if they were new."""
    source = make_engine(2 - stage, "apex", clip=0.5)
    assert type(base_optimizer(source)) is Apex
    assert described(source).startswith("optimizer: FusedAdam of apex; ")
    assert "by the host, which waits" in described(source)
    train(source, range(3), Updates(source))
    path, about = saved(source, tmp_path / "checkpoints", 3)
    resumed = make_engine(stage, backend, clip=0.5)
    load_checkpoint(path, resumed, Ema(resumed, 0.9), about)
    train(source, [3, 4])
    train(resumed, [3, 4], Updates(resumed))
    for ours, theirs in zip(weights(resumed), weights(source), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    if backend == "apex":
        back = make_engine(2 - stage, "auto", clip=0.5)
        path, about = saved(resumed, tmp_path / "again", 5)
        load_checkpoint(path, back, Ema(back, 0.9), about)
        states = base_optimizer(back).state.values()
        assert {float(state["step"]) for state in states} == {5.0}


def test_apex_must_be_nvidias(monkeypatch):
    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # as the other project of that name
    with pytest.raises(UserError) as mistake:
        apex_fused_adam()
    assert "optimizer.backend is 'apex', but there is no apex.optimizers.FusedAdam" in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_another_deepspeed_is_refused_before_it_trains():
    inner = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
    outer = SimpleNamespace(optimizer=inner, step=None, averaged_gradients={}, scaled_global_norm=None)
    engine = SimpleNamespace(optimizer=outer, zero_optimization_stage=lambda: 2, gradient_clipping=lambda: 1.0)
    with pytest.raises(UserError, match=r"has no check_grad_overflow, unscale_and_clip_grads, which 0\.19\.8 has$"):
        skip_on_device(engine)


def resolved(tmp_path, backend: str, on_gpu: bool = False, shipped: str = "zero2_bf16", **optimizer) -> dict:
    values = json.loads((ROOT / f"ds_configs/{shipped}.json").read_text())
    params = {**values["optimizer"]["params"], **optimizer.pop("params", {})}
    values["optimizer"] |= {**optimizer, "params": {k: v for k, v in params.items() if v is not None}}
    (tmp_path / "ds.json").write_text(json.dumps(values))
    config = {"run_dir": "r", "model": {"name": "DiT-S/2"}, "train": {"steps": 1, "global_batch": 8}}
    data = {"latents": "l", "image_size": 256, "vae": "v"}
    run = config_from_dict({**config, "data": data, "optimizer": {"backend": backend}})
    return resolve_deepspeed_config(tmp_path / "ds.json", run, 1, on_gpu)


OFFLOAD = "zero2_bf16_offload"


@pytest.mark.parametrize(
    ("backend", "given", "on_gpu", "shipped", "torch_adam"),
    [
        ("auto", "auto", False, "zero2_bf16", True),
        ("auto", "auto", True, "zero2_bf16", True),
        ("auto", None, True, "zero0_fp32", True),
        ("auto", "auto", True, OFFLOAD, False),
        ("auto", "auto", False, OFFLOAD, True),
        ("auto", False, True, "zero2_bf16", False),  # the DeepSpeed config names DeepSpeed's
        ("auto", True, True, OFFLOAD, True),
        ("torch", "auto", True, OFFLOAD, True),
        ("torch", None, True, "zero2_bf16", True),
        ("deepspeed", "auto", False, "zero2_bf16", False),
        ("deepspeed", False, True, OFFLOAD, False),
        ("apex", "auto", True, "zero2_bf16", False),
    ],
)
def test_who_chooses_torchs_adam(tmp_path, backend, given, on_gpu, shipped, torch_adam):
    params = resolved(tmp_path, backend, on_gpu, shipped, params={"torch_adam": given})["optimizer"]["params"]
    assert params["torch_adam"] is torch_adam


@pytest.mark.parametrize(
    ("backend", "shipped", "optimizer", "says"),
    [
        ("torch", "zero2_bf16", {"params": {"torch_adam": False}}, "is False, but the run's config implies True"),
        ("deepspeed", "zero2_bf16", {"params": {"torch_adam": True}}, "is True, but the run's config implies False"),
        ("torch", "zero2_bf16", {"type": "SGD"}, "optimizer.type is 'SGD'; with optimizer.backend 'torch' it must be"),
        ("apex", OFFLOAD, {}, "offload_optimizer needs optimizer.backend auto, torch or deepspeed"),
        ("nvidia", "zero2_bf16", {}, "optimizer.backend is 'nvidia'; it must be auto or torch or deepspeed or apex"),
        (True, "zero2_bf16", {}, "config key 'optimizer.backend' must be of type str, not True"),
    ],
)
def test_contradictions_are_refused(tmp_path, backend, shipped, optimizer, says):
    with pytest.raises(UserError) as mistake:
        resolved(tmp_path, backend, True, shipped, **optimizer)
    assert says in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_other_optimizers_stay_possible(tmp_path):
    params = resolved(tmp_path, "auto", type="SGD", params=dict.fromkeys(("torch_adam", "betas", "eps")))["optimizer"]
    assert params == {"type": "SGD", "params": {"lr": 1e-4, "weight_decay": 0.0}}


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "AdamW of torch as a fused kernel; a step that is not finite is skipped on the device"),
        ({"fused": False}, "AdamW of torch; a step that is not finite is skipped by the host, which waits"),
        ({"foreach": True}, "AdamW of torch; a step that is not finite is skipped by the host, which waits"),
    ],
)
def test_the_log_says_which(params, says):
    assert says in described(make_engine(2, **params))


def test_one_process_overlaps_nothing(tmp_path):
    assert resolved(tmp_path, "auto")["zero_optimization"]["overlap_comm"] is False


def test_experts_are_reduced_with_all_others_where_the_same_processes_do_both(monkeypatch):
    """The real ZeRO optimizer: that it works out is for the gradients' parity; this is that it happens."""
    for name in [name for name in vars(groups) if name.startswith("_EXPERT_")]:  # gone again when the test ends
        monkeypatch.setattr(groups, name, {})
    torch.manual_seed(0)
    model = build_model("Switch-DiT-S/2", depth=1, hidden_size=16, num_heads=2, input_size=4, num_classes=3)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
    }
    zero = build_engine(model, config).optimizer
    assert list(zero.expert_dp_process_group) == ["ep_size_1"]
    assert zero.expert_dp_process_group["ep_size_1"] is zero.dp_process_group
