"""The referee from end to end: look-alikes of every released format, a kill in the middle, rows from elsewhere."""

import functools
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from image_writers import write_folders
from safetensors.torch import load_file
from small_models import write_transformers_clip

from diva_lab.cli import main
from diva_lab.evaluation import referee as module
from diva_lab.evaluation.referee import (
    CHECKS,
    NUMBERS,
    OPTIONAL,
    OWN,
    find_benchmarks,
    gather_encoders,
    read_results,
    run_referee,
)
from diva_lab.evaluation.results import read_written
from diva_lab.evaluation.table import BENCHMARKS, evaluate
from diva_lab.evaluation.verdicts import balance_table, claims, differences
from diva_lab.models.encoders import ENCODERS, load_encoder
from diva_lab.paths import DATA
from diva_lab.training.export import save_encoder
from diva_lab.training.stages import tune
from diva_lab.workbook.referee_page import write_referee_page
from diva_lab.world import World, write_pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """MMVP-VLM's layout, and a set with both splits."""
    root = tmp_path_factory.mktemp("root")
    write_pairs(root / "MMVP_VLM", World(), 2, seed=3)
    for split in ("train", "test"):
        write_folders(root / "animals", ("cat", "dog", "owl"), 7, split)
    return root


@pytest.fixture(scope="module")
def released(tmp_path_factory, small_clip):
    """Weights as DIVA's trainer saves them (a .pth behind its prefix) and as GenHancer's (a transformers folder)."""
    folder = tmp_path_factory.mktemp("released")
    state, random = load_file(small_clip / "open_clip_model.safetensors"), torch.Generator().manual_seed(5)
    moved = {name: value + 0.05 * torch.randn(value.shape, generator=random) for name, value in state.items()}
    trainer = {f"class_model.model.{name}": value for name, value in moved.items() if name.startswith("visual.")}
    torch.save(trainer | {"unet.conv.weight": torch.ones(2)}, folder / "OpenAI-ViT-L-14-224.pth")
    write_transformers_clip(folder / "openai-l14-genhancer", "clip", "quick_gelu", seed=7)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_settings):
    return tune(small_settings, tmp_path_factory.mktemp("runs")).folder


@pytest.fixture
def original(monkeypatch, small_clip):
    monkeypatch.setitem(ENCODERS, "openai-l14", (f"local-dir:{small_clip}", None))
    return "openai-l14"


@pytest.fixture
def calls(monkeypatch):
    """How often each benchmark measured each encoder: (benchmark, set, weights) -> number."""
    counted = Counter()

    def counting(name, function):
        @functools.wraps(function)
        def count(task):
            counted[name, task.folder.name, task.store.fingerprint] += 1
            yield from function(task)

        return count

    for name, function in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, counting(name, function))
    return counted


def test_every_released_format_and_a_run_are_scored_alike_and_the_page_says_so(
    original, root, released, run, tmp_path, capsys
):
    words = ["referee", original, "--root", str(root), "--out", str(tmp_path), "--released", str(released)]
    assert main([*words, "--also", str(run), "--benchmarks", "mmvp-vlm,zero-shot,knn"]) == 0
    printed = capsys.readouterr().out
    results = read_results(tmp_path / "results.csv")
    own = results[results["source"] == OWN]
    assert set(own["method"]) == {"none", "diva", "genhancer", run.name}
    assert all(set(rows["benchmark"]) == {"mmvp-vlm", "zero-shot", "knn"} for _, rows in own.groupby("method"))
    assert own["weights"].nunique() == 4 and own["commit"].all() and (own["command"].str.contains("--also")).all()
    for one in ("dcr", "un2clip"):
        assert re.search(rf"^openai-l14-{one}: not on this machine; see ", printed, re.MULTILINE)
    assert "DIVA on mmvp-vlm, MMVP-VLM (pairs). Published: +6.6 points, from 19.3 to 25.9 %. Measured: " in printed
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "below the original with each of 4 seeds (baaivision/DIVA issue 11)" in page
    assert "openai-l14-un2clip: repository, file, format, licence" in page and "<script" not in page
    scored = evaluate([original, str(run)], ["mmvp-vlm"], root, cache=None)
    pairs = scored.query("metric == 'pairs' and category == 'all'")["value"].to_numpy()
    mine = own.query("benchmark == 'mmvp-vlm' and metric == 'pairs'").set_index("method")["percent"]
    np.testing.assert_allclose(mine[["none", run.name]], 100 * pairs, atol=1e-3)


