"""Which images share a call; decoding beside sampling; what is compiled gives what is not."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from switchdit import build_model
from switchdit.diffusion.samplers import guided
from switchdit.engine.compilation import check_compiler, compile_blocks, compile_model
from switchdit.engine.generate import DecoderBeside, cpu_block_size, image_blocks
from switchdit.errors import UserError

CPU = torch.device("cpu")


@settings(max_examples=300)
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 9))
def test_blocks_hold_every_image_once_and_keep_no_process_waiting(num_images, max_size, world_size):
    blocks = image_blocks(num_images, max_size, world_size)
    assert blocks[blocks < num_images].tolist() == list(range(num_images))
    assert blocks.shape[1] <= max_size
    assert blocks.shape[1] == 1 or (blocks[-1] < num_images).any()
    rounds = -(-num_images // (world_size * max_size))  # as few as can be
    assert max(map(len, np.array_split(blocks, world_size))) == rounds


@given(st.integers(1, 100_000))
def test_on_a_cpu_16_processes_have_work(num_images):
    blocks = image_blocks(num_images, cpu_block_size(num_images))
    assert len(blocks) >= min(num_images, 16)
    assert blocks.shape[1] == min(16, max(1, num_images // 16))


class Doubler:
    """Stands in for an autoencoder; waits until it may go on."""

    def __init__(self):
        self.may_go_on = threading.Event()

    def decode(self, latents):
        assert not torch.is_grad_enabled()
        self.may_go_on.wait(20)
        return 2 * latents


def test_decoding_runs_beside_and_all_is_kept_at_the_end():
    autoencoder, images = Doubler(), np.zeros((3, 2))
    with DecoderBeside(autoencoder) as decode:
        decode(torch.full((2,), 1.0), lambda image: images.__setitem__(0, image))
        assert not images.any()  # not reached if the call had waited
        threading.Timer(0.1, autoencoder.may_go_on.set).start()
        for i in (1, 2):
            decode(torch.full((2,), 1.0 + i), lambda image, i=i: images.__setitem__(i, image))
    assert images.tolist() == [[2, 2], [4, 4], [6, 6]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_what_was_sampled():
    autoencoder, images, expected = Doubler(), {}, []
    autoencoder.may_go_on.set()
    with DecoderBeside(autoencoder) as decode:
        for i in range(4):
            latents = torch.randn(2048, 2048, device="cuda")
            for _ in range(20):  # still at work when it is handed over
                latents = latents @ latents / latents.norm()
            decode(latents, lambda image, i=i: images.__setitem__(i, image))
            expected.append(2 * latents)
    for i, image in enumerate(expected):
        assert np.array_equal(images[i], image.cpu().numpy())


@pytest.mark.parametrize("calls", [1, 2])
def test_what_goes_wrong_beside_is_raised(calls):
    def full_disk(_):
        raise OSError(28, "No space left on device")

    autoencoder = Doubler()
    autoencoder.may_go_on.set()
    with pytest.raises(OSError, match="No space"), DecoderBeside(autoencoder) as decode:
        for _ in range(calls):
            decode(torch.zeros(2), full_disk)


def test_an_interruption_is_not_covered_by_what_is_decoded():
    autoencoder = Doubler()
    autoencoder.may_go_on.set()
    with pytest.raises(KeyboardInterrupt), DecoderBeside(autoencoder) as decode:
        decode(torch.zeros(2), lambda _: None)
        raise KeyboardInterrupt


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiler(request, monkeypatch):
    """The one that is used, and one that stops before code is generated, which takes most of the time."""
    if request.param != "inductor":
        compile_with = torch.nn.Module.compile
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda m, mode=None, **how: compile_with(m, backend=request.param, **how)
        )
    torch._dynamo.reset()
    counters.clear()


def small_model(name="Switch-DiT"):
    torch.manual_seed(0)
    model = build_model(f"{name}-S/2", input_size=4, depth=3, hidden_size=32, num_heads=2, num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_compiled_blocks_train_alike_without_breaks_or_recompilation(compiler):
    model = small_model()
    model.class_dropout_prob = 0.0

    def gradients(seed):
        rng = torch.Generator().manual_seed(seed)
        x, t = torch.randn(4, 4, 4, 4, generator=rng), torch.randint(0, 1000, (4,), generator=rng)
        model.zero_grad()
        out, routing = model(x, t, torch.tensor([0, 1, 2, 3]), return_routing=True)
        (out.square().mean() + routing.probs.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = [gradients(seed) for seed in range(3)]
    names = list(model.state_dict())
    compile_blocks(model)
    first = gradients(0)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        later = [gradients(seed) for seed in (1, 2)]
    assert graphs and counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    for ours, theirs in zip([first, *later], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == names


def test_a_compiled_model_samples_alike_at_all_timesteps_by_one_graph(compiler):
    model = small_model().eval().requires_grad_(False)
    x, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
    denoise = guided(model, labels, model.null_label, cfg_scale=1.5)
    expected = [denoise(x, t) for t in (999, 500, 0)]
    compile_model(model)
    torch.testing.assert_close([denoise(x, t) for t in (999, 500, 0)], expected, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_systems_that_are_not_compiled_are_told():
    with pytest.raises(UserError, match=r"train\.compile is true, but Diff-MoE is not compiled"):
        check_compiler("train.compile", "Diff-MoE", CPU)


def test_a_machine_without_a_compiler_is_told(monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "fx_graph_cache": False}),
        pytest.raises(UserError, match=r"sample\.compile is true, but torch\.compile does not work here"),
    ):
        check_compiler("sample.compile", "DiT", CPU)
