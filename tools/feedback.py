"""The study of feedback that CLIP can read: alignments x objectives x seeds, each a curve over the dose.

    python -m tools.feedback align [ALIGNMENT ...]    stage 1 of each alignment and seed -> data/results/projectors
    python -m tools.feedback rates [ROW ...]          each row's learning rate, at the full dose on the split `choose`
    python -m tools.feedback run [ROW ...]            each row's seeds, on the split `measure`
    python -m tools.feedback tables                   data/results/feedback.csv, and what was tried and is missing
    python -m tools.feedback readability              the instrument on every projector -> data/results/readability.csv
    python -m tools.feedback ship                     the first anchored projector -> data/tiny/projectors
    python -m tools.feedback --models FOLDER PART     the same on other models, as `tools.pretrain` writes them

A row is an objective after an alignment, as `diva/anchored`; `diva` or `/anchored` names several. Every finished run is
put on record under data/results/records; a run on record is not run again. Parts may run side by side on rows of their
own.

The rate of a row is the one with the highest pair score among those that end within 5 points of the original's
zero-shot accuracy; if there is none, the one with the highest sum of both. A rate at an end of its grid widens it. The
rates are chosen after the anchored and after the image-only alignment; an unpaired row takes the anchored one's, a
placebo the image-only one's. A run whose zero-shot accuracy falls below 70 % has diverged and is stopped.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch

from diva_lab.analysis.alignment import alignment_report
from diva_lab.analysis.readability import DRAWS, Instrument, readability, world_pairs_in_memory
from diva_lab.evaluation.shift import shift_report
from diva_lab.evaluation.world import WORLD_MEASURES, WORLD_SPLITS, cache_report, world_report
from diva_lab.models.encoders import Encoder, load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.paths import DATA, RUNS
from diva_lab.provenance import environment, sha256
from diva_lab.training.build import build_conditioner, tuned_encoder
from diva_lab.training.settings import SHIPPED, Settings
from diva_lab.training.stages import align, find_run, tune
from diva_lab.world import World
from tools.records import read_record, write_record
from tools.study import find_models, name_models, world_of

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
DIVA = {"objective": "diva", "batch": 16, "steps": 1000, "timesteps": "high-noise"}
DCR = {"objective": "dcr", "batch": 8, "steps": 2000, "timesteps": "high-noise"}
OBJECTIVES = {  # name -> settings of stage 2; 16,000 images each
    "diva": DIVA,
    "dcr": DCR,
    "dcr, bounded": DCR | {"centre": True, "flips": False, "push_weight": 0.1},
}
RATES = {"diva": (1e-4, 2e-4, 4e-4)} | dict.fromkeys(("dcr", "dcr, bounded"), (1e-5, 3e-5, 1e-4))
RATE_FROM = {"unpaired": "anchored", "placebo": "image-only"}  # alignment -> whose learning rate its rows take
RATE_SEED = 99  # of runs that choose a rate; no seed that is reported
LOSS_ALLOWED = 0.05  # of zero-shot accuracy, in a run that may be chosen
DIVERGED = 0.7  # zero-shot accuracy below which a run is stopped
Report = Callable[[Encoder], dict[str, float]]


class Diverged(Exception):
    """A run's zero-shot accuracy fell below `DIVERGED`."""


@dataclass(frozen=True)
class Row:
    """An objective after an alignment."""

    objective: str
    alignment: str

    def __str__(self) -> str:
        return f"{self.objective}/{self.alignment}"


