"""The results that ship: converged projectors, then every objective and control over several seeds.

    python -m diva_lab.study projectors       stage 1 to its plateau, for each condition -> data/tiny/projectors
    python -m diva_lab.study rates            a learning rate for each objective, on pairs that are not reported
    python -m diva_lab.study objectives       objectives and controls, paired over seeds -> data/results/objectives.csv
    python -m diva_lab.study approximations   DCR's, against exact DCR -> data/results/approximations.csv
    python -m diva_lab.study table            the README's table of results, from objectives.csv

Without a part, all of them. Each goes on where it was stopped: its runs are kept under runs/study.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from diva_lab.evaluation.alignment import alignment_report
from diva_lab.evaluation.comparison import paired_differences
from diva_lab.evaluation.world import world_report
from diva_lab.figures import MEASURES, NAMES
from diva_lab.objectives import COMPARED
from diva_lab.runs import DATA, ROOT, RUNS, Run, environment, sha256
from diva_lab.training import PROJECTORS, SHIPPED, Settings, align, perturb, tune
from diva_lab.workbook import summary
from diva_lab.world import World, draw_scenes

STUDY = RUNS / "study"
RESULTS = DATA / "results"
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
APPROXIMATIONS = {  # of DCR: name -> settings
    "exact": {},
    "4 negatives": {"negatives": 4},
    "no gradient through negatives": {"negative_gradient": False},
}
FAST = 1e-4  # a learning rate at which DCR changes the encoder much, beside the chosen one
PLATEAU = 0.01  # the recovered fraction gained in 1000 steps below which stage 1 has converged


def projectors(condition: str, rounds: int = 6, steps: int = 500) -> Path:
    """Align in rounds of `steps` until one gains less than `PLATEAU`; ship the last projector with its record."""
    settings = Settings(condition=condition, projector="new", batch=16, lr=1e-3, steps=steps, save_every=250)
    history = []
    for number in range(rounds):
        if history:
            settings = replace(settings, projector=str(STUDY / history[-1]["run"]), seed=number)
        run = align(settings, STUDY, alignment_report)
        table = run.evaluations()
        first, last = table["recovered"].iloc[0], table.iloc[-1]
        history.append(
            {"run": run.id, "steps": steps, **last.drop("step").to_dict(), "gained": last["recovered"] - first}
        )
        print(condition, f"round {number + 1}: recovered {first:.4f} -> {last['recovered']:.4f}", flush=True)
        if number and history[-1]["gained"] < PLATEAU * steps / 1000:
            break
    SHIPPED.mkdir(parents=True, exist_ok=True)
    path = SHIPPED / f"{condition}.safetensors"
    shutil.copy(STUDY / history[-1]["run"] / "checkpoint" / "weights.safetensors", path)
    record = {"sha256": sha256(path), "settings": run.settings, "rounds": history, **run.environment}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return path


def rates(steps: int, names: Sequence[str] = tuple(COMPARED), seed: int = 100) -> dict[str, float]:
    """For each objective the learning rate of the best mean of pair score and zero-shot, on the split `choose`."""
    rows, chosen = [], {}
    report = partial(world_report, split="choose")
    for objective in names:
        for lr in RATES:
            run = tune(Settings(objective=objective, lr=lr, steps=steps, seed=seed), STUDY, report)
            last = run.evaluations().iloc[-1]
            rows.append({"objective": objective, "lr": lr, "run": run.id, **last.to_dict()})
            print(objective, lr, f"pairs {last['pairs/mean']:.4f}, zero-shot {last['zeroshot']:.4f}", flush=True)
        table = pd.DataFrame([row for row in rows if row["objective"] == objective])
        chosen[objective] = float(table.loc[(table["pairs/mean"] + table["zeroshot"]).idxmax(), "lr"])
    if set(names) == set(COMPARED):  # a slice keeps its runs; the whole call, which finds them, writes the table
        _write(pd.DataFrame(rows).assign(chosen=lambda d: d["lr"] == d["objective"].map(chosen)), "rates.csv")
    return chosen


def objectives(seeds: Sequence[int], steps: int) -> Path:
    """Every objective at its chosen rate, and the controls, for each seed; one row per objective and seed."""
    table = pd.read_csv(RESULTS / "rates.csv")
    lr = table[table["chosen"]].set_index("objective")["lr"].to_dict()
    world, root = World(), STUDY / "objectives"
    held_out = torch.from_numpy(world.render(draw_scenes(1000, (world.seed, 8)))).permute(0, 3, 1, 2)
    runs: list[Run] = []
    for seed in seeds:
        for objective in ("none", *COMPARED):
            settings = Settings(objective=objective, lr=lr.get(objective, 1e-4), steps=steps, seed=seed)
            runs.append(tune(replace(settings, evaluate_every=max(1, steps // 2)), root, world_report))
        runs += [perturb(runs[-1], held_out, match, root, world_report) for match in ("norm", "drift")]
        result = summary(root)
        rate = result["objective"].map(lr)
        git = result["run"].map({run.id: run.environment["git"] for run in runs})
        path = _write(result.assign(lr=rate, git=git, torch=environment()["versions"]["torch"]), "objectives.csv")
        curves = [
            run.evaluations().assign(objective=run.settings["objective"], seed=run.settings["seed"]) for run in runs
        ]
        _write(pd.concat(curves), "curves.csv")
        terms = [
            run.metrics().assign(objective=run.settings["objective"], seed=run.settings["seed"])
            for run in runs
            if run.settings["objective"] == "naive"
        ]
        _write(pd.concat(terms), "conflict.csv")
    return path


def approximations(seeds: Sequence[int], steps: int) -> Path:
    """DCR exactly and by its approximations, at the chosen rate and at `FAST`; one row per rate, name and seed.

    Beside them, per rate and approximation, the differences to exact DCR: rows of approximations_differences.csv.
    """
    table = pd.read_csv(RESULTS / "rates.csv")
    chosen = table.loc[table["chosen"] & (table["objective"] == "dcr"), "lr"].item()
    rows = []
    for lr in (chosen, FAST):
        for seed in seeds:
            for name, changes in APPROXIMATIONS.items():
                run = tune(Settings(objective="dcr", lr=lr, steps=steps, seed=seed, **changes), STUDY, world_report)
                first, last = (run.evaluations().iloc[i].to_dict() for i in (0, -1))
                print(lr, seed, name, f"pairs {last['pairs/mean']:.4f}, zero-shot {last['zeroshot']:.4f}", flush=True)
                facts = {"lr": lr, "objective": name, "seed": seed, "run": run.id, "git": run.environment["git"]}
                rows += [facts | last] + ([facts | {"objective": "none"} | first] if name == "exact" else [])
    found = pd.DataFrame(rows)
    differences = [
        paired_differences(part, MEASURES, baseline="exact").assign(lr=lr) for lr, part in found.groupby("lr")
    ]
    _write(pd.concat(differences), "approximations_differences.csv")
    return _write(found, "approximations.csv")


def readme_table(results: pd.DataFrame) -> str:
    """Markdown: the mean of each measure, in points, and under it the paired difference to `none` with its interval."""
    rows = paired_differences(results, MEASURES).set_index(["objective", "measure"])
    lines = ["| | " + " | ".join(NAMES[name] for name in MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, group in results.groupby("objective", sort=False):
        cells = [NAMES[name]]
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


def write_readme(path: Path = ROOT / "README.md") -> Path:
    """Put the table between the README's marks."""
    text = path.read_text()
    head, rest = text.split("<!-- results:", 1)
    mark, rest = rest.split("-->", 1)
    tail = rest.split("<!-- /results -->", 1)[1]
    table = readme_table(pd.read_csv(RESULTS / "objectives.csv"))
    path.write_text(f"{head}<!-- results:{mark}-->\n{table}\n<!-- /results -->{tail}")
    return path


def _write(table: pd.DataFrame, name: str) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    table.to_csv(RESULTS / name, index=False, float_format="%.6g")
    return RESULTS / name


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diva_lab.study", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="projectors, rates, objectives, approximations, table; default: all")
    parser.add_argument("--condition", choices=PROJECTORS, help="only this condition's projector")
    parser.add_argument("--only", nargs="+", choices=tuple(COMPARED), default=tuple(COMPARED), help="rates: of these")
    parser.add_argument("--rounds", type=int, default=6, help="projectors: at most so many")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    known = ("projectors", "rates", "objectives", "approximations", "table")
    for part in args.parts:
        if part not in known:
            parser.error(f"unknown part {part!r}; expected {', '.join(known)}")
    parts = args.parts or known
    if "projectors" in parts:
        for condition in (args.condition,) if args.condition else PROJECTORS:
            print("written:", projectors(condition, args.rounds))
    if "rates" in parts:
        print("chosen:", rates(max(1, args.steps // 2), args.only))
    if "objectives" in parts:
        print("written:", objectives(args.seeds, args.steps))
    if "approximations" in parts:
        print("written:", approximations(args.seeds, args.steps))
    if "table" in parts:
        print("written:", write_readme())


if __name__ == "__main__":
    main()
