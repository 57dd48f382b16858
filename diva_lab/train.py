"""Train by a preset, on one GPU or many: both stages, one command.

    hf download --repo-type dataset pixparse/cc3m-wds --local-dir cc3m
    accelerate launch -m diva_lab.train --preset openai-l14-dcr
    python -m diva_lab.train --preset openai-l14-dcr --shards 'elsewhere/cc3m-train-{0000..0575}.tar'

Without --shards the pictures are the preset's, cc3m/cc3m-train-*.tar; the copy's validation tars lie beside them. A
recipe with two stages aligns first, unless --projector names the run of an earlier alignment. A stopped command goes on
where it was; a finished one only says where its run lies. Processes on several nodes need one folder of runs that all
of them see: --out.
"""

import argparse
import ast
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from diva_lab.images import tars
from diva_lab.presets import PRESETS, preset, stages
from diva_lab.runs import RUNS
from diva_lab.training import Settings, align, tune

KNOWN = {field.name: field.type for field in fields(Settings)}


def parsed(changes: list[str]) -> dict[str, object]:
    """Settings from `name=value`; values are Python's, anything else is text.

    Raises:
        ValueError: for an unknown name, a change without `=`, or a value that the setting does not take.
    """
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in KNOWN:
            raise ValueError(f"--set {change}: expected NAME=VALUE with a name of {', '.join(KNOWN)}")
        try:
            values[name] = text if KNOWN[name] is str else ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"--set {change}: expected a value of type {KNOWN[name].__name__}") from error
    return values


def changed(settings: Settings, changes: dict[str, object]) -> Settings:
    """`settings` with others by name.

    Raises:
        ValueError: for an unknown name, or a value that the setting does not take.
    """
    if unknown := changes.keys() - KNOWN.keys():
        raise ValueError(f"unknown setting {min(unknown)!r}; expected some of {', '.join(KNOWN)}")
    return replace(settings, **changes)


def aligned(
    name: str, root: str | Path = RUNS, processes: int = 1, stage1: dict | None = None, stage2: dict | None = None
) -> Settings:
    """A preset's settings for `tune`, after stage 1 where it has one and `stage2` names no projector.

    Args:
        name: one of `PRESETS`.
        root: where the run of stage 1 is made; a finished one is taken as it is.
        processes: as many as train together.
        stage1, stage2: settings to change, by name; `stage1` is not read where there is no stage 1.

    Raises:
        ValueError: for an unknown preset or setting, of either stage, before anything is trained.
        FileNotFoundError: for tars that are not there, as soon.
    """
    changes = {1: stage1 or {}, 2: stage2 or {}}
    chosen = {stage: changed(preset(name, stage, processes), changes[stage]) for stage in stages(name)}
    if "projector" in changes[2]:
        chosen.pop(1, None)
    for settings in chosen.values():
        if settings.images.endswith(".tar"):
            tars(settings.images)
    if 1 in chosen:
        return replace(chosen[2], projector=str(align(chosen[1], root).folder))
    return chosen[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m diva_lab.train", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--shards", help="webdataset tars, a folder of pictures, or world; the preset's if left out")
    parser.add_argument("--projector", help="folder of a finished run of stage 1: only stage 2 is run")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of both stages to change")
    parser.add_argument("--out", type=Path, default=RUNS, help="where the runs' folders are made; seen by all nodes")
    args = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as `accelerate launch` says
    try:
        both = ({"images": args.shards} if args.shards else {}) | parsed(args.set)
        projector = {"projector": args.projector} if args.projector else {}
        run = tune(aligned(args.preset, args.out, processes, both, both | projector), args.out)
    except (ValueError, FileNotFoundError, FloatingPointError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(run.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
