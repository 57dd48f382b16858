"""The tables that ship, from the runs of `tools.study`.

    python -m tools.tables              all of them -> data/results, and the table in docs/results.md
    python -m tools.tables rows         scores, curves, conflicts, probes and claims of the study's rows
    python -m tools.tables theory       both sides of the two theorems: theory_scatter.csv, theory_affine.csv
    python -m tools.tables results      the table in docs/results.md, from objectives.csv
    python -m tools.tables --models FOLDER    the rows on other models -> data/results/NAME

Rows that have not been run are missing from the tables; missing.csv names them.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from diva_lab.analysis.theory import COSINES, dcr_predictions, theorem_2
from diva_lab.figures.style import LABELS, MEASURES
from diva_lab.paths import ROOT
from diva_lab.provenance import environment
from diva_lab.statistics import paired_differences
from diva_lab.training.build import tuned_encoder
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import find_run
from tools.study import MATCHES, RESULTS, THEORY, Study, add_study, read_rows, read_study

# --- the study's rows -------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row and seed of the study: its learning rate (None if not yet chosen) and run (None if not finished)."""

    tier: str
    name: str
    seed: int
    lr: float | None
    run: Run | None


def find_rows(study: Study) -> Iterator[Row]:
    for tier, name, changes in study.each_row():
        lr = study.choose_rate(changes)
        for seed in study.seeds_of(tier):
            run = None if lr is None else find_run(study.row_settings(changes, seed), study.root)
            yield Row(tier, name, seed, lr, run if run and run.done else None)


def collect(study: Study) -> list[Path]:
    """Write the tables of all finished runs to `study.results`, and missing.csv of the others.

    rates.csv: every learning rate that was tried, and which was chosen. objectives.csv: the first tier with its
    controls, one row for each objective and seed; ablations.csv: the other tiers. curves.csv: every evaluation.
    conflict.csv: every step of the naive sum. probes.csv: the records of the probes. claims.csv: differences to `none`
    with intervals. A table without rows is removed.
    """
    every = list(find_rows(study))
    done = [row for row in every if row.run]
    first = [row for row in done if row.tier == "objectives"]
    tables = {
        "rates": list(rate_rows(study)),
        "objectives": [*original_rows(done), *(line for row in first for line in objective_rows(row, study.root))],
        "ablations": [score_run(row) for row in done if row.tier != "objectives"],
        "curves": [row.run.evaluations().assign(**facts_of(row.run, row.name, row.tier)) for row in done],
        "conflict": [label_run(row, row.run.metrics()) for row in done if row.name == "naive"],
        "probes": [label_run(row, row.run.probes()) for row in done if len(row.run.probes())],
    }
    study.results.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, parts in tables.items():
        if not parts:
            (study.results / f"{name}.csv").unlink(missing_ok=True)
            continue
        table = pd.concat(parts) if isinstance(parts[0], pd.DataFrame) else pd.DataFrame(parts)
        if name == "curves":
            table = table[["objective", "tier", "seed", "step", *MEASURES]]
        paths.append(write_table(table, study.results / f"{name}.csv"))
    missing = [(row.tier, row.name, row.seed, row.lr) for row in every if not row.run]
    missing = pd.DataFrame(missing, columns=["tier", "row", "seed", "lr"])
    paths.append(write_table(missing, study.results / "missing.csv"))
    scores = pd.DataFrame([*tables["objectives"], *tables["ablations"]])
    if len(scores):
        paths.append(write_table(paired_differences(scores, MEASURES), study.results / "claims.csv"))
    return paths


def facts_of(run: Run, name: str, tier: str) -> dict:
    """The columns of a row that are no measures."""
    settings, code = run.settings, run.environment
    facts = {"objective": name, "tier": tier, "seed": settings["seed"], "lr": settings["lr"], "run": run.id}
    return facts | {"git": code["git"], "torch": code["versions"]["torch"]}


def label_run(row: Row, records: pd.DataFrame) -> pd.DataFrame:
    return records.assign(objective=row.name, seed=row.seed, run=row.run.id)


