"""The study of feedback that CLIP can read: alignments x objectives x seeds, each a curve over the dose.

    python -m tools.feedback align [ALIGNMENT ...]    stage 1 of each alignment and seed -> data/results/projectors
    python -m tools.feedback rates [ROW ...]          each row's learning rate, at the full dose on the split `choose`
    python -m tools.feedback run [ROW ...]            each row's seeds, on the split `measure`
    python -m tools.feedback tables [ROW ...]         data/results/feedback.csv, and what was tried and is missing
    python -m tools.feedback readability              the instrument on every projector -> data/results/readability.csv
    python -m tools.feedback soup [ROW ...]           the mean of the mixed rows' runs -> data/results/feedback_soup.csv
    python -m tools.feedback pushes [ROW ...]         random pushes as far as the mixed rows' runs and soups go
    python -m tools.feedback ship                     the first anchored and unpaired projectors, and a run of DCR
    python -m tools.feedback --models FOLDER PART     the same on other models, as `tools.pretrain` writes them

A row is an objective after an alignment, as `diva/anchored`; `diva` or `/anchored` names several. `caption-contrast`,
`un2clip` and `kuea` read no projector: their rows are `caption-contrast/none` and so on. Every finished run is put on
record under data/results/records; a run on record is not run again. The same command may be started several times side
by side, on a GPU a dozen times: the processes share the runs, and none takes what another has in hand.

The rate of a row is the one with the highest pair score among those that end within 5 points of the original's zero-
shot accuracy; if there is none, the one with the highest sum of both. A rate at an end of its grid widens it, but for
un2clip and kuea, which at no rate raise the score: they would always ask for a smaller one. The rates are chosen after
the anchored and after the image-only alignment. Others take that of another row: unpaired, poor captions and bounded
DCR that of the anchored one, a placebo that of the image-only one, a row of `RELEASED` that of the row from which it
differs, the naive sum that of DIVA, `pseudo-labels` and `true labels`, on the images of `tools.pseudo_labels`, that of
caption-contrast; DCR and its guided form the paper's. A run whose zero-shot accuracy falls below 70 % has diverged and
is stopped. Everything is chosen on the shipped models: on others (`--models`) nothing is, and without names the rows of
`REPEATED` are run.

At its end each run is measured at `MIXES` too: between the original's weights and its own (`tuned_encoder`). The rows
of `MIXED` choose rate and mix together: the highest pair score within 2 points of the original's zero-shot accuracy
and 5 points of its NMI.
"""

