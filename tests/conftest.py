"""What all tests share."""

import os

# Small tensors gain nothing from threads, and threads of several ranks wait for each other on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
