"""What processes agree on, with their collectives imitated: each test says what the others have."""

import pickle

import pytest
import torch
from launching import WORKERS, launched

from switchdit.engine import engine
from switchdit.engine.engine import agree, build_engine, check_same, told_by_all
from switchdit.errors import FaultError, UserError


@pytest.fixture
def others(monkeypatch):
    """Three processes; this one is the second. Give what the first and the third tell."""

    def tell(first, third) -> None:
        def gather(everyone: list, mine: object) -> None:
            everyone[:] = [first(mine), pickle.loads(pickle.dumps(mine)), third(mine)]

        monkeypatch.setattr(engine.dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(engine.dist, "all_gather_object", gather)

    return tell


def test_a_mistake_of_one_is_everybodys(others):
    others(lambda _: None, lambda _: None)
    assert agree(lambda: 5) == 5

    def mistaken():
        raise UserError("no such file")

    with pytest.raises(UserError, match=r"^\(process 1\) no such file$"):
        agree(mistaken)
    others(lambda _: (True, "disk broken"), lambda _: None)
    with pytest.raises(FaultError, match=r"^disk broken$"):
        agree(mistaken)
    assert told_by_all("x") == [(True, "disk broken"), "(process 1) x"]


def test_processes_that_were_told_something_else_are_named(others):
    others(lambda mine: mine, lambda mine: mine)
    check_same(config={"lr": 1}, latents="abc")
    others(lambda mine: mine, lambda mine: {**mine, "latents": b"other", "config": b"stale"})
    with pytest.raises(UserError, match=r"^process 2 has another config and another latents than process 0; all mach"):
        check_same(config={"lr": 1}, latents="abc")


def test_what_deepspeed_cannot_use_is_told_in_a_line(monkeypatch):
    def refuse(**_):
        raise AssertionError("optimizer\n  is not known")

    monkeypatch.setattr(engine.deepspeed, "initialize", refuse)
    with pytest.raises(UserError, match=r"^DeepSpeed cannot use its configuration: AssertionError: optimizer is not k"):
        build_engine(torch.nn.Linear(1, 1), {"optimizer": {"type": "NoSuch"}})


def test_a_missing_compiler_is_told_in_a_line(monkeypatch):
    def fail(problem: str):
        def initialize(**_):
            raise RuntimeError(problem)

        monkeypatch.setattr(engine.deepspeed, "initialize", initialize)
        return build_engine(torch.nn.Linear(1, 1), {"optimizer": {"type": "AdamW"}})

    says = r"^DeepSpeed cannot compile its optimizer: sh: c\+\+: not found; optimizer.backend torch needs no compiler$"
    with pytest.raises(UserError, match=says):
        fail("Error building extension 'fused_adam': c++ -x\nFAILED: fused_adam.o\nsh: c++: not found\nninja: stopped")
    with pytest.raises(UserError, match="its optimizer: Unable to JIT load the fused_adam op due to ninja not being"):
        fail("Unable to JIT load the fused_adam op due to ninja not being installed.")
    with pytest.raises(RuntimeError, match="out of memory"):
        fail("CUDA out of memory")


def test_what_is_recorded_of_deepspeeds_config_is_what_was_given(monkeypatch):
    """Not how it was completed: a run that starts from the record may have another backend."""
    seen, given = {}, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "bf16": {"enabled": True}}

    def initialize(config, **_):
        seen.update(config)
        raise ValueError("enough")

    monkeypatch.setattr(engine.deepspeed, "initialize", initialize)
    with pytest.raises(UserError, match="enough"):
        build_engine(torch.nn.Linear(1, 1), given)
    assert seen["optimizer"]["params"] == {"torch_adam": True, "fused": True}
    assert given == {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "bf16": {"enabled": True}}


@pytest.mark.world_size(2)
def test_collectives_wait_for_a_process_that_has_more_to_do():
    launched(2, WORKERS / "wait_long.py")
