"""Training through the launchers for several machines, to the end: slurm, MPI, and two machines without ssh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, WORKERS, environment, free_port
from tiny_run import read_log, write_config, write_latents

from switchdit.engine import engine as processes_of
from switchdit.errors import UserError
from switchdit.ranks import RANK_VARIABLES, launched_rank

STEPS = 24
DS_CONFIG = "ds_configs/zero2_fp32.json"
PYTHON = Path(sys.executable).parent

# As srun: every task has its number; ends with the largest code. As slurm at the end of a job's time: SIGUSR1 to all
# tasks, and to nothing else, once LOG has reached step 6.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
words = sys.argv[sys.argv.index("bash"):]
options = dict(word[2:].split("=") for word in sys.argv[1 : sys.argv.index("bash")])
tasks, per_node = int(options["ntasks"]), int(options["ntasks-per-node"])
running = []
for i in range(tasks):
    own = {{"SLURM_PROCID": i, "SLURM_LOCALID": i % per_node, "SLURM_NODEID": i // per_node, "SLURM_NTASKS": tasks}}
    running.append(subprocess.Popen(words, env={{**os.environ, **{{name: str(value) for name, value in own.items()}}}}))
log = os.environ.get("SIGNAL_WITH")
while log and not (os.path.exists(log) and '"step": 6,' in open(log).read()):
    time.sleep(0.02)
    assert all(task.poll() is None for task in running), "ended too early"
if log:
    for task in running:
        task.send_signal(signal.SIGUSR1)
codes = [task.wait() for task in running]
print("codes of the tasks:", codes, flush=True)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

# As Hydra's mpiexec, where there is no MPI: variables of MPICH, signals passed on, the largest code
MPIEXEC = """#!{python}
import os, signal, subprocess, sys
count, words = int(sys.argv[2]), sys.argv[3:]
assert sys.argv[1] == "-n"
running = []
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in running])
for i in range(count):
    own = {{"PMI_RANK": i, "PMI_SIZE": count, "MPI_LOCALRANKID": i, "MPI_LOCALNRANKS": count}}
    running.append(subprocess.Popen(words, env={{**os.environ, **{{name: str(value) for name, value in own.items()}}}}))
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in running]))
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)


