"""The launch scripts and the Makefile, as far as one machine can show; their training runs are in test_nodes.py."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import free_port

ROOT = Path(__file__).resolve().parents[1]


def clean(environment: dict[str, str]) -> dict[str, str]:
    drop = (
        "NPROC",
        "HOSTFILE",
        "NODE_RANK",
        "MASTER_ADDR",
        "SLURM_JOB_ID",
        "MAKEFLAGS",
        "MAKELEVEL",
        "RESTARTS",
        "LOG",
        "CUDA_VISIBLE_DEVICES",
        "DS_ACCELERATOR",
    )
    return {**{k: v for k, v in os.environ.items() if k not in drop}, **environment}


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean(environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def recorder(tmp_path) -> dict[str, str]:
    """A PATH on which deepspeed, srun, mpiexec and scontrol print how they were called.

    The first three end with the codes in CODES, one for each start, and with 0 when these are used up.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "srun", "mpiexec"):
        (folder / name).write_text(
            f"#!/bin/bash\nwords=$*\necho \"{name} was given: ${{words//$'\\n'/ }}\"\n"
            f"echo >> {tmp_path}/starts\ncodes=($CODES)\nexit ${{codes[$(wc -l < {tmp_path}/starts) - 1]:-0}}\n"
        )
    (folder / "scontrol").write_text(
        "#!/bin/bash\n[ $1 = show ] && printf 'nodeA\\nnodeB\\n' || echo \"scontrol was given: $*\"\n"
    )
    for path in folder.iterdir():
        path.chmod(0o755)
    copy = tmp_path / "repository"  # without a .venv that would come first on the PATH
    (copy / "switchdit").mkdir(parents=True)
    (copy / "switchdit/train.py").touch()
    shutil.copytree(ROOT / "launchers", copy / "launchers")
    restarts = copy / "launchers/restarts.sh"
    quick = restarts.read_text().replace("SECONDS_BEFORE_RESTART=5", "SECONDS_BEFORE_RESTART=0")
    restarts.write_text(quick.replace("SECONDS_TO_SAVE=60", "SECONDS_TO_SAVE=3"))
    return {"PATH": f"{folder}:{os.environ['PATH']}", "REPOSITORY": str(copy)}


@pytest.mark.parametrize("name", ["single_node.sh", "multi_node.sh", "slurm.sh", "mpi.sh"])
def test_without_arguments_they_explain_themselves(name):
    done = run(f"launchers/{name}")
    assert done.returncode == 2
    script = (ROOT / "launchers" / name).read_text()
    assert "MASTER_PORT" in done.stdout
    assert "#!/" not in done.stdout
    assert "RESTARTS" in done.stdout
    for variable in ("OMP_NUM_THREADS", "NPROC", "HOSTFILE", "NODE_RANK", "GPUS_PER_NODE", "LOG", "MPIEXEC"):
        if f"${{{variable}:" in script:
            assert variable in done.stdout, f"{variable} is used but not documented"


def test_single_node(recorder):
    launcher = Path(recorder["REPOSITORY"]) / "launchers/single_node.sh"
    done = run(launcher, "switchdit/train.py", "--config", "x.yaml", NPROC="3", DS_ACCELERATOR="cpu", **recorder)
    assert "deepspeed was given: --num_accelerators 3 switchdit/train.py --config x.yaml" in done.stdout
    done = run(launcher, "a.py", NPROC="two", **recorder)
    assert done.returncode == 2
    assert "error: NPROC is 'two'; it must be a whole number of at least 1" in done.stderr


