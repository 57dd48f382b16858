"""Run the study that ships: projectors aligned to their plateau, then every objective and control over several seeds.

    python -m tools.study projectors       stage 1 to its plateau, for each condition -> data/tiny/projectors
    python -m tools.study run [ROW ...]    rows of `ROWS`: choose a learning rate for each, then train its seeds
    python -m tools.study theory           the runs in which both sides of theorem 1 are measured

Without a part: the last two. Runs are kept under runs/study, so each part continues where it was stopped.
`python -m tools.tables` makes the tables of them.

    python -m tools.study --models FOLDER  the first tier on other models, as `tools.pretrain` writes them

aligns a projector for these models and runs the rows: in another world, or with a CLIP that is less blind. The name of
FOLDER names the folder of the runs, runs/study-NAME, and of the tables, data/results/NAME.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from diva_lab.analysis.alignment import alignment_report
from diva_lab.analysis.conflict import probe_gradients
from diva_lab.analysis.theory import theory_report
from diva_lab.evaluation.world import cache_report, world_report
from diva_lab.gradients import COMBINE
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder, load_encoder
from diva_lab.paths import DATA, RUNS
from diva_lab.provenance import sha256
from diva_lab.training.build import build_conditioner, build_denoiser
from diva_lab.training.controls import perturb
from diva_lab.training.settings import PROJECTORS, SHIPPED, Settings
from diva_lab.training.stages import align, find_run, tune
from diva_lab.world import World, draw_scenes

STUDY = RUNS / "study"
RESULTS = DATA / "results"
RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # each row chooses among these learning rates
# in proportion to the SNR of DCR's gradient in each fifth of the timesteps, at the original encoder (probes.csv)
SNR_WEIGHTS = "1.19,1.00,1.17,1.51,1.31"
STEPS, RATE_STEPS = 200, 60  # of a run, and of a run that only chooses a learning rate
SEEDS = {"objectives": (0, 1, 2, 3, 4)} | dict.fromkeys(("rivals", "variants", "ours", "suspects"), (0, 1, 2))
RATE_SEED = 100  # of the runs that choose a learning rate: no seed that is reported
THEORY = ("diva", "dcr", "dcr-guidance")  # objectives under which theorem 1 is measured
PROBES = ("diva", "naive", "dcr", "dcr-guidance")  # rows whose first seed is probed
MATCHES = ("norm", "drift")  # random controls of the row `dcr`, as `perturb` makes them
PLATEAU = 0.01  # stage 1 has converged when 1000 steps add less than this to the recovered fraction
NAIVE, DCR, OURS = ({"objective": name} for name in ("naive", "dcr", "dcr-guidance"))
# tier -> row -> what differs from the defaults of `Settings`; `align`: the same for a stage 1 of its own
ROWS: dict[str, dict[str, dict]] = {
    "objectives": {"diva": {"objective": "diva"}, "contrastive": {"objective": "contrastive"}, "naive": NAIVE,
                   "dcr": DCR, "dcr-guidance": OURS},
    "rivals": {
        **{f"naive, λ_rec {weight}": NAIVE | {"lambda_rec": float(weight)} for weight in (10, 100, 1000)},
        **{f"naive, {how}": NAIVE | {"combine": how} for how in COMBINE if how != "sum"},
    },
    "variants": {
        "dcr, velocity": DCR | {"target": "velocity"},
        "dcr, 2 negatives": DCR | {"negatives": 2},
        "dcr, 4 negatives": DCR | {"negatives": 4},
        "dcr, still negatives": DCR | {"negative_gradient": False},
        "dcr, own denominators": DCR | {"denominator": "own"},
        "dcr, no flips": DCR | {"flips": False},
        "dcr, high noise": DCR | {"timesteps": "high-noise"},
        "dcr, logit-normal": DCR | {"timesteps": "logit-normal"},
        "dcr, SNR-weighted": DCR | {"timesteps": SNR_WEIGHTS},
        "dcr, recap": DCR | {"condition": "recap"},
        "dcr, all weights": DCR | {"lora_rank": 0},
        "dcr, end to end": DCR | {"projector": "new", "train_projector": True},
        "diva, equal evaluations": {"objective": "diva", "steps": 900},  # 900 x 16 as 200 x 72
        "diva, high noise": {"objective": "diva", "timesteps": "high-noise"},
        "diva, recap": {"objective": "diva", "condition": "recap"},
        "dcr, batch 16": DCR | {"batch": 16, "steps": 100},
        "dcr, short stage 1": DCR | {"align": {"steps": 300}},
        "dcr, short stage 1 by DCR": DCR | {"align": {"steps": 300, "align_by": "dcr"}},
        "dcr, recap-all": DCR | {"condition": "recap-all", "align": {"steps": 1000}},
        "genhancer": {"objective": "genhancer", "denoiser": "light-tiny", "timesteps": "logit-normal",
                      "align": {"steps": 3000}},
    },
    "ours": {
        "dcr-guidance, τ .3": OURS | {"tau": 0.3},
        "dcr-guidance, τ 1": OURS | {"tau": 1.0},
        "dcr-guidance, high noise": OURS | {"timesteps": "high-noise"},
        "dcr-guidance, no flips": OURS | {"flips": False},
    },
    # what may hide DIVA's effect, beside the number of steps ("diva, equal evaluations") and the models
    "suspects": {
        "diva, all weights": {"objective": "diva", "lora_rank": 0},
        "diva, LoRA 64": {"objective": "diva", "lora_rank": 64, "lora_alpha": 64.0},
        "diva, batch 64": {"objective": "diva", "batch": 64, "steps": 100},
    },
}  # fmt: skip
SMALL_ROWS = ("naive", "dcr")  # with and without probes and pushes


def find_models(models: Path) -> Path:
    """The absolute path of a folder of models; raises FileNotFoundError if it holds none."""
    missing = [part for part in ("clip/record.json", "diffusion/model_index.json") if not (models / part).is_file()]
    if missing:
        raise FileNotFoundError(
            f"models {models}: no {missing[0]}; expected a folder that `python -m tools.pretrain models` wrote"
        )
    return models.resolve()


def world_of(models: Path | None) -> World:
    """The world that the models in a folder of `tools.pretrain` were trained on; the shipped one's for None."""
    return World(json.loads((models / "clip" / "record.json").read_text(encoding="utf-8"))["world"] if models else 0)