import argparse
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diva_lab import messages
from diva_lab.analysis.alignment import alignment_report
from diva_lab.analysis.conflict import probe_gradients
from diva_lab.analysis.readability import DRAWS, Instrument, readability, world_pairs_in_memory
from diva_lab.evaluation.shift import shift_report
from diva_lab.evaluation.world import PATTERNS, WORLD_MEASURES, WORLD_SPLITS, cache_report, world_report, world_scenes
from diva_lab.machine import default_device
from diva_lab.models.encoders import Encoder, load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.paths import DATA, RUNS
from diva_lab.provenance import environment, sha256
from diva_lab.statistics import nested_t, where_reached
from diva_lab.training.build import SHIPPED_NAMES, build_conditioner, tuned_encoder
from diva_lab.training.controls import perturb
from diva_lab.training.runs import Run
from diva_lab.training.settings import SHIPPED, Settings
from diva_lab.training.soup import soup
from diva_lab.training.stages import align, find_run, tune
from diva_lab.workbook.findings import SOUP
from diva_lab.world import World
from tools.pseudo_labels import FOLDER as LABELS
from tools.records import DIGITS, read_record, write_record
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
    "mentions .3": {"anchor": "captions", "mentions": 0.3},
    "mentions .1": {"anchor": "captions", "mentions": 0.1},
}
POOR = ("mentions .3", "mentions .1")  # alignments of one seed: captions that say little
NO_PROJECTOR = "none"  # the alignment of an objective that reads no projector
RIVALS = ("un2clip", "kuea")  # objectives that learn from models of `tools.rivals`, of the shipped world alone
DIVA = {"objective": "diva", "batch": 16, "steps": 1000, "timesteps": "high-noise"}
DCR = {"objective": "dcr", "batch": 8, "steps": 500, "timesteps": "high-noise"}
CAPTION_CONTRAST = {"objective": "caption-contrast", "batch": 16, "steps": 1000, "tau": 0.01}
PUBLISHED = {"lr": 1e-5}  # DCR's rate: at 3e-5 and at 1e-4 it diverged
OBJECTIVES = {  # name -> settings of stage 2: 16,000 images, or DCR's 4,000, which take as long
    "diva": DIVA,
    "diva, mixed": DIVA,
    "dcr": DCR | PUBLISHED,
    "dcr, bounded": DCR | {"centre": True, "flips": False, "push_weight": 0.1},
    "naive, equal norms": DIVA | {"objective": "naive", "combine": "equal-norms", "lr": 4e-4},
    "dcr, guided": DCR | PUBLISHED | {"objective": "dcr-guidance"},
    "caption-contrast": CAPTION_CONTRAST,
    "caption-contrast, mixed": CAPTION_CONTRAST,
    "pseudo-labels": CAPTION_CONTRAST | {"lr": 4e-4, "images": str(LABELS / "denoiser")},
    "true labels": CAPTION_CONTRAST | {"lr": 4e-4, "images": str(LABELS / "world")},
    "un2clip": DIVA | {"objective": "un2clip", "denoiser": "unclip-tiny"},
    "kuea": {"objective": "kuea", "batch": 16, "steps": 1000},
}
RELEASED = {  # row -> the row that it differs from, and how: in one setting of the released code
    "diva, draws 5 to 1": ("diva", {"draw_weights": "5,1"}),
    "diva, VAE input": ("diva", {"vae_input": "imagenet"}),
    "diva, loader crop": ("diva", {"loader_crop": True}),
    "diva, normalise": ("diva", {"normalise": "openai"}),
    "diva, prompt mask": ("diva", {"prompt_mask": True}),
    "diva, noise in bf16": ("diva", {"noise_precision": "bf16"}),
    "diva, warm-up from 0": ("diva", {"warmup": 5, "warmup_zero": True}),
    "diva, SGD": ("diva", {"optimizer": "sgd", "lr": 6e-4, "clip": 0.1667}),  # as `5,1` at lr 1e-4
    "dcr, velocity": ("dcr", {"target": "velocity"}),
    "dcr, augment normalised": ("dcr", {"augment_normalised": True}),
}
OBJECTIVES |= {name: OBJECTIVES[base] | change for name, (base, change) in RELEASED.items()}
CAPTIONED = ("caption-contrast", "caption-contrast, mixed", "pseudo-labels", "true labels")  # without a denoiser
MIXED = ("diva, mixed", "caption-contrast, mixed")  # objectives whose mix is chosen too
RATES = {name: (1e-4, 2e-4, 4e-4) for name in ("diva", "caption-contrast", *RIVALS)}
RATES |= {"dcr, bounded": (3e-5, 1e-4, 3e-4)} | dict.fromkeys(MIXED, (4e-4, 8e-4, 1.6e-3))
SOUP_MIXES = (0.0, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 1.0)
MIXES = (0.15, 0.3, 0.45, 0.6, 0.8)
BOTH = ("anchored", "image-only")
ROWS = {  # objective -> alignments before it; only `anchored` before all others
    "diva": tuple(ALIGNMENTS), "diva, mixed": (*BOTH, "unpaired", "placebo"), "dcr": BOTH, "dcr, bounded": BOTH,
} | dict.fromkeys((*CAPTIONED, *RIVALS), (NO_PROJECTOR,))  # fmt: skip
WHOLE = (  # rows of five seeds, the others have three
    "diva/anchored", "diva, mixed/anchored", "diva, mixed/unpaired", "caption-contrast/none",
    "caption-contrast, mixed/none",
)  # fmt: skip
REPEATED = (  # rows of three seeds on other models
    "diva, mixed/unpaired", "diva, mixed/anchored", "diva/anchored", "diva/unpaired", "diva/image-only", "dcr/anchored",
    "dcr, bounded/anchored", "caption-contrast/none", "caption-contrast, mixed/none",
)  # fmt: skip
RATE_FROM = {  # row, or alignment -> the alignment whose learning rate it takes
    "unpaired": "anchored", "placebo": "image-only", "dcr, bounded/image-only": "anchored",
} | dict.fromkeys(POOR, "anchored")  # fmt: skip
LEVELS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)  # pair scores of `matched_scores`
MATCHED = [("pairs/mean", level, name) for name in ("zeroshot", "nmi", "probe/mean") for level in LEVELS]
MATCHED += [("zeroshot", lost, "pairs/mean") for lost in (0.005, 0.01, 0.02, 0.05)]  # at, level, measure
RATE_SEED = 99  # of runs that choose a rate; no seed that is reported
LOSS_ALLOWED = {"zeroshot": 0.05}  # in a run that may be chosen, from its start
MIX_ALLOWED = {"zeroshot": 0.02, "nmi": 0.05}  # at a mix that may be chosen
TRIED = ["lr", "mix", "pairs", "zeroshot", "nmi", "within"]  # columns of feedback_rates.csv
TERMS = ("contrastive", "diva")  # of the naive sum
NULL = ("cos", "cos/low", "cos/high", "other", "other/sd", "random/sd")  # of `probe_gradients`
PAUSE = 20.0  # seconds, where other processes have all in hand
DIVERGED = 0.7  # zero-shot accuracy below which a run is stopped
Report = Callable[[Encoder], dict[str, float]]
Task = Callable[[], object]


class Diverged(Exception):
    """A run's zero-shot accuracy fell below `DIVERGED`."""


