"""Optimizer state in host memory: the same numbers, resumable, and refused where it cannot work."""

import json
import shutil

import numpy as np
import pytest
import torch
from launching import ROOT, WORKERS, launched
from safetensors.torch import load_file
from tiny_run import write_config, write_latents

from switchdit.config import config_from_dict
from switchdit.deepspeed_config import resolve_deepspeed_config
from switchdit.errors import UserError

SHIPPED = ROOT / "ds_configs/zero2_bf16_offload.json"


@pytest.mark.world_size(2)
def test_the_same_numbers_to_the_last_bit(tmp_path):
    """Accumulation, experts on two processes, float32 and bf16: losses and averages.

    Gradient norms are sums in another order, so that clipping differs by their rounding.
    """
    launched(2, WORKERS / "offload.py", tmp_path / "out.npz")
    results = dict(np.load(tmp_path / "out.npz"))
    on_host = [name for name in results if "/host/" in name]
    assert len(on_host) * 2 == len(results)
    assert {name.split("/")[0] for name in on_host} == {"float32", "clipped", "bf16"}
    for name in on_host:
        device = results[name.replace("/host/", "/device/")]
        if name.endswith("norms") or name.startswith("clipped"):
            np.testing.assert_allclose(results[name], device, rtol=1e-6, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(results[name], device, err_msg=name)
    assert (results["clipped/host/norms"] > 0.05).all(), "clipping must bite"
    assert results["float32/host/losses"][0] != results["float32/host/losses"][-1]


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_training_with_the_shipped_config_resumes_to_the_last_bit(tmp_path):
    latents = write_latents(tmp_path / "latents")
    run_dir = tmp_path / "run"
    config = write_config(
        tmp_path / "run.yaml", latents, run_dir, train={"steps": 4}, monitor={"checkpoint_every": 2, "routing_every": 0}
    )
    command = (2, ROOT / "switchdit/train.py", "--config", config, "--deepspeed_config", SHIPPED)
    launched(*command)
    last = run_dir / "checkpoints/step_0000004"
    whole = load_file(last / "ema.safetensors")
    shutil.move(last, tmp_path / "kept")
    launched(*command, "--resume", str(run_dir / "checkpoints/step_0000002"))
    resumed = load_file(last / "ema.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    early = load_file(run_dir / "checkpoints/step_0000002/ema.safetensors")
    assert any(not torch.equal(early[name], whole[name]) for name in whole)


def resolved(tmp_path, on_gpu: bool = False, **changes) -> dict:
    values = json.loads(SHIPPED.read_text())
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change}
    (tmp_path / "ds.json").write_text(json.dumps(values))
    config = {"run_dir": "r", "model": {"name": "DiT-S/2"}, "train": {"steps": 1, "global_batch": 8}}
    data = {"latents": "l", "image_size": 256, "vae": "v"}
    return resolve_deepspeed_config(tmp_path / "ds.json", config_from_dict({**config, "data": data}), 1, on_gpu)


def test_on_a_cpu_nothing_is_compiled_and_on_a_gpu_adam_is_deepspeeds(tmp_path):
    assert resolved(tmp_path)["optimizer"]["params"]["torch_adam"] is True
    assert resolved(tmp_path, on_gpu=True)["optimizer"]["params"]["torch_adam"] is False
    assert resolved(tmp_path)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        (
            "zero_optimization",
            {"offload_optimizer": {"device": "nvme"}},
            "is 'nvme'; it must be 'cpu' or 'none'",
        ),
        ("zero_optimization", {"offload_optimizer": {"device": []}}, "is []; it must be 'cpu' or 'none'"),
        ("zero_optimization", {"offload_optimizer": "cpu"}, "'offload_optimizer' must be an object, not 'cpu'"),
        ("zero_optimization", {"stage": 0}, "offload_optimizer needs zero_optimization.stage 1 or 2"),
        ("zero_optimization", {"offload_param": {"device": "cpu"}}, "offload_param needs zero_optimization.stage 3"),
        ("zero_optimization", {"zenflow": {"topk_ratio": 0.1}}, "zenflow is not supported"),
        ("bf16", {"bf16_master_weights_and_grads": True}, "masters and their average are float32"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, section, change, says):
    with pytest.raises(UserError) as mistake:
        resolved(tmp_path, **{section: change})
    assert says in str(mistake.value)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("offload", [None, {}, {"device": "none"}])
def test_no_offload_is_no_mistake(tmp_path, offload):
    assert resolved(tmp_path, zero_optimization={"offload_optimizer": offload})
