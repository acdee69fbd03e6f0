"""Settings shared by all tests: the CPU, unless a GPU run asks for cuda."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")