class Waiting(Exception):
    """What is asked for is in the hands of another process."""


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
        seeds: of stage 2, of which a row takes those of `seeds_of`; seed k starts from the projector of
            `align_seeds[k % len(align_seeds)]`.
        align_seeds: of stage 1, none that stage 2 takes: equal seeds draw equal images.
        rates: tried for each objective; None for `RATES`.
        wider: how often a grid of rates may be widened.
        report: what is measured of an encoder, on a split of the models' world.
        mixes: at which a run's encoder is measured at the end.
        pushes: random pushes that are measured beside a run, by what they match.
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
    mixes: tuple[float, ...] = MIXES
    pushes: tuple[str, ...] = ("norm", "drift")
    report: Callable[..., dict[str, float]] = world_report
    shift: Callable[..., dict[str, float]] = shift_report
    align_report: Callable[..., dict[str, float]] = alignment_report

    @classmethod
    def of(cls, models: Path) -> "Plan":
        """The study on the models in a folder; raises FileNotFoundError if the folder holds none."""
        models = find_models(models)
        report = partial(alignment_report, n=64)  # a glance: on 256 images it takes a quarter of stage 1's time
        return cls(RUNS / f"feedback-{models.name}", DATA / "results" / models.name, models, align_report=report)

    @cached_property
    def world(self) -> World:
        """The world that the models were trained on."""
        return world_of(self.models)

    @cached_property
    def chooser(self) -> "Plan":
        """The plan on the shipped models, by whose runs rates and mixes are chosen."""
        return self if self.models is None else Plan()

    def rows(self, names: Sequence[str] = ()) -> list["Row"]:
        """The rows of these names (`read_rows`); without names all that are planned.

        Raises:
            ValueError: for an unknown name, and for a row that cannot be run on the models.
        """
        planned = ("",) if self.models is None else REPEATED
        rows = list(read_rows(names or planned))
        if self.models and (rivals := {row.objective for row in rows} & {*RIVALS}):
            raise ValueError(
                f"{', '.join(sorted(rivals))}: only on the shipped models, whose teachers ship; omit --models"
            )
        return rows

    def seeds_of(self, row: "Row") -> tuple[int, ...]:
        """Those of a row: the first alone of `RELEASED` and of `POOR`, three of most."""
        if row.objective in RELEASED or row.alignment in POOR:
            return self.seeds[:1]
        return self.seeds if str(row) in WHOLE and self.models is None else self.seeds[:3]

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
        projector = "new"  # of which an objective without projector makes no use
        if row.alignment != NO_PROJECTOR:
            projector = self.projector(row.alignment, self.align_seeds[seed % len(self.align_seeds)])
        return Settings(
            **name_models(self.models) | {"lr": lr} | changes | {"steps": steps}, projector=str(projector), seed=seed,
            evaluate_every=every, save_every=every,
        )  # fmt: skip

    def trial(self, row: Row, lr: float) -> Settings:
        """The run that tries a learning rate."""
        return self.stage_2(row, lr, RATE_SEED, min(4, self.evaluations))

    def record(self, settings: Settings, stage: str = "tune") -> dict | None:
        return read_record(find_run(settings, self.runs, stage), self.results / "records")


# --- what is run ------------------------------------------------------------------------------------------------


@contextmanager
def held(plan: Plan, name: str) -> Iterator[None]:
    """Keep other processes of the study from making what has this name; raises Waiting where one does."""
    plan.runs.mkdir(parents=True, exist_ok=True)
    with open(plan.runs / f"{name}.lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Waiting from None
        yield


def do_all(tasks: Iterable[Task]) -> list[Task]:
    """Do tasks in their order; returns those that another process has in hand."""
    left = []
    for task in tasks:
        try:
            task()
        except Waiting:
            left.append(task)
    return left


def take_turns(tasks: Sequence[Task]) -> None:
    """Do all tasks in their order; what another process has in hand is asked for again after the others."""
    while left := do_all(tasks):
        if len(left) == len(tasks):
            time.sleep(PAUSE)
        tasks = left


def align_once(plan: Plan, name: str, seed: int) -> None:
    """Stage 1 of an alignment and seed; its projector and its record are kept."""
    path = plan.projector(name, seed)
    with held(plan, f"align-{path.stem}"):
        if path.is_file():
            return
        run = align(plan.stage_1(name, seed), plan.runs, partial(plan.align_report, world=plan.world))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run.folder / "checkpoint" / "weights.safetensors", path)
        path.chmod(0o644)
        write_record(run, plan.results / "records", row=f"align/{name}")
        print(f"{name}, seed {seed}: recovered {run.evaluations()['recovered'].iloc[-1]:.3f}", flush=True)


def align_tasks(plan: Plan, alignments: Sequence[str]) -> list[Task]:
    """Stage 1 of each alignment and seed, the first seed of all alignments before the second."""
    return [
        partial(align_once, plan, name, seed)
        for k, seed in enumerate(plan.align_seeds)
        for name in alignments
        if k == 0 or name not in POOR
    ]


def score_mixes(run: Run, mixes: Sequence[float], report: Report) -> pd.DataFrame:
    """A line for each mix: what `report` finds of the run's encoder there."""
    device = default_device()
    return pd.DataFrame([{"mix": mix} | report(tuned_encoder(run, device, mix)) for mix in mixes])


