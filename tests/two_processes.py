"""One of two processes that train together: `torchrun --nproc-per-node 2 two_processes.py OUT [die]`."""

import os
import sys
from itertools import islice

import torch

from diva_lab import training
from diva_lab.training import Settings, tune

SETTINGS = Settings(
    objective="diva", lora_rank=0, steps=1, batch=2, accumulate=2, optimizer="sgd", lr=0.1, weight_decay=0.0, clip=0.0,
    precision="no",
)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = SETTINGS
    if "die" in sys.argv:
        settings = training.replace(SETTINGS, steps=50)
        opened = training.open_images

        def dying(*args):
            yield from islice(opened(*args), 3)
            os._exit(9)

        if os.environ["RANK"] == "1":
            training.open_images = dying
    run = tune(settings, sys.argv[1], evaluate=lambda encoder: {"rank": int(os.environ["RANK"])})
    print(run.id, run.done)
