"""Run the notebooks in order, evaluate the runs that they made, and write a report.

    runs/ID/NN_name.ipynb   the executed notebooks
    runs/ID/RUN/            every training run that they made; see training/runs.py
    runs/ID/evaluation.csv  rows of `evaluate` on the tiny world and on EmojiPairs, for the runs in the summary
    runs/ID/summary.csv     one row per objective and seed, from evaluation.csv
    runs/ID/report.html     notebooks and summary on one page

A notebook gets those of the parameters `runs_root`, `images`, `seeds` and `steps` that its `parameters` cell declares.
The first failure ends the run with exit code 1: what was written stays, and the report shows it.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from diva_lab import messages
from diva_lab.evaluation.results import COLUMNS, FACTS, write_csv
from diva_lab.evaluation.world import WORLD_MEASURES, report_rows
from diva_lab.models.conditions import CONDITIONS
from diva_lab.objectives import OBJECTIVES
from diva_lab.paths import ROOT, RUNS, check_writable
from diva_lab.provenance import environment
from diva_lab.training.runs import Run
from diva_lab.training.settings import CONTROLS
from diva_lab.workbook.parameters import assigned_names
from diva_lab.workbook.report import write_report

NOTEBOOKS = ROOT / "notebooks"
SUMMARY_COLUMNS = ["objective", "seed", *WORLD_MEASURES, "conflict_rate", "seconds_per_step", "steps", "run"]
EVALUATED_COLUMNS = ["pairs/mean/low", "pairs/mean/high", "zeroshot/low", "zeroshot/high"]
EVALUATED_COLUMNS += [f"{name}/mean{end}" for name in ("emoji", "emoji-match") for end in ("", "/low", "/high")]
EVALUATED_COLUMNS += ["note"]
SUMMARY_ORDER = ("none", "diva", "contrastive", "naive", "dcr", "genhancer", "perturb-norm", "perturb-drift")


def _summary_runs(root: Path) -> list[Run]:
    """The runs that the summary shows, in its order; see `summarise_runs`."""
    objectives, conditions = (*OBJECTIVES, *CONTROLS), ("", *CONDITIONS)
    runs = [Run(file.parent) for file in Path(root).glob("*/settings.json")]
    damaged = {run: error for run in runs if (error := run.error)}
    print("".join(f"left out: {error}\n" for error in damaged.values()), end="")
    runs = [run for run in runs if run not in damaged]
    runs = [run for run in runs if run.done and run.settings.get("stage") in ("tune", "perturb")]
    runs = [run for run in runs if run.settings["objective"] in objectives]
    runs = [run for run in runs if run.settings.get("condition", "") in conditions]
    runs.sort(key=lambda run: (not len(recorded_rows(run)), (run.folder / "settings.json").stat().st_mtime_ns, run.id))
    first: dict[tuple, Run] = {}
    for run in runs:
        first.setdefault((run.settings["objective"], run.settings["seed"]), run)
    rank = {name: i for i, name in enumerate(SUMMARY_ORDER)}
    return [first[key] for key in sorted(first, key=lambda key: (rank.get(key[0], len(SUMMARY_ORDER)), *key))]


def recorded_rows(run: Run) -> pd.DataFrame:
    """A run's last evaluation on the tiny world (`world_report`, split `measure`) as rows of `evaluate`.

    An empty table if the run recorded none. Pairs and zero-shot have their interval and the score of chance.
    """

    evaluations = run.evaluations()
    last = evaluations.iloc[-1].to_dict() if "pairs/mean" in evaluations else {}
    rows = list(report_rows(last))
    table = pd.DataFrame(rows, columns=COLUMNS[3:]).assign(encoder=run.id, benchmark="world", set="world")
    if rows:
        made = run.environment
        table = table.assign(seed=0, features="global", precision="no", weights="", git=made["git"])
        table["torch"] = made["versions"]["torch"]
    return table.reindex(columns=COLUMNS + FACTS)


def evaluate_runs(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """Rows of `evaluate` for every run of the summary, on the tiny world and on EmojiPairs; and the errors.

    `encoder` is the run's id. The rows of the tiny world come from the run's own record if it has one: evaluating again
    takes about 12 seconds a run and gives the same values up to rounding.
    """
    from diva_lab.evaluation.table import evaluate

    empty = pd.DataFrame(columns=COLUMNS + FACTS)
    tables, errors = [], []
    for run in _summary_runs(root):
        recorded = recorded_rows(run)
        try:
            rows = evaluate([run.folder], ["emoji"] if len(recorded) else ["world", "emoji"])
        except (ValueError, OSError) as error:
            errors.append(str(error))
            rows = getattr(error, "table", empty)
        if len(rows):
            recorded = recorded.assign(weights=rows["weights"].iloc[0])
        tables += [table for table in (recorded, rows.assign(encoder=run.id)) if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else empty, errors


def _summary_scores(rows: pd.DataFrame) -> dict[str, float | str]:
    """The summary's columns from one encoder's rows of `evaluate`; `metric/mean` for the category `all`; and notes."""
    scores: dict[str, float | str] = {}
    notes: dict[str, list[str]] = {}
    for row in rows.itertuples():
        name = row.metric if row.metric in WORLD_MEASURES else f"{row.metric}/{row.category}".replace("/all", "/mean")
        scores |= {name: row.value, f"{name}/low": row.low, f"{name}/high": row.high}
        if row.note and row.category == "all":
            notes.setdefault(row.note, []).append(row.metric)
    return scores | {"note": "; ".join(f"{note}: {', '.join(names)}" for note, names in notes.items())}


def _summary_row(run: Run, rows: pd.DataFrame) -> dict:
    settings, metrics, evaluations = run.settings, run.metrics(), run.evaluations()
    cosines = metrics["cos"].dropna() if "cos" in metrics else pd.Series(dtype=float)
    seconds = metrics["seconds"].diff() if "seconds" in metrics else pd.Series(dtype=float)
    return {
        "objective": settings.get("objective"),
        "seed": settings.get("seed"),
        **_summary_scores(rows),
        "conflict_rate": (cosines < 0).mean() if len(cosines) else np.nan,
        "seconds_per_step": seconds.median(),
        "steps": int(evaluations["step"].iloc[-1]) if len(evaluations) else len(metrics),
        "run": run.id,
    }


def summarise_runs(root: Path, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per objective and seed from the finished stage-2 runs and controls under `root`.

    Args:
        root: folder of the runs.
        table: their rows of `evaluate`, as from `evaluate_runs`; if None, those of their own records (`recorded_rows`).

    Returns:
        Columns `SUMMARY_COLUMNS`, and with a table `EVALUATED_COLUMNS`: intervals, scores on EmojiPairs, and `note`,
        which names the metrics that are not above chance. `conflict_rate` is the share of steps whose gradients have a
        negative cosine, `seconds_per_step` the median over the steps; unknown values are NaN. Of several runs with the
        same objective and seed the row shows the earliest that was evaluated. Runs whose objective or condition was
        registered in a notebook are left out: their functions do not exist here.
    """
    runs = _summary_runs(root)
    each = [recorded_rows(run) if table is None else table[table["encoder"] == run.id] for run in runs]
    rows = [_summary_row(run, own) for run, own in zip(runs, each, strict=True)]
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS + (EVALUATED_COLUMNS if table is not None else []))