def is_within(table: pd.DataFrame, start: pd.Series, allowed: dict[str, float]) -> pd.Series:
    """Whether each line loses no more against `start` than is allowed of each measure."""
    return pd.DataFrame({name: table[name] >= start[name] - loss for name, loss in allowed.items()}).all(axis=1)


def measure_pushes(plan: Plan, run: Run, report: Report, mix: float = 1.0) -> dict[str, dict[str, float]]:
    """What `report` finds after random pushes as far as a run went, or its mix, by how they are matched."""
    _, images = world_scenes(plan.world, max(key for *_, key in WORLD_SPLITS.values()) + 1)
    pushed = {match: perturb(run, images[:64], match, plan.runs, report, mix).evaluations() for match in plan.pushes}
    return {match: table.iloc[-1].drop("step").round(DIGITS).to_dict() for match, table in pushed.items()}


def measure_conflict(run: Run) -> dict[str, dict[str, list]]:
    """The cosine of the two terms' gradients in each step of a naive sum, and its null: probes of different batches."""
    probes, steps = run.probes(), run.metrics()[["step", "cos", "norm_con", "norm_rec"]]
    null = probes[(probes["of"] == "~".join(TERMS)) & probes["measure"].isin(NULL)][["step", "measure", "value"]]
    return {name: table.round(DIGITS).to_dict("list") for name, table in (("steps", steps), ("null", null))}


def run_once(plan: Plan, settings: Settings, report: Report, **facts: object) -> dict:
    """The record of a run, which is trained if it is on none; one that diverges is recorded as far as it came.

    Raises:
        Waiting: where another process has the run, or its projector, in hand.
    """
    if record := plan.record(settings):
        return record
    projector = Path(settings.projector)
    if projector.suffix and not projector.is_file():
        with held(plan, f"align-{projector.stem}"):
            pass  # nobody makes it: `tune` says what is missing
    with held(plan, find_run(settings, plan.runs).id):
        return plan.record(settings) or _train(plan, settings, report, facts)


def _train(plan: Plan, settings: Settings, report: Report, facts: dict[str, object]) -> dict:
    def watch(encoder: Encoder) -> dict[str, float]:
        values = report(encoder)
        if values["zeroshot"] < DIVERGED:
            raise Diverged
        return values

    probe = partial(probe_gradients, objectives=TERMS, bins=0) if settings.objective == "naive" else None
    try:
        run = tune(settings, plan.runs, watch, probe)
        if facts["row"].rpartition("/")[0] not in RELEASED:
            mixes = score_mixes(run, plan.mixes, report)
            facts["mixes"] = mixes.map(lambda value: round(value, DIGITS)).to_dict("list")
            if facts["split"] == "measure":
                facts["pushes"] = measure_pushes(plan, run, report)
        device = default_device()
        pair = load_encoder(settings.encoder, device), tuned_encoder(run, device)
        facts["shift"] = plan.shift(*pair, plan.world, facts["split"])
    except (Diverged, FloatingPointError):
        facts["diverged"] = True
    run = find_run(settings, plan.runs)
    if probe:
        facts["conflict"] = measure_conflict(run)
    write_record(run, plan.results / "records", **facts)
    return plan.record(settings)


def trial_rows(plan: Plan, row: Row, grid: Sequence[float], report: Report | None) -> pd.DataFrame | None:
    """lr, mix, scores and whether the losses are allowed, of each rate (of `MIXED` and mix) that did not diverge.

    None without `report`, where a trial is not on record. Raises Waiting where another process has a trial in hand.
    """
    once = partial(run_once, plan, report=report, row=str(row), split="choose") if report else plan.record
    records: list[dict | None] = []
    if do_all([lambda lr=lr: records.append(once(plan.trial(row, lr))) for lr in grid]):
        raise Waiting
    if any(record is None for record in records):
        return None
    tables, mixed = [], row.objective in MIXED
    for lr, record in zip(grid, records, strict=True):
        if record.get("diverged"):
            continue
        ends, start = record["evaluations"].iloc[[-1]].assign(mix=1.0), record["evaluations"].iloc[0]
        if mixed:
            ends = pd.concat([pd.DataFrame(record["mixes"]), ends])
        within = is_within(ends, start, MIX_ALLOWED if mixed else LOSS_ALLOWED)
        tables.append(ends.assign(lr=lr, pairs=ends["pairs/mean"], within=within))
    return pd.concat(tables)[TRIED].reset_index(drop=True) if tables else pd.DataFrame(columns=TRIED)


def rate_row(row: Row) -> Row:
    """The row whose learning rate a row takes."""
    objective, _ = RELEASED.get(row.objective, (row.objective, {}))
    alignment = RATE_FROM.get(row.alignment, row.alignment)
    return Row(objective, RATE_FROM.get(str(row), alignment))


