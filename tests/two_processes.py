"""One of two processes that train together: `torchrun --nproc-per-node 2 two_processes.py OUT IMAGES|die`."""

import os
import sys
from dataclasses import replace
from itertools import chain, islice

import torch

from diva_lab.training import batches
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune

SETTINGS = Settings(
    objective="diva", lora_rank=0, steps=1, batch=2, accumulate=2, optimizer="sgd", lr=0.1, weight_decay=0.0, clip=0.0,
    precision="no",
)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "die" in sys.argv:
        settings = replace(SETTINGS, steps=50)
        opened = batches.open_images

        def dying(*args):
            source = opened(*args)
            source.batches = chain(islice(source.batches, 3), map(os._exit, [9]))
            return source

        if os.environ["RANK"] == "1":
            batches.open_images = dying
    else:
        settings = replace(SETTINGS, images=sys.argv[2])
    run = tune(settings, sys.argv[1], evaluate=lambda encoder: {"rank": int(os.environ["RANK"])})
    print(run.id, run.done)
