"""Two machines in miniature, and one command on each; in namespaces of its own, as `tests/test_nodes.py` starts it.

    unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc
        python nodes.py SHARED [--cut LOG STEP] -- COMMAND...

Each machine has a network interface with an address, a name and a /tmp. The second finds 127.0.1.1 under its own name,
as Debian has it. They share the installation and the folder SHARED, which both see as /mnt. COMMAND gets NODE_RANK and
MASTER_ADDR. With --cut the cable is pulled once LOG has reached STEP. Prints as JSON each machine's exit code, output,
and how many seconds after the cut it ended.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from tiny_run import steps_done

HOSTS = (
    "127.0.0.1 localhost\n10.77.0.1 nodea\n10.77.0.2 nodeb\n",
    "127.0.0.1 localhost\n10.77.0.1 nodea\n127.0.1.1 nodeb\n",
)
LIMIT = 600  # seconds


def inside(machine: subprocess.Popen, *command: object) -> list[str]:
    return ["nsenter", f"--target={machine.pid}", "--net", "--mount", "--uts", *map(str, command)]


def set_up(shared: Path) -> list[subprocess.Popen]:
    """Processes that do nothing but hold the namespaces of one machine each."""
    hold = ["unshare", "--net", "--mount", "--uts", "sh", "-c", "echo; exec sleep infinity"]
    machines = [subprocess.Popen(hold, stdout=subprocess.PIPE) for _ in HOSTS]
    for machine in machines:
        machine.stdout.readline()  # the namespaces are there
    first, second = (machine.pid for machine in machines)
    cable = f"ip link add cable0 netns {first} type veth peer name cable1 netns {second}"
    subprocess.run(cable.split(), check=True)
    needs_tmp = any(path.is_relative_to("/tmp") for path in (ROOT, Path(sys.prefix)))
    for number, (machine, hosts) in enumerate(zip(machines, HOSTS, strict=True)):
        (shared / f"hosts_{number}").write_text(hosts)
        steps = f"""
            hostname {("nodea", "nodeb")[number]}
            ip link set lo up
            ip address add 10.77.0.{number + 1}/24 dev cable{number}
            ip link set cable{number} up
            mount --bind {shared}/hosts_{number} /etc/hosts
            mount --bind {shared} /mnt
            {"" if needs_tmp else "mount -t tmpfs none /tmp"}"""
        subprocess.run(inside(machine, "sh", "-ec", steps), check=True)
    return machines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=Path)
    parser.add_argument("--cut", nargs=2, metavar=("LOG", "STEP"))
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    machines = set_up(args.shared)
    runs, cut_at = [], None
    for number, machine in enumerate(machines):
        environment = {**os.environ, "NODE_RANK": str(number), "MASTER_ADDR": "nodea"}
        with open(args.shared / f"output_{number}", "w") as output:
            command = inside(machine, f"--wd={ROOT}", *args.command)
            runs.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    ended: dict[int, float] = {}
    deadline = time.monotonic() + LIMIT
    while len(ended) < len(runs) and time.monotonic() < deadline:
        time.sleep(0.02)
        if args.cut and cut_at is None and steps_done(Path(args.cut[0])) >= int(args.cut[1]):
            subprocess.run(inside(machines[0], "ip", "link", "set", "cable0", "down"), check=True)
            cut_at = time.monotonic()
        for number, run in enumerate(runs):
            if run.poll() is not None:
                ended.setdefault(number, time.monotonic())
    results = [
        {
            "code": run.poll(),
            "output": (args.shared / f"output_{number}").read_text(),
            "seconds": ended[number] - cut_at if cut_at and number in ended else None,
        }
        for number, run in enumerate(runs)
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
