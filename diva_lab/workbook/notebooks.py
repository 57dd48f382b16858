"""Run the notebooks in their order and gather what came out.

    runs/ID/NN_name.ipynb   the notebooks as they ran
    runs/ID/RUN/            every training run that they made, as training.runs writes it
    runs/ID/evaluation.csv  rows of `evaluate`, on the world and on emoji, of the runs that the summary shows
    runs/ID/summary.csv     one row per objective and seed, made of it
    runs/ID/report.html     all of it on one page

A notebook gets those of the parameters `runs_root`, `images`, `seeds` and `steps` that its `parameters` cell declares.
The first failure ends the run with exit code 1: what was written stays, and the report covers it.
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

from diva_lab.paths import ROOT, RUNS
from diva_lab.provenance import environment
from diva_lab.training.runs import Run
from diva_lab.workbook.parameters import assigned_names
from diva_lab.workbook.report import write_report
from diva_lab.world import DETAILS

NOTEBOOKS = ROOT / "notebooks"
SUMMARY_MEASURES = [f"{kind}/{name}" for kind in ("pairs", "probe") for name in (*DETAILS, "mean")]
SUMMARY_MEASURES += ["zeroshot", "nmi", "acc", "ari"]
SUMMARY_COLUMNS = ["objective", "seed", *SUMMARY_MEASURES, "conflict_rate", "seconds_per_step", "steps", "run"]
EVALUATED_COLUMNS = ["pairs/mean/low", "pairs/mean/high"]
EVALUATED_COLUMNS += [f"{name}/mean{end}" for name in ("emoji", "emoji-match") for end in ("", "/low", "/high")] + [
    "note"
]
OBJECTIVE_ORDER = ("none", "diva", "contrastive", "naive", "dcr", "genhancer", "perturb-norm", "perturb-drift")


def _runs(root: Path) -> list[Run]:
    """The runs that the summary shows, in its order; see there."""
    runs = [Run(file.parent) for file in Path(root).glob("*/settings.json")]
    runs = [run for run in runs if run.done and run.settings.get("stage") in ("tune", "perturb")]
    runs.sort(key=lambda run: (not len(recorded_rows(run)), (run.folder / "settings.json").stat().st_mtime_ns, run.id))
    first: dict[tuple, Run] = {}
    for run in runs:
        first.setdefault((run.settings["objective"], run.settings["seed"]), run)
    rank = {name: i for i, name in enumerate(OBJECTIVE_ORDER)}
    return [first[key] for key in sorted(first, key=lambda key: (rank.get(key[0], len(OBJECTIVE_ORDER)), *key))]


def recorded_rows(run: Run) -> pd.DataFrame:
    """A run's last evaluation on the tiny world (`world_report`, on the split `measure`) as rows of `evaluate`.

    Without rows where the run recorded none. Pairs and zero-shot have their interval and what chance would score.
    """
    from diva_lab.evaluation.results import COLUMNS, FACTS
    from diva_lab.evaluation.world import report_rows

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
    """Every run of the summary on the tiny world and on EmojiPairs, as `evaluate` has it, and what failed.

    `encoder` is the run's id. The world's rows are those of the run's own record where it has them: to ask again would
    take a dozen seconds a run, and give the same to rounding.
    """
    from diva_lab.evaluation.results import COLUMNS, FACTS
    from diva_lab.evaluation.table import evaluate

    empty = pd.DataFrame(columns=COLUMNS + FACTS)
    tables, failures = [], []
    for run in _runs(root):
        known = recorded_rows(run)
        try:
            found = evaluate([run.folder], ["emoji"] if len(known) else ["world", "emoji"])
        except (ValueError, OSError) as error:
            failures.append(str(error))
            found = getattr(error, "table", empty)
        if len(found):
            known = known.assign(weights=found["weights"].iloc[0])
        tables += [table for table in (known, found.assign(encoder=run.id)) if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else empty, failures


def _measures(rows: pd.DataFrame) -> dict[str, float | str]:
    """The summary's columns from one encoder's rows: `metric/category`, `mean` for all; with its interval."""
    found: dict[str, float | str] = {}
    notes: dict[str, list[str]] = {}
    for row in rows.itertuples():
        name = row.metric if row.metric in SUMMARY_MEASURES else f"{row.metric}/{row.category}".replace("/all", "/mean")
        found[name] = row.value
        found |= {f"{name}/low": row.low, f"{name}/high": row.high}  # of which the summary shows some
        if row.note and row.category == "all":
            notes.setdefault(row.note, []).append(row.metric)
    return found | {"note": "; ".join(f"{note}: {', '.join(names)}" for note, names in notes.items())}


def _row(run: Run, rows: pd.DataFrame) -> dict:
    settings, metrics, evaluations = run.settings, run.metrics(), run.evaluations()
    cos = metrics["cos"].dropna() if "cos" in metrics else pd.Series(dtype=float)
    seconds = metrics["seconds"].diff() if "seconds" in metrics else pd.Series(dtype=float)
    return {
        "objective": settings.get("objective"),
        "seed": settings.get("seed"),
        **_measures(rows),
        "conflict_rate": (cos < 0).mean() if len(cos) else np.nan,
        "seconds_per_step": seconds.median(),
        "steps": int(evaluations["step"].iloc[-1]) if len(evaluations) else len(metrics),
        "run": run.id,
    }


def summarise_runs(root: Path, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per objective and seed from the finished stage-2 runs and controls under `root`.

    Args:
        root: folder of the runs.
        table: what `evaluation` says of them; if None, what they recorded themselves (`recorded_rows`).

    Returns:
        Columns `SUMMARY_COLUMNS`, and with a table `EVALUATED_COLUMNS`: intervals, the emoji's scores, and `note`,
        which says what is not above chance. `conflict_rate` is the share of steps whose gradients have a negative
        cosine, and `seconds_per_step` the median over the steps; what is not known is NaN. Of several runs of one
        objective and seed the row shows the earliest that was evaluated: that of the comparison, in the notebooks'
        order.
    """
    rows = [
        _row(run, recorded_rows(run) if table is None else table[table["encoder"] == run.id]) for run in _runs(root)
    ]
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS + (EVALUATED_COLUMNS if table is not None else []))