def test_gpus_are_named_as_the_launcher_understands(recorder, tmp_path):
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/bash\nprintf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n'\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    launcher = Path(recorder["REPOSITORY"]) / "launchers/single_node.sh"
    for environment, options in (
        ({}, "--num_accelerators 4"),
        ({"NPROC": "2"}, "--num_accelerators 2"),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "--include localhost:2,3"),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "NPROC": "1"}, "--include localhost:2"),
        ({"CUDA_VISIBLE_DEVICES": "", "NPROC": "3", "DS_ACCELERATOR": "cpu"}, "--num_accelerators 3"),
    ):
        done = run(launcher, "a.py", **recorder, **environment)
        assert done.stdout.endswith(f"deepspeed was given: {options} a.py\n"), done.stdout + done.stderr
    for environment, says in (
        ({"NPROC": "8"}, "NPROC is 8, but there are 4 GPUs"),
        ({"NPROC": "8", "CUDA_VISIBLE_DEVICES": "2,3"}, "NPROC is 8, but CUDA_VISIBLE_DEVICES=2,3 names 2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is ''; it must be numbers"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f6a,GPU-11"}, "CUDA_VISIBLE_DEVICES is 'GPU-8f6a,GPU-11'; it must be numbers"),
    ):
        done = run(launcher, "a.py", **recorder, **environment)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"error: {says}")
        assert done.stderr.count("\n") == 1


def test_several_nodes(recorder, tmp_path):
    launcher = Path(recorder["REPOSITORY"]) / "launchers/multi_node.sh"
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# ours\nnode1 slots=8\nnode2 slots=8\n")
    done = run(launcher, "a.py", HOSTFILE=str(hostfile), **recorder)
    assert f"--hostfile {hostfile} --master_port 29500 --master_addr node1 a.py" in done.stdout
    done = run(launcher, "a.py", HOSTFILE=str(hostfile), NODE_RANK="1", MASTER_ADDR="localhost", **recorder)
    assert "--no_ssh --node_rank 1 --master_addr localhost a.py" in done.stdout
    assert "GLOO_SOCKET_IFNAME" not in done.stdout  # of no use on a loopback
    for environment, says in (
        ({"HOSTFILE": "absent"}, "HOSTFILE 'absent' does not exist"),
        ({"HOSTFILE": str(hostfile), "NODE_RANK": "1"}, "NODE_RANK needs MASTER_ADDR"),
        ({"HOSTFILE": str(hostfile), "NODE_RANK": "2", "MASTER_ADDR": "localhost"}, "lists 2 machines; the first is 0"),
        ({"HOSTFILE": str(hostfile), "NODE_RANK": "b", "MASTER_ADDR": "localhost"}, "NODE_RANK is 'b'; it must be"),
        ({"HOSTFILE": str(hostfile), "NODE_RANK": "1", "MASTER_ADDR": "no.such.invalid"}, "is no machine that this"),
        ({"HOSTFILE": "/dev/null"}, "does not exist"),
    ):
        done = run(launcher, "a.py", **recorder, **environment)
        assert done.returncode == 2
        assert says in done.stderr


@pytest.mark.parametrize("word", ["data.latents=/d/a(b)", "/d/a;b", "a$(b)", "a'b", "a\tb", "100%"])
def test_ssh_is_given_no_word_that_a_shell_would_act_on(recorder, tmp_path, word):
    launcher = Path(recorder["REPOSITORY"]) / "launchers/multi_node.sh"
    (tmp_path / "hosts").write_text("node1 slots=8\n")
    done = run(
        launcher, "a.py", "sample.guidance_interval=[0, 100]", word, HOSTFILE=str(tmp_path / "hosts"), **recorder
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "has a sign that the shells of the other machines would act on" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("codes", "ends", "starts"),
    [
        ("247 1", 0, 3),  # SIGKILL of a worker, then another fault
        ("247 139 134", 134, 3),  # one fault more than RESTARTS
        ("2", 2, 1),  # a mistake stays one
        ("130", 130, 1),  # Ctrl-C
        ("75", 75, 1),  # the scheduler decides
        ("1 2", 2, 2),
    ],
)
@pytest.mark.parametrize("name", ["single_node.sh", "mpi.sh"])
def test_a_fault_starts_training_again(recorder, tmp_path, name, codes, ends, starts):
    launcher = Path(recorder["REPOSITORY"]) / "launchers" / name
    words = ["switchdit/train.py", "--config", "x.yaml", "a.b=c d"]
    done = run(launcher, *words, CODES=codes, RESTARTS="2", NPROC="2", DS_ACCELERATOR="cpu", **recorder)
    assert done.returncode == ends
    given = [line for line in done.stdout.splitlines() if "was given" in line]
    assert len(given) == starts
    assert given[0].endswith("switchdit/train.py --config x.yaml a.b=c d")  # the user's first start is the user's
    assert all(line.endswith("switchdit/train.py --resume auto --config x.yaml a.b=c d") for line in given[1:])
    told = [line for line in done.stderr.splitlines() if "the program ended with" in line]
    assert len(told) == starts - 1
    if codes.startswith("247"):
        assert told[0] == "the program ended with code 247 (SIGKILL); restart 1 of 2 in 0 seconds"


