"""The study of feedback that CLIP can read: alignments x objectives x seeds, each a curve over the dose.

    python -m tools.feedback align [ALIGNMENT ...]    stage 1 of each alignment and seed -> data/results/projectors
    python -m tools.feedback rates [ROW ...]          each row's learning rate, at the full dose on the split `choose`
    python -m tools.feedback run [ROW ...]            each row's seeds, on the split `measure`

A row is an objective after an alignment, as `diva/anchored`; `diva` or `/anchored` names several. Every finished run is
put on record under data/results/records; a run on record is not run again. Parts may run side by side on rows of their
own.

The rate of a row is the one with the highest pair score among those that end within 5 points of the original's
zero-shot accuracy; if there is none, the one with the highest sum of both. A rate at an end of its grid widens it.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from diva_lab.analysis.alignment import alignment_report
from diva_lab.evaluation.world import world_report
from diva_lab.paths import DATA, RUNS
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align, find_run, tune
from tools.records import read_record, write_record
from tools.study import cache_report

PROJECTORS = DATA / "results" / "projectors"
STAGE_1 = {
    "projector": "new", "batch": 32, "steps": 1500, "lr": 2e-3, "schedule": "cosine", "draws": 1,
    "timesteps": "0,1,1,1,1", "save_every": 250, "evaluate_every": 500,
}  # fmt: skip
ALIGNMENTS = {  # name -> what differs in stage 1
    "anchored": {"anchor": "captions"},
    "image-only": {"anchor": "none"},
    "placebo": {"anchor": "shuffled"},
    "unpaired": {"anchor": "text"},
}
ALIGN_SEEDS = (10_000, 10_001, 10_002)  # none that stage 2 takes: equal seeds draw equal images
DIVA = {"objective": "diva", "batch": 16, "steps": 1000, "timesteps": "high-noise"}
DCR = {"objective": "dcr", "batch": 8, "steps": 2000, "timesteps": "high-noise"}
ROWS = {  # objective's name -> settings of stage 2; 16,000 images each
    "diva": DIVA,
    "dcr": DCR,
    "dcr, bounded": DCR | {"centre": True, "flips": False, "push_weight": 0.1},
}
RATES = {"diva": (1e-4, 2e-4, 4e-4, 8e-4)} | dict.fromkeys(("dcr", "dcr, bounded"), (1e-5, 3e-5, 1e-4, 3e-4))
WIDER = 2  # how often a grid may be widened
SEEDS = (0, 1, 2, 3, 4)  # seed k starts from the projector of seed ALIGN_SEEDS[k % 3]
RATE_SEED = 99  # of runs that choose a rate; no seed that is reported
LOSS_ALLOWED = 0.05  # of zero-shot accuracy, in a run that may be chosen
DIVERGED = 0.3  # zero-shot accuracy below which a run is stopped
EVALUATIONS = 8  # of a run, after the one at its start


class Diverged(Exception):
    """A run's zero-shot accuracy fell below `DIVERGED`."""


@dataclass(frozen=True)
class Row:
    """An objective after an alignment."""

    objective: str
    alignment: str

    def __str__(self) -> str:
        return f"{self.objective}/{self.alignment}"

    def settings(self, lr: float, seed: int, evaluations: int = EVALUATIONS) -> Settings:
        changes = ROWS[self.objective]
        projector = projector_file(self.alignment, ALIGN_SEEDS[seed % len(ALIGN_SEEDS)])
        every = changes["steps"] // evaluations
        return Settings(**changes, projector=str(projector), lr=lr, seed=seed, evaluate_every=every, save_every=every)

    def trial(self, lr: float) -> Settings:
        return self.settings(lr, RATE_SEED, 4)


def projector_file(alignment: str, seed: int) -> Path:
    return PROJECTORS / f"{alignment}-{seed}.safetensors"


def align_all(alignments: Sequence[str], seeds: Sequence[int]) -> None:
    """Stage 1 of each alignment and seed; its projector and its record are kept."""
    for seed in seeds:
        for name in alignments:
            settings = Settings(**STAGE_1 | ALIGNMENTS[name], seed=seed)
            if projector_file(name, seed).is_file():
                continue
            run = align(settings, RUNS / "feedback", alignment_report)
            PROJECTORS.mkdir(parents=True, exist_ok=True)
            shutil.copy(run.folder / "checkpoint" / "weights.safetensors", projector_file(name, seed))
            write_record(run, row=f"align/{name}")
            print(f"{name}, seed {seed}: recovered {run.evaluations()['recovered'].iloc[-1]:.3f}", flush=True)


