import os
import socket
import subprocess
import sys

import pytest

from diva_lab import cli
from diva_lab.paths import ROOT

COUNT = "from diva_lab.machine import count_processes; print(count_processes())"


def test_processes_that_mpirun_starts_are_counted_without_world_size():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables |= {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
    started = []
    for rank in "01":
        own = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        started.append(subprocess.Popen([sys.executable, "-c", COUNT], stdout=subprocess.PIPE, env=variables | own))
    assert [process.communicate(timeout=120)[0].split()[-1:] for process in started] == [[b"2"], [b"2"]]


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 16), (2, 8)])
def test_train_shares_a_steps_images_among_as_many_processes_as_accelerate_counts(
    processes, accumulate, tmp_path, monkeypatch
):
    from diva_lab import plan
    from diva_lab.training import stages

    tuned = []

    def stop(settings, root):
        tuned.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("diva_lab.machine.count_processes", lambda: processes)
    monkeypatch.setattr(stages, "tune", stop)
    monkeypatch.setattr(plan, "plan_stage", lambda *_: None)  # counts a step at real size, and that takes its time
    monkeypatch.setattr(plan, "describe_start", lambda *_: "")
    cli.main(["train", "--preset", "openai-l14-dcr", "--shards", "world", "--projector", "x", "--out", str(tmp_path)])
    assert [settings.accumulate for settings in tuned] == [accumulate]
