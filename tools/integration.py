"""The study of stage 3: does what tuning adds to a tower reach its patch tokens, and a language model that reads them?

    python -m tools.integration [--seeds 0 1 3]    -> data/results/integration.csv

The towers are those of the study of feedback (`tools.feedback`): the original, and for each seed the runs of `TOWERS`
that it has trained, with the random push that belongs to the last one. Each is measured by the pair score, by the
benchmarks of patch tokens, and, under the language model of data/tiny/llava, by questions about minimal pairs at three
rungs: tower swapped and nothing trained, projector retrained, projector and LoRA retrained. Training starts from the
same weights and sees the same conversations for every tower, also for the original, with the seed of the run.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch

from diva_lab.evaluation.table import evaluate
from diva_lab.evaluation.world import world_scenes
from diva_lab.llava.folders import swap
from diva_lab.llava.scores import evaluate_llava
from diva_lab.llava.tuning import LlavaSettings, train_llava
from diva_lab.paths import DATA, RUNS
from diva_lab.training.controls import perturb
from diva_lab.training.stages import find_run
from tools.feedback import Plan as Feedback
from tools.feedback import Row, choose_trial
from tools.language import LONGEST, write_conversations, write_questions

TOWERS = {  # name -> row of the study of feedback, and whether its run is taken whole instead of at its chosen mix
    "DIVA, image-only": (Row("diva", "image-only"), True),
    "DCR, anchored": (Row("dcr, short", "anchored"), True),  # a quarter of the dose
    "DIVA, anchored, mixed": (Row("diva, mixed", "anchored"), False),
    "DIVA, anchored": (Row("diva, mixed", "anchored"), True),
}
ORIGINAL, PUSH = "original", "random push"
PATCHES = ("patch-probe", "world-segmentation", "correspondence")
ASKED = ("mmvp", "naturalbench")
RUNGS = ("projector", "lora")  # one after the other
RECIPE = {"dialogue": "chat", "lr": 5e-4, "lora_rank": 16, "lora_alpha": 32.0, "max_tokens": LONGEST}
KEPT = ["benchmark", "metric", "category", "value", "low", "high", "n", "chance", "git", "torch"]
COLUMNS = ["tower", "seed", "rung", *KEPT]


@dataclass(frozen=True)
class Plan:
    """Where the study's files lie, and how much of it is run; the defaults are those of the shipped results.

    Attributes:
        feedback: the study whose towers are taken.
        runs: folder of the LLaVA folders and their runs.
        out: the table.
        llava: the folder that towers are put into.
        seeds: of the towers' runs and of training.
        steps, batch: of each rung that is trained.
        records: images of the conversations that are trained on.
        each: minimal pairs of every detail that are asked about.
        patches: benchmarks of patch tokens.
    """

    feedback: Feedback = field(default_factory=Feedback)
    runs: Path = RUNS / "integration"
    out: Path = DATA / "results" / "integration.csv"
    llava: Path = DATA / "tiny" / "llava"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    batch: int = 16
    records: int = 2000
    each: int = 30
    patches: tuple[str, ...] = PATCHES


def find_towers(plan: Plan, seed: int) -> dict[str, str]:
    """Name -> encoder, as `evaluation.table.open_encoder` takes it; what is not trained yet is left out and told."""
    towers, study = {ORIGINAL: "tiny"}, plan.feedback
    for name, (row, whole) in TOWERS.items():
        chosen, _ = choose_trial(study, row)
        run = None if chosen is None else find_run(study.stage_2(row, float(chosen["lr"]), seed), study.runs)
        if run is None or not run.done:
            print(f"{name}, seed {seed}: not trained, see python -m tools.feedback run '{row}'", flush=True)
            continue
        towers[name] = str(run.folder) if whole else f"{run.folder}:{chosen['mix']:g}"
        if name == list(TOWERS)[-1]:
            _, images = world_scenes(study.world, 64)
            towers[PUSH] = str(perturb(run, images[:64], "drift", plan.runs).folder)
    return towers


def measure_patches(plan: Plan, tower: str) -> Iterator[dict]:
    """Rows of the pair score on the shipped minimal pairs, and of the benchmarks of patch tokens."""
    for row in evaluate([tower], ["mmvp-vlm", *plan.patches], DATA / "world").to_dict("records"):
        yield {name: row[name] for name in KEPT}


def measure_language(plan: Plan, tower: str, seed: int, asked: Path, data: Path) -> Iterator[dict]:
    """Rows of the questions in the folder `asked`, at every rung."""
    folder = plan.runs / "swapped"
    shutil.rmtree(folder, ignore_errors=True)
    folders = [swap(plan.llava, tower, folder)]
    for trained in RUNGS:
        settings = LlavaSettings(
            llava=str(folders[-1]), data=str(data), images=str(data.parent / "images"), trained=trained, seed=seed,
            steps=plan.steps, batch=plan.batch, **RECIPE,
        )  # fmt: skip
        folders.append(train_llava(settings, plan.runs).folder / "llava")
    for row in evaluate_llava(folders, ASKED, asked, answers=plan.runs / "answers").to_dict("records"):
        yield {"rung": row["features"]} | {name: row[name] for name in KEPT}


def run_study(plan: Plan) -> pd.DataFrame:
    """The table, which grows by each tower; a tower and seed that stands in it is not measured again."""
    world = plan.feedback.world
    asked = write_questions(plan.runs / "asked", world, plan.each)
    data = write_conversations(plan.runs / "told", world, plan.records, 1)["conversations"]
    table = pd.read_csv(plan.out) if plan.out.is_file() else pd.DataFrame(columns=COLUMNS)
    for seed in plan.seeds:
        for name, tower in find_towers(plan, seed).items():
            if ((table["tower"] == name) & (table["seed"] == seed)).any():
                continue
            rows = [*measure_patches(plan, tower), *measure_language(plan, tower, seed, asked, data)]
            new = pd.DataFrame([{"tower": name, "seed": seed} | row for row in rows], columns=COLUMNS)
            table = pd.concat([table, new]) if len(table) else new
            plan.out.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(plan.out, index=False, float_format="%.4g")
            print(f"{name}, seed {seed}: done", flush=True)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.integration", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    run_study(replace(Plan(), seeds=tuple(args.seeds)) if args.seeds else Plan())


if __name__ == "__main__":
    main()
