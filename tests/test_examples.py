"""examples/ and docs/gpu.md do what they say, under a scheduler and an object storage that are pretended."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from run_checks import same_records, same_weights

from diva_lab.paths import ROOT
from diva_lab.training.runs import Run

SRUN = """#!/bin/bash
# One task, which is sent SIGTERM once it has trained for a step, if it is to be preempted.
shift  # --kill-on-bad-exit
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
"$@" &
task=$!
if [ -n "$PREEMPT" ]; then
    until [ -s "$(echo "$PREEMPT"/*/metrics.jsonl)" ]; do sleep 0.05; kill -0 $task || break; done
    kill -TERM $task
fi
wait $task
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames"*) echo localhost ;;
    "show job"*) echo "JobId=7 JobState=$STATE" ;;
    *) echo "$@" >>"$ASKED" ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """A function that runs examples/slurm.sh as a scheduler would; returns its exit status and what it asked for."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "asked").touch()
    settings = ["encoder=tiny", "denoiser=tiny", "steps=6", "batch=2", "accumulate=1", "vae_px=0", "images=world"]
    settings += ["save_every=0"]

    def submit(runs: Path, preempt: bool = False, state: str = "RUNNING", **more: str) -> tuple[int, str]:
        words = ["bash", str(ROOT / "examples" / "slurm.sh"), "--preset", "openai-l14-diva", "--out", str(runs)]
        places = {"PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])}
        places |= {"PREEMPT": str(runs) if preempt else "", "STATE": state, "ASKED": str(tmp_path / "asked")}
        places |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "SLURM_SUBMIT_DIR": str(tmp_path)}
        done = subprocess.run(
            [*words, "--set", *settings, *(f"{name}={value}" for name, value in more.items())],
            env=os.environ | places | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, (tmp_path / "asked").read_text()

    return submit


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_ends_with_the_same_bits(submit, tmp_path):
    assert submit(tmp_path / "whole") == (0, "")
    assert submit(tmp_path / "preempted", preempt=True) == (0, "requeue 7\n")
    whole, stopped = (Run(*(tmp_path / name).iterdir()) for name in ("whole", "preempted"))
    assert not stopped.done and 0 < len(stopped.metrics()) < 6
    assert submit(tmp_path / "preempted") == (0, "requeue 7\n")
    assert stopped.done and same_weights(whole, stopped)
    same_records(whole, stopped)


@pytest.mark.slow
def test_a_job_that_is_cancelled_or_fails_is_not_queued_again(submit, tmp_path):
    assert submit(tmp_path / "runs", preempt=True, state="CANCELLED") == (130, "")
    assert submit(tmp_path / "runs", lr="fast") == (2, "")


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket of an S3 that moto pretends; its address is in the environment, as papermill reads it."""
    server = pytest.importorskip("moto.server", reason="no object storage: needs the extra `storage`")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "us-east-1")
    pretended = server.ThreadedMotoServer(port=0)
    pretended.start()
    address = "http://{}:{}".format(*pretended.get_host_and_port())
    monkeypatch.setenv("BOTO3_ENDPOINT_URL", address)
    bucket = __import__("boto3").resource("s3", endpoint_url=address).create_bucket(Bucket="bucket")
    yield bucket
    pretended.stop()


@pytest.mark.slow
def test_papermill_writes_a_notebook_to_object_storage(bucket, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "papermill", ROOT / "notebooks" / "11_checkpoints.ipynb", "s3://bucket/11.ipynb"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    written = nbformat.reads(bucket.Object("11.ipynb").get()["Body"].read().decode(), 4)
    assert all(cell.execution_count for cell in written.cells if cell.cell_type == "code")
    assert not written.metadata.papermill.exception