def test_what_is_started_again_keeps_the_users_words(recorder):
    launcher = Path(recorder["REPOSITORY"]) / "launchers/single_node.sh"
    resumed = (["switchdit/train.py", option, "runs/a"] for option in ("--resume", "--resum"))
    for words in (*resumed, ["switchdit/train.py", "--resume=runs/a"], ["switchdit/sample.py", "--out", "o"]):
        (Path(recorder["REPOSITORY"]).parent / "starts").unlink(missing_ok=True)
        done = run(launcher, *words, CODES="1", RESTARTS="1", DS_ACCELERATOR="cpu", NPROC="1", **recorder)
        assert done.returncode == 0
        given = [line for line in done.stdout.splitlines() if "was given" in line]
        assert given == [f"deepspeed was given: --num_accelerators 1 {' '.join(words)}"] * 2
    done = run(launcher, "a.py", RESTARTS="often", NPROC="1", **recorder)
    assert done.returncode == 2
    assert done.stderr == "error: RESTARTS is 'often'; it must be a whole number of at least 0\n"


# DeepSpeed's launcher is a process that starts another that starts the workers; a signal ends the first two.
TREE = """#!{python}
import os, subprocess, sys, time
level = os.environ.get("LEVEL", "0")
if level == "2":
    import signal
    def end(number, frame):
        print(signal.Signals(number).name, flush=True)
        if "--fault" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        os._exit({{signal.SIGUSR1: 75, signal.SIGTERM: 75, signal.SIGINT: 130}}[number])
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    print("worker is up", flush=True)
    time.sleep(90)
    sys.exit("no signal came")
launch = ["-m", "deepspeed.launcher.launch", f"--master_port={{os.environ.get('MASTER_PORT')}}", "a.py"]
command = [sys.executable, __file__, *(launch if level == "0" else ["--local_rank=0"])]
if "--never" in sys.argv:
    time.sleep(90)
command += [word for word in sys.argv[1:] if word == "--fault"]
code = subprocess.run(command, env={{**os.environ, "LEVEL": str(int(level) + 1)}}).returncode
sys.exit(code % 256 if level == "1" else max(code, 0))
"""


@pytest.mark.parametrize(
    ("number", "seen", "code"),
    [(signal.SIGTERM, "SIGUSR1", 75), (signal.SIGUSR1, "SIGUSR1", 75), (signal.SIGINT, "SIGINT", 130)],
)
def test_a_signal_reaches_the_workers_and_their_code_comes_back(recorder, tmp_path, number, seen, code):
    (tmp_path / "bin/deepspeed").write_text(TREE.format(python=sys.executable))
    log = tmp_path / "log"
    launcher = Path(recorder["REPOSITORY"]) / "launchers/single_node.sh"
    environment = clean({**recorder, "NPROC": "1", "DS_ACCELERATOR": "cpu", "RESTARTS": "3", "LOG": str(log)})
    process = subprocess.Popen([launcher, "switchdit/train.py"], env=environment, stdout=subprocess.DEVNULL)
    wait_for_line(log, "worker is up")
    process.send_signal(number)
    assert process.wait(60) == code
    lines = log.read_text().splitlines()
    assert lines.count("worker is up") == 1  # no restart
    assert lines[-1] == seen


