"""A soup: the mean of runs, which is read, mixed and exported as a run."""

from dataclasses import replace

import pytest
import torch
from one_step import pictures

from diva_lab.cli import main
from diva_lab.evaluation.table import open_encoder
from diva_lab.models.encoders import load_encoder
from diva_lab.models.lora import visual_weights
from diva_lab.training.build import tuned_encoder
from diva_lab.training.controls import perturb
from diva_lab.training.soup import soup
from diva_lab.training.stages import tune


@pytest.fixture(scope="module")
def runs(small_settings, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [tune(replace(small_settings, lr=1e-2, steps=2, seed=seed), root) for seed in (0, 1, 2)]


def test_a_soup_is_the_mean_of_its_runs_and_may_be_mixed_with_the_original(runs, small_settings, tmp_path):
    made = soup(runs, tmp_path, lambda encoder: {"zeroshot": 0.5})
    each = [visual_weights(tuned_encoder(run)) for run in runs]
    original = visual_weights(load_encoder(small_settings.encoder))
    half = visual_weights(open_encoder(f"{made.folder}:0.5"))
    for name, weight in visual_weights(tuned_encoder(made)).items():
        mean = torch.stack([own[name] for own in each]).mean(0)
        torch.testing.assert_close(weight, mean)
        torch.testing.assert_close(half[name], (original[name] + mean) / 2)
    assert made.done and made.evaluations()["step"].tolist() == [2]


def test_the_command_makes_it_once_whatever_the_order_and_exports_it(runs, tmp_path, capsys):
    words = [str(run.folder) for run in runs]
    assert main(["soup", *words, "--out", str(tmp_path)]) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    assert main(["soup", words[0], *reversed(words[1:]), "--out", str(tmp_path)]) == 0
    assert "done before" in capsys.readouterr().out and len(list(tmp_path.glob("soup-*"))) == 1
    assert main(["export", f"{folder}:0.5", str(tmp_path / "exported")]) == 0
    assert "tuned by soup" in (tmp_path / "exported" / "README.md").read_text()


def test_what_cannot_be_averaged_is_refused(runs, small_settings, tmp_path, capsys):
    first = str(runs[0].folder)
    pushed = perturb(runs[0], pictures(2), root=tmp_path)
    other = tune(replace(small_settings, encoder="tiny", denoiser="tiny", objective="none", steps=0), tmp_path)
    for words, said in {
        (first,): "expected two or more runs, each once",
        (first, first): "expected two or more runs, each once",
        (first, str(pushed.folder)): "expected the folder of a finished run of tune()",
        (first, str(other.folder)): f"run {other.id} tuned another encoder than {runs[0].id}",
        (first, str(tmp_path / "no")): "settings.json",
    }.items():
        assert main(["soup", *words, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))