def declared_parameters(path: Path) -> set[str]:
    """The parameters that a notebook declares in its cell tagged `parameters`."""
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return {name for source in tagged for name in assigned_names(source)}


class _Progress:
    """A stream for papermill that prints whole lines, indented; bars that redraw themselves leave only their end."""

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
    """Run one notebook by papermill, in its own folder; returns what went wrong, or the empty string."""
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
            stdout_file=_Progress(),
            start_timeout=300,
            extra_arguments=["--log-level=ERROR"],  # else each kernel warns that its local socket is not encrypted
        )
    except PapermillExecutionError as error:
        return f"In [{error.exec_count}]: {error.ename}: {error.evalue}"
    except Exception as error:  # the kernel died or never started
        return f"{type(error).__name__}: {error}"
    return ""


def select_notebooks(notebooks: Path, only: str | None) -> list[Path]:
    """The numbered notebooks of a folder; `only` picks some by number (`02` or `01,02`).

    Raises:
        ValueError: if there is none, or none of a number asked for.
    """
    paths = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    numbers = [path.name[:2] for path in paths]
    if not paths:
        raise ValueError(f"no notebook in {notebooks}; expected files like 00_tiny_world.ipynb")
    wanted = only.split(",") if only else numbers
    for number in wanted:
        if number not in numbers:
            raise ValueError(f"no notebook {number!r}; expected one of {', '.join(numbers)}")
    return [path for path in paths if path.name[:2] in wanted]


def resolve_images(images: str) -> str:
    """`images` as the notebooks can use it: `world[:SEED]` and a hub id as they are, all else with an absolute path.

    Raises:
        FileNotFoundError, ValueError: if there is no picture that can be read; see `diva_lab.images.open_images`.
    """
    from diva_lab.images import open_images

    kind, _, rest = images.partition(":")
    if kind == "hf" and Path(rest.partition(":")[0]).expanduser().is_dir():
        source = f"hf:{Path(rest).expanduser().absolute()}"
    else:
        source = images if kind in ("world", "hf") else str(Path(images).expanduser().absolute())
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
    """Run the notebooks in their order, evaluate what they trained, and write the report.

    Args:
        images, seeds, steps: given to each notebook that declares a parameter of this name; None keeps its default.
        out: folder to write; None for a new one under runs/. The folder of a stopped run goes on with its runs.
        only: numbers of the notebooks to run, as `02` or `00,02`; None for all.
        notebooks: the folder that holds them; None for the repository's own.

    Returns:
        0, or 1 after the first notebook that failed.

    Raises:
        ValueError, FileNotFoundError: for what no notebook knows, and images that cannot be read; nothing was written.
    """
    given = {
        name: value for name, value in (("images", images), ("seeds", seeds), ("steps", steps)) if value is not None
    }
    paths = select_notebooks(notebooks or NOTEBOOKS, only)
    names = {path: declared_parameters(path) for path in paths}
    for name in given:
        if not any(name in known for known in names.values()):
            raise ValueError(f"--{name}: none of these notebooks has the parameter {name!r}")
    if images is not None:
        given["images"] = resolve_images(images)

    out = (out or RUNS / time.strftime("%Y%m%d-%H%M%S")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel before one in the user's home
    os.environ.pop("MPLBACKEND", None)  # figures go into the notebook
    facts = {"run": out.name, **environment(), **given}
    facts |= {name: version for name, version in facts.pop("versions").items() if name == "torch"}
    failure, ran = "", []
    for path in paths:
        print(f"{path.name} ...", flush=True)
        start = time.time()
        values = {k: v for k, v in {"runs_root": str(out), **given}.items() if k in names[path]}
        failure = run_notebook(path, out, values)
        ran.append(out / path.name)
        facts[path.stem] = f"{time.time() - start:.0f} s"
        if failure:
            print(f"FAILED: {path.name}\n" + "\n".join(failure.strip().splitlines()[-20:]), file=sys.stderr, flush=True)
            break
        print(f"{path.name} done in {facts[path.stem]}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    facts["peak memory"] = f"{peak:.1f} GB"

    ran = [path for path in ran if path.exists()]
    failed = ran[-1].name if failure and ran else ""
    print("evaluation ...", flush=True)
    start = time.time()
    every, failures = evaluate_runs(out)
    facts["evaluation"] = f"{time.time() - start:.0f} s"
    every.to_csv(out / "evaluation.csv", index=False, float_format="%.6g")
    table = summarise_runs(out, every)
    table.to_csv(out / "summary.csv", index=False, float_format="%.6g")
    if failures:
        failure = failure or "\n".join(failures)
        print("FAILED: evaluation\n" + "\n".join(failures), file=sys.stderr, flush=True)
    (out / "workbook.json").write_text(json.dumps(facts | {"failure": failure}, indent=1) + "\n")
    write_report(out / "report.html", ran, table, facts, failed)
    print(out / "evaluation.csv")
    print(out / "summary.csv")
    print(out / "report.html")
    return 1 if failure else 0
