"""The command `diva-lab`: one verb a room. Nothing heavy is imported before the arguments have been read."""

import argparse
import re
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from diva_lab.paths import RUNS, check_writable

EXPECTED = (ValueError, OSError, FloatingPointError, RuntimeError)  # what our own code raises of bad input
LINE = 2000  # characters of a line of an error that are printed
SEED = 2**32 - 1  # the largest, as numpy and scikit-learn take it
EVALUATE_EXAMPLE = """\
example:
  diva-lab evaluate --encoder openai-l14 --encoder runs/ID \\
      --benchmarks mmvp-vlm,clustering,zero-shot --root data_root --out results.csv
"""
REFEREE_EXAMPLE = """\
example:
  diva-lab referee openai-l14 --root data_root --released weights --also runs/ID --out referee

A stopped command goes on where it was. Published encoders whose weights are not on this machine are named.
"""
TRAIN_EXAMPLE = """\
examples:
  hf download --repo-type dataset pixparse/cc3m-wds --local-dir cc3m
  accelerate launch -m diva_lab train --preset openai-l14-dcr
  diva-lab train --preset openai-l14-dcr --shards 'elsewhere/cc3m-train-{0000..0575}.tar'

A recipe with two stages aligns first, unless --projector names a finished run of stage 1. A stopped command goes on
where it was; a finished one only prints where its run lies. Processes on several nodes need one folder of runs that
all of them see: --out.
"""


# --- run --------------------------------------------------------------------------------------------------------


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", help="folder of images, webdataset tars or hf:DATASET (default: the tiny world)")
    parser.add_argument("--seeds", type=read_seeds, help="how many seeds to train with, as 3, or which, as 0,1,2")
    parser.add_argument("--steps", type=whole(1, 10**9), help="steps of training in each run")
    parser.add_argument("--out", type=Path, help="folder to write (default: runs/ and the time)")
    parser.add_argument("--only", help="numbers of the notebooks to run, as 02 or 00,02")


def run(args: argparse.Namespace) -> int:
    from diva_lab.workbook.notebooks import run_workbook

    return run_workbook(args.images, args.seeds, args.steps, args.out, args.only)