def measures_of(run: Run, place: int) -> dict[str, float]:
    """The measures of evaluation number `place` of a run, without intervals."""
    evaluations = run.evaluations()
    columns = [name for name in evaluations if name in MEASURES or name.startswith(("pairs/", "probe/"))]
    return evaluations.iloc[place][[name for name in columns if not name.endswith(("/low", "/high"))]].to_dict()


def rate_rows(study: Study) -> Iterator[dict]:
    """A row for each finished trial of a learning rate."""
    for tier, name, changes in study.each_row():
        lr = study.choose_rate(changes)
        for settings in study.rate_trials(changes):
            if (run := find_run(settings, study.root)).done:
                last = run.evaluations().iloc[-1][["pairs/mean", "probe/mean", "zeroshot"]].to_dict()
                yield facts_of(run, name, tier) | {"chosen": settings.lr == lr, "steps": settings.steps} | last


def original_rows(rows: list[Row]) -> list[dict]:
    """The original encoder, `none`: the first evaluation of the first run of each seed."""
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row.seed, row)
    untrained = {"objective": "none", "lr": np.nan, "steps": 0}
    return [facts_of(row.run, row.name, row.tier) | untrained | measures_of(row.run, 0) for row in first.values()]


def score_run(row: Row) -> dict:
    """The row of a finished run: its last evaluation, its time for a step, and its conflict if it has two terms."""
    metrics = row.run.metrics()
    scores = facts_of(row.run, row.name, row.tier) | measures_of(row.run, -1)
    scores |= {"steps": row.run.settings["steps"], "seconds_per_step": metrics["seconds"].diff().median()}
    cosines = metrics["cos"].dropna() if "cos" in metrics else ()
    return scores | ({"conflict_rate": (cosines < 0).mean(), "cos": cosines.mean()} if len(cosines) else {})


def objective_rows(row: Row, root: Path) -> Iterator[dict]:
    """The row of a finished run, and those of DCR's random controls."""
    yield score_run(row)
    for match in MATCHES if row.name == "dcr" else ():
        if control := find_control(row.run, match, root):
            facts = facts_of(control, f"perturb-{match}", row.tier)
            yield facts | measures_of(control, -1) | {"steps": row.run.settings["steps"]}


def find_control(like: Run, match: str, root: Path) -> Run | None:
    """The finished run of `perturb` that imitates the run `like`, or None."""
    for path in sorted(root.glob(f"perturb-perturb-{match}-s{like.settings['seed']}-*")):
        if Run(path).done and Run(path).settings["like"] == like.id:
            return Run(path)
    return None


def write_table(table: pd.DataFrame, path: Path) -> Path:
    table.to_csv(path, index=False, float_format="%.6g")
    return path


# --- the theorems -----------------------------------------------------------------------------------------------


def theory_tables(study: Study) -> list[Path]:
    """Both theorems before and after training, from the finished runs of `run_theory`; without any: no tables.

    theory_scatter.csv: one row for each objective, step, kind of features, timestep and way to estimate the constants,
    with the values of `theorem_1`; every step 0 is the original encoder. theory_affine.csv: records of `theorem_2` at
    each timestep, of the original encoder (`none`) and of each run's last encoder.
    """
    runs = {name: find_run(study.theory_settings(name), study.root / "theory") for name in THEORY}
    runs = {name: run for name, run in runs.items() if run.done}
    if not runs:
        return []
    scatter = [row for name, run in runs.items() for row in scatter_rows(name, run)]
    timesteps = list(dict.fromkeys(row["t"] for row in scatter))
    tables = {"theory_scatter": scatter, "theory_affine": list(affine_rows(study, runs, timesteps))}
    study.results.mkdir(parents=True, exist_ok=True)
    return [write_table(pd.DataFrame(table), study.results / f"{name}.csv") for name, table in tables.items()]


def theory_facts(run: Run) -> dict:
    facts = {"run": run.id, "seed": run.settings["seed"], "lr": run.settings["lr"]}
    return facts | {"git": run.environment["git"], "torch": run.environment["versions"]["torch"]}


