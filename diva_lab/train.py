"""Train by a preset, on one GPU or many: both stages, one command.

    python -m diva_lab.train --preset openai-l14-dcr --shards 'cc3m/{0000..0331}.tar'
    accelerate launch -m diva_lab.train --preset openai-l14-dcr --shards 'cc3m/{0000..0331}.tar'

CC3M's usable copy is `pixparse/cc3m-wds`. A recipe with two stages aligns first, unless --projector names the run of an
earlier alignment. A stopped command goes on where it was; a finished one only says where its run lies.
"""

import argparse
import ast
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from diva_lab.presets import PRESETS, preset
from diva_lab.runs import RUNS
from diva_lab.training import Settings, align, tune


def changed(settings: Settings, changes: list[str]) -> Settings:
    """Settings with `name=value` changes; values are Python's, anything else is text.

    Raises:
        ValueError: for an unknown name, a change without `=`, or a value that the setting does not take.
    """
    known = {field.name: field.type for field in fields(Settings)}
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set {change}: expected NAME=VALUE with a name of {', '.join(known)}")
        try:
            values[name] = text if known[name] is str else ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"--set {change}: expected a value of type {known[name].__name__}") from error
    return replace(settings, **values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m diva_lab.train", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--shards", required=True, help="webdataset tars, a folder of pictures, or world")
    parser.add_argument("--projector", help="folder of a finished run of stage 1: only stage 2 is run")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of both stages to change")
    parser.add_argument("--out", type=Path, default=RUNS, help="where the runs' folders are made")
    args = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as `accelerate launch` says
    try:
        two = not args.preset.endswith("-diva") and not args.projector
        for stage in (1, 2) if two else (2,):
            settings = changed(replace(preset(args.preset, stage, processes), images=args.shards), args.set)
            if stage == 1:
                args.projector = str(align(settings, args.out).folder)
                continue
            run = tune(replace(settings, projector=args.projector or settings.projector), args.out)
    except (ValueError, FileNotFoundError, FloatingPointError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(run.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
