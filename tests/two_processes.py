"""One of two processes that train together: `torchrun --nproc-per-node 2 two_processes.py FOLDER`.

FOLDER holds two tars, `pictures` of 16, and `begun`, the run of `GOES_ON` that one process has begun. The parts follow
one another in one job, since a process takes ten seconds to import what it needs.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.diva import diva
from diva_lab.training import batches
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune

SETTINGS = Settings(
    objective="diva", lora_rank=0, steps=1, batch=2, accumulate=2, optimizer="sgd", lr=0.1, weight_decay=0.0, clip=0.0,
    precision="no",
)  # fmt: skip
GOES_ON = replace(SETTINGS, steps=4, save_every=2, evaluate_every=3)  # in two processes with accumulate=1


def launch(*words: str, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
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


@contextmanager
def changed_step(number: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the second process's objective does `change` to the loss of its step `number`."""
    calls = []

    def changed(step):
        calls.append(1)
        rec = diva(step)["rec"]
        return {"rec": change(rec) if os.environ["RANK"] == "1" and len(calls) == number + 1 else rec}

    OBJECTIVES["diva"] = changed
    try:
        yield
    finally:
        OBJECTIVES["diva"] = diva


def terminate(rec: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return rec


def average(root: str) -> None:
    tune(replace(SETTINGS, images=f"{root}/{{0..1}}.tar"), f"{root}/both", lambda _: {"rank": int(os.environ["RANK"])})


def stop(root: str) -> None:
    """A run that goes to its end; one that is stopped by a signal, and goes on; one whose gradient becomes infinite."""
    settings = replace(SETTINGS, steps=3, accumulate=1, save_every=0)
    tune(settings, f"{root}/whole")
    with changed_step(1, terminate):
        try:
            tune(settings, f"{root}/stopped")
        except KeyboardInterrupt:
            tune(settings, f"{root}/stopped")
    with changed_step(1, lambda rec: rec + (rec - rec.detach()).sqrt()):
        try:
            tune(settings, f"{root}/broken")
        except FloatingPointError as error:
            print(error, flush=True)


def begin_and_go_on(root: str) -> None:
    """A run that is stopped by a signal in its second step; the run that one process has begun, to its end."""
    settings = replace(GOES_ON, accumulate=1, images=f"{root}/pictures")
    with changed_step(1, terminate), suppress(KeyboardInterrupt):
        tune(replace(settings, save_every=0), f"{root}/halfway")
    tune(settings, f"{root}/begun")


def die(root: str) -> None:
    opened = batches.open_images

    def dying(*args):
        source = opened(*args)
        source.batches = chain(islice(source.batches, 3), map(os._exit, [9]))
        return source

    if os.environ["RANK"] == "1":
        batches.open_images = dying
    tune(replace(SETTINGS, steps=50), f"{root}/dead")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in (average, stop, begin_and_go_on, die):
        part(sys.argv[1])