def config_of(folder: Path, latents: Path, run_dir: Path, **sections: dict) -> Path:
    few = {"train": {"steps": STEPS}, "monitor": {"checkpoint_every": STEPS // 2, "routing_every": STEPS // 2}}
    return write_config(folder / "config.yaml", latents, run_dir, **{**few, **sections})


def training(config: Path) -> list[str]:
    return ["switchdit/train.py", "--config", str(config), "--deepspeed_config", DS_CONFIG]


def run(*command: object, timeout: float = 900, **variables: str) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "latents")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, latents) -> dict[int, dict[str, float]]:
    """What two processes of one machine log, started by mpiexec (a real one if there is one)."""
    folder = tmp_path_factory.mktemp("mpi")
    path = environment()["PATH"]
    if not shutil.which("mpiexec", path=path):
        program(folder / "bin/mpiexec", MPIEXEC)
        path = f"{folder / 'bin'}:{path}"
    words = training(config_of(folder, latents, folder / "run"))
    done = run("launchers/mpi.sh", *words, NPROC="2", MASTER_PORT=str(free_port()), PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes on cpu, ep_size 2" in done.stdout
    log = read_log(folder / "run")
    assert max(log) == STEPS
    return log


@pytest.mark.slow
def test_slurm_stops_saves_queues_again_and_goes_on(tmp_path, latents, reference):
    program(tmp_path / "bin/srun", SRUN)
    program(
        tmp_path / "bin/scontrol", '#!/bin/bash\n[ $1 = show ] && echo 127.0.0.1 || echo "$*" >> $(dirname $0)/asked\n'
    )
    run_dir = tmp_path / "run"
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "any",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "GPUS_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "HF_TOKEN": "hf_secret",
        "PATH": f"{tmp_path / 'bin'}:{environment()['PATH']}",
    }
    words = training(config_of(tmp_path, latents, run_dir))
    stopped = run("launchers/slurm.sh", *words, SIGNAL_WITH=str(run_dir / "log.jsonl"), **job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "codes of the tasks: [75, 75]" in stopped.stdout
    assert (tmp_path / "bin/asked").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    assert max(read_log(run_dir)) < STEPS
    finished = run("launchers/slurm.sh", *words, SLURM_RESTART_COUNT="1", **job)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "start 2: " in finished.stdout
    assert "steps 0 to" not in finished.stdout  # not from the beginning
    assert len((tmp_path / "bin/asked").read_text().splitlines()) == 1
    assert read_log(run_dir) == reference
    written = [stopped.stdout, stopped.stderr, *(f.read_text("latin1") for f in run_dir.rglob("*") if f.is_file())]
    assert not any("hf_secret" in text for text in written)


UNSHARE = [
    "unshare",
    "--user",
    "--map-root-user",
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]


def namespaces() -> str | None:
    """Why machines cannot be made here, or None."""
    tried = "unshare --uts ip link add cable0 type veth peer name cable1 && mount -t tmpfs none /mnt"
    try:
        done = subprocess.run([*UNSHARE, "sh", "-c", tried], capture_output=True, text=True, timeout=60, check=False)
    except OSError as problem:
        return str(problem)
    return done.stderr.strip() or "not permitted" if done.returncode else None


def two_machines(tmp_path: Path, latents: Path, *options: object, **sections: dict) -> list[dict]:
    if why := namespaces():
        pytest.skip(f"this system gives no network namespaces: {why}")
    shutil.copytree(latents, tmp_path / "latents")
    config = config_of(tmp_path, Path("/mnt/latents"), Path("/mnt/run"), **sections)
    (tmp_path / "hostfile").write_text("nodea slots=1\nnodeb slots=1\n")
    command = ["launchers/multi_node.sh", *training(Path("/mnt") / config.name)]
    nodes = [*UNSHARE, sys.executable, WORKERS / "nodes.py", tmp_path, *options, "--", *command]
    done = run(*nodes, HOSTFILE="/mnt/hostfile")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_machines_train_as_one_does_until_one_is_cut_off(tmp_path, latents, reference):
    peer_timeout, log = 5.0, tmp_path / "run/log.jsonl"
    sections = {"train": {"steps": 10_000}, "faults": {"peer_timeout": peer_timeout}}
    results = two_machines(tmp_path, latents, "--cut", log, STEPS, **sections)
    trained = read_log(tmp_path / "run")
    assert {step: trained[step] for step in reference} == reference
    for number, result in enumerate(results):
        # its own name would have led to the loopback: not to be reached from the other
        assert f"+ GLOO_SOCKET_IFNAME=cable{number} deepspeed" in result["output"]
        told = [line for line in result["output"].splitlines() if line.startswith("error: ")]
        assert len(told) == 1, result["output"]
        assert f"rank {1 - number}" in told[0]
        assert "Traceback" not in result["output"]
        assert result["code"] == 1
        assert peer_timeout / 2 < result["seconds"] < peer_timeout + 30  # also on a machine with five times its work
    assert "parameters" not in results[1]["output"]  # rank 1 is local rank 0 of its machine, and does not speak


@pytest.mark.slow
def test_two_machines_finish(tmp_path, latents, reference):
    for result in two_machines(tmp_path, latents):
        assert result["code"] == 0, result["output"]
    assert read_log(tmp_path / "run") == reference


LAUNCHED = [dict(zip(names, "140", strict=True)) for names in RANK_VARIABLES]  # rank 1 of 4, local rank 0
SHELL_OF_A_JOB = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
ONE_TASK = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}


@pytest.fixture
def described(monkeypatch):
    """How `init_processes` describes itself to torch, as (RANK, WORLD_SIZE, LOCAL_RANK), without a process group."""
    for name in (*sum(RANK_VARIABLES, ()), "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever happens to it
        monkeypatch.delenv(name)
    monkeypatch.setattr(processes_of.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(processes_of.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(processes_of.dist, "get_rank", lambda: int(os.environ["RANK"]))
    monkeypatch.setattr(processes_of.dist, "get_world_size", lambda: int(os.environ["WORLD_SIZE"]))

    def describe(variables: dict[str, str]) -> tuple[int, int, int]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        processes = processes_of.init_processes()
        return processes.rank, processes.world_size, processes.local_rank

    return describe


@pytest.mark.parametrize("variables", LAUNCHED, ids=lambda variables: next(iter(variables)))
def test_ranks_of_every_launcher_are_understood(described, variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == 1  # known before the processes have met
    assert described({**variables, "MASTER_ADDR": "127.0.0.1"}) == (1, 4, 0)


EMPTY = {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "MASTER_ADDR": ""}


@pytest.mark.parametrize("variables", [{}, EMPTY, SHELL_OF_A_JOB, ONE_TASK])
def test_a_process_that_nobody_launched_is_alone(described, variables):
    assert described(variables) == (0, 1, 0)
    assert os.environ["MASTER_PORT"] != "29500"


def test_processes_without_a_place_to_meet_are_told(described):
    with pytest.raises(
        UserError, match="MASTER_ADDR is not set, but PMI_SIZE is 4: it must name the machine of rank 0"
    ):
        described(LAUNCHED[2])