def name_models(models: Path | None) -> dict[str, str]:
    """The settings that name the models in a folder and their world; none for the shipped models."""
    if models is None:
        return {}
    folders = {"encoder": str(models / "clip"), "denoiser": str(models / "diffusion")}
    return folders | {"images": f"world:{world_of(models).seed}"}


@dataclass(frozen=True)
class Study:
    """Where a study's runs and tables lie, and how much of it is run; the defaults are those of the shipped results."""

    root: Path = STUDY
    results: Path = RESULTS
    steps: int = STEPS
    rate_steps: int = RATE_STEPS
    rates: tuple[float, ...] = RATES
    seeds: int = 5  # the most of a row
    rows: tuple[str, ...] = tuple(name for tier in ROWS.values() for name in tier)
    probe: Callable = probe_gradients
    theory_steps: int = 100
    theory: Callable = theory_report
    theory_batches: int = 2  # of eight images, for theorem 2
    models: Path | None = None  # a folder of `tools.pretrain`; None for the shipped models
    split: str = "measure"  # of the world, on which the rows are measured
    evaluations: int = 2  # of a row's run, after the one at its start

    @classmethod
    def of(cls, models: Path) -> "Study":
        """The first tier on the models in a folder.

        Raises FileNotFoundError if the folder holds none.
        """
        models = find_models(models)
        root, results = RUNS / f"study-{models.name}", RESULTS / models.name
        return cls(root, results, rows=tuple(ROWS["objectives"]), models=models)

    @cached_property
    def world(self) -> World:
        """The world that the models were trained on."""
        return world_of(self.models)

    def render(self, n: int, stream: int) -> torch.Tensor:
        """Images of `n` scenes of the world, uint8 [n, 3, h, w]; `stream` separates them from other draws."""
        return torch.from_numpy(self.world.render(draw_scenes(n, (self.world.seed, stream)))).permute(0, 3, 1, 2)

    def model_settings(self, condition: str = "global") -> dict:
        """The settings that name the study's models; empty for the shipped models."""
        if self.models is None:
            return {}
        return name_models(self.models) | {"projector": str(self.models / "projectors" / f"{condition}.safetensors")}

    def each_row(self) -> Iterator[tuple[str, str, dict]]:
        """Tier, name and changed settings of every row of the study."""
        for tier, rows in ROWS.items():
            yield from ((tier, name, changes) for name, changes in rows.items() if name in self.rows)

    def seeds_of(self, tier: str) -> tuple[int, ...]:
        return SEEDS[tier][: self.seeds]

    def stage_one(self, changes: dict) -> Settings | None:
        """The alignment that a row starts from; None for the shipped projector."""
        recipe = {"steps": self.steps, "lr": 1e-3, "batch": 8, "projector": "new"} | changes.get("align", {})
        shared = {name: value for name, value in changes.items() if name not in ("align", "steps")}
        return Settings(**self.model_settings() | shared | recipe) if "align" in changes else None

    def stage_two(self, changes: dict, **more: float | int) -> Settings:
        """A row's settings, with the projector of its own stage 1 if it has one."""
        if first := self.stage_one(changes):
            more["projector"] = str(find_run(first, self.root, "align").folder)
        shared = {name: value for name, value in changes.items() if name != "align"}
        return Settings(**self.model_settings(changes.get("condition", "global")) | shared | more)

    def rate_trials(self, changes: dict) -> list[Settings]:
        """The short runs that choose a row's learning rate, on a seed and on pairs that are not reported."""
        steps = round(self.rate_steps * changes.get("steps", self.steps) / self.steps) or 1
        return [self.stage_two(changes, lr=lr, steps=steps, seed=RATE_SEED) for lr in self.rates]

    def choose_rate(self, changes: dict) -> float | None:
        """The learning rate with the largest sum of pair score and zero-shot; None before all trials are finished."""
        runs = [find_run(settings, self.root) for settings in self.rate_trials(changes)]
        if not all(run.done for run in runs):
            return None
        scores = [run.evaluations().iloc[-1][["pairs/mean", "zeroshot"]].sum() for run in runs]
        return self.rates[int(np.argmax(scores))]

    def row_settings(self, changes: dict, seed: int) -> Settings:
        """A row's run of one seed at the chosen learning rate."""
        settings = self.stage_two({"steps": self.steps} | changes, lr=self.choose_rate(changes), seed=seed)
        return replace(settings, evaluate_every=max(1, settings.steps // self.evaluations))

    def theory_settings(self, objective: str) -> Settings:
        """A run in which theorem 1 is measured at the start and after each quarter of the steps."""
        every = max(1, self.theory_steps // 4)
        return Settings(**self.model_settings(), objective=objective, steps=self.theory_steps, evaluate_every=every)

    def theory_models(self) -> tuple[Encoder, Conditioner, Denoiser]:
        """The original encoder, and the conditioner and the denoiser with which the theorems are measured."""
        settings = self.theory_settings(THEORY[0])
        encoder, denoiser = load_encoder(settings.encoder), build_denoiser(settings)
        return encoder, build_conditioner(settings, encoder, denoiser), denoiser


SMALL = Study(
    RUNS / "study-small", RUNS / "study-small" / "results", 6, 3, (1e-5,), 2, SMALL_ROWS,
    partial(probe_gradients, batches=2, bins=2), 2, partial(theory_report, timesteps=(400,), n=48, halvings=4), 1,
    split="choose", evaluations=1,
)  # fmt: skip


def align_projectors(study: Study, condition: str, rounds: int = 6, steps: int = 500) -> Path:
    """Align in rounds of `steps` until one gains less than `PLATEAU`, and copy the projector to the models' folder.

    Returns the file, with its record beside it: in projectors/ of the study's models, or of data/tiny.
    """
    recipe = {"condition": condition, "batch": 16, "lr": 1e-3, "steps": steps, "save_every": 250, "projector": "new"}
    settings = Settings(**study.model_settings() | recipe)
    history = []
    for number in range(rounds):
        if history:
            settings = replace(settings, projector=str(study.root / history[-1]["run"]), seed=number)
        run = align(settings, study.root, partial(alignment_report, world=study.world))
        table = run.evaluations()
        first, last = table["recovered"].iloc[0], table.iloc[-1]
        history.append(
            {"run": run.id, "steps": steps, **last.drop("step").to_dict(), "gained": last["recovered"] - first}
        )
        print(condition, f"round {number + 1}: recovered {first:.4f} -> {last['recovered']:.4f}", flush=True)
        if number and history[-1]["gained"] < PLATEAU * steps / 1000:
            break
    path = (study.models / "projectors" if study.models else SHIPPED) / f"{condition}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(study.root / history[-1]["run"] / "checkpoint" / "weights.safetensors", path)
    record = {"sha256": sha256(path), "settings": run.settings, "rounds": history, **run.environment}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def run_rows(study: Study) -> None:
    """Run every row: its own stage 1 if it has one, its learning rate, then its seeds with probes and controls."""
    splits = dict.fromkeys(("choose", study.split))
    reports = {split: cache_report(partial(world_report, world=study.world, split=split)) for split in splits}
    for tier, name, changes in study.each_row():
        if first := study.stage_one(changes):
            reads_captions = first.denoiser == Settings(**study.model_settings()).denoiser  # the report needs that
            align(first, study.root, partial(alignment_report, world=study.world) if reads_captions else None)
        for settings in study.rate_trials(changes):
            tune(settings, study.root, reports["choose"])
        for seed in study.seeds_of(tier):
            run_seed(study, name, study.row_settings(changes, seed), reports[study.split])


def run_seed(study: Study, name: str, settings: Settings, report: Callable[[Encoder], dict[str, float]]) -> None:
    """Tune one seed of the row `name`, probe it if it is the first of `PROBES`, and push DCR's weights at random."""
    run = tune(settings, study.root, report, study.probe if name in PROBES and settings.seed == 0 else None)
    if name == "dcr":
        held_out = study.render(1000, stream=8)
        for match in MATCHES:
            perturb(run, held_out, match, study.root, report)
    last = run.evaluations().iloc[-1]
    scores = f"pairs {last['pairs/mean']:.4f}, probes {last['probe/mean']:.4f}, zero-shot {last['zeroshot']:.4f}"
    print(f"{name}, seed {settings.seed}, lr {settings.lr:g}: {scores}", flush=True)


def run_theory(study: Study) -> None:
    """Train every objective of `THEORY` once, in a run of its own, with both sides of theorem 1 measured on the way."""
    _, conditioner, denoiser = study.theory_models()
    report = cache_report(partial(study.theory, conditioner=conditioner, denoiser=denoiser, world=study.world))
    for objective in THEORY:
        tune(study.theory_settings(objective), study.root / "theory", report)


# --- the command ------------------------------------------------------------------------------------------------


def add_study(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose a study; `tools.tables` has them too."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--small", action="store_true", help="a small part of every kind, in runs/study-small")
    which.add_argument("--models", type=Path, metavar="FOLDER", help="the first tier on models of `tools.pretrain`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def read_study(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Study:
    torch.set_num_threads(args.threads)
    try:
        return SMALL if args.small else Study.of(args.models) if args.models else Study()
    except FileNotFoundError as error:
        parser.error(str(error))


def read_rows(parser: argparse.ArgumentParser, names: list[str]) -> tuple[str, ...]:
    """Names of rows, tiers replaced by their rows."""
    rows = tuple(row for name in names for row in ROWS.get(name, [name]))
    if unknown := set(rows) - set(Study().rows):
        parser.error(f"unknown row {min(unknown)!r}; expected {', '.join((*ROWS, *Study().rows))}")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("projectors", "run", "theory"))
    parser.add_argument("rows", nargs="*", metavar="ROW", help="run: names of rows or of tiers; default: all")
    parser.add_argument("--condition", choices=PROJECTORS, help="projectors: only this condition")
    parser.add_argument("--rounds", type=int, default=6, help="projectors: the most rounds of each")
    parser.add_argument("--seeds", type=int, default=Study.seeds, help="run: the most seeds of a row")
    add_study(parser)
    args = parser.parse_args(argv)
    study, rows = read_study(parser, args), read_rows(parser, args.rows)
    conditions = (args.condition,) if args.condition else PROJECTORS if args.models is None else ("global",)
    if args.part == "projectors" or (args.part is None and args.models):
        for condition in conditions:
            print("written:", align_projectors(study, condition, args.rounds))
    if args.part in (None, "run"):
        run_rows(replace(study, rows=rows or study.rows, seeds=min(args.seeds, study.seeds)))
    if args.part == "theory" or (args.part is None and not args.models):
        run_theory(study)


if __name__ == "__main__":
    main()