def choose_trial(plan: Plan, row: Row, report: Report | None = None) -> tuple[pd.Series | None, pd.DataFrame]:
    """The row's chosen trial and all of them; without `report` nothing is trained, and there may be none.

    A row that has a rate of its own needs no trial. On other models than the shipped ones nothing is ever trained here.

    Raises:
        FileNotFoundError: with `report` on other models, where the trials are not on record.
    """
    if plan.models is not None:
        chosen, _ = choose_trial(plan.chooser, row)
        if chosen is None and report:
            asked = f"python -m tools.feedback rates '{rate_row(row)}'"
            raise FileNotFoundError(f"{row}: no rate of the shipped models is on record; run `{asked}` first")
        return chosen, pd.DataFrame()
    if own := OBJECTIVES[row.objective].get("lr"):
        return pd.Series({"lr": own, "mix": 1.0}), pd.DataFrame()
    row = rate_row(row)
    grid, chosen = sorted(plan.rates or RATES[row.objective]), None
    for _ in range(1 if row.objective in RIVALS else plan.wider + 1):
        trials = trial_rows(plan, row, grid, report)
        if trials is None:
            return None, pd.DataFrame()
        if trials.empty:
            grid = [grid[0] / 10, *grid]
            continue
        within = trials[trials["within"]]
        best = within["pairs"] if len(within) else trials["pairs"] + trials["zeroshot"]
        chosen = trials.loc[best.idxmax()]
        if chosen["lr"] == grid[0]:
            grid = [grid[0] / 2, *grid]
        elif chosen["lr"] == grid[-1]:
            grid = [*grid, 2 * grid[-1]]
        else:
            break
    return chosen, trials


def try_rates(plan: Plan, row: Row, report: Report) -> None:
    """Every trial of a row's rates; says which one was chosen."""
    chosen, trials = choose_trial(plan, row, report)
    print(f"{row}: {chosen}\n{trials.to_string(index=False)}", flush=True)


def run_seed(plan: Plan, row: Row, seed: int, choose: Report, measure: Report) -> None:
    """A row's run of this seed, at the rate that its trials choose; says what it scored."""
    chosen, _ = choose_trial(plan, row, choose)
    if chosen is None:
        print(f"{row}: every rate diverged", flush=True)
        return
    record = run_once(plan, plan.stage_2(row, float(chosen["lr"]), seed), measure, row=str(row), split="measure")
    last = all_mixes(record).set_index("mix").loc[chosen["mix"]]
    scores = f"pairs {last['pairs/mean']:.3f}, probes {last['probe/mean']:.3f}"
    scores += f", zero-shot {last['zeroshot']:.3f}, NMI {last['nmi']:.3f}"
    print(f"{row}, seed {seed}, lr {chosen['lr']:g}, mix {chosen['mix']:g}: {scores}", flush=True)


def row_tasks(plan: Plan, rows: Sequence[Row]) -> list[Task]:
    """Every seed of every row, a seed of all rows before the next one."""
    reports, seeds = (plan.reports("choose"), plan.reports("measure")), plan.seeds_of
    return [partial(run_seed, plan, row, seed, *reports) for seed in plan.seeds for row in rows if seed in seeds(row)]


# --- tables -----------------------------------------------------------------------------------------------------


def all_mixes(record: dict) -> pd.DataFrame:
    """What a run on record scored at each mix: 0 for its start, `plan.mixes`, 1 for its end."""
    start, end = (record["evaluations"].iloc[[k]].assign(mix=float(k != 0)) for k in (0, -1))
    return pd.concat([start, pd.DataFrame(record.get("mixes", {})), end]).reset_index(drop=True)


