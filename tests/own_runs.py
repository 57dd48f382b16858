"""A pytest plugin: notebooks of each worker have a folder of runs of their own, since they train the same runs."""

import os

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["DIVA_LAB_RUNS"] = os.path.join(os.environ["DIVA_LAB_RUNS"], worker)
