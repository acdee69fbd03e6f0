"""Configs: what a run may say, and what is said back when it is wrong."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from switchdit.config import Config, config_from_dict, config_to_dict, load_config
from switchdit.deepspeed_config import micro_batch_of, resolve_deepspeed_config
from switchdit.engine.objective import auxiliary_of
from switchdit.errors import UserError
from switchdit.models import model_fields

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "switchdit/configs").rglob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
DIGITS = ROOT / "switchdit/configs/digits.yaml"


def minimal(**train) -> dict:
    return {
        "run_dir": "r",
        "model": {"name": "Switch-DiT-S/2"},
        "data": {"latents": "l", "image_size": 256, "vae": "v"},
        "train": {"steps": 1, **train},
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_say_how_to_run_them(path):
    config = load_config(path)
    model_fields(config.model_name, **config.model_overrides)
    auxiliary_of(config)
    head = path.read_text().split("run_dir:")[0]
    assert f"--config {path.relative_to(ROOT)}" in head
    assert "Expected" in head or "expected" in head or "reproduced" in head
    for ds_config in DS_CONFIGS:
        for world_size in (8, 16):
            resolved = resolve_deepspeed_config(ds_config, config, world_size, on_gpu=True)
            assert "auto" not in json.dumps(resolved)
            assert resolved["train_batch_size"] == config.train.global_batch


def test_a_config_survives_being_written_and_read(tmp_path):
    config = load_config(DIGITS, ["train.lr=3e-4", "sample.guided_channels=3", "model.depth=2"])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    assert load_config(tmp_path / "c.yaml") == config
    assert (config.train.lr, config.sample.guided_channels, config.model["depth"]) == (3e-4, 3, 2)


def test_a_base_gives_what_the_file_does_not(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**minimal(lr=0.5, seed=3), "loss": {"lambda_dp": 2.0}}))
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {seed: 4}\nmodel: {top_k: 1}\n")
    (tmp_path / "sub/c.yaml").write_text("base: ../b.yaml\nrun_dir: other\n")
    config = load_config(tmp_path / "sub/c.yaml", ["loss.lambda_dp=3"])
    assert (config.run_dir, config.train.lr, config.train.seed, config.loss.lambda_dp) == ("other", 0.5, 4, 3.0)
    assert config.model == {"name": "Switch-DiT-S/2", "top_k": 1}


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("c.yaml", "is its own base"),
        ("none.yaml", "none.yaml' does not exist"),
        ("[1]", "is \\[1\\]; it must be the path"),
    ],
)
def test_a_base_that_cannot_be(tmp_path, base, says):
    (tmp_path / "c.yaml").write_text(f"base: {base}\n")
    with pytest.raises(UserError, match=says):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["diffusion.process=flow"], "diffusion.process is 'flow'; it must be gaussian or rectified_flow"),
        (["diffusion.process=rectified_flow"], "sample.sampler is 'ddpm'; it must be euler (rectified_flow)"),
        (["sample.sampler=euler"], "sample.sampler is 'euler'; it must be ddpm or ddim (gaussian)"),
        (["loss.weighting=snr"], "it must be constant or min_snr or p2 or uncertainty"),
        (["loss.auxiliary=prior"], "it must be none or load_balancing or diffusion_prior"),
        (["sample.guidance_interval=[500, 100]"], "it must be two timesteps in order, or null"),
        (["sample.eta=0.5"], "sample.eta is 0.5; it must be 0 for ddpm: it is of ddim"),
        (["loss.lambda_dp=.inf"], "config key 'loss.lambda_dp' must be of type float, not inf"),
        (["train.lr=.nan"], "config key 'train.lr' must be of type float, not nan"),
        (["sample.dtype=float16"], "it must be float32 or bfloat16"),
        (["train.step=3"], "config key 'train.step' is unknown; did you mean 'train.steps'?"),
        (["trian.steps=3"], "config key 'trian' is unknown; did you mean 'train'?"),
        (["lambda_dp=3"], "did you mean 'loss.lambda_dp'?"),
        (["data.schedule=linear"], "did you mean 'diffusion.schedule'?"),
        (["train.steps=many"], "config key 'train.steps' must be of type int, not 'many'"),
        (["train.steps=1.5"], "must be of type int, not 1.5"),
        (["train.steps=true"], "must be of type int, not True"),
        (["train.steps=0"], "train.steps is 0; it must be at least 1"),
        (["train.lr=fast"], "must be of type float, not 'fast'"),
        (["train.betas=[0.9]"], "train.betas is [0.9]; it must be two numbers"),
        (["diffusion.schedule=cosin"], "diffusion.schedule is 'cosin'; it must be cosine or linear"),
        (["sample.sampler=euler"], "must be ddpm or ddim"),
        (["train.ema_decay=1"], "train.ema_decay is 1.0; it must be from 0 to below 1"),
        (["train"], "override 'train' must have the form section.key=value"),
        (["run_dir.x=1"], "'run_dir' is a value, not a section"),
        (["train=3"], "config section 'train' must hold keys, not 3"),
        (["train.lr=[1"], "is not valid YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, says):
    with pytest.raises(UserError) as info:
        load_config(DIGITS, overrides)
    assert says in str(info.value)
    assert "\n" not in str(info.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"'nowhere.yaml' does not exist"):
        load_config("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must hold sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "broken.yaml")
    with pytest.raises(UserError, match=r"'train.steps' is missing"):
        config_from_dict({**minimal(), "train": {}})


def test_learning_rate_without_a_dot_is_a_number(tmp_path):
    assert config_from_dict(minimal(lr="1e-4")).train.lr == 1e-4


@given(
    micro_batch=st.integers(1, 64), accumulation=st.integers(1, 8), world_size=st.integers(1, 64), off=st.integers(0, 5)
)
def test_batch_arithmetic(micro_batch, accumulation, world_size, off):
    total = micro_batch * accumulation * world_size + off
    config = config_from_dict(minimal(global_batch=total, gradient_accumulation_steps=accumulation))
    if total % (accumulation * world_size):
        with pytest.raises(UserError, match=f"global_batch \\({total}\\) must be divisible"):
            micro_batch_of(config, world_size)
    else:
        assert micro_batch_of(config, world_size) * accumulation * world_size == total


def test_a_given_micro_batch_must_fit():
    config = config_from_dict(minimal(global_batch=32, micro_batch=8))
    assert micro_batch_of(config, 4) == 8
    with pytest.raises(UserError, match=r"micro_batch \(8\) x .* leave micro_batch null to get 16"):
        micro_batch_of(config, 2)


def resolve(tmp_path, change, config: Config | None = None, world_size: int = 2):
    values = json.loads((ROOT / "ds_configs/zero2_fp32.json").read_text())
    change(values)
    (tmp_path / "ds.json").write_text(json.dumps(values))
    return resolve_deepspeed_config(tmp_path / "ds.json", config or config_from_dict(minimal()), world_size, False)


def test_auto_takes_the_runs_values(tmp_path):
    config = config_from_dict(
        minimal(lr=3e-4, weight_decay=0.1, max_grad_norm=2.0, global_batch=64, gradient_accumulation_steps=4)
    )
    resolved = resolve(tmp_path, lambda v: None, config)
    assert resolved["optimizer"]["params"] == {
        "lr": 3e-4,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "torch_adam": True,
    }
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 2.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(train_batch_size=7), "'train_batch_size' is 7, but the run's config implies 256"),
        (lambda v: v["optimizer"]["params"].update(lr=1.0), "'optimizer.params.lr' is 1.0"),
        (lambda v: v.update(amp={"enabled": "auto"}), "nothing in the run's config fills \"auto\" of 'amp.enabled'"),
        (lambda v: v["zero_optimization"].update(stage=3), "stage is 3; with DeepSpeed's MoE it must be 0, 1 or 2"),
        (lambda v: v["zero_optimization"].update(contiguous_gradients=False), "needs contiguous_gradients"),
        (lambda v: v.update(bf16={"enabled": True}, zero_optimization={"stage": 0}), "bf16 needs"),
        (lambda v: v.update(fp16={"enabled": True}), "fp16 is not supported"),
        (lambda v: v["zero_optimization"].update(round_robin_gradients=True), "round_robin_gradients must be off"),
        (lambda v: v["zero_optimization"].update(elastic_checkpoint=True), "elastic_checkpoint must be off"),
        (lambda v: v["optimizer"].update(params=[1]), "optimizer.params must be an object, not [1]"),
        (lambda v: v["optimizer"].update(params=None), "optimizer.params must be an object, not None"),
        (lambda v: v.update(torch_autocast={"enabled": True}), "torch_autocast is not supported"),
        (lambda v: v.update(torch_autocast=3), "'torch_autocast' must be an object, not 3"),
        (lambda v: v["zero_optimization"].update(load_from_fp32_weights=False), "load_from_fp32_weights must be true"),
        (lambda v: v.update(checkpoint={"load_universal": True}), "checkpoint.load_universal must be off"),
        (lambda v: v.update(checkpoint=True), "'checkpoint' must be an object, not True"),
        (lambda v: v.update(use_data_before_expert_parallelism=True), "must be off"),
        (lambda v: v.update(scheduler={"type": "WarmupLR"}), "must have no 'scheduler'"),
        (lambda v: v.pop("optimizer"), "needs an 'optimizer' section"),
    ],
)
def test_deepspeed_configs_that_cannot_work(tmp_path, change, says):
    with pytest.raises(UserError) as info:
        resolve(tmp_path, change)
    assert says in str(info.value)
    assert "\n" not in str(info.value)


def test_world_size_must_be_divisible_by_ep_size(tmp_path):
    config = config_from_dict({**minimal(global_batch=12), "model": {"name": "Switch-DiT-S/2", "ep_size": 2}})
    with pytest.raises(UserError, match=r"number of processes \(3\) must be divisible by ep_size \(2\)"):
        resolve(tmp_path, lambda v: None, config, world_size=3)


def test_broken_deepspeed_json(tmp_path):
    (tmp_path / "ds.json").write_text('{"a": 1,}')
    with pytest.raises(UserError, match="is not valid JSON"):
        resolve_deepspeed_config(tmp_path / "ds.json", config_from_dict(minimal()), 1, False)
    with pytest.raises(UserError, match="does not exist"):
        resolve_deepspeed_config(tmp_path / "absent.json", config_from_dict(minimal()), 1, False)


def test_learning_rate():
    train = config_from_dict(minimal(lr=2.0, warmup_steps=4, decay_steps=5) | {"model": {"name": "x"}}).train
    train.steps = 20
    assert [train.lr_at(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert [train.lr_at(step) for step in range(14, 20)] == pytest.approx([2.0, 2.0, 1.6, 1.2, 0.8, 0.4])
    constant = config_from_dict(minimal(lr=2.0)).train
    assert constant.lr_at(0) == constant.lr_at(10**6) == 2.0


def test_auxiliary_losses_go_with_systems():
    auxiliary = {
        name: auxiliary_of(config_from_dict({**minimal(), "model": {"name": name}}))
        for name in ("DiT-S/2", "DTR-S/2", "Switch-DiT-S/2", "Diff-MoE-S/2", "Multi-Expert-DiT-S/2")
    }
    assert list(auxiliary.values()) == ["none", "none", "diffusion_prior", "load_balancing", "none"]
    with pytest.raises(UserError, match="for Diff-MoE it must be load_balancing or none"):
        auxiliary_of(
            config_from_dict({**minimal(), "model": {"name": "Diff-MoE-S/2"}, "loss": {"auxiliary": "diffusion_prior"}})
        )