def test_the_log_is_whole_when_the_launcher_ends(recorder, tmp_path):
    (tmp_path / "bin/tee").write_text(f'#!/bin/bash\nsleep 1\nexec {shutil.which("tee")} "$@"\n')
    (tmp_path / "bin/tee").chmod(0o755)
    log = tmp_path / "log"
    subprocess.run(
        [Path(recorder["REPOSITORY"]) / "launchers/single_node.sh", "a.py"],
        env=clean({**recorder, "NPROC": "1", "DS_ACCELERATOR": "cpu", "LOG": str(log)}),
        stdout=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
    assert log.read_text().endswith("deepspeed was given: --num_accelerators 1 a.py\n")


def start(recorder: dict[str, str], log: Path, *words: str, **variables: str) -> subprocess.Popen:
    """single_node.sh, with `TREE` for DeepSpeed's launcher, whose worker is up."""
    (log.parent / "bin/deepspeed").write_text(TREE.format(python=sys.executable))
    launcher = Path(recorder["REPOSITORY"]) / "launchers/single_node.sh"
    environment = clean({**recorder, "NPROC": "1", "DS_ACCELERATOR": "cpu", **variables})
    with open(log, "w") as output:
        process = subprocess.Popen(
            [launcher, "switchdit/train.py", *words], env=environment, stdout=output, stderr=output
        )
    wait_for_line(log, "worker is up")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_fault_after_a_wish_to_stop_is_no_saved_stop(recorder, tmp_path, number):
    process = start(recorder, tmp_path / "log", "--fault", RESTARTS="3")
    process.send_signal(number)
    assert process.wait(60) == 256 - signal.SIGKILL
    assert (tmp_path / "log").read_text().count("worker is up") == 1


@pytest.mark.parametrize(("restarts", "code"), [("0", 1), ("1", 75)])
def test_a_launch_that_is_killed_is_a_fault_and_leaves_no_process_behind(recorder, tmp_path, restarts, code):
    log = tmp_path / "log"
    process = start(recorder, log, RESTARTS=restarts)
    [launch] = children(process.pid, "deepspeed.launcher.launch")
    [worker] = children(launch, "--local_rank=0")
    os.kill(launch, signal.SIGKILL)
    if restarts == "1":
        wait_for_line(log, "worker is up", times=2)
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == code
    lines = log.read_text().splitlines()
    assert "the launch ended with code 0 and left processes behind: they are stopped" in lines
    assert lines[lines.index("worker is up") + 1 :].count("SIGTERM") == 1  # the worker could save
    assert not is_running(worker)


def test_a_signal_between_the_start_of_a_launch_and_the_note_of_its_number_is_not_lost(tmp_path):
    script = """
        . launchers/restarts.sh
        none() { false; }
        set -o functrace
        trap 'if [[ $BASH_COMMAND == child=?! ]]; then kill -TERM $$; fi' DEBUG
        keep_running none sleep 30"""
    began = time.monotonic()
    done = run("bash", "-c", script)
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - began < 10


def test_a_signal_reaches_workers_that_ssh_started(recorder, tmp_path):
    """They are no children of the script: `setsid` and a process that ends stand in for pdsh and ssh."""
    launch = TREE.format(python=sys.executable)
    (tmp_path / "bin/remote").write_text(launch)
    (tmp_path / "bin/remote").chmod(0o755)
    (tmp_path / "bin/deepspeed").write_text(
        f"#!/bin/bash\n(setsid {tmp_path}/bin/remote -- & echo $! > {tmp_path}/pid)\n"
        f"while kill -0 $(< {tmp_path}/pid) 2>/dev/null; do sleep 0.1; done\nexit 75\n"
    )
    hosts, log = tmp_path / "hosts", tmp_path / "log"
    hosts.write_text("node1 slots=1\n")
    launcher = Path(recorder["REPOSITORY"]) / "launchers/multi_node.sh"
    environment = clean({**recorder, "HOSTFILE": str(hosts), "MASTER_PORT": str(free_port())})
    with open(log, "w") as output:
        process = subprocess.Popen([launcher, "a.py"], env=environment, stdout=output)
    wait_for_line(log, "worker is up")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert log.read_text().splitlines()[-1] == "SIGUSR1"


def test_a_signal_before_there_are_workers_ends_the_launch(recorder, tmp_path):
    (tmp_path / "bin/deepspeed").write_text(TREE.format(python=sys.executable))
    launcher = Path(recorder["REPOSITORY"]) / "launchers/single_node.sh"
    environment = clean({**recorder, "NPROC": "1", "DS_ACCELERATOR": "cpu", "RESTARTS": "3"})
    process = subprocess.Popen([launcher, "a.py", "--never"], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("+ deepspeed")
    while not children(process.pid, "--never"):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75


def wait_for_line(path: Path, line: str, seconds: float = 60, times: int = 1) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text().count(line) >= times):
        assert time.monotonic() < deadline, f"no line '{line}' in {path}"
        time.sleep(0.02)


def children(process: int, sign: str) -> list[int]:
    """Descendants of a process whose command line has ``sign``, down to the first of each branch."""
    found = []
    for child in map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()):
        command = Path(f"/proc/{child}/cmdline").read_text()
        found += [child] if sign in command else children(child, sign)
    return found