def write_tables(plan: Plan, rows: Sequence[Row]) -> None:
    """What is on record of these rows alone, and what is missing, as tables in place of those that were there.

    feedback.csv: every evaluation of every run. feedback_mixes.csv: every mix of every run's end. feedback_pushes.csv:
    random pushes as far as each run went. feedback_rates.csv: every trial of a rate. feedback_released.csv: the end of
    each run of `RELEASED`. feedback_conflict.csv and feedback_null.csv: `measure_conflict` of the naive sum.
    feedback_matched.csv: `matched_scores`. feedback_predicted.csv: `predicted_gains`, of the projectors in
    readability.csv. feedback_missing.csv: the seeds that are not on record, no line if all are.
    """
    curves, mixes, pushes, tried, released, missing, steps, null = ([] for _ in range(8))
    for row in rows:
        place = {"objective": row.objective, "alignment": row.alignment}
        chosen, trials = choose_trial(plan, row)
        if rate_row(row) == row and len(trials):
            own = (trials["lr"] == chosen["lr"]) & (trials["mix"] == chosen["mix"])
            tried.append(trials.assign(**place, chosen=own))
        for seed in plan.seeds_of(row):
            settings = None if chosen is None else plan.stage_2(row, float(chosen["lr"]), seed)
            record = settings and plan.record(settings)
            if record is None:
                missing.append(place | {"seed": seed})
                continue
            facts = place | _facts(plan, row, record)
            if row.objective in RELEASED:
                end = _kept("step", record["evaluations"].iloc[[-1]])
                released.append(end.assign(diverged=bool(record.get("diverged")), **facts))
                continue
            if row.objective not in MIXED:
                images = record["evaluations"]["step"] * settings.batch
                curves.append(_kept("step", record["evaluations"]).assign(images=images, **facts))
            mixed = _kept("mix", all_mixes(record))
            mixes.append(mixed.assign(chosen=mixed["mix"] == chosen["mix"], **facts))
            pushes.append(_kept("match", _push_table(record.get("pushes", {}))).assign(**facts))
            if conflict := record.get("conflict"):
                steps.append(pd.DataFrame(conflict["steps"]).assign(**facts))
                null.append(pd.DataFrame(conflict["null"]).assign(**facts))
    tables = {
        "feedback": curves, "feedback_mixes": mixes, "feedback_pushes": pushes, "feedback_rates": tried,
        "feedback_released": released, "feedback_conflict": steps, "feedback_null": null,
    }  # fmt: skip
    if mixes:
        apart = pd.concat(mixes).drop_duplicates(["run", "mix"])  # two rows may have chosen the same runs
        tables["feedback_matched"] = [matched_scores(pd.concat([apart, read_soups(plan)]))]
    if curves and (measured := plan.results / "readability.csv").is_file():
        tables["feedback_predicted"] = [predicted_gains(pd.read_csv(measured), pd.concat(curves))]
    for name, parts in tables.items():
        parts = [part for part in parts if len(part)]
        if parts:
            pd.concat(parts).to_csv(plan.results / f"{name}.csv", index=False, float_format="%.5g")
        else:
            (plan.results / f"{name}.csv").unlink(missing_ok=True)
    missing = pd.DataFrame(missing, columns=["objective", "alignment", "seed"])
    missing.to_csv(plan.results / "feedback_missing.csv", index=False)


def matched_scores(mixes: pd.DataFrame) -> pd.DataFrame:
    """Each row's D at the same P, and P at the same D: where its runs' mixes, from 0 to 1, first come to a level.

    Args:
        mixes: feedback_mixes.csv.

    Returns:
        Columns `objective`, `alignment`, `at` and `level` (a pair score, or points of zero-shot accuracy lost against
        the original), `measure`, `value` (its mean, `statistics.nested_t` in the seeds of stage 1), `low`, `high` and
        `seeds`. A level that not all runs of a row come to is left out.
    """
    rows = []
    for (objective, alignment), runs in mixes.groupby(["objective", "alignment"], sort=False):
        paths = [path.sort_values("mix") for _, path in runs.groupby("seed")]
        groups = [path["align_seed"].fillna(path["seed"]).iloc[0] for path in paths]
        for at, level, measure in MATCHED:
            met = []
            for path in paths:
                along = path[at] if at == "pairs/mean" else path[at].iloc[0] - path[at]
                met.append(where_reached(along, level, path[measure]))
            if not np.isnan(met).any():
                value, low, high = nested_t(met, groups)
                place = {"objective": objective, "alignment": alignment, "at": at, "level": level}
                rows.append(place | {"measure": measure, "value": value, "low": low, "high": high, "seeds": len(met)})
    return pd.DataFrame(rows)


