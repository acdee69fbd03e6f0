"""apex's LayerNorm, seen through a stand-in: apex itself needs a GPU and its own build."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from switchdit import build_model
from switchdit.engine.layer_norm import check_layer_norm, use_apex_layer_norm
from switchdit.errors import UserError

SIZES = {"depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8, "num_classes": 5, "class_dropout_prob": 0.0}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class FusedLayerNorm(torch.nn.Module):
    """With the signature of apex's."""

    calls = 0

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        assert not elementwise_affine
        self.shape, self.eps = (
            torch.Size([normalized_shape] if isinstance(normalized_shape, int) else normalized_shape),
            eps,
        )

    def forward(self, x):
        type(self).calls += 1
        return F.layer_norm(x, self.shape, eps=self.eps)


def install(monkeypatch, **contents):
    package, normalization = ModuleType("apex"), ModuleType("apex.normalization")
    package.normalization = normalization
    vars(normalization).update(contents)
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.normalization", normalization)


@pytest.mark.parametrize(
    ("name", "norms"), [("DiT-S/2", 5), ("DTR-S/2", 5), ("Switch-DiT-S/2", 5), ("Diff-MoE-S/2", 23)]
)
def test_every_norm_is_replaced_and_no_number_changes(monkeypatch, name, norms):
    install(monkeypatch, FusedLayerNorm=FusedLayerNorm)
    torch.manual_seed(0)
    model = build_model(name, **SIZES)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 4])
    before, names = model(x, t, y), list(model.state_dict())
    use_apex_layer_norm(model)
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    assert sum(isinstance(module, FusedLayerNorm) for module in model.modules()) == norms
    assert list(model.state_dict()) == names
    monkeypatch.setattr(FusedLayerNorm, "calls", 0)
    assert torch.equal(model(x, t, y), before)
    assert FusedLayerNorm.calls > 0


@pytest.mark.parametrize(
    ("contents", "compiled", "device", "says"),
    [
        ({}, False, CUDA, "there is no apex.normalization.FusedLayerNorm (cannot import name"),
        ({"FusedLayerNorm": FusedLayerNorm}, True, CUDA, "with train.compile it must be torch"),
        ({"FusedLayerNorm": FusedLayerNorm}, False, CPU, "needs a CUDA device, not cpu"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(monkeypatch, contents, compiled, device, says):
    install(monkeypatch, **contents)
    with pytest.raises(UserError) as mistake:
        check_layer_norm("apex", compiled, device)
    assert says in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_what_can_be_is_let_through(monkeypatch):
    check_layer_norm("torch", True, CPU)
    install(monkeypatch, FusedLayerNorm=FusedLayerNorm)
    check_layer_norm("apex", False, CUDA)


def test_apex_without_its_extensions_is_told(monkeypatch):
    def without(*_, **__):
        raise ImportError("No module named 'fused_layer_norm_cuda'")

    install(monkeypatch, FusedLayerNorm=without)
    with pytest.raises(
        UserError, match=r"No module named 'fused_layer_norm_cuda'.*: install NVIDIA's apex from its so"
    ):
        check_layer_norm("apex", False, CUDA)
