"""The training program with a fault planted in it.

FAULT_FOLDER, FAULT_RUN_DIR and, for a fault, FAULT (JSON) stand in the environment.
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import fault_points

import switchdit.train
from switchdit.errors import run_and_end


def main() -> None:
    fault = os.environ.get("FAULT")
    fault_points.plant(
        Path(os.environ["FAULT_FOLDER"]),
        Path(os.environ["FAULT_RUN_DIR"]),
        fault_points.fault_from_json(fault) if fault else None,
    )
    switchdit.train.main()


if __name__ == "__main__":
    run_and_end(main)