def predicted_gains(instrument: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """What the instrument said of each projector and pattern before, and what DIVA gained through it at the full dose.

    Args:
        instrument: readability.csv.
        curves: feedback.csv.

    Returns:
        Columns `alignment` (of un2CLIP, which has none, its name), `projector`, `pattern`, `readable` (a fraction, with
        `low` and `high`), `gain` (points of the pair score, the mean over seeds) and `seeds`.
    """
    readable = instrument[instrument["measure"].str.startswith("readable") & (instrument["bin"] == "all")]
    readable = readable.rename(columns={"value": "readable"}).set_index(["projector", "pattern"])
    curves = curves[curves["objective"].isin(["diva", "un2clip"])].sort_values("step")
    rows = []
    for (objective, alignment, align_seed), runs in curves.groupby(
        ["objective", "alignment", "align_seed"], dropna=False
    ):
        alignment = objective if alignment == NO_PROJECTOR else alignment
        projector = alignment if np.isnan(align_seed) else f"{alignment}-{align_seed:.0f}"
        start, end = runs.groupby("run").first(), runs.groupby("run").last()
        for detail, pattern in PATTERNS.items():
            if (projector, pattern) in readable.index:
                gain = 100 * (end[f"pairs/{detail}"] - start[f"pairs/{detail}"]).mean()
                said = readable.loc[(projector, pattern), ["readable", "low", "high"]]
                place = {"alignment": alignment, "projector": projector, "pattern": detail}
                rows.append(place | said.to_dict() | {"gain": gain, "seeds": len(end)})
    return pd.DataFrame(rows)


def _facts(plan: Plan, row: Row, record: dict) -> dict:
    """Which run of a row a record is of."""
    seed, made = record["settings"]["seed"], record["environment"]
    align_seed = None if row.alignment == NO_PROJECTOR else plan.align_seeds[seed % len(plan.align_seeds)]
    facts = {"seed": seed, "align_seed": align_seed, "lr": record["settings"]["lr"], "run": record["run"]}
    return facts | {"git": made["git"], "torch": made["versions"]["torch"]}


def _push_table(pushes: dict[str, dict[str, float]]) -> pd.DataFrame:
    """A row for each of `measure_pushes`, by `match`."""
    return pd.DataFrame(pushes).T.rename_axis("match").reset_index()


def _kept(key: str, table: pd.DataFrame) -> pd.DataFrame:
    return table[[key, *(name for name in WORLD_MEASURES if name in table)]]


READABILITY_PAIRS = 16  # of a pattern


def measure_readability(plan: Plan) -> None:
    """readability.csv: the instrument on the shipped projector, those of stage 1 and un2CLIP's decoder, once each."""
    path = plan.results / "readability.csv"
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame({"projector": []})
    pairs = world_pairs_in_memory(READABILITY_PAIRS, WORLD_SPLITS["measure"][1] + plan.world.seed, plan.world)
    models = Settings(**name_models(plan.models), objective="diva", draws=DRAWS)
    measured_with = {} if plan.models else {"shipped": replace(models, projector="shipped")}
    for file in sorted((plan.results / "projectors").glob("*.safetensors")):
        measured_with[file.stem] = replace(models, projector=str(file))
    if plan.models is None:
        measured_with["un2clip"] = replace(models, objective="un2clip", denoiser=OBJECTIVES["un2clip"]["denoiser"])
    encoder, load = load_encoder(models.encoder), cache(load_denoiser)
    for name, settings in measured_with.items():
        if name in set(table["projector"]):
            continue
        start = time.perf_counter()
        denoiser = load(settings.denoiser)
        conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(False)
        instrument = Instrument(encoder, conditioner, denoiser, settings, (settings.objective,))
        measured = readability(pairs, instrument)
        facts = {"projector": name, "seconds": time.perf_counter() - start, "git": environment()["git"]}
        table = pd.concat([table, measured.assign(**facts)])
        table.to_csv(path, index=False, float_format="%.5g")
        whole = measured[(measured["pattern"] == "mean") & (measured["bin"] == "all")].set_index("measure")["value"]
        print(f"{name}: {whole.round(3).to_dict()}", flush=True)


SOUPS = [*(Row("diva, mixed", name) for name in ("anchored", "unpaired")), Row("caption-contrast, mixed", NO_PROJECTOR)]


def read_soups(plan: Plan) -> pd.DataFrame:
    """The soups' scores on the reported pairs, as lines of feedback_mixes.csv; empty where none was made."""
    path = plan.results / "feedback_soup.csv"
    if not path.is_file():
        return pd.DataFrame()
    table = pd.read_csv(path).query("split == 'measure'")
    return table.assign(objective=SOUP + table["objective"], seed=0, align_seed=None)


def measure_soups(plan: Plan, rows: Sequence[Row]) -> None:
    """The mean of the runs that are here of each row that is in `SOUPS`, at `SOUP_MIXES` on both splits.

    The mix is chosen on `choose`, by the rule of the row; other models than the shipped ones take what was chosen there
    and are measured on `measure` alone. Another row, or one of fewer than two runs here, keeps its lines.
    """
    path, made = plan.results / "feedback_soup.csv", []
    before = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["objective", "alignment"])
    for row in SOUPS:
        runs = _runs_of(plan, row)[1] if row in rows else []
        if len(runs) < 2:
            print(f"{row}: {len(runs)} of its runs are in {plan.runs}; its soup stays as it is")
            made.append(_lines_of(before, row))
            continue
        mixed = soup(runs, plan.runs)
        facts = {"objective": row.objective, "alignment": row.alignment}
        facts |= {"runs": mixed.settings["runs"], "git": environment()["git"]}
        best = _soup_mix(plan.chooser, row) if plan.models else None
        for split in ("measure",) if plan.models else ("choose", "measure"):
            table = score_mixes(mixed, SOUP_MIXES, plan.reports(split))
            within = is_within(table, table.iloc[0], MIX_ALLOWED)
            if best is None:
                best = table["mix"][table["pairs/mean"].where(within).idxmax()]
            made.append(table.assign(split=split, **facts, within=within, chosen=table["mix"] == best))
    pd.concat(made).to_csv(path, index=False, float_format="%.5g")


def _runs_of(plan: Plan, row: Row) -> tuple[pd.Series | None, list[Run]]:
    """A row's chosen trial, and its finished runs that are here."""
    chosen, _ = choose_trial(plan, row)
    seeds = () if chosen is None else plan.seeds_of(row)
    runs = [find_run(plan.stage_2(row, float(chosen["lr"]), seed), plan.runs) for seed in seeds]
    return chosen, [run for run in runs if run.done]


def _lines_of(table: pd.DataFrame, row: Row) -> pd.DataFrame:
    return table[(table["objective"] == row.objective) & (table["alignment"] == row.alignment)]


def _soup_mix(plan: Plan, row: Row) -> float:
    """The mix that was chosen for a row's soup."""
    lines = _lines_of(pd.read_csv(plan.results / "feedback_soup.csv"), row)
    return float(lines[lines["chosen"]]["mix"].iloc[0])