def test_after_a_kill_no_finished_cell_is_measured_again(original, root, released, tmp_path, calls, monkeypatch):
    names, out = ["mmvp-vlm", "zero-shot", "knn:animals"], tmp_path / "out"
    whole = run_referee(original, root, tmp_path / "whole", (), released, names, cache=tmp_path / "cache").results
    once = Counter(calls)
    calls.clear()
    inner, left = BENCHMARKS["zero-shot"], [2]  # the third encoder is killed between two cells

    @functools.wraps(inner)
    def kill(task):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        yield from inner(task)

    with monkeypatch.context() as patch:
        patch.setitem(BENCHMARKS, "zero-shot", kill)
        with pytest.raises(KeyboardInterrupt):
            run_referee(original, root, out, (), released, names, cache=tmp_path / "cache")
    assert 0 < len(calls) < len(once) and calls.keys() < once.keys()
    again = run_referee(original, root, out, (), released, names, cache=tmp_path / "cache").results
    assert calls == once and set(once.values()) == {1}, "each cell once over both calls"
    columns = [name for name in CHECKS if name != "command"]
    pd.testing.assert_frame_equal(again[columns], whole[columns])


def test_an_encoder_that_comes_later_is_compared_without_measuring_the_original_again(
    original, root, run, tmp_path, calls
):
    run_referee(original, root, tmp_path, benchmarks=["mmvp-vlm"], cache=None)
    first = Counter(calls)
    found = run_referee(original, root, tmp_path, [run], benchmarks=["mmvp-vlm"], cache=None)
    assert len(calls - first) == 1
    fresh = evaluate([original, str(run)], ["mmvp-vlm"], root, cache=None).query("category.str.startswith('against')")
    (row,) = found.results.query("method == @run.name and metric == 'pairs'").to_dict("records")
    values = fresh.set_index("metric")["value"]
    assert (row["gained"] / row["n"], row["lost"] / row["n"], row["p"]) == pytest.approx(
        tuple(values[f"pairs, {name}"] for name in ("gained", "lost", "p")), abs=1e-6
    )


def test_other_weights_under_the_same_name_are_measured_again(original, root, small_clip, tmp_path, calls, monkeypatch):
    run_referee(original, root, tmp_path, benchmarks=["mmvp-vlm"], cache=None)
    other = load_encoder(write_transformers_clip(tmp_path / "other", "clip", "quick_gelu"))
    monkeypatch.setitem(ENCODERS, original, (f"local-dir:{save_encoder(other, tmp_path / 'copy')['open_clip']}", None))
    run_referee(original, root, tmp_path, benchmarks=["mmvp-vlm"], cache=None)
    assert len(calls) == 2
    rows = read_written(tmp_path / "evaluate.csv")
    assert rows["weights"].nunique() == 1, "the new rows take the place of the old ones"


