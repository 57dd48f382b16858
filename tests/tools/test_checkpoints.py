"""The pairs that each checkpoint gets right, as they are kept."""

import numpy as np
import pandas as pd
import pytest

from diva_lab.analysis.selection import pack, read_checkpoints, unpack
from diva_lab.evaluation.pairs import score_pairs
from diva_lab.evaluation.world import world_pairs
from diva_lab.models.encoders import load_encoder
from tools.checkpoints import run_seed
from tools.feedback import Plan


def test_bits_are_read_back_as_they_were_written():
    for n in (1, 8, 2700, 2701):
        correct = np.random.default_rng(n).random(n) < 0.3
        assert np.array_equal(unpack(pack(correct), n), correct)


@pytest.mark.slow
def test_a_seed_has_a_row_for_each_checkpoint_of_which_the_first_is_the_original(tmp_path):
    rows = run_seed(Plan(runs=tmp_path, dose=0.002, evaluations=1), 0, 1e-4)
    assert rows["step"].tolist() == [0, 2]
    pd.concat([rows, rows.assign(seed=1)]).to_csv(tmp_path / "checkpoints.csv", index=False)
    correct, patterns = read_checkpoints(tmp_path / "checkpoints.csv")
    assert correct.shape == (2, 2, len(patterns)) and np.array_equal(correct[0], correct[1])
    original = score_pairs(load_encoder("tiny"), world_pairs())["correct"].to_numpy()
    assert np.array_equal(correct[1, 0], original)
