"""The results that ship: converged projectors, then every objective and control over several seeds.

    python -m tools.study projectors       stage 1 to its plateau, for each condition -> data/tiny/projectors
    python -m tools.study run [ROW ...]    rows of `ROWS`: a learning rate for each, then its seeds
    python -m tools.study collect          tables of all that has been run -> data/results
    python -m tools.study theory           both sides of the two theorems -> data/results/theory_*.csv
    python -m tools.study table            the README's table of results, from objectives.csv

Without a part, all but the first. Each goes on where it was stopped: runs are kept under runs/study. What has not been
run is missing from the tables, and named in data/results/missing.csv.

    python -m tools.study --models FOLDER  the first tier on other models, as `tools.pretrain` writes them

aligns their projector, runs and collects: another world, or a CLIP that is less blind. The name of FOLDER is that of
the runs' folder, runs/study-NAME, and of the tables', data/results/NAME.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diva_lab.analysis.alignment import alignment_report
from diva_lab.analysis.conflict import probe_gradients
from diva_lab.analysis.theory import COSINES, dcr_predictions, theorem_2, theory_report
from diva_lab.evaluation.world import world_report
from diva_lab.figures.style import LABELS, MEASURES
from diva_lab.gradients import COMBINE
from diva_lab.models.encoders import Encoder, embed, load_encoder
from diva_lab.paths import DATA, ROOT, RUNS
from diva_lab.provenance import environment, sha256
from diva_lab.statistics import paired_differences
from diva_lab.training.build import build_conditioner, build_denoiser, tuned_encoder
from diva_lab.training.controls import perturb
from diva_lab.training.runs import Run
from diva_lab.training.settings import PROJECTORS, SHIPPED, Settings
from diva_lab.training.stages import align, find_run, tune
from diva_lab.world import World, draw_scenes

STUDY = RUNS / "study"
RESULTS = DATA / "results"
RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # the same small budget for every row
# in proportion to the SNR of DCR's gradient in fifths of T, at the original encoder (probes.csv)
SNR_WEIGHTS = "1.19,1.00,1.17,1.51,1.31"
STEPS, RATE_STEPS = 200, 60  # of a run, and of one that only chooses a learning rate
SEEDS = {"objectives": (0, 1, 2, 3, 4)} | dict.fromkeys(("rivals", "variants", "ours", "suspects"), (0, 1, 2))
THEORY = ("diva", "dcr", "dcr-guidance")  # objectives under which theorem 1 is measured
PROBES = ("diva", "naive", "dcr", "dcr-guidance")  # rows whose first seed is probed
NAIVE, DCR, OURS = ({"objective": name} for name in ("naive", "dcr", "dcr-guidance"))
# tier -> row -> what differs from the defaults of `Settings`; `align` is for a stage 1 of its own
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
    # what may keep DIVA's effect away, beside steps ("diva, equal evaluations") and the models
    "suspects": {
        "diva, all weights": {"objective": "diva", "lora_rank": 0},
        "diva, LoRA 64": {"objective": "diva", "lora_rank": 64, "lora_alpha": 64.0},
        "diva, batch 64": {"objective": "diva", "batch": 64, "steps": 100},
    },
}  # fmt: skip
PLATEAU = 0.01  # the recovered fraction gained in 1000 steps below which stage 1 has converged


def align_projectors(study: "Study", condition: str, rounds: int = 6, steps: int = 500) -> Path:
    """Align in rounds of `steps` until one gains less than `PLATEAU`; the last projector goes to the models' folder.

    Returns the file, beside which lies its record: in projectors/ of the study's models, or of data/tiny.
    """
    own = {"condition": condition, "batch": 16, "lr": 1e-3, "steps": steps, "save_every": 250}
    settings = Settings(**study.base() | own | {"projector": "new"})
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
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return path


# a thin slice: every kind of record
SMALL_ROWS = ("naive", "dcr", "naive, upgrad", "dcr-guidance, τ .3")


def cache_report(report: Callable[[Encoder], dict[str, float]]) -> Callable[[Encoder], dict[str, float]]:
    """`report`, which says again what it has said of an encoder with the same embeddings: all runs begin alike."""
    known: dict[bytes, dict[str, float]] = {}
    images = torch.from_numpy(World().render(draw_scenes(64, 0))).permute(0, 3, 1, 2)

    def asked(encoder: Encoder) -> dict[str, float]:
        key = embed(encoder, images).numpy().tobytes()
        if key not in known:
            known[key] = report(encoder)
        return known[key]

    return asked


@dataclass(frozen=True)
class Study:
    """Where a study's runs lie and how much of it is asked for; the defaults are those of the shipped results."""

    root: Path = STUDY
    results: Path = RESULTS
    steps: int = STEPS
    rate_steps: int = RATE_STEPS
    rates: tuple[float, ...] = RATES
    seeds: int = 5  # at most so many a row
    rows: tuple[str, ...] = tuple(name for tier in ROWS.values() for name in tier)
    probe: Callable = probe_gradients
    theory_steps: int = 100
    theory: Callable = theory_report
    theory_batches: int = 2  # of eight pictures, on which theorem 2 is tried
    models: Path | None = None  # a folder of `tools.pretrain`; None for the shipped one

    @classmethod
    def of(cls, models: Path) -> "Study":
        """The first tier on the models in a folder.

        Raises FileNotFoundError where the folder holds none.
        """
        missing = [part for part in ("clip/record.json", "diffusion/model_index.json") if not (models / part).is_file()]
        if missing:
            raise FileNotFoundError(
                f"models {models}: no {missing[0]}; expected a folder that `python -m tools.pretrain models` wrote"
            )
        models = models.resolve()
        root, results = RUNS / f"study-{models.name}", RESULTS / models.name
        return cls(root, results, rows=tuple(ROWS["objectives"]), models=models)

    @cached_property
    def world(self) -> World:
        """The world that the models learned from."""
        return World(json.loads((self.models / "clip" / "record.json").read_text())["world"] if self.models else 0)

    def base(self, condition: str = "global") -> dict:
        """The settings that name the study's models; empty for the shipped ones."""
        if self.models is None:
            return {}
        folders = {"encoder": self.models / "clip", "denoiser": self.models / "diffusion",
                   "projector": self.models / "projectors" / f"{condition}.safetensors"}  # fmt: skip
        return {name: str(path) for name, path in folders.items()} | {"images": f"world:{self.world.seed}"}

    def tiers(self) -> Iterator[tuple[str, str, dict]]:
        """Tier, name and settings of every row asked for."""
        for tier, rows in ROWS.items():
            yield from ((tier, name, changes) for name, changes in rows.items() if name in self.rows)

    def seeds_of(self, tier: str) -> tuple[int, ...]:
        return SEEDS[tier][: self.seeds]

    def stage_one(self, changes: dict) -> Settings | None:
        """The alignment that a row begins with; None where it takes the shipped projector."""
        own = {"steps": self.steps, "lr": 1e-3, "batch": 8, "projector": "new"} | changes.get("align", {})
        shared = {name: value for name, value in changes.items() if name not in ("align", "steps")}
        return Settings(**self.base() | shared | own) if "align" in changes else None

    def stage_two(self, changes: dict, **more: float | int) -> Settings:
        """A row's settings, with its own projector where it has one."""
        if first := self.stage_one(changes):
            more["projector"] = str(find_run(first, self.root, "align").folder)
        shared = {name: value for name, value in changes.items() if name != "align"}
        return Settings(**self.base(changes.get("condition", "global")) | shared | more)

    def choosing(self, changes: dict) -> list[Settings]:
        """The runs that choose a row's learning rate, on a seed and on pairs that are not reported."""
        steps = round(self.rate_steps * changes.get("steps", self.steps) / self.steps) or 1
        return [self.stage_two(changes, lr=lr, steps=steps, seed=100) for lr in self.rates]

    def chosen(self, changes: dict) -> float | None:
        """The learning rate of the best mean of pair score and zero-shot; None before all have been run."""
        runs = [find_run(settings, self.root) for settings in self.choosing(changes)]
        if not all(run.done for run in runs):
            return None
        scores = [run.evaluations().iloc[-1][["pairs/mean", "zeroshot"]].sum() for run in runs]
        return self.rates[int(np.argmax(scores))]

    def settings(self, changes: dict, seed: int) -> Settings:
        """A row's run of one seed at the chosen rate, evaluated before, halfway and at the end."""
        found = self.stage_two({"steps": self.steps} | changes, lr=self.chosen(changes), seed=seed)
        return replace(found, evaluate_every=max(1, found.steps // 2))


SMALL = Study(
    RUNS / "study-small", RUNS / "study-small" / "results", 6, 3, (1e-5, 1e-4), 2, SMALL_ROWS,
    partial(probe_gradients, batches=2, bins=2), 2, partial(theory_report, timesteps=(400,), n=48, halvings=4), 1,
)  # fmt: skip


def run_rows(study: Study) -> None:
    """All rows asked for: their learning rates, then seed by seed; each with its probes and controls."""
    world = study.world
    choose = cache_report(partial(world_report, world=world, split="choose"))
    report = cache_report(partial(world_report, world=world))
    held_out = torch.from_numpy(world.render(draw_scenes(1000, (world.seed, 8)))).permute(0, 3, 1, 2)
    for tier, name, changes in study.tiers():
        if first := study.stage_one(changes):
            drawn = first.denoiser == Settings(**study.base()).denoiser  # by a denoiser that knows the world's captions
            align(first, study.root, partial(alignment_report, world=world) if drawn else None)
        for settings in study.choosing(changes):
            tune(settings, study.root, choose)
        for seed in study.seeds_of(tier):
            settings = study.settings(changes, seed)
            made = tune(settings, study.root, report, study.probe if name in PROBES and seed == 0 else None)
            if name == "dcr":
                for match in ("norm", "drift"):
                    perturb(made, held_out, match, study.root, report)
            last = made.evaluations().iloc[-1]
            facts = f"pairs {last['pairs/mean']:.4f}, probes {last['probe/mean']:.4f}, zero-shot {last['zeroshot']:.4f}"
            print(f"{name}, seed {seed}, lr {settings.lr:g}: {facts}", flush=True)


def theory_tables(study: Study) -> list[Path]:
    """Both theorems measured before and after training, in runs of their own.

    theory_scatter.csv: one row an objective, step, kind of features, timestep and way to read the constants off, with
    what `theorem_1` returns; every step 0 is the original encoder. theory_affine.csv: records of `theorem_2` at each t,
    of the original encoder (`none`), and of each run's last with its negatives as they are.
    """
    world = study.world
    images = torch.from_numpy(world.render(draw_scenes(8 * study.theory_batches, (world.seed, 12))))
    batches = (images.permute(0, 3, 1, 2).float() / 255).split(8)
    every, rows, affine, now = max(1, study.theory_steps // 4), [], [], environment()
    measured = {"git": now["git"], "torch": now["versions"]["torch"]}
    for name in THEORY:
        settings = Settings(**study.base(), objective=name, steps=study.theory_steps, evaluate_every=every)
        denoiser, original = build_denoiser(settings), load_encoder(settings.encoder)
        conditioner = build_conditioner(settings, original, denoiser)
        report = cache_report(partial(study.theory, conditioner=conditioner, denoiser=denoiser, world=world))
        made = tune(settings, study.root / "theory", report)
        facts = {"run": made.id, "seed": settings.seed, "lr": settings.lr}
        facts |= {"git": made.environment["git"], "torch": made.environment["versions"]["torch"]}
        for record in made.evaluations().to_dict("records"):
            found: dict[tuple, dict] = {}
            for key, value in record.items():
                if key != "step":
                    features, t, constants, quantity = key.split("/", 3)
                    found.setdefault((features, int(t), constants), {})[quantity] = value
            for (features, t, constants), values in found.items():
                place = {"features": features, "t": t, "constants": constants}
                rows.append({"objective": name, "step": record["step"], **place, **values, **facts})
        encoders = {} if affine else {"none": original}
        for objective, encoder in (encoders | {name: tuned_encoder(made)}).items():
            place = {"objective": objective, "step": 0 if objective == "none" else settings.steps}
            for t in dict.fromkeys(row["t"] for row in rows):
                each = [dcr_predictions(encoder, conditioner, denoiser, batch, t) for batch in batches]
                cosines = COSINES if objective == "none" else ()
                found = theorem_2(*map(torch.cat, zip(*each, strict=True)), cosines)
                affine += [{**place, "t": t, **record, **facts, **measured} for record in found]
    study.results.mkdir(parents=True, exist_ok=True)
    tables = {"theory_scatter": rows, "theory_affine": affine}
    return [_write(pd.DataFrame(table), study.results / f"{name}.csv") for name, table in tables.items()]


def _facts(made: Run, name: str, tier: str) -> dict:
    """What a row of a table says beside its measures."""
    settings, made_in = made.settings, made.environment
    facts = {"objective": name, "tier": tier, "seed": settings["seed"], "lr": settings["lr"], "run": made.id}
    return facts | {"git": made_in["git"], "torch": made_in["versions"]["torch"]}


def collect(study: Study) -> list[Path]:
    """The tables of `study.results` from all runs that are done, and `missing.csv` for those that are not.

    rates.csv: every rate tried, and which was chosen. objectives.csv: the first tier with its controls, one row an
    objective and seed; ablations.csv: the others. curves.csv: every evaluation. conflict.csv: every step of the naive
    sum. probes.csv: what the probes said. claims.csv: differences to `none` with intervals.
    """
    tables: dict[str, list] = {
        name: [] for name in ("rates", "objectives", "ablations", "curves", "conflict", "probes")
    }
    missing, untouched = [], {}
    for tier, name, changes in study.tiers():
        lr = study.chosen(changes)
        for settings in study.choosing(changes):
            if (made := find_run(settings, study.root)).done:
                last = made.evaluations().iloc[-1]
                row = _facts(made, name, tier) | {"chosen": settings.lr == lr, "steps": settings.steps}
                tables["rates"].append(row | last[["pairs/mean", "probe/mean", "zeroshot"]].to_dict())
        for seed in study.seeds_of(tier):
            settings = None if lr is None else study.settings(changes, seed)
            made = settings and find_run(settings, study.root)
            if made is None or not made.done:
                missing.append({"tier": tier, "row": name, "seed": seed, "lr": lr})
                continue
            facts, evaluations, metrics = _facts(made, name, tier), made.evaluations(), made.metrics()
            untouched.setdefault(
                seed, facts | {"objective": "none", "lr": np.nan, "steps": 0} | _measures(evaluations, 0)
            )
            where = "objectives" if tier == "objectives" else "ablations"
            cos = metrics["cos"].dropna() if "cos" in metrics else pd.Series(dtype=float)
            extra = {"steps": settings.steps, "seconds_per_step": metrics["seconds"].diff().median()}
            if len(cos):
                extra |= {"conflict_rate": (cos < 0).mean(), "cos": cos.mean()}
            tables[where].append(facts | _measures(evaluations, -1) | extra)
            if name == "dcr":
                for match in ("norm", "drift"):
                    control = find_control(made, match, study.root)
                    if control is not None:
                        row = _facts(control, f"perturb-{match}", tier) | _measures(control.evaluations(), -1)
                        tables["objectives"].append(row | {"steps": settings.steps})
            tables["curves"].append(evaluations.assign(**facts))
            if name == "naive":
                tables["conflict"].append(metrics.assign(objective=name, seed=seed, run=made.id))
            if len(made.probes()):
                tables["probes"].append(made.probes().assign(objective=name, seed=seed, run=made.id))
    tables["objectives"] = [*untouched.values(), *tables["objectives"]]
    study.results.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, parts in tables.items():
        if not parts:
            (study.results / f"{name}.csv").unlink(missing_ok=True)
            continue
        table = pd.concat(parts) if isinstance(parts[0], pd.DataFrame) else pd.DataFrame(parts)
        if name == "curves":
            table = table[["objective", "tier", "seed", "step", *MEASURES]]
        paths.append(_write(table, study.results / f"{name}.csv"))
    paths.append(_write(pd.DataFrame(missing, columns=["tier", "row", "seed", "lr"]), study.results / "missing.csv"))
    everything = pd.DataFrame([*tables["objectives"], *tables["ablations"]])
    if len(everything):
        paths.append(_write(paired_differences(everything, MEASURES), study.results / "claims.csv"))
    return paths


def _measures(evaluations: pd.DataFrame, place: int) -> dict[str, float]:
    columns = [name for name in evaluations if name in MEASURES or name.startswith(("pairs/", "probe/"))]
    return evaluations.iloc[place][[name for name in columns if not name.endswith(("/low", "/high"))]].to_dict()


def find_control(like: Run, match: str, root: Path) -> Run | None:
    """The finished run of `perturb` that was made like `like`, if there is one."""
    for path in sorted(root.glob(f"perturb-perturb-{match}-s{like.settings['seed']}-*")):
        if Run(path).done and Run(path).settings["like"] == like.id:
            return Run(path)
    return None


def results_table(results: pd.DataFrame) -> str:
    """Markdown: the mean of each measure, in points, and under it the paired difference to `none` with its interval."""
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


def write_results_table(path: Path = ROOT / "README.md") -> Path:
    """Put the table between the README's marks."""
    text = path.read_text()
    head, rest = text.split("<!-- results:", 1)
    mark, rest = rest.split("-->", 1)
    tail = rest.split("<!-- /results -->", 1)[1]
    table = results_table(pd.read_csv(RESULTS / "objectives.csv"))
    path.write_text(f"{head}<!-- results:{mark}-->\n{table}\n<!-- /results -->{tail}")
    return path


def _write(table: pd.DataFrame, path: Path) -> Path:
    table.to_csv(path, index=False, float_format="%.6g")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("projectors", "run", "collect", "theory", "table"))
    parser.add_argument("rows", nargs="*", metavar="ROW", help="run: names of rows or of tiers; default: all")
    parser.add_argument("--condition", choices=PROJECTORS, help="only this condition's projector")
    parser.add_argument("--rounds", type=int, default=6, help="projectors: at most so many")
    parser.add_argument("--seeds", type=int, default=Study.seeds, help="run: at most so many a row")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--small", action="store_true", help="a thin slice of it, in a folder of its own")
    which.add_argument("--models", type=Path, metavar="FOLDER", help="the first tier on models of `tools.pretrain`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        study = SMALL if args.small else Study.of(args.models) if args.models else Study()
    except FileNotFoundError as error:
        parser.error(str(error))
    rows = tuple(name for row in args.rows for name in ROWS.get(row, [row]))
    if unknown := set(rows) - set(Study().rows):
        parser.error(f"unknown row {min(unknown)!r}; expected {', '.join((*ROWS, *Study().rows))}")
    conditions = (args.condition,) if args.condition else PROJECTORS if args.models is None else ("global",)
    if args.part == "projectors" or (args.part is None and args.models):
        for condition in conditions:
            print("written:", align_projectors(study, condition, args.rounds))
    if args.part in (None, "run"):
        run_rows(replace(study, rows=rows or study.rows, seeds=min(args.seeds, study.seeds)))
    if args.part in (None, "collect"):
        print("written:", *collect(replace(study, rows=tuple(dict.fromkeys((*study.rows, *rows))))))
    if args.part == "theory" or (args.part is None and not args.models):
        print("written:", *theory_tables(study))
    if args.part == "table" or (args.part is None and study.results == RESULTS):
        print("written:", write_results_table())
