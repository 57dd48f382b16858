"""Which pairs each checkpoint of several seeds gets right: what `analysis.selection` chooses among.

    python -m tools.checkpoints [--seeds 0 1 2 3 4]    -> data/results/checkpoints.csv

DIVA after the image-only alignment of `tools.feedback`, with the rate that it chose there, for 250 steps: a recipe
whose pair score hardly moves, as in the replications of DIVA that are known. Each seed and checkpoint has a row;
`correct` holds a bit for each pair of the split `measure`, in hexadecimal digits.
"""

import argparse
from collections.abc import Sequence

import pandas as pd
import torch

from diva_lab.analysis.selection import pack
from diva_lab.evaluation.pairs import score_pairs
from diva_lab.evaluation.results import versions_and_git
from diva_lab.evaluation.world import world_pairs
from diva_lab.models.encoders import Encoder
from diva_lab.paths import DATA
from diva_lab.training.stages import tune
from tools.feedback import Plan, Row, choose_trial

FILE = DATA / "results" / "checkpoints.csv"
ROW, DOSE, CHECKPOINTS = Row("diva", "image-only"), 0.25, 10


def run_seed(plan: Plan, seed: int, lr: float) -> pd.DataFrame:
    """The rows of one seed; its run is trained if it is not there."""
    folder = world_pairs(plan.world)

    def right_pairs(encoder: Encoder) -> dict[str, str]:
        return {"correct": pack(score_pairs(encoder, folder)["correct"].to_numpy())}

    evaluations = tune(plan.stage_2(ROW, lr, seed), plan.runs, right_pairs).evaluations()
    return evaluations[["step", "correct"]].assign(seed=seed, lr=lr, **versions_and_git())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoints", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    chosen, _ = choose_trial(Plan(), ROW)
    plan = Plan(dose=DOSE, evaluations=CHECKPOINTS, align_seeds=Plan.align_seeds[:1])  # seeds of stage 2 alone
    tables = []
    for seed in args.seeds:
        tables.append(run_seed(plan, seed, float(chosen["lr"])))
        pd.concat(tables).to_csv(FILE, index=False)


if __name__ == "__main__":
    main()
