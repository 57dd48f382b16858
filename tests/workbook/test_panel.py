import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from diva_lab.training import progress
from diva_lab.training.progress import PANELS, Bar, Lines, Progress
from diva_lab.training.stages import tune
from diva_lab.workbook import panel
from diva_lab.workbook.display import make_show
from diva_lab.workbook.panel import POINTS, Panel, curve, show_training


@pytest.fixture
def front_end(monkeypatch) -> list:
    """As in a kernel whose front end somebody looks at; returns what is displayed."""
    shown = []
    monkeypatch.setattr(progress, "has_front_end", lambda: True)
    monkeypatch.setattr(panel, "display", shown.append)
    monkeypatch.setattr(panel, "EVERY", 0.0)
    monkeypatch.setattr(progress, "PANELS", PANELS)
    before = PANELS[:]
    show_training()
    yield shown
    PANELS[:] = before


def test_a_panel_shows_a_run_from_its_first_step_to_its_end(front_end, small_settings, tmp_path, capsys):
    scores = iter([{"pairs/mean": 0.2, "zeroshot": 0.9}, {"pairs/mean": 0.35, "zeroshot": 0.88}])
    run = tune(replace(small_settings, objective="naive", steps=4), tmp_path, lambda encoder: next(scores))
    (html,) = [widget.value for widget in front_end]
    out = capsys.readouterr().out
    assert f"{run.id}: in {run.folder}" in out and "step 4/4" not in out
    for text in (run.id, "finished", "4 of 4", "rec", "con", "cosine of the terms&#x27; gradients", "images a second"):
        assert text in html, text
    assert "35.0 %, +15.0 since its first evaluation" in html and "88.0 %, -2.0" in html
    assert f"{run.metrics()['loss'].iloc[-1]:.4f}" in html and "<polyline" in html


def test_a_stopped_run_says_so_and_the_next_one_goes_on(front_end, small_settings, tmp_path, capsys):
    settings = replace(small_settings, objective="contrastive", steps=4, save_every=1, evaluate_every=2)

    def stop(encoder) -> dict[str, float]:
        if stop.calls:
            raise KeyboardInterrupt
        stop.calls += 1
        return {"pairs/mean": 0.2}

    stop.calls = 0
    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path, stop)
    assert "stopped; run the cell again" in front_end[-1].value and "2 of 4" in front_end[-1].value
    tune(settings, tmp_path)
    assert "finished" in front_end[-1].value and "steps done before, in" in capsys.readouterr().out


def test_where_nobody_watches_lines_are_printed_also_with_the_panel_on(small_settings, tmp_path, capsys):
    before = PANELS[:]
    show_training()
    try:
        run = tune(replace(small_settings, objective="contrastive", steps=2), tmp_path, lambda encoder: {"x": 1.0})
    finally:
        PANELS[:] = before
    assert f"{run.id}: step 2/2" in capsys.readouterr().out


def test_a_front_end_is_one_that_can_be_asked(monkeypatch):
    for allowed in (True, False):
        kernel = SimpleNamespace(_allow_stdin=allowed)
        monkeypatch.setitem(
            sys.modules, "IPython", SimpleNamespace(get_ipython=lambda k=kernel: SimpleNamespace(kernel=k))
        )
        assert progress.has_front_end() == allowed


def test_a_bar_without_a_panel_and_lines_in_other_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "is_live", lambda: True)
    assert isinstance(Progress(2, 0, 1, "run", tmp_path).view, Bar)
    assert isinstance(Progress(2, 0, 1, "run", tmp_path, rank=1).view, Lines)


def test_an_evaluation_is_told_with_the_time_that_the_last_one_took(monkeypatch, tmp_path, capsys):
    told = Progress(2, 0, 1, "run", tmp_path)
    with told.evaluate(0) as rows:
        rows.append({"x": 1.0})
    told.seconds = 12.4
    with told.evaluate(1):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "run: evaluating after 0 steps ...", "run: evaluating after 1 steps (about 12 s) ..."
    ]  # fmt: skip


def test_a_bars_rate_counts_training_alone(tmp_path):
    bar = Bar(10, 0, 1, "run")
    begun = bar.bar.start_t
    bar.wait("evaluating ...")
    bar.waits -= 100  # seconds ago
    bar.report(0, {})
    bar.close()
    assert bar.bar.start_t == pytest.approx(begun + 100, abs=1)


def test_a_curve_has_few_points_and_its_ends_are_in_words():
    losses = [float(k) for k in range(1000, 0, -1)]
    drawn = curve(losses)
    points = re.search(r"points='([^']*)'", drawn)[1].split()
    assert len(points) <= POINTS and points[0].endswith(",0.0") and points[-1].endswith(",60.0")
    assert "aria-label='loss, from" in drawn and curve([1.0]) == ""
    assert "nan" not in curve([1.0, 1.0])


def test_a_notebook_that_shows_figures_shows_its_training_too():
    before = PANELS[:]
    try:
        make_show(False)
        assert [Panel] == PANELS
    finally:
        PANELS[:] = before
