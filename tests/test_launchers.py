"""The launch scripts and the Makefile, as far as one machine can show."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    drop = ("NPROC", "HOSTFILE", "NODE_RANK", "MASTER_ADDR", "SLURM_JOB_ID", "MAKEFLAGS", "MAKELEVEL")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def recorder(tmp_path) -> dict[str, str]:
    """A PATH on which deepspeed, srun and scontrol print how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "srun"):
        (folder / name).write_text(f'#!/bin/bash\necho "{name} was given: $*"\n')
    (folder / "scontrol").write_text("#!/bin/bash\nprintf 'nodeA\\nnodeB\\n'\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    copy = tmp_path / "repository"  # without a .venv that would come first on the PATH
    (copy / "switchdit").mkdir(parents=True)
    (copy / "switchdit/train.py").touch()
    shutil.copytree(ROOT / "launchers", copy / "launchers")
    return {"PATH": f"{folder}:{os.environ['PATH']}", "REPOSITORY": str(copy)}


@pytest.mark.parametrize("name", ["single_node.sh", "multi_node.sh", "slurm.sh"])
def test_without_arguments_they_explain_themselves(name):
    done = run(f"launchers/{name}")
    assert done.returncode == 2
    script = (ROOT / "launchers" / name).read_text()
    assert "MASTER_PORT" in done.stdout
    assert "#!/" not in done.stdout
    for variable in ("MASTER_PORT", "OMP_NUM_THREADS", "NPROC", "HOSTFILE", "NODE_RANK", "GPUS_PER_NODE", "LOG"):
        if f"${{{variable}:" in script:
            assert variable in done.stdout, f"{variable} is used but not documented"


def test_single_node(recorder):
    launcher = Path(recorder["REPOSITORY"]) / "launchers/single_node.sh"
    done = run(launcher, "switchdit/train.py", "--config", "x.yaml", NPROC="3", DS_ACCELERATOR="cpu", **recorder)
    assert "deepspeed was given: --num_accelerators 3 switchdit/train.py --config x.yaml" in done.stdout
    done = run(launcher, "a.py", NPROC="two", **recorder)
    assert done.returncode == 2
    assert "error: NPROC is 'two'; it must be a whole number of at least 1" in done.stderr


def test_several_nodes(recorder, tmp_path):
    launcher = Path(recorder["REPOSITORY"]) / "launchers/multi_node.sh"
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# ours\nnode1 slots=8\nnode2 slots=8\n")
    done = run(launcher, "a.py", HOSTFILE=str(hostfile), **recorder)
    assert f"--hostfile {hostfile} --master_port 29500 --master_addr node1 a.py" in done.stdout
    done = run(launcher, "a.py", HOSTFILE=str(hostfile), NODE_RANK="1", MASTER_ADDR="node1", **recorder)
    assert "--no_ssh --node_rank 1 --master_addr node1 a.py" in done.stdout
    for environment, says in (
        ({"HOSTFILE": "absent"}, "HOSTFILE 'absent' does not exist"),
        ({"HOSTFILE": str(hostfile), "NODE_RANK": "1"}, "NODE_RANK needs MASTER_ADDR"),
        ({"HOSTFILE": "/dev/null"}, "does not exist"),
    ):
        done = run(launcher, "a.py", **recorder, **environment)
        assert done.returncode == 2
        assert says in done.stderr


def test_slurm(recorder):
    repository = Path(recorder["REPOSITORY"])
    launcher = repository / "launchers/slurm.sh"
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[A-B]",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": str(repository),
    }
    done = run(launcher, "switchdit/train.py", "--config", "x.yaml", **recorder, **job)
    assert "2 nodes x 4 processes, meeting at nodeA:24711: switchdit/train.py --config x.yaml" in done.stdout
    assert "srun was given: --kill-on-bad-exit=1 bash -c" in done.stdout
    assert done.stdout.rstrip().endswith("4 nodeA 24711 switchdit/train.py --config x.yaml")
    done = run(launcher, "switchdit/train.py", **recorder)
    assert done.returncode == 2
    assert "this is not a slurm job" in done.stderr
    done = run(launcher, "absent.py", **recorder, **job)
    assert "'absent.py' does not exist" in done.stderr


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