def declared_parameters(path: Path) -> set[str]:
    """The parameters that a notebook declares in its cell tagged `parameters`."""
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return {name for source in tagged for name in assigned_names(source)}


class _Lines:
    """A stream for papermill that prints whole lines, indented; of a bar that redraws itself only the last state."""

    def __init__(self) -> None:
        self.rest = ""

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line := line.rstrip("\r").rpartition("\r")[2].rstrip():
                print("   ", line, flush=True)

    def flush(self) -> None:
        pass


def run_notebook(path: Path, out: Path, parameters: dict) -> str:
    """Run one notebook with papermill, in its own folder. Returns the error's text, or "" if there was none."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            path,
            out / path.name,
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=path.parent,
            progress_bar=False,
            stdout_file=_Lines(),
            start_timeout=300,
            extra_arguments=["--log-level=ERROR"],  # else each kernel warns that its local socket is not encrypted
        )
    except PapermillExecutionError as error:
        return f"In [{error.exec_count}]: {error.ename}: {error.evalue}"
    except Exception as error:  # the kernel died or did not start
        return f"{type(error).__name__}: {error}"
    return ""


def select_notebooks(notebooks: Path, only: str | None) -> list[Path]:
    """The numbered notebooks of a folder; `only` selects some by number (`02` or `01,02`).

    Raises:
        ValueError: if there is none, or none with a number in `only`.
    """
    paths = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    numbers = [path.name[:2] for path in paths]
    if not paths:
        raise ValueError(f"no notebook in {notebooks}; expected files like 00_tiny_world.ipynb")
    selected = numbers if only is None else only.split(",")
    for number in selected:
        if number not in numbers:
            raise ValueError(f"no notebook {number!r}; {messages.expected(number, numbers)}")
    return [path for path in paths if path.name[:2] in selected]


def resolve_images(images: str) -> str:
    """`images` with an absolute path, because notebooks run in their own folder; the world, hub ids and URLs unchanged.

    Raises:
        FileNotFoundError, ValueError: if there is no readable image; see `diva_lab.images.open_images`.
    """
    from diva_lab.images import open_images
    from diva_lab.remote import scheme_of

    kind, _, rest = images.partition(":")
    if not images.strip() or (kind == "hf" and not rest.strip()):
        raise ValueError(f"--images {images!r}: expected a folder of images, webdataset tars, hf:DATASET or world")
    if kind == "hf" and Path(rest.partition(":")[0]).expanduser().is_dir():
        source = f"hf:{Path(rest).expanduser().absolute()}"
    else:
        source = images if kind in ("world", "hf") or scheme_of(images) else str(Path(images).expanduser().absolute())
    next(open_images(source, px=32, n=1, seed=0))
    return source


def run_workbook(
    images: str | None = None,
    seeds: int | list[int] | None = None,
    steps: int | None = None,
    out: Path | None = None,
    only: str | None = None,
    notebooks: Path | None = None,
) -> int:
    """Run the notebooks in order, evaluate the runs that they made, and write the report.

    Args:
        images, seeds, steps: passed to each notebook that declares a parameter of this name; None keeps its default.
        out: folder to write; None for a new one under runs/. In the folder of a stopped run, finished runs are reused.
        only: numbers of the notebooks to run, as `02` or `00,02`; None for all.
        notebooks: their folder; None for the repository's own.

    Returns:
        0, or 1 after the first notebook that failed.

    Raises:
        ValueError, FileNotFoundError: before anything is written, for a parameter that no notebook declares, and for
            images that cannot be read.
    """
    paths = select_notebooks(notebooks or NOTEBOOKS, only)
    parameters = {"images": images, "seeds": seeds, "steps": steps}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    declared = {path: declared_parameters(path) for path in paths}
    for name in parameters:
        if not any(name in names for names in declared.values()):
            raise ValueError(f"--{name}: none of these notebooks has the parameter {name!r}")
    if images is not None:
        parameters["images"] = resolve_images(images)

    out = (out or RUNS / time.strftime("%Y%m%d-%H%M%S")).absolute()
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"run": out.name, **environment(), **parameters}
    facts["torch"] = facts.pop("versions")["torch"]
    executed, failure = _run_all(declared, out, parameters, facts)
    summary, errors = _gather(out, facts)
    (out / "workbook.json").write_text(
        json.dumps(facts | {"failure": failure or "\n".join(errors)}, indent=1) + "\n", encoding="utf-8"
    )
    write_report(out / "report.html", executed, summary, facts, executed[-1].name if failure and executed else "")
    print(out / "evaluation.csv", out / "summary.csv", out / "report.html", sep="\n")
    return 1 if failure or errors else 0


def _run_all(declared: dict[Path, set[str]], out: Path, parameters: dict, facts: dict) -> tuple[list[Path], str]:
    """Run notebooks up to the first that fails, and add their times to `facts`.

    `declared`: each notebook with its parameters' names. Returns the executed notebooks that were written, and the
    error's text, or "".
    """
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel before one in the user's home
    os.environ.pop("MPLBACKEND", None)  # figures go into the notebook
    values, executed, failure = {"runs_root": str(out), **parameters}, [], ""
    for path, names in declared.items():
        print(f"{path.name} ...", flush=True)
        start = time.time()
        failure = run_notebook(path, out, {name: value for name, value in values.items() if name in names})
        executed.append(out / path.name)
        facts[path.stem] = f"{time.time() - start:.0f} s"
        if failure:
            print(f"FAILED: {path.name}\n" + "\n".join(failure.strip().splitlines()[-20:]), file=sys.stderr, flush=True)
            break
        print(f"{path.name} done in {facts[path.stem]}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    facts["peak memory"] = f"{peak:.1f} GB"
    return [path for path in executed if path.exists()], failure


def _gather(out: Path, facts: dict) -> tuple[pd.DataFrame, list[str]]:
    """Write evaluation.csv and summary.csv. Returns the summary, and the errors of the evaluation."""
    print("evaluation ...", flush=True)
    start = time.time()
    table, errors = evaluate_runs(out)
    facts["evaluation"] = f"{time.time() - start:.0f} s"
    summary = summarise_runs(out, table)
    write_csv(out / "evaluation.csv", table)
    write_csv(out / "summary.csv", summary)
    if errors:
        print("FAILED: evaluation\n" + "\n".join(errors), file=sys.stderr, flush=True)
    return summary, errors