@dataclass(frozen=True)
class Plan:
    """Where the study's runs and records lie, and how much of it is run; the defaults are those of the shipped results.

    Attributes:
        runs: folder of the runs.
        results: folder of the records, the projectors and the tables.
        models: a folder of `tools.pretrain`; None for the shipped models.
        align_steps: of stage 1.
        dose: part of each objective's steps.
        evaluations: of a run, after the one at its start.
        seeds: of stage 2; seed k starts from the projector of `align_seeds[k % len(align_seeds)]`.
        align_seeds: of stage 1, none that stage 2 takes: equal seeds draw equal images.
        rates: tried for each objective; None for `RATES`.
        wider: how often a grid of rates may be widened.
        report: what is measured of an encoder, on a split of the models' world.
        shift: what is measured of the original and the tuned encoder at the end.
        align_report: what is measured of a projector.
    """

    runs: Path = RUNS / "feedback"
    results: Path = DATA / "results"
    models: Path | None = None
    align_steps: int = STAGE_1["steps"]
    dose: float = 1.0
    evaluations: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    align_seeds: tuple[int, ...] = (10_000, 10_001, 10_002)
    rates: tuple[float, ...] | None = None
    wider: int = 2
    report: Callable[..., dict[str, float]] = world_report
    shift: Callable[..., dict[str, float]] = shift_report
    align_report: Callable[..., dict[str, float]] = alignment_report

    @classmethod
    def of(cls, models: Path) -> "Plan":
        """The study on the models in a folder; raises FileNotFoundError if the folder holds none."""
        models = find_models(models)
        return cls(RUNS / f"feedback-{models.name}", DATA / "results" / models.name, models)

    @cached_property
    def world(self) -> World:
        """The world that the models were trained on."""
        return world_of(self.models)

    def reports(self, split: str) -> Report:
        return cache_report(partial(self.report, world=self.world, split=split))

    def projector(self, alignment: str, seed: int) -> Path:
        return self.results / "projectors" / f"{alignment}-{seed}.safetensors"

    def stage_1(self, alignment: str, seed: int) -> Settings:
        recipe = STAGE_1 | {"steps": self.align_steps} | ALIGNMENTS[alignment]
        return Settings(**name_models(self.models) | recipe, seed=seed)

    def stage_2(self, row: Row, lr: float, seed: int, evaluations: int = 0) -> Settings:
        changes = OBJECTIVES[row.objective]
        steps = max(1, round(self.dose * changes["steps"]))
        every = max(1, steps // (evaluations or self.evaluations))
        projector = self.projector(row.alignment, self.align_seeds[seed % len(self.align_seeds)])
        return Settings(
            **name_models(self.models) | changes | {"steps": steps}, projector=str(projector), lr=lr, seed=seed,
            evaluate_every=every, save_every=every,
        )  # fmt: skip

    def trial(self, row: Row, lr: float) -> Settings:
        """The run that tries a learning rate."""
        return self.stage_2(row, lr, RATE_SEED, min(4, self.evaluations))

    def record(self, settings: Settings, stage: str = "tune") -> dict | None:
        return read_record(find_run(settings, self.runs, stage), self.results / "records")


# --- what is run ------------------------------------------------------------------------------------------------


def align_all(plan: Plan, alignments: Sequence[str]) -> None:
    """Stage 1 of each alignment and seed; its projector and its record are kept."""
    for seed in plan.align_seeds:
        for name in alignments:
            path = plan.projector(name, seed)
            if path.is_file():
                continue
            run = align(plan.stage_1(name, seed), plan.runs, partial(plan.align_report, world=plan.world))
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run.folder / "checkpoint" / "weights.safetensors", path)
            path.chmod(0o644)
            write_record(run, plan.results / "records", row=f"align/{name}")
            print(f"{name}, seed {seed}: recovered {run.evaluations()['recovered'].iloc[-1]:.3f}", flush=True)


def run_once(plan: Plan, settings: Settings, report: Report, **facts: object) -> dict:
    """The record of a run, which is trained if it is on none; one that diverges is recorded as far as it came."""
    if record := plan.record(settings):
        return record

    def watch(encoder: Encoder) -> dict[str, float]:
        values = report(encoder)
        if values["zeroshot"] < DIVERGED:
            raise Diverged
        return values

    try:
        run = tune(settings, plan.runs, watch)
        facts["shift"] = plan.shift(load_encoder(settings.encoder), tuned_encoder(run), plan.world, facts["split"])
    except (Diverged, FloatingPointError):
        facts["diverged"] = True
    write_record(find_run(settings, plan.runs), plan.results / "records", **facts)
    return plan.record(settings)