def run_once(settings: Settings, report, **facts: object) -> dict:
    """The record of a run, which is trained if it is on none; one that diverges is recorded as far as it came."""
    run = find_run(settings, RUNS / "feedback")
    if record := read_record(run):
        return record

    def watch(encoder) -> dict[str, float]:
        values = report(encoder)
        if values["zeroshot"] < DIVERGED:
            raise Diverged
        return values

    try:
        tune(settings, RUNS / "feedback", watch)
    except (Diverged, FloatingPointError):
        facts["diverged"] = True
    write_record(run, **facts)
    return read_record(run)


def ended(record: dict, settings: Settings) -> pd.Series | None:
    """The last evaluation of a run; None where it diverged."""
    return None if record.get("diverged") else record["evaluations"].iloc[-1]


def choose_rate(row: Row, report=None) -> float | None:
    """The row's learning rate by the rule above; without `report` nothing is trained, and None is an open choice."""
    grid = sorted(RATES[row.objective])
    for _ in range(WIDER + 1):
        ends = {}
        for lr in grid:
            settings = row.trial(lr)
            record = read_record(find_run(settings, RUNS / "feedback"))
            if record is None and report is None:
                return None
            record = record or run_once(settings, report, row=str(row), split="choose")
            start, end = record["evaluations"].iloc[0], ended(record, settings)
            if end is not None:
                ends[lr] = (end["zeroshot"] >= start["zeroshot"] - LOSS_ALLOWED, end["pairs/mean"], end["zeroshot"])
            print(f"{row}, lr {lr:g}: {'diverged' if end is None else ends[lr]}", flush=True)
        if not ends:
            grid = [grid[0] / 10, *grid]
            continue
        within = {lr: pairs for lr, (fine, pairs, _) in ends.items() if fine}
        chosen = max(within, key=within.get) if within else max(ends, key=lambda lr: sum(ends[lr][1:]))
        if chosen == grid[0]:
            grid = [grid[0] / 2, *grid]
        elif chosen == grid[-1]:
            grid = [*grid, 2 * grid[-1]]
        else:
            break
    return chosen


def run_rows(rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Every seed of every row, a seed of all rows before the next one."""
    choose, measure = (cache_report(partial(world_report, split=split)) for split in ("choose", "measure"))
    for seed in seeds:
        for row in rows:
            settings = row.settings(choose_rate(row, choose), seed)
            last = run_once(settings, measure, row=str(row), split="measure")["evaluations"].iloc[-1]
            scores = f"pairs {last['pairs/mean']:.3f}, probes {last['probe/mean']:.3f}"
            scores += f", zero-shot {last['zeroshot']:.3f}, NMI {last['nmi']:.3f}"
            print(f"{row}, seed {seed}, lr {settings.lr:g}: {scores}", flush=True)


def read_rows(names: Sequence[str]) -> Iterator[Row]:
    """The rows that names such as `diva/anchored`, `diva` and `/anchored` stand for; of none all.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    for name in names or [""]:
        objective, _, alignment = name.partition("/")
        if objective not in (*ROWS, "") or alignment not in (*ALIGNMENTS, ""):
            raise ValueError(f"unknown row {name!r}; expected {', '.join(ROWS)} / {', '.join(ALIGNMENTS)}")
        for o in [objective] if objective else ROWS:
            yield from (Row(o, a) for a in ([alignment] if alignment else ALIGNMENTS))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.feedback", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("align", "rates", "run"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="alignments, or rows as OBJECTIVE/ALIGNMENT")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.part == "align":
        align_all(args.names or list(ALIGNMENTS), args.seeds or ALIGN_SEEDS)
        return
    rows = list(read_rows(args.names))
    if args.part == "rates":
        report = cache_report(partial(world_report, split="choose"))
        for row in rows:
            print(f"{row}: lr {choose_rate(row, report):g}", flush=True)
    else:
        run_rows(rows, args.seeds or SEEDS)


if __name__ == "__main__":
    main()
