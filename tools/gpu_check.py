"""Everything that waits for a GPU, in one command of at most 25 minutes: records, logs and a page in one folder.

    make gpu-check OUT=out/gpu

- DCR's step with ViT-L/14 and Stable Diffusion 2.1, with and without compiling: seconds, and memory by rows
- images a second of an evaluation
- the plan of `openai-l14-dcr` at the rate that was measured
- `pytest -m "cuda or real_size"`, of the presets at real size one of each recipe and kind of encoder
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from diva_lab.paths import ROOT, check_writable
from diva_lab.plan import DEVICES
from diva_lab.provenance import environment

MINUTES = 25
VARIANTS = (
    "exact", "exact, row by row", "exact, two rows at a time", "exact, three rows at a time", "sampled, K = 4",
    "exact, compiled", "exact, row by row, compiled", "sampled, K = 4, compiled",
)  # fmt: skip
PRESETS = ("openai-l14-dcr", "openai-l14-diva", "metaclip-l14-diva-anchored", "siglip-so400m-genhancer")
SHOWN = 40  # lines of a command's output on the page


def commands(out: Path, device: str) -> dict[str, list[str]]:
    """Name -> words for this Python; what they write lies in `out`."""
    bench, record = ["-m", "diva_lab", "benchmark"], f"{out / 'dcr-step.json'}"
    step = [*bench, "dcr-step", "--scale", "sd21", "--rounds", "5", "--compile", "--json", record, "--only", *VARIANTS]
    chosen = " or ".join(["not at_real_size", *(f"[{name}]" for name in PRESETS)])
    return {
        "dcr-step": [*step, "--batch", "16"],
        "dcr-step of 8 images": [*step, "--batch", "8"],  # where 16 do not fit
        "evaluate": [*bench, "evaluate", "--batch", "64", "--rounds", "3", "--json", f"{out / 'evaluate.json'}"],
        "plan": ["-m", "diva_lab", "plan", "openai-l14-dcr", "--device", device, "--rate", record],
        "tests": ["-m", "pytest", "-q", "-m", "cuda or real_size", "-k", chosen],
    }


def run(words: list[str], log: Path, seconds: float) -> tuple[str, str]:
    """Run a command of this Python, its output into a file. Returns how it ended, and the last lines of the output."""
    env = os.environ | {"DIVA_LAB_RECORD": str(log.parent / "real_size.csv")}
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                [sys.executable, *words], cwd=ROOT, env=env, stdout=file, stderr=file, timeout=max(1, seconds)
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped, {MINUTES} minutes were over"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"exit {code}, {(time.monotonic() - start) / 60:.1f} minutes", "\n".join(lines[-SHOWN:])


def gpu_check(out: Path) -> Path:
    """Run all commands one after the other, and write the page; returns it.

    Raises:
        ValueError: where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("gpu-check: torch finds no CUDA device here; expected a machine with one and its driver")
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    out, gpu, end = out.resolve(), torch.cuda.get_device_name(), time.monotonic() + 60 * MINUTES
    facts = environment()
    page = [f"# {gpu}, {facts['time'][:10]}, git {facts['git']}, torch {facts['versions']['torch']}"]
    device = next((name for name in DEVICES if name in gpu), "A100")
    for name, words in commands(out, device).items():
        if name == "dcr-step of 8 images" and (out / "dcr-step.json").exists():
            continue
        ended, said = run(words, out / f"{name}.log", end - time.monotonic())
        print(f"{name}: {ended}", flush=True)
        page += [f"## {name}", f"`python {' '.join(words)}`: {ended}", f"```\n{said}\n```"]
        (out / "index.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return out / "index.md"


if __name__ == "__main__":
    try:
        print(gpu_check(Path(sys.argv[1] if len(sys.argv) > 1 else "out/gpu")))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
