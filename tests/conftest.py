"""No test talks to the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores already.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
