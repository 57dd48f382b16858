"""Pseudo-labels: the denoiser chooses every detail, and both folders tell it by the same random numbers."""

import csv

import pandas as pd

from diva_lab.captions import TABLE
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune
from diva_lab.world import ATTRIBUTES, DETAILS, World, draw_scenes
from tools.pseudo_labels import main, write_folder


def test_the_denoiser_says_what_it_sees_and_both_folders_tell_the_same_details(tmp_path):
    main(["--images", "12", "--out", str(tmp_path), "--results", str(tmp_path)])
    table = pd.read_csv(tmp_path / "pseudo_labels.csv").set_index("detail")
    assert list(table.index) == list(ATTRIBUTES) and table["chance"]["presence"] == 0.5
    details = table.loc[list(DETAILS)]
    assert details["right"].mean() > 0.6 > 0.35 > details["chance"].mean()
    told = {}
    for name in ("denoiser", "world"):
        rows = list(csv.DictReader((tmp_path / name / TABLE).open(encoding="utf-8")))
        assert [row["image"] for row in rows] == [path.name for path in sorted((tmp_path / name).glob("*.png"))]
        told[name] = [row["caption"].split() for row in rows]
    assert [len(words) for words in told["denoiser"]] == [len(words) for words in told["world"]]
    assert told["denoiser"] != told["world"]


def test_clips_own_loss_reads_such_a_folder(tmp_path, small_settings):
    scenes = draw_scenes(4, 0)
    write_folder(tmp_path / "denoiser", World().render(scenes), scenes, (0,))
    kept = Settings(
        objective="caption-contrast", images=str(tmp_path / "denoiser"), encoder=small_settings.encoder,
        denoiser=small_settings.denoiser, projector="new", steps=1, batch=2,
    )  # fmt: skip
    assert tune(kept, tmp_path / "runs").done