def test_what_cannot_be_measured_is_listed_and_the_rest_stands(original, root, tmp_path, capsys):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "openai-l14-diva.pth").write_bytes(b"no weights")
    words = ["referee", original, "--root", str(root), "--out", str(tmp_path / "out")]
    assert main([*words, "--released", str(tmp_path / "weights")]) == 2
    assert "openai-l14-diva.pth" in capsys.readouterr().err
    own = read_results(tmp_path / "out" / "results.csv").query("source == @OWN")
    assert set(own["method"]) == {"none"} and set(own["benchmark"]) == set(find_benchmarks(root))
    assert "What could not be measured" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["no-such-encoder"], "unknown encoder 'no-such-encoder'"),
        (["tiny", "--released", "nowhere"], "--released nowhere: no such folder; expected a folder of published"),
        (["tiny", "--also", "tiny"], "--also tiny: this encoder is compared already; expected each once"),
        (["tiny", "--root", "empty"], "--root empty: no data of any benchmark; expected folders"),
        (["tiny", "--root", "nowhere"], "--root nowhere: no such folder"),
        (["tiny", "--benchmarks", "mmvp"], "unknown benchmark 'mmvp'; did you mean 'mmvp-vlm'? expected one of"),
    ],
)
def test_a_wrong_argument_ends_in_one_line(words, expected, root, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["referee", *words, *([] if "--root" in words else ["--root", str(root)]), "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "out" / "evaluate.csv").exists()


def test_a_table_of_another_original_is_not_mixed_with(original, root, tmp_path):
    run_referee("tiny", root, tmp_path, benchmarks=["zero-shot"], cache=None)
    with pytest.raises(ValueError, match=r"results.csv: measured for tiny; expected openai-l14: choose another folder"):
        run_referee(original, root, tmp_path, benchmarks=["zero-shot"], cache=None)


def test_a_runs_original_may_be_any_encoder_and_p_stands_against_d(root, small_clip, run, tmp_path):
    also, names = [run, f"{run}:0.5"], ["mmvp-vlm", "zero-shot", "knn"]
    found = run_referee(str(small_clip), root, tmp_path, also, None, names, cache=None)
    assert list(found.encoders) == ["none", run.name, f"{run.name}:0.5"] and found.missing == {}
    balance = balance_table(found.results, str(small_clip))
    assert set(balance["objective"]) == set(found.encoders) - {"none"} and balance[["P", "D"]].notna().all(axis=None)
    assert differences(found.results, str(small_clip))["holm"].notna().sum() == 2 * len(names)
    assert claims(found.results, str(small_clip)).empty
    write_referee_page(tmp_path / "page.html", found)
    assert "No claim on" in (tmp_path / "page.html").read_text()


def test_only_benchmarks_with_data_under_the_root_are_found(root, tmp_path):
    assert find_benchmarks(root) == ["mmvp-vlm", "zero-shot", "clustering", "probe", "knn"]
    write_pairs(tmp_path / "pairs", World(), 1, seed=0)
    assert find_benchmarks(tmp_path) == ["mmvp-vlm"] == find_benchmarks(tmp_path / "pairs")
    for name, splits in {"both": ("train", "test"), "one": ("test",)}.items():
        for split in splits:
            write_folders(tmp_path / name, ("disc", "star"), 2, split)
    assert find_benchmarks(tmp_path) == ["mmvp-vlm", "zero-shot", "clustering", "probe:both", "knn:both"]


def test_encoders_of_one_folder_name_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "same", tmp_path / "b" / "same"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert list(gather_encoders("tiny", folders)[0]) == ["none", "same", str(folders[1])]


# --- rows from elsewhere ------------------------------------------------------------------------------------------

ROW = dict.fromkeys(CHECKS, "") | {
    "benchmark": "mmvp-vlm", "set": "MMVP-VLM", "metric": "pairs", "category": "all", "backbone": "openai-l14",
    "method": "diva", "percent": "21.5", "n": "135", "seed": "3", "source": "somebody", "commit": "0123456",
}  # fmt: skip


def write_rows(path, *rows):
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_the_replications_are_rows_of_the_schema_and_come_first(original, root, tmp_path):
    known = read_results(DATA / "published" / "replications.csv")
    assert list(known.columns) == list(CHECKS)
    found = run_referee(original, root, tmp_path, benchmarks=["zero-shot"], cache=None).results
    pd.testing.assert_frame_equal(found.iloc[: len(known)], known)
    assert (found["source"].iloc[len(known) :] == OWN).all()


def test_a_row_that_somebody_adds_stays_and_is_shown_with_its_claim(original, root, tmp_path):
    found = run_referee(original, root, tmp_path, benchmarks=["zero-shot"], cache=None)
    table = pd.read_csv(tmp_path / "results.csv", dtype=str, keep_default_na=False)
    write_rows(tmp_path / "results.csv", *table.to_dict("records"), ROW)
    found = run_referee(original, root, tmp_path, benchmarks=["zero-shot"], cache=None)
    (row,) = found.results.query("source == 'somebody'").to_dict("records")
    assert (row["percent"], row["seed"], row["commit"]) == (21.5, 3, "0123456")
    (claim,) = claims(found.results, original).query("method == 'diva' and benchmark == 'mmvp-vlm'").to_dict("records")
    assert "21.5 % (somebody)" in claim["elsewhere"] and claim["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"benchmark": "mmvp"}, r"column benchmark: 'mmvp'; expected one of mmvp-vlm, "),
        ({"percent": "lots"}, "column percent: 'lots'; expected a number from -100 to 100, or nothing"),
        ({"percent": "nan"}, "column percent: 'nan'; expected a number from -100 to 100, or nothing"),
        ({"percent": "101"}, "column percent: '101'; expected a number from -100 to 100"),
        ({"percent": ""}, "column percent: ''; expected a number, or what was found in words under finding"),
        ({"low": "20"}, "column low: '20'; expected both ends of an interval"),
        ({"low": "20", "high": "10"}, r"column low: '20'; expected both ends of an interval, low and high \('10'\)"),
        ({"difference_low": "2"}, "column difference_low: '2'; expected both ends of an interval, difference_low and "),
        ({"n": "13.5"}, "column n: '13.5'; expected a whole number of at least 1, or nothing"),
        ({"n": "0"}, "column n: '0'; expected a whole number"),
        ({"gained": "100", "lost": "36"}, r"column n: '135'; expected at least gained \+ lost, 136"),
        ({"p": "1.5"}, "column p: '1.5'; expected a number from 0 to 1"),
        ({"seed": "-1"}, "column seed: '-1'; expected a whole number of at least 0"),
        ({"source": " "}, "column source: ''; expected a word or more"),
        ({"method": ""}, "column method: ''; expected a word or more"),
    ],
)
def test_a_wrong_row_is_named_with_its_file_row_column_and_what_was_expected(change, expected, tmp_path):
    path = write_rows(tmp_path / "results.csv", ROW, ROW | change)
    with pytest.raises(ValueError, match=f"^{path}, row 2, {expected}"):
        read_results(path)


def test_all_wrong_rows_are_listed_at_once_before_anything_is_measured(original, root, tmp_path, calls):
    write_rows(tmp_path / "results.csv", ROW | {"p": "x"}, ROW, ROW | {"set": ""})
    with pytest.raises(ValueError, match=r"^2 rows are wrong:\n- .*row 1, column p.*\n- .*row 3, column set"):
        run_referee(original, root, tmp_path)
    assert not calls


def test_a_table_of_other_columns_is_refused(original, root, tmp_path):
    write_rows(tmp_path / "results.csv", {"benchmark": "mmvp-vlm", "percent": "3"})
    with pytest.raises(ValueError, match=r"results.csv: columns benchmark, percent; expected"):
        run_referee(original, root, tmp_path)
    path = write_rows(tmp_path / "more.csv", ROW | {"mood": "good"})
    with pytest.raises(ValueError, match=r"more.csv: column 'mood'; expected benchmark, set"):
        read_results(path)


def test_a_table_from_before_the_paired_differences_is_read_and_gets_their_columns(tmp_path):
    older = {name: value for name, value in ROW.items() if name not in OPTIONAL}
    path = write_rows(tmp_path / "results.csv", older, older | {"seed": "4"})
    rows = read_results(path)
    assert list(rows.columns) == list(CHECKS) and rows[list(OPTIONAL)].isna().all(axis=None)
    module._open_table(path, "openai-l14")
    table = module.write_results(path, rows[:1].assign(seed=5.0, difference_low=-1.5, difference_high=2.5))
    pd.testing.assert_frame_equal(table.iloc[:2], rows)
    assert table.iloc[2][[*OPTIONAL, "seed"]].tolist() == [-1.5, 2.5, 5]


def test_a_number_survives_writing_and_reading(tmp_path):
    rows = read_results(write_rows(tmp_path / "a.csv", ROW, ROW | {"seed": "4", "percent": "", "finding": "none"}))
    pd.testing.assert_frame_equal(module.write_results(tmp_path / "b.csv", rows), rows)
    assert set(NUMBERS) <= set(rows.select_dtypes("float"))
