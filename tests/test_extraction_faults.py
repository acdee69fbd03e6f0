"""Extraction of the real program: killed at any moment, out of disk, out of memory, it loses a shard at most."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from switchdit.data.latent_dataset import LatentDataset
from tests.extraction_inputs import arguments, as_tar, content, noise, write_photos
from tests.launching import ROOT, environment
from tools import extract_latents as tool

PROGRAM = ROOT / "tools" / "extract_latents.py"
LAUNCHER = ROOT / "launchers" / "single_node.sh"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 images in a tar."""
    path = tmp_path_factory.mktemp("photos")
    return as_tar(write_photos(path / "photos", {"ant": 20, "bee": 9, "cow": 14}), path / "photos.tar")


def options(photos, out, *more):
    """43 shards, and no autoencoder, which takes seconds to be imported."""
    return [*arguments(photos, out, "pixels", "--shard-size", "1"), *more]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    tool.main(options(photos, out))
    return content(out)


def start(command, log, **variables):
    with open(log, "ab") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment(TMPDIR=str(log.parent), **variables),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start_ranks(argv, world_size, log):
    return [
        start([sys.executable, PROGRAM, *argv], log, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world_size))
        for r in range(world_size)
    ]


def family(processes):
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return found


def having(word, processes):
    """Those of the processes that were started with such a word, and live."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if word in " ".join(process.cmdline()) else []
    return found


def finished(out):
    return len(list(out.glob("shard_*.json")))


def kill_after(processes, out, shards, delay, limit=120):
    """kill -9 some time (s) after so many shards more are finished; their worker processes must end by themselves."""
    goal, deadline = finished(out) + shards, time.monotonic() + limit
    while finished(out) < goal and any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    for process in processes:
        process.send_signal(signal.SIGSTOP)  # here it is struck; the search for its workers takes longer than a shard
    relatives = family(processes)
    for process in processes:
        process.kill()
    assert all(process.wait(30) in (-signal.SIGKILL, 0) for process in processes)
    _, orphans = psutil.wait_procs(relatives, timeout=30)
    assert not orphans
    assert not list(out.parent.glob("switchdit-images-*"))


@pytest.mark.parametrize(("world_size", "workers", "kills"), [(1, 1, 3), (2, 0, 1)])
def test_killed_at_random_moments_and_continued_to_the_same_bytes(photos, whole, tmp_path, world_size, workers, kills):
    out, chance = tmp_path / "latents", random.Random(world_size)
    argv = options(photos, out, "--workers", workers)
    for _ in range(kills):
        processes = start_ranks(argv, world_size, tmp_path / "log")
        kill_after(processes, out, chance.randrange(1, 6), delay=chance.uniform(0, 0.03))
    assert not (out / "manifest.json").exists(), (tmp_path / "log").read_text()
    tool.main(options(photos, out))
    assert content(out) == whole


def test_two_processes_write_the_bytes_of_one(photos, whole, tmp_path):
    for process in start_ranks(options(photos, tmp_path / "latents"), 2, tmp_path / "log"):
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert content(tmp_path / "latents") == whole


@pytest.mark.slow  # the launcher and its processes take ten seconds to start, each time
def test_ten_kills_of_two_processes_under_the_launcher(photos, tmp_path):
    out, chance, log, killed = tmp_path / "latents", random.Random(10), tmp_path / "log", 0
    large = ["--workers", "1", "--image-size", "512"]  # shards that take their time

    def launch():
        argv = options(photos, out, *large)
        return start([LAUNCHER, PROGRAM, *argv], log, NPROC="2", MASTER_PORT=str(20000 + os.getpid() % 20000))

    for _ in range(10):
        launcher = launch()
        goal, deadline = finished(out) + chance.randrange(3), time.monotonic() + 120
        victims = []
        while not (victims and finished(out) >= goal) and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
            victims = victims or having("--local_rank", family([launcher]))
        relatives = family([launcher])
        if victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(victims).kill()  # the launcher stops the other one
                killed += 1
        assert launcher.wait(120) is not None
        assert not psutil.wait_procs(relatives, timeout=60)[1]
    assert launch().wait(300) == 0, log.read_text()[-3000:]
    assert killed >= 8
    tool.main(options(photos, tmp_path / "whole", *large))
    assert content(out) == content(tmp_path / "whole")


def test_dead_worker_ends_the_run_in_a_line(photos, tmp_path):
    log = tmp_path / "log"
    (process,) = start_ranks(options(photos, tmp_path / "out", "--workers", "2", "--image-size", "512"), 1, log)
    deadline = time.monotonic() + 120
    while not finished(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    relatives = family([process])
    having("spawn_main", relatives)[0].kill()
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 2
    assert not psutil.wait_procs(relatives, timeout=30)[1]
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("error:"))
    assert "a worker process that decodes images has died" in line
    assert "Traceback" not in log.read_text()


def test_interrupt_ends_the_workers_without_a_traceback(photos, whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    (process,) = start_ranks(options(photos, out, "--workers", "1", "--image-size", "512"), 1, log)
    deadline = time.monotonic() + 120
    while not finished(out) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    relatives = family([process])
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 130
    assert not psutil.wait_procs(relatives, timeout=30)[1]
    assert "interrupted; finished shards are kept" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_full_disk_keeps_what_was_finished(photos, whole, tmp_path, capsys, monkeypatch):
    out, synced = tmp_path / "latents", []

    def no_space(descriptor):
        synced.append(descriptor)
        if len(synced) > 20:  # four for each shard: file and folder, of the shard and of its sidecar
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(SystemExit, match="2"):
        tool.main(options(photos, out))
    monkeypatch.undo()
    assert "no space left on the disk that holds " in capsys.readouterr().err
    assert sorted(content(out)) == sorted(name for name in whole if name.startswith("shard") and name[6:11] < "00005")
    tool.main(options(photos, out))
    assert content(out) == whole


# ----------------------------------------------------------- real photographs, an autoencoder of real size

PHOTOGRAPHS = os.environ.get("SWITCHDIT_PHOTOGRAPHS", "")  # a folder or a tar of class folders
CAMPAIGN = {"image_size": 64, "shard_size": 8, "kills": 10}


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS, reason="SWITCHDIT_PHOTOGRAPHS names no tar of photographs")
def test_photographs_through_the_autoencoder_of_stable_diffusion(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
    ).save_pretrained(tmp_path / "vae")
    subprocess.run(
        ["tar", "xf", PHOTOGRAPHS, "--strip-components=1", "--one-top-level=photos"], cwd=tmp_path, check=True
    )
    odd = tmp_path / "photos" / "zz_odd"
    odd.mkdir()
    Image.fromarray(noise(90, 80)).convert("CMYK").save(odd / "cmyk.jpg")
    Image.fromarray(noise(90, 80)[:, :, 0].astype("uint16") * 257).save(odd / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(90, 80)).save(odd / "turned.jpg", exif=exif)
    data = as_tar(tmp_path / "photos", tmp_path / "photos.tar")
    size, shard_size = str(CAMPAIGN["image_size"]), str(CAMPAIGN["shard_size"])
    more = ["--image-size", size, "--shard-size", shard_size, "--batch-size", "8", "--workers", "1"]

    def argv(out):
        return ["--data", data, "--out", tmp_path / out, "--vae", tmp_path / "vae", *more]

    (whole,) = start_ranks(argv("whole"), 1, tmp_path / "log")
    assert whole.wait() == 0, (tmp_path / "log").read_text()
    chance = random.Random(0)
    for _ in range(CAMPAIGN["kills"]):
        processes = start_ranks(argv("killed"), 1, tmp_path / "log")
        kill_after(processes, tmp_path / "killed", chance.randrange(3), delay=chance.uniform(0, 5))
    (last,) = start_ranks(argv("killed"), 1, tmp_path / "log")
    assert last.wait() == 0, (tmp_path / "log").read_text()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert len(LatentDataset(tmp_path / "whole")) >= 203
    print((tmp_path / "log").read_text())
    print("peak memory, MB:", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