def scatter_rows(objective: str, run: Run) -> Iterator[dict]:
    """The evaluations of a run of `run_theory`, one row for each "<features>/<t>/<constants>"."""
    for record in run.evaluations().to_dict("records"):
        step = record.pop("step")
        rows: dict[tuple, dict] = {}
        for key, value in record.items():
            features, t, constants, quantity = key.split("/", 3)
            rows.setdefault((features, int(t), constants), {})[quantity] = value
        for (features, t, constants), values in rows.items():
            place = {"objective": objective, "step": step, "features": features, "t": t, "constants": constants}
            yield place | values | theory_facts(run)


def affine_rows(study: Study, runs: dict[str, Run], timesteps: list[int]) -> Iterator[dict]:
    """Theorem 2, measured now: on the original encoder at all `COSINES`, on the tuned ones with negatives as they are.

    The rows of the original encoder name the first run, whose settings they share.
    """
    original, conditioner, denoiser = study.theory_models()
    batches = (study.render(8 * study.theory_batches, stream=12).float() / 255).split(8)
    now = environment()
    encoders = {"none": original} | {name: tuned_encoder(run) for name, run in runs.items()}
    for objective, encoder in encoders.items():
        run = runs.get(objective, next(iter(runs.values())))
        facts = theory_facts(run) | {"git": now["git"], "torch": now["versions"]["torch"]}
        place = {"objective": objective, "step": 0 if objective == "none" else run.settings["steps"]}
        for t in timesteps:
            parts = [dcr_predictions(encoder, conditioner, denoiser, batch, t) for batch in batches]
            predictions = map(torch.cat, zip(*parts, strict=True))
            for record in theorem_2(*predictions, COSINES if objective == "none" else ()):
                yield place | {"t": t} | record | facts


# --- the table in docs/results.md -------------------------------------------------------------------------------


def results_table(results: pd.DataFrame) -> str:
    """Markdown: the mean of each measure, in percent, and below it the difference to `none` with its interval."""
    rows = paired_differences(results, MEASURES).set_index(["objective", "measure"])
    lines = ["| | " + " | ".join(LABELS[name] for name in MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, group in results.groupby("objective", sort=False):
        cells = [LABELS[name]]
        for measure in MEASURES:
            cell = f"{100 * group[measure].mean():.1f}"
            if name != "none":
                row = 100 * rows.loc[(name, measure)]
                cell += f"<br>{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    seeds, steps, git = results["seed"].nunique(), results["steps"].max(), results["git"].iloc[0]
    lines += [
        "",
        f"Percent; mean of {seeds} seeds after {steps} steps of batch {Settings.batch}, LoRA {Settings.lora_rank}, on "
        "the shipped world; below it the difference to the original, paired by seed, with its 95 % interval over seeds "
        f"of training. `data/results/objectives.csv`, git {git}, torch {results['torch'].iloc[0]}.",
    ]
    return "\n".join(lines)


def write_results_table(path: Path = ROOT / "docs" / "results.md") -> Path:
    """Write the table between the marks `<!-- results: ... -->` and `<!-- /results -->` of a file.

    Raises ValueError if the file has no such marks.
    """
    table = results_table(pd.read_csv(RESULTS / "objectives.csv"))
    marks = re.compile("(<!-- results:.*?-->).*?(<!-- /results -->)", re.DOTALL)
    text, count = marks.subn(lambda mark: f"{mark[1]}\n{table}\n{mark[2]}", path.read_text(encoding="utf-8"), count=1)
    if not count:
        raise ValueError(f"{path}: expected the marks <!-- results: ... --> and <!-- /results --> around its table")
    path.write_text(text, encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tables", description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("rows", "theory", "results"), help="default: all of them")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="rows or tiers beside those of the study")
    add_study(parser)
    args = parser.parse_args(argv)
    study = read_study(parser, args)
    if args.part != "results" and not study.root.is_dir():  # without this check all tables would be removed
        parser.error(f"no runs in {study.root}; expected those of `python -m tools.study`, with the same options")
    if args.part in (None, "rows"):
        rows = dict.fromkeys((*study.rows, *read_rows(parser, args.rows)))
        print("written:", *collect(replace(study, rows=tuple(rows))))
    if args.part == "theory" or (args.part is None and not args.models):
        print("written:", *theory_tables(study))
    if args.part == "results" or (args.part is None and study.results == RESULTS):
        print("written:", write_results_table())


if __name__ == "__main__":
    main()