def trial_rows(plan: Plan, row: Row, grid: Sequence[float], report: Report | None) -> pd.DataFrame | None:
    """lr, pair score, zero-shot and whether it is within `LOSS_ALLOWED`, of each rate that did not diverge.

    None without `report`, where a trial is not on record.
    """
    lines = []
    for lr in grid:
        settings = plan.trial(row, lr)
        record = run_once(plan, settings, report, row=str(row), split="choose") if report else plan.record(settings)
        if record is None:
            return None
        start, end = record["evaluations"].iloc[0], record["evaluations"].iloc[-1]
        if not record.get("diverged"):
            line = {"lr": lr, "pairs": end["pairs/mean"], "zeroshot": end["zeroshot"]}
            lines.append(line | {"within": end["zeroshot"] >= start["zeroshot"] - LOSS_ALLOWED})
    return pd.DataFrame(lines, columns=["lr", "pairs", "zeroshot", "within"])


def choose_rate(plan: Plan, row: Row, report: Report | None = None) -> tuple[float | None, pd.DataFrame]:
    """The row's learning rate and its trials; without `report` nothing is trained, and the rate may be None."""
    row = Row(row.objective, RATE_FROM.get(row.alignment, row.alignment))
    grid = sorted(plan.rates or RATES[row.objective])
    for _ in range(plan.wider + 1):
        trials = trial_rows(plan, row, grid, report)
        if trials is None:
            return None, pd.DataFrame()
        if trials.empty:
            grid = [grid[0] / 10, *grid]
            continue
        within = trials[trials["within"]]
        best = within["pairs"] if len(within) else trials["pairs"] + trials["zeroshot"]
        chosen = float(trials.loc[best.idxmax(), "lr"])
        if chosen == grid[0]:
            grid = [grid[0] / 2, *grid]
        elif chosen == grid[-1]:
            grid = [*grid, 2 * grid[-1]]
        else:
            break
    return (None if trials.empty else chosen), trials


def run_rows(plan: Plan, rows: Sequence[Row]) -> None:
    """Every seed of every row, a seed of all rows before the next one."""
    choose, measure = plan.reports("choose"), plan.reports("measure")
    for seed in plan.seeds:
        for row in rows:
            lr, _ = choose_rate(plan, row, choose)
            if lr is None:
                print(f"{row}: every rate diverged", flush=True)
                continue
            last = run_once(plan, plan.stage_2(row, lr, seed), measure, row=str(row), split="measure")
            last = last["evaluations"].iloc[-1]
            scores = f"pairs {last['pairs/mean']:.3f}, probes {last['probe/mean']:.3f}"
            scores += f", zero-shot {last['zeroshot']:.3f}, NMI {last['nmi']:.3f}"
            print(f"{row}, seed {seed}, lr {lr:g}: {scores}", flush=True)


# --- tables -----------------------------------------------------------------------------------------------------


def write_tables(plan: Plan) -> None:
    """feedback.csv: every evaluation of every run; feedback_rates.csv: every rate; feedback_missing.csv: the rest."""
    curves, tried, missing = [], [], []
    for row in all_rows():
        place = {"objective": row.objective, "alignment": row.alignment}
        lr, trials = choose_rate(plan, row)
        if row.alignment not in RATE_FROM and len(trials):
            tried.append(trials.assign(**place, chosen=trials["lr"] == lr))
        for seed in plan.seeds:
            settings = None if lr is None else plan.stage_2(row, lr, seed)
            record = settings and plan.record(settings)
            if record is None:
                missing.append(place | {"seed": seed})
                continue
            table = record["evaluations"]
            facts = place | {"seed": seed, "align_seed": plan.align_seeds[seed % len(plan.align_seeds)], "lr": lr}
            facts |= {"run": record["run"], "git": record["environment"]["git"]}
            facts |= {"torch": record["environment"]["versions"]["torch"]}
            kept = [name for name in WORLD_MEASURES if name in table]
            curves.append(table[["step", *kept]].assign(images=table["step"] * settings.batch, **facts))
    tables = {"feedback": curves, "feedback_rates": tried, "feedback_missing": [pd.DataFrame(missing)]}
    for name, parts in tables.items():
        parts = [part for part in parts if len(part)]
        if parts:
            pd.concat(parts).to_csv(plan.results / f"{name}.csv", index=False, float_format="%.5g")
        else:
            (plan.results / f"{name}.csv").unlink(missing_ok=True)


READABILITY_PAIRS = 16  # of a pattern