def push_mixes(plan: Plan, rows: Sequence[Row]) -> None:
    """feedback_pushes_mixed.csv: random pushes as far as the runs of `SOUPS`, and their soups, go at the chosen mix.

    Of each run that is here, and of the soup in feedback_soup.csv if all its runs are; once.
    """
    path, report, soups = plan.results / "feedback_pushes_mixed.csv", plan.reports("measure"), read_soups(plan)
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame({"run": []})
    for row in [row for row in SOUPS if row in rows]:
        chosen, runs = _runs_of(plan, row)
        goals = [(row.objective, run, float(chosen["mix"])) for run in runs]
        for line in soups.itertuples():
            if line.chosen and set(line.runs.split()) == {run.id for run in runs}:
                goals.append((line.objective, soup(runs, plan.runs), line.mix))
        for name, run, mix in goals:
            if run.id not in set(table["run"]):
                pushed = _push_table(measure_pushes(plan, run, report, mix))
                facts = {"objective": name, "alignment": row.alignment, "mix": mix, "run": run.id}
                table = pd.concat([table, pushed.assign(**facts, git=environment()["git"])])
                table.to_csv(path, index=False, float_format="%.5g")


def ship_projector(plan: Plan, name: str) -> Path:
    """Copy the first projector of an alignment to where `projector="anchored"`, say, looks for it, with its record."""
    record = plan.record(plan.stage_1(name, plan.align_seeds[0]), "align")
    path = SHIPPED / SHIPPED_NAMES[name].format("global")
    shutil.copy(plan.projector(name, plan.align_seeds[0]), path)
    record |= {"sha256": sha256(path), "evaluations": record["evaluations"].to_dict("list")}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


SHIPPED_ROW, SHIPPED_RUN = Row("dcr", "anchored"), DATA / "results" / "tuned" / "dcr"


def ship_run(plan: Plan) -> Path:
    """Copy DCR's run of the first seed, without its optimizer, to where notebook 10 reads it."""
    chosen, _ = choose_trial(plan, SHIPPED_ROW)
    run = find_run(plan.stage_2(SHIPPED_ROW, float(chosen["lr"]), plan.seeds[0]), plan.runs)
    for name in ("settings.json", "environment.json", "done", "checkpoint/weights.safetensors"):
        (SHIPPED_RUN / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run.folder / name, SHIPPED_RUN / name)
        (SHIPPED_RUN / name).chmod(0o644)
    return SHIPPED_RUN


# --- the command ------------------------------------------------------------------------------------------------

SMALL_FOLDER = RUNS / "feedback-small"
SMALL = Plan(
    SMALL_FOLDER, SMALL_FOLDER / "results", align_steps=3, dose=0.002, evaluations=1, seeds=(0,), align_seeds=(10_000,),
    rates=(1e-4,), wider=0, mixes=(), pushes=(), shift=lambda *models: {}, align_report=partial(alignment_report, n=16),
)  # fmt: skip


def all_rows() -> list[Row]:
    """Every row of the study, the more important ones first."""
    return [Row(name, alignment) for name in OBJECTIVES for alignment in ROWS.get(name, ("anchored",))]


def read_rows(names: Sequence[str]) -> Iterator[Row]:
    """The rows that names such as `diva/anchored`, `diva` and `/anchored` stand for, in this order; of "" all.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    for name in names:
        objective, _, alignment = name.partition("/")
        rows = [row for row in all_rows() if objective in ("", row.objective) and alignment in ("", row.alignment)]
        if not rows:
            raise ValueError(f"unknown row {name!r}; {messages.expected(name, map(str, all_rows()))}")
        yield from rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.feedback", description=__doc__.split("\n")[0])
    parts = ("align", "rates", "run", "tables", "readability", "soup", "pushes", "ship", "all")
    parser.add_argument("part", choices=parts)
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
        rows = plan.rows(["diva/anchored"] if args.small else names)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.seeds:
        plan = replace(plan, **{"align_seeds" if args.part == "align" else "seeds": tuple(args.seeds)})
    tasks: list[Task] = []
    if args.part in ("align", "all"):
        tasks += align_tasks(plan, [name for name in ALIGNMENTS if any(row.alignment == name for row in rows)])
    if args.part == "rates":
        tasks += [partial(try_rates, plan, row, plan.reports("choose")) for row in rows]
    if args.part in ("run", "all"):
        tasks += row_tasks(plan, rows)
    take_turns(tasks)
    if args.part in ("tables", "all"):
        write_tables(plan, rows if args.part == "tables" else plan.rows())
    if args.part == "readability":
        measure_readability(plan)
    if args.part == "soup":
        measure_soups(plan, rows)
    if args.part == "pushes":
        push_mixes(plan, rows)
    if args.part == "ship":
        print(*(ship_projector(plan, name) for name in ("anchored", "unpaired")), ship_run(plan), sep="\n")


if __name__ == "__main__":
    main()