def is_running(process: int) -> bool:
    """Zombies, which nobody waits for where the first process is no init, have ended."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def slurm_job(repository: Path) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[A-B]",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": str(repository),
    }


def test_slurm(recorder):
    repository = Path(recorder["REPOSITORY"])
    launcher = repository / "launchers/slurm.sh"
    job = slurm_job(repository)
    done = run(launcher, "switchdit/train.py", "--config", "x.yaml", **recorder, **job)
    assert done.returncode == 0
    assert (
        "2 nodes x 4 processes, meeting at nodeA:24711, start 1: "
        "switchdit/train.py --resume auto --config x.yaml" in done.stdout
    )
    assert "--kill-on-bad-exit=0 --wait=300 --nodes=2 --ntasks=8 --ntasks-per-node=4 bash -c" in done.stdout
    assert done.stdout.rstrip().endswith(" 4 switchdit/train.py --resume auto --config x.yaml")
    assert "requeue" not in done.stdout.partition("srun was given")[2]
    done = run(launcher, "switchdit/train.py", **recorder)
    assert done.returncode == 2
    assert "this is not a slurm job" in done.stderr
    done = run(launcher, "absent.py", **recorder, **job)
    assert "'absent.py' does not exist" in done.stderr
    # what slurm reads of it, and whom it then signals: the tasks (B: would mean this shell alone)
    options = [line.split()[1] for line in launcher.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= set(options)


def test_slurm_queues_the_job_again(recorder, tmp_path):
    repository = Path(recorder["REPOSITORY"])
    launcher = repository / "launchers/slurm.sh"
    ended = []
    codes = "137 137 75 137 137 1 2"
    for count in range(len(codes.split())):
        job = {**slurm_job(repository), "SLURM_RESTART_COUNT": str(count), "RESTARTS": "2", "CODES": codes}
        done = run(launcher, "switchdit/train.py", **recorder, **job)
        assert f"start {count + 1}: " in done.stdout
        if count == 5:
            told = "error: the program ended with code 1, fault 3 without a new checkpoint, RESTARTS is 2: the job ends"
            assert told in done.stderr
        ended.append((done.returncode, "scontrol was given: requeue 4711" in done.stdout))
    queued, mistake = (0, True), (2, False)
    assert ended == [
        queued,
        queued,
        queued,
        queued,
        queued,
        (1, False),
        mistake,
    ]  # the third fault in a row is the last
    assert not list(repository.glob("*.faults"))


def test_slurm_counts_faults_since_the_newest_checkpoint(recorder):
    repository = Path(recorder["REPOSITORY"])
    shutil.rmtree(repository / "switchdit")
    (repository / "switchdit").symlink_to(ROOT / "switchdit")
    (repository / "a.yaml").write_text((ROOT / "switchdit/configs/digits.yaml").read_text())
    checkpoints = repository / "runs/a/checkpoints"
    checkpoints.mkdir(parents=True)
    words = ["switchdit/train.py", "--config", "a.yaml", "--deepspeed_config", "ds.json", "run_dir=runs/a"]
    (repository.parent / "bin/python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (repository.parent / "bin/python").chmod(0o755)
    job = {**slurm_job(repository), "RESTARTS": "1", "CODES": "137 " * 5}
    counts = []
    for newest in (None, "step_0000010", "step_0000020", "step_0000020"):
        if newest:
            (checkpoints / "latest").write_text(newest)
        done = run(repository / "launchers/slurm.sh", *words, **recorder, **job)
        counts.append((done.returncode, len(list(repository.glob("*.faults")))))
        if counts[-1] == (0, 1):
            [line] = (repository / "slurm-4711.faults").read_text().splitlines()
            assert line.endswith(f"code 137 (SIGKILL); newest checkpoint: {newest or 'none'}")
    assert counts == [(0, 1), (0, 1), (0, 1), (137, 0)]
    done = run(repository / "launchers/slurm.sh", "a.yaml", **recorder, **job)
    assert "--wait=0 " in done.stdout  # no training: the last part may be the work of one process


def test_mpi(recorder, tmp_path):
    launcher = Path(recorder["REPOSITORY"]) / "launchers/mpi.sh"
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nnode1:8\nnode2:8\n")
    done = run(launcher, "a.py", "--x", NPROC="16", HOSTFILE=str(hosts), **recorder)
    assert f"mpiexec was given: -n 16 -machinefile {hosts} env MASTER_ADDR=node1 MASTER_PORT=29500" in done.stdout
    assert done.stdout.endswith("python a.py --x\n")
    done = run(launcher, "a.py", NPROC="2", MPIEXEC="mpiexec --oversubscribe", **recorder)
    assert "mpiexec was given: --oversubscribe -n 2 env MASTER_ADDR=127.0.0.1" in done.stdout
    for environment, says in (
        ({}, "NPROC is ''; it must be a whole number of at least 1"),
        ({"NPROC": "2", "MPIEXEC": "absent"}, "no 'absent' on the PATH"),
        ({"NPROC": "2", "HOSTFILE": "absent"}, "HOSTFILE 'absent' does not exist"),
    ):
        done = run(launcher, "a.py", **recorder, **environment)
        assert done.returncode == 2
        assert says in done.stderr
    (tmp_path / "bin/mpiexec").write_text('#!/bin/bash\nexec "${@:3}"\n')
    for environment in ({}, {"PMI_RANK": "0", "PMI_SIZE": "2"}, {"PMI_RANK": "1", "PMI_SIZE": "2"}):
        done = run(launcher, "a.py", NPROC="2", **recorder, **environment)
        assert done.returncode == 2
        line = "error: this mpiexec gives its processes no rank, or none within their machine"
        assert done.stderr.count(line) == (environment.get("PMI_RANK") != "1")
        assert done.stderr.count("\n") <= 1


@pytest.mark.parametrize(
    "variables", [("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"), ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mistake_is_told_by_one_process_of_any_launcher(variables, rank):
    given = dict(zip(variables, (rank, "2", rank), strict=True))
    words = ["--config", "absent.yaml", "--deepspeed_config", "x.json"]
    done = run(sys.executable, "switchdit/train.py", *words, **{"RANK": "", **given})
    assert done.returncode == 2
    assert done.stderr.count("error: ") == (rank == "0")
    assert done.stderr.count("\n") == (rank == "0")


@pytest.mark.parametrize("door", ["extract-latents", "train", "sample", "eval-fid"])
def test_a_door_without_its_variables_prints_its_help(door):
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("needs the environment that make sets up")
    done = run("make", "--no-print-directory", door)
    assert done.returncode == 2
    assert f"usage: make {door}" in done.stdout
    assert "--help" in done.stdout


def test_a_python_too_old_ends_in_one_line(tmp_path):
    copy = tmp_path / "copy"
    (copy / "tools").mkdir(parents=True)
    for name in ("tools/setup_environment.sh", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/bash\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = run(copy / "tools/setup_environment.sh", PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "(Python 3.8.1) cannot be used; CPython 3.10, 3.11 or 3.12" in done.stderr
    assert not (copy / ".venv").exists()
