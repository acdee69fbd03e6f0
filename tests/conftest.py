"""Settings shared by all tests: the CPU, unless a GPU run asks for cuda; a cache of their own."""

import os
import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="switchdit-tests-")  # removed when Python ends

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["SWITCHDIT_CACHE"] = CACHE.name