def whole(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`, for an argument's `type`."""

    def read(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,18}", text) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} to {most}")

    return read


def read_seeds(text: str) -> int | list[int]:
    """`3` as it is, `0,1,2` as a list."""
    try:
        if "," not in text:
            return whole(1, 10_000)(text)
        return [whole(0, SEED)(number) for number in text.removesuffix(",").split(",")]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected how many (3) or which ones (0,1,2); {error}") from None


# --- train ------------------------------------------------------------------------------------------------------


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.epilog = TRAIN_EXAMPLE
    parser.add_argument(
        "--preset", required=True, metavar="NAME", help="BACKBONE-RECIPE; `diva-lab presets` lists them"
    )
    parser.add_argument("--shards", help="webdataset tars, a folder of images, or world (default: the preset's)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--projector", help="folder of a finished run of stage 1: only stage 2 is run")
    only.add_argument("--align-only", action="store_true", help="only stage 1 is run")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings of both stages to change"
    )
    parser.add_argument("--out", type=Path, default=RUNS, help="where the runs' folders are made")


def train(args: argparse.Namespace) -> int:
    from diva_lab.machine import count_processes
    from diva_lab.training.presets import parse_changes
    from diva_lab.training.stages import align, align_preset, preset_settings, tune

    check_writable(args.out)
    both = ({} if args.shards is None else {"images": args.shards}) | parse_changes(args.set)
    announce(args, both)
    if args.align_only:
        print(align(preset_settings(args.preset, count_processes(), {1: both})[1], args.out).folder)
        return 0
    projector = {} if args.projector is None else {"projector": args.projector}
    print(tune(align_preset(args.preset, args.out, count_processes(), both, both | projector), args.out).folder)
    return 0


def announce(args: argparse.Namespace, changes: dict[str, object]) -> None:
    """Print what each stage of `train` costs, where its models are the preset's."""
    from diva_lab.machine import count_processes, default_device, is_main_process
    from diva_lab.training.presets import preset, stages
    from diva_lab.training.stages import preset_settings

    wanted = [1] if args.align_only else stages(args.preset) if args.projector is None else [2]
    chosen = preset_settings(args.preset, count_processes(), dict.fromkeys(wanted, changes))
    models = {(preset(args.preset, stage).encoder, preset(args.preset, stage).denoiser) for stage in wanted}
    if is_main_process() and {(settings.encoder, settings.denoiser) for settings in chosen.values()} == models:
        from diva_lab.plan import describe_start, plan_stage

        for stage, settings in chosen.items():
            print(describe_start(plan_stage(settings, stage, count_processes()), default_device()), flush=True)


# --- plan -------------------------------------------------------------------------------------------------------


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="NAME", help="BACKBONE-RECIPE; `diva-lab presets` lists them")
    parser.add_argument("--processes", type=whole(1, 100_000), default=1, help="as many as will train together")
    parser.add_argument("--device", default="A100", help="A100, A100-40GB, H100, H200, L40S or RTX4090")
    parser.add_argument("--rate", help="TFLOP/s of one, or the json of a benchmark there (default: 21 %% of its peak)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings of both stages to change"
    )


def plan(args: argparse.Namespace) -> int:
    from diva_lab.plan import describe_plan, plan_preset, read_device, read_rate
    from diva_lab.training.presets import parse_changes

    read_device(args.device)
    rate = None if args.rate is None else read_rate(args.rate)
    plans = plan_preset(args.preset, args.processes, parse_changes(args.set), rows=(0, 1, 4))
    print(describe_plan(args.preset, plans, args.device, rate))
    return 0


# --- evaluate ---------------------------------------------------------------------------------------------------


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EVALUATE_EXAMPLE
    parser.add_argument(
        "--encoder", action="append", required=True, help="name, folder, NAME@FILE, run or RUN:MIX; repeatable"
    )
    parser.add_argument(
        "--benchmarks",
        required=True,
        help="some of mmvp-vlm, sugarcrepe, winoground, colorswap, whatsup, aro, countbench, valse, world-readability, "
        "readability, zero-shot, clustering, probe, knn, retrieval, world, emoji, patch-probe, segmentation, "
        "world-segmentation, correspondence, by commas; NAME:SET for one set",
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the data (default: here)")
    parser.add_argument("--out", type=Path, default=Path("results.csv"), help="csv to write (default: results.csv)")
    parser.add_argument("--seed", type=whole(0, SEED), default=0, help="of k-means and bootstraps")
    parser.add_argument(
        "--features", default="global", help="global, class+patches, class+unit-patches or class+76patches"
    )
    parser.add_argument("--precision", default="auto", help="auto, no (float32) or bf16 (default: auto)")
    parser.add_argument("--strict-official", action="store_true", help="MMVP-VLM as the official script counts it")
    parser.add_argument("--corrections", type=Path, help="csv of corrected labels of pairs: set, id, label, source")
    parser.add_argument(
        "--max-images", type=whole(0, 10**9), default=0, help="of a set's split at most so many, drawn by the seed"
    )
    parser.add_argument("--workers", type=whole(0, 256), help="processes that decode images")
    parser.add_argument(
        "--layer", type=int, default=-2, help="whose patch tokens are read: 1 to the tower's depth, or from -1 back"
    )
    parser.add_argument(
        "--projector", default="shipped", help="readability: shipped, anchored, a run of stage 1, or .safetensors"
    )
    parser.add_argument("--denoiser", default="tiny", help="readability: a denoiser, unless the projector is a run")


def evaluate(args: argparse.Namespace) -> int:
    from diva_lab.evaluation.results import COLUMNS
    from diva_lab.evaluation.table import count_sets, evaluate

    check_writable(args.out.parent)
    table = evaluate(
        args.encoder, args.benchmarks.split(","), args.root, args.out, args.seed, args.features, args.precision,
        args.strict_official, args.max_images, workers=args.workers, projector=args.projector, denoiser=args.denoiser,
        corrections=args.corrections, layer=args.layer,
    )  # fmt: skip
    shown = table[(table["category"] == "all") | table["category"].str.startswith(("against ", "corrected by "))]
    print(shown[COLUMNS].to_string(index=False))
    print("\n".join(count_sets(table)))
    print(args.out)
    return 0


# --- referee ----------------------------------------------------------------------------------------------------


def add_referee(parser: argparse.ArgumentParser) -> None:
    parser.epilog = REFEREE_EXAMPLE
    parser.add_argument("original", help="the encoder that all others are compared with: name, folder or NAME@FILE")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the data (default: here)")
    parser.add_argument("--out", type=Path, default=Path("referee"), help="folder to write (default: referee)")
    parser.add_argument(
        "--also", nargs="+", action="extend", default=[], metavar="ENCODER", help="runs and other encoders to compare"
    )
    parser.add_argument("--released", type=Path, metavar="FOLDER", help="folder of published weights")
    parser.add_argument("--benchmarks", help="by commas, as of evaluate (default: all that find data under the root)")
    parser.add_argument("--seed", type=whole(0, SEED), default=0, help="of k-means and bootstraps")
    parser.add_argument(
        "--max-images", type=whole(0, 10**9), default=0, help="of a set's split at most so many, drawn by the seed"
    )
    parser.add_argument("--workers", type=whole(0, 256), help="processes that decode images")


def referee(args: argparse.Namespace) -> int:
    from diva_lab.evaluation.referee import run_referee
    from diva_lab.workbook.referee_page import state_rulings, write_referee_page

    check_writable(args.out)
    found = run_referee(
        args.original, args.root, args.out, args.also, args.released, args.benchmarks and args.benchmarks.split(","),
        args.seed, args.max_images, args.workers,
    )  # fmt: skip
    write_referee_page(args.out / "index.html", found)
    for name, why in found.missing.items():
        print(f"{name}: {why}")
    print("\n".join(state_rulings(found.results, found.original)))
    print(args.out / "index.html")
    if found.failures:
        raise ValueError(found.failures)
    return 0


# --- export -----------------------------------------------------------------------------------------------------


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        help="folder of a finished run of stage 2; RUN:MIX, as runs/ID:0.6, for original + MIX (tuned - original)",
    )
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument("--scores", type=Path, help="csv of `diva-lab evaluate`: its rows of this run go on the card")


def export(args: argparse.Namespace) -> int:
    from diva_lab.training.build import split_mix
    from diva_lab.training.export import export
    from diva_lab.training.runs import Run

    run, mix = split_mix(args.run)
    if not (run / "settings.json").is_file():
        raise FileNotFoundError(f"{run}: no run here; expected a folder with settings.json, as runs/ID")
    print(export(Run(run), args.folder, args.scores, mix))
    return 0


# --- soup -------------------------------------------------------------------------------------------------------


def add_soup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs of stage 2")
    parser.add_argument("--out", type=Path, default=RUNS, help="where the new run's folder is made")


def soup(args: argparse.Namespace) -> int:
    from diva_lab.training.runs import Run
    from diva_lab.training.soup import soup

    check_writable(args.out)
    print(soup([Run(folder) for folder in args.runs], args.out).folder)
    return 0


# --- blind-pairs ------------------------------------------------------------------------------------------------


def add_blind_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, help="folder of images, searched with its folders")
    parser.add_argument("--encoder", required=True, help="the blind one: as for evaluate")
    parser.add_argument("--against", required=True, help="one that sees: timm:NAME, or a folder or hub id, as DINOv2's")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write, in MMVP-VLM's layout")
    parser.add_argument("--similar", type=float, default=0.95, help="least cosine in the blind one (default: .95)")
    parser.add_argument("--apart", type=float, default=0.6, help="largest cosine in the seeing one (default: .6)")
    parser.add_argument("--most", type=whole(1, 100_000), default=150, help="pairs to write (default: 150)")


def blind_pairs(args: argparse.Namespace) -> int:
    from diva_lab.evaluation.blind_pairs import write_blind_pairs

    bounds = {"similar": args.similar, "apart": args.apart}
    pairs = write_blind_pairs(args.images, args.encoder, args.against, args.out, args.most, **bounds)
    print(f"{args.out}: {len(pairs)} pairs; write their statements into Questions.csv, as in notebook 04")
    return 0


# --- llava ------------------------------------------------------------------------------------------------------


def add_llava(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    assemble = verbs.add_parser("assemble", help="join an encoder and a language model by a new projector")
    assemble.add_argument("--language", type=Path, required=True, help="folder of a causal language model")
    assemble.add_argument("--seed", type=whole(0, SEED), default=0, help="of the projector's weights")
    swap = verbs.add_parser("swap", help="put another encoder's image tower into a LLaVA folder")
    swap.add_argument("llava", type=Path, help="folder of a LLaVA-1.5, as llava-hf/llava-1.5-7b-hf")
    evaluate = verbs.add_parser("evaluate", help="ask LLaVA folders the questions of benchmarks")
    evaluate.add_argument("--llava", type=Path, action="append", required=True, help="folder; repeatable")
    evaluate.add_argument("--benchmarks", required=True, help="some of mmvp, naturalbench, pope, cv-bench, by commas")
    evaluate.add_argument("--root", type=Path, default=Path(), help="folder of the data (default: here)")
    evaluate.add_argument("--out", type=Path, default=Path("results.csv"), help="csv to write (default: results.csv)")
    evaluate.add_argument("--answers", type=Path, help="folder for the answers (default: beside the csv)")
    evaluate.add_argument("--corrections", type=Path, help="csv of corrected labels of MMVP: set, id, label, source")
    evaluate.add_argument("--batch", type=whole(1, 4096), default=8, help="questions at a time")
    evaluate.add_argument("--seed", type=whole(0, SEED), default=0, help="of bootstraps")
    train = verbs.add_parser("train", help="train the projector, then the language model too")
    train.add_argument("llava", type=Path, help="folder to start from")
    train.add_argument("--data", type=Path, required=True, help="conversations in LLaVA's JSON format")
    train.add_argument("--images", type=Path, required=True, help="folder of their images")
    trained = ("projector", "all", "lora")
    text = "projector alone, with all weights of the language model, or with LoRA in it"
    train.add_argument("--trained", required=True, choices=trained, help=text)
    train.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings to change")
    train.add_argument("--out", type=Path, default=RUNS, help="where the run's folder is made")
    for verb in (assemble, swap):
        verb.add_argument("--encoder", required=True, help="name, folder, NAME@FILE, run or RUN:MIX")
        verb.add_argument("out", type=Path, help="new folder to write")


def llava(args: argparse.Namespace) -> int:
    check_writable(args.out.parent)
    does = {"assemble": llava_assemble, "swap": llava_swap, "train": llava_train, "evaluate": llava_evaluate}
    return does[args.what](args)


def llava_assemble(args: argparse.Namespace) -> int:
    from diva_lab.llava.folders import assemble

    print(assemble(args.encoder, args.language, args.out, args.seed))
    return 0


def llava_swap(args: argparse.Namespace) -> int:
    from diva_lab.llava.folders import swap

    print(swap(args.llava, args.encoder, args.out))
    return 0


def llava_train(args: argparse.Namespace) -> int:
    from diva_lab.llava.tuning import llava_settings, train_llava
    from diva_lab.machine import count_processes

    settings = llava_settings(args.llava, args.data, args.images, args.trained, args.set, count_processes())
    print(train_llava(settings, args.out).folder / "llava")
    return 0


def llava_evaluate(args: argparse.Namespace) -> int:
    from diva_lab.evaluation.results import COLUMNS
    from diva_lab.llava.scores import evaluate_llava

    table = evaluate_llava(
        args.llava, args.benchmarks.split(","), args.root, args.out, args.answers, args.corrections, args.batch,
        args.seed,
    )  # fmt: skip
    print(table[COLUMNS].to_string(index=False))
    print(args.out)
    return 0


# --- benchmark --------------------------------------------------------------------------------------------------


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("dcr-step", "diva-step", "align-step", "conflict-step", "evaluate", "input"))
    parser.add_argument("--scale", help="tiny, small, sd21, or for evaluate l14 (default: tiny; of evaluate l14)")
    parser.add_argument("--batch", type=whole(1, 4096), default=8)
    parser.add_argument("--rounds", type=whole(1, 10_000), default=7)
    parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto")
    parser.add_argument("--images", default="world", help="input: the source to load from")
    parser.add_argument("--workers", type=whole(0, 256), help="evaluate: processes that decode images")
    parser.add_argument("--files", type=whole(0, 10**6), default=0, help="evaluate: files to read in one go")
    parser.add_argument("--compile", action="store_true", help="compiled variants too, minutes more")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="only these variants and the reference"
    )
    parser.add_argument("--threads", type=whole(1, 1024), help="of torch (default: as torch has them)")
    parser.add_argument("--json", type=Path, help="write all figures there")


def benchmark(args: argparse.Namespace) -> int:
    from diva_lab.benchmark import run_benchmark

    if args.json:
        check_writable(args.json.parent)
    run_benchmark(
        args.what, args.scale, args.batch, args.rounds, args.precision, args.images, args.workers, args.files,
        args.compile, args.only, args.threads, args.json,
    )  # fmt: skip
    return 0


# --- presets ----------------------------------------------------------------------------------------------------


def add_presets(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("name", nargs="?", help="print this preset's settings as YAML, for papermill's -f")
    what.add_argument("--compare", nargs=2, metavar="NAME", help="print in what two presets differ, and why")


def presets(args: argparse.Namespace) -> int:
    from diva_lab.training.presets import compare_presets, describe_presets, preset_yaml

    if args.compare:
        print(compare_presets(*args.compare))
    else:
        print(describe_presets() if args.name is None else preset_yaml(args.name))
    return 0


# --- all of them ------------------------------------------------------------------------------------------------

VERBS: dict[str, tuple[str, Callable, Callable]] = {  # name -> what it does, its arguments, the function
    "run": ("run the notebooks and gather what came out: runs/ID/report.html, summary.csv", add_run, run),
    "train": ("train by a preset, both stages, on one GPU or many", add_train, train),
    "plan": ("what a preset costs before it starts: FLOPs, hours, memory, the largest batch", add_plan, plan),
    "evaluate": ("score any encoders on any benchmarks, into one csv", add_evaluate, evaluate),
    "referee": (
        "score an encoder and its published improved versions alike, and rule on the claims",
        add_referee,
        referee,
    ),
    "export": ("write a tuned encoder as open_clip and transformers folders, with a model card", add_export, export),
    "soup": ("average the weights of several runs into one that is read as a run", add_soup, soup),
    "blind-pairs": ("find pairs of images that an encoder takes for the same", add_blind_pairs, blind_pairs),
    "llava": ("make, train and ask language models that see through an encoder", add_llava, llava),
    "benchmark": ("how fast and how small a step is, against a plain one", add_benchmark, benchmark),
    "presets": ("list the papers' recipes, or print the settings of one", add_presets, presets),
}


class Parser(argparse.ArgumentParser):
    """A parser whose error is one line; a line that is found in a name of 200 kB is shortened."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {_shorten_lines(message)}; `{self.prog} --help` lists what it takes\n")


def _shorten_lines(text: str) -> str:
    """`text` with the middle of each line left out that is longer than `LINE` characters."""
    half = LINE // 2
    lines = [line if len(line) <= LINE else f"{line[:half]} ... {line[-half:]}" for line in text.splitlines()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns 0, or 2 after a line that says what was wrong with the input."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that cannot show a letter shows its number
            stream.reconfigure(errors="backslashreplace")
    parser = Parser(prog="diva-lab", description=sys.modules["diva_lab"].__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (text, add, _) in VERBS.items():
        own = verbs.add_parser(name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        add(own)
    args = parser.parse_args(argv)
    try:
        return VERBS[args.verb][2](args)
    except EXPECTED as error:
        print(f"error: {_shorten_lines(str(error)) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a run that was being trained has said how to go on
        return 130
