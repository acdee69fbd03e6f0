"""Settings shared by all tests: the CPU, unless a GPU run asks for cuda; a cache of their own."""

import os
import signal
import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="switchdit-tests-")  # removed when Python ends

# programs that are started hear these signals, also where the tests run in the background of a script or under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["SWITCHDIT_CACHE"] = CACHE.name
