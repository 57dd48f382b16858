"""One of two processes that train together: `torchrun --nproc-per-node 2 two_processes.py OUT IMAGES|die|stop`.

Behind IMAGES may stand other settings than `SETTINGS`, as JSON, and `begin`: stop in the second step.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch

from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.diva import diva
from diva_lab.training import batches
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune

SETTINGS = Settings(
    objective="diva", lora_rank=0, steps=1, batch=2, accumulate=2, optimizer="sgd", lr=0.1, weight_decay=0.0, clip=0.0,
    precision="no",
)  # fmt: skip


def launch(*words: str, cwd: Path | None = None, timeout: float = 240) -> subprocess.CompletedProcess:
    """This script, or `-m` and a module, with its arguments, in two processes as `accelerate launch` starts them."""
    here = Path(__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [] if words[0] == "-m" else [str(here)]
    places = {"PYTHONPATH": os.pathsep.join(map(str, here.parents[:2])), "ACCELERATE_USE_CPU": "true"}
    places |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(
        [*command, *words], env=os.environ | places | {"OMP_NUM_THREADS": "1"}, cwd=cwd,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def change_step(number: int, change) -> None:
    """From now on the second process's objective does `change` to the loss of its step `number`."""
    calls = []

    def changed(step):
        calls.append(1)
        rec = diva(step)["rec"]
        return {"rec": change(rec) if os.environ["RANK"] == "1" and len(calls) == number + 1 else rec}

    OBJECTIVES["diva"] = changed


def terminate(rec):
    os.kill(os.getpid(), signal.SIGTERM)
    return rec


def stop(root: str) -> None:
    """A run that goes to its end; one that is stopped by a signal, and goes on; one whose gradient becomes infinite."""
    settings = replace(SETTINGS, steps=3, accumulate=1, save_every=0)
    tune(settings, f"{root}/whole")
    change_step(1, terminate)
    try:
        tune(settings, f"{root}/stopped")
    except KeyboardInterrupt:
        tune(settings, f"{root}/stopped")
    change_step(1, lambda rec: rec + (rec - rec.detach()).sqrt())
    try:
        tune(settings, f"{root}/broken")
    except FloatingPointError as error:
        print(error, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "stop" in sys.argv:
        stop(sys.argv[1])
        sys.exit()
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
        settings = replace(SETTINGS, images=sys.argv[2], **json.loads("".join(sys.argv[3:4]) or "{}"))
        if "begin" in sys.argv:
            change_step(1, terminate)
    run = tune(settings, sys.argv[1], evaluate=lambda encoder: {"rank": int(os.environ["RANK"])})
    print(run.id, run.done)