def measure_readability(plan: Plan) -> None:
    """readability.csv: the instrument on the shipped projector and on those of stage 1 that are not in it yet."""
    path = plan.results / "readability.csv"
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame({"projector": []})
    pairs = world_pairs_in_memory(READABILITY_PAIRS, WORLD_SPLITS["measure"][1] + plan.world.seed, plan.world)
    projectors = {} if plan.models else {"shipped": "shipped"}
    projectors |= {file.stem: str(file) for file in sorted((plan.results / "projectors").glob("*.safetensors"))}
    models = Settings(**name_models(plan.models), objective="diva", draws=DRAWS)
    encoder, denoiser = load_encoder(models.encoder), load_denoiser(models.denoiser)
    for name, projector in projectors.items():
        if name in set(table["projector"]):
            continue
        start = time.perf_counter()
        settings = replace(models, projector=projector)
        conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(False)
        measured = readability(pairs, Instrument(encoder, conditioner, denoiser, settings))
        facts = {"projector": name, "seconds": time.perf_counter() - start, "git": environment()["git"]}
        table = pd.concat([table, measured.assign(**facts)])
        table.to_csv(path, index=False, float_format="%.5g")
        whole = measured[(measured["pattern"] == "mean") & (measured["bin"] == "all")].set_index("measure")["value"]
        print(f"{name}: {whole.round(3).to_dict()}", flush=True)


def ship_projector(plan: Plan) -> Path:
    """Copy the first anchored projector to where `projector="anchored"` looks for it, with its record."""
    record = plan.record(plan.stage_1("anchored", plan.align_seeds[0]), "align")
    path = SHIPPED / "global-anchored.safetensors"
    shutil.copy(plan.projector("anchored", plan.align_seeds[0]), path)
    record |= {"sha256": sha256(path), "evaluations": record["evaluations"].to_dict("list")}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


# --- the command ------------------------------------------------------------------------------------------------

SMALL_FOLDER = RUNS / "feedback-small"
SMALL = Plan(
    SMALL_FOLDER, SMALL_FOLDER / "results", align_steps=3, dose=0.002, evaluations=1, seeds=(0,), align_seeds=(10_000,),
    rates=(1e-4,), wider=0, shift=lambda *models: {}, align_report=partial(alignment_report, n=16),
)  # fmt: skip


def all_rows() -> list[Row]:
    return [Row(objective, alignment) for objective in OBJECTIVES for alignment in ALIGNMENTS]


def read_rows(names: Sequence[str]) -> Iterator[Row]:
    """The rows that names such as `diva/anchored`, `diva` and `/anchored` stand for, in this order; of none all.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    for name in names or [""]:
        objective, _, alignment = name.partition("/")
        if objective not in (*OBJECTIVES, "") or alignment not in (*ALIGNMENTS, ""):
            raise ValueError(f"unknown row {name!r}; expected {', '.join(OBJECTIVES)} / {', '.join(ALIGNMENTS)}")
        yield from (row for row in all_rows() if row.objective in (objective or row.objective, )
                    and row.alignment == (alignment or row.alignment))  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.feedback", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("align", "rates", "run", "tables", "readability", "ship", "all"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="alignments, or rows as OBJECTIVE/ALIGNMENT")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="models of `tools.pretrain`")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these; for align of stage 1")
    parser.add_argument("--small", action="store_true", help="a few steps of one row, in runs/feedback-small")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    names = [f"/{name}" for name in args.names] if args.part == "align" else args.names
    try:
        plan = SMALL if args.small else Plan.of(args.models) if args.models else Plan()
        rows = list(read_rows(["diva/anchored"] if args.small else names))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.seeds:
        plan = replace(plan, **{"align_seeds" if args.part == "align" else "seeds": tuple(args.seeds)})
    if args.part in ("align", "all"):
        align_all(plan, list(dict.fromkeys(row.alignment for row in rows)))
    if args.part == "rates":
        report = plan.reports("choose")
        for row in rows:
            lr, trials = choose_rate(plan, row, report)
            print(f"{row}: lr {lr}\n{trials.to_string(index=False)}", flush=True)
    if args.part in ("run", "all"):
        run_rows(plan, rows)
    if args.part in ("tables", "all"):
        write_tables(plan)
    if args.part == "readability":
        measure_readability(plan)
    if args.part == "ship":
        print(ship_projector(plan))


if __name__ == "__main__":
    main()
