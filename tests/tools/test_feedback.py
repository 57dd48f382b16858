"""The study of alignments: what is run once, how a rate is chosen, and what its tables hold."""

import re
from dataclasses import replace

import pandas as pd
import pytest

from diva_lab.paths import DATA, ROOT
from diva_lab.workbook.findings import tabulate_matched, tabulate_mixes
from tools import feedback
from tools.feedback import (
    ALIGNMENTS,
    CAPTIONED,
    OBJECTIVES,
    RATE_SEED,
    RIVALS,
    Plan,
    Row,
    all_rows,
    choose_trial,
    read_rows,
)  # fmt: skip


@pytest.fixture
def plan(small_settings, settings_of, tmp_path, monkeypatch):
    """Two steps of small models, and a report that counts its calls."""
    calls = []

    def report(encoder, world, split):
        calls.append(split)
        return {"pairs/mean": 0.2, "probe/mean": 0.5, "zeroshot": 0.9, "nmi": 0.8}

    models = {"encoder": small_settings.encoder, "denoiser": small_settings.denoiser, "precision": "no", "batch": 2}
    monkeypatch.setattr(feedback, "STAGE_1", feedback.STAGE_1 | models)
    small = {name: OBJECTIVES[name] | models | SMALL for name in OBJECTIVES}
    small["un2clip"]["denoiser"] = settings_of("un2clip").denoiser
    small["kuea"]["teacher"] = settings_of("kuea").teacher
    monkeypatch.setattr(feedback, "OBJECTIVES", small)
    monkeypatch.setattr("diva_lab.training.batches.GAP_IMAGES", 64)
    made = Plan(
        tmp_path / "runs", tmp_path / "results", align_steps=2, evaluations=2, seeds=(0, 1), align_seeds=(10_000,),
        rates=(1e-4, 2e-4, 4e-4), wider=0, mixes=(0.5,), pushes=("norm",), report=report,
        shift=lambda *of: {"shift/share": 0.5}, align_report=lambda *of, world: {"recovered": 0.1},
    )  # fmt: skip
    vars(made)["calls"] = calls
    return made


def align_all(plan: Plan) -> None:
    feedback.take_turns(feedback.align_tasks(plan, ["anchored"]))


def run_rows(plan: Plan, *rows: Row) -> None:
    feedback.take_turns(feedback.row_tasks(plan, rows))


ROW = Row("diva", "anchored")
SMALL = {"steps": 2, "lora_rank": 2}


def test_a_predicted_gain_is_the_mean_over_the_seeds_of_a_projector_that_the_instrument_measured():
    instrument = pd.DataFrame(
        [(projector, measure, "all", "Texts", 0.75, 0.5, 1.0)
         for projector in ("anchored-10000", "un2clip") for measure in ("known", "readable: any")],
        columns=["projector", "measure", "bin", "pattern", "value", "low", "high"],
    )  # fmt: skip
    runs = [("diva", "anchored", 10_000.0, "a", 0.5), ("diva", "anchored", 10_000.0, "b", 0.4)]
    runs += [
        ("diva", "anchored", 10_001.0, "c", 0.9),
        ("un2clip", "none", None, "d", 0.1),
        ("dcr", "none", None, "e", 1),
    ]
    curves = pd.DataFrame(
        [(*run[:4], step, step * run[4] + 0.2 * (1 - step)) for run in runs for step in (1, 0)],
        columns=["objective", "alignment", "align_seed", "run", "step", "pairs/text"],
    )  # fmt: skip
    curves = curves.assign(**{f"pairs/{name}": 0.0 for name in set(feedback.PATTERNS) - {"text"}})
    table = feedback.predicted_gains(instrument, curves).set_index("projector")
    assert list(table.index) == ["anchored-10000", "un2clip"] and list(table["pattern"]) == ["text", "text"]
    assert list(table["gain"]) == pytest.approx([25, -10]) and list(table["seeds"]) == [2, 1]
    assert list(table["alignment"]) == ["anchored", "un2clip"] and set(table["readable"]) == {0.75}


def test_rows_are_compared_at_the_same_pair_score_and_the_same_loss_and_only_where_all_their_runs_come():
    place = {"objective": "diva", "alignment": "anchored"}
    ends = {0: (0.40, 0.90), 1: (0.30, 0.94), 2: (0.50, 0.94)}  # seed -> pair score and zero-shot at mix 1
    mixes = pd.DataFrame(
        {"mix": mix, "pairs/mean": 0.2 + mix * (pairs - 0.2), "zeroshot": 0.96 - mix * (0.96 - zeroshot),
         "probe/mean": mix, "nmi": 0.8, "seed": seed, "align_seed": 10_000 + seed % 2, **place}
        for seed, (pairs, zeroshot) in ends.items() for mix in (1, 0.5, 0)
    )  # fmt: skip
    table = feedback.matched_scores(mixes).set_index(["at", "level", "measure"])
    at_25 = table.loc[("pairs/mean", 0.25, "zeroshot")]  # seeds 0 and 2 share a projector
    assert at_25["value"] == pytest.approx(((0.945 + 0.96 - 0.02 / 6) / 2 + 0.95) / 2) and at_25["seeds"] == 3
    assert table.loc[("zeroshot", 0.02, "pairs/mean")]["value"] == pytest.approx(((0.2 + 0.2 / 3 + 0.5) / 2 + 0.3) / 2)
    assert table.index.get_level_values("level").isin([0.2, 0.25, 0.3, 0.005, 0.01, 0.02]).all()
    assert table.loc[("pairs/mean", 0.3, "nmi")][["value", "low", "high"]].tolist() == pytest.approx([0.8] * 3)


def test_no_image_of_stage_1_is_shown_in_stage_2():
    made = Plan()
    assert not set(made.align_seeds) & {*made.seeds, RATE_SEED} and min(made.align_seeds) >= 10_000
    assert {made.stage_2(row, 1e-4, seed).seed for row in all_rows() for seed in made.seeds} == set(made.seeds)


def test_every_row_sees_as_many_images_and_is_evaluated_as_often():
    made = Plan()
    for row in all_rows():
        settings = made.stage_2(row, 1e-4, 0)
        images = 4_000 if row.objective.startswith("dcr") else 16_000
        assert settings.steps * settings.batch == images and settings.steps // settings.evaluate_every == 8


def test_the_controls_differ_from_the_anchored_stage_1_in_the_anchor_alone():
    made = Plan()
    ours = made.stage_1("anchored", 10_000)
    for name in ALIGNMENTS:
        assert replace(made.stage_1(name, 10_000), anchor="captions", mentions=1.0) == ours


def test_a_finished_run_is_on_record_and_is_not_run_again(plan, monkeypatch):
    align_all(plan)
    run_rows(plan, ROW)
    # the original once; of each seed two evaluations, the second of which is mix 1, one mix, one push
    assert plan.calls.count("measure") == 1 + 2 * 2 + 2 * (1 + 1)
    records = sorted((plan.results / "records").glob("*.json"))
    assert len(records) == 1 + 3 + 2  # stage 1, the rates, the seeds
    before = [path.read_bytes() for path in records]
    monkeypatch.setattr(feedback, "tune", None)
    monkeypatch.setattr(feedback, "align", None)
    again = replace(plan, runs=plan.runs / "gone")
    align_all(again)
    run_rows(again, ROW)
    assert [path.read_bytes() for path in records] == before


def test_processes_share_the_runs_and_none_takes_what_another_has_in_hand(plan, monkeypatch):
    projector = plan.projector("anchored", 10_000)
    with feedback.held(plan, f"align-{projector.stem}"):  # as another process would
        assert len(feedback.do_all(feedback.align_tasks(plan, ["anchored"]))) == 1
        assert len(feedback.do_all(feedback.row_tasks(plan, [ROW]))) == 2  # they wait for the projector
    with pytest.raises(FileNotFoundError, match=projector.name):  # nobody makes it
        run_rows(plan, ROW)
    align_all(plan)
    trial = feedback.find_run(plan.trial(ROW, 2e-4), plan.runs).id
    with feedback.held(plan, trial):
        assert len(feedback.do_all(feedback.row_tasks(plan, [ROW]))) == 2
        assert len(list((plan.results / "records").glob("*.json"))) == 1 + 2  # the other trials were not waited for
    paused = []
    monkeypatch.setattr(feedback.time, "sleep", paused.append)
    settings = plan.stage_2(ROW, 1e-4, 0)
    with feedback.held(plan, feedback.find_run(settings, plan.runs).id):
        first, second = feedback.row_tasks(plan, [ROW])
        assert feedback.do_all([first, second]) == [first]
    feedback.take_turns([first, second])
    assert plan.record(settings) and paused == []


def test_tables_hold_every_evaluation_and_name_what_is_missing(plan):
    align_all(plan)
    run_rows(replace(plan, seeds=(0,)), ROW)
    feedback.write_tables(plan, plan.rows())
    table = pd.read_csv(plan.results / "feedback.csv")
    assert table["step"].tolist() == [0, 1, 2] and table["images"].tolist() == [0, 2, 4]
    assert set(table["objective"]) == {"diva"} and set(table["align_seed"]) == {10_000} and table["git"].notna().all()
    rates = pd.read_csv(plan.results / "feedback_rates.csv").query("objective == 'diva'")
    assert rates["lr"].tolist() == [1e-4, 2e-4, 4e-4] and rates["chosen"].sum() == 1
    missing = pd.read_csv(plan.results / "feedback_missing.csv")
    planned = sum(len(plan.seeds_of(row)) for row in all_rows())
    assert len(missing) == planned - 2  # `diva, mixed` has chosen the same rate, and so the same run
    assert missing[(missing["objective"] == "diva") & (missing["alignment"] == "anchored")]["seed"].tolist() == [1]
    mixes, pushes = (pd.read_csv(plan.results / f"feedback_{name}.csv") for name in ("mixes", "pushes"))
    mixes, pushes = (table[table["objective"] == "diva"] for table in (mixes, pushes))
    assert mixes["mix"].tolist() == [0, 0.5, 1] and mixes["chosen"].tolist() == [False, False, True]
    assert pushes["match"].tolist() == ["norm"]


def test_a_study_without_gaps_says_so_in_a_table_of_no_line(plan):
    row = Row("caption-contrast", "none")
    run_rows(plan, row)
    feedback.write_tables(plan, [row])
    missing = pd.read_csv(plan.results / "feedback_missing.csv")
    assert missing.columns.tolist() == ["objective", "alignment", "seed"] and missing.empty


def test_the_naive_sum_records_the_cosine_of_its_terms_in_each_step_and_that_of_different_batches(plan):
    align_all(plan)
    row = Row("naive, equal norms", "anchored")
    run_rows(replace(plan, seeds=(0,)), row)
    feedback.write_tables(plan, [row])
    missing = pd.read_csv(plan.results / "feedback_missing.csv")
    assert missing["seed"].tolist() == [1] and set(missing["objective"]) == {row.objective}
    steps, null = (pd.read_csv(plan.results / f"feedback_{name}.csv") for name in ("conflict", "null"))
    assert steps["step"].tolist() == [0, 1] and steps["cos"].between(-1, 1).all() and (steps["norm_rec"] > 0).all()
    assert set(null["measure"]) == set(feedback.NULL) and sorted(set(null["step"])) == [0, 1, 2]


def test_a_soup_is_of_the_runs_that_are_here_and_a_row_without_them_keeps_its_lines(plan, monkeypatch):
    monkeypatch.setattr(feedback, "SOUP_MIXES", (0.0, 0.5))
    row = Row("caption-contrast, mixed", "none")
    run_rows(plan, row)
    plan.results.mkdir(exist_ok=True)
    names = {"objective": ["diva, mixed", "diva, mixed", row.objective], "alignment": ["anchored", "unpaired", "none"]}
    kept = pd.DataFrame(names | {"mix": [0.3, 0.4, 0.7], "split": "measure"})
    kept.to_csv(plan.results / "feedback_soup.csv", index=False)
    align_all(plan)
    run_rows(replace(plan, seeds=(0,)), Row("diva, mixed", "anchored"))  # one run makes no soup
    feedback.measure_soups(plan, plan.rows())
    table = pd.read_csv(plan.results / "feedback_soup.csv")
    mixes = table.groupby(["objective", "alignment"])["mix"].agg(list).to_dict()
    assert [*mixes.values()] == [[0, 0.5] * 2, [0.3], [0.4]]
    ours = table[table["objective"] == row.objective]
    assert set(ours["split"]) == {"choose", "measure"} and ours["runs"].str.count("tune-").eq(2).all()
    assert set(feedback.read_soups(plan)["objective"]) == {"soup of diva, mixed", f"soup of {row.objective}"}


def test_the_random_pushes_go_as_far_as_the_chosen_mixes_of_runs_and_soup_and_are_measured_once(plan, monkeypatch):
    monkeypatch.setattr(feedback, "SOUP_MIXES", (0.0, 0.5))
    row = Row("caption-contrast, mixed", "none")
    run_rows(plan, row)
    feedback.measure_soups(plan, plan.rows())
    for _ in range(2):
        feedback.push_mixes(plan, plan.rows())
    table = pd.read_csv(plan.results / "feedback_pushes_mixed.csv")
    assert table["objective"].tolist() == [row.objective] * 2 + [f"soup of {row.objective}"]
    mixes = pd.read_csv(plan.results / "feedback_soup.csv").query("chosen")["mix"].unique()
    assert table["mix"].tolist() == [choose_trial(plan, row)[0]["mix"]] * 2 + [*mixes]
    assert set(table["match"]) == {"norm"} and table["run"].is_unique and table["zeroshot"].notna().all()


def test_the_soup_on_other_models_takes_the_mix_of_the_shipped_ones(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "SOUP_MIXES", (0.0, 0.5, 1.0))
    row = Row("caption-contrast, mixed", "none")
    run_rows(plan, row)
    other = replace(plan, results=tmp_path / "other", models=tmp_path / "models")
    vars(other).update(chooser=plan, world=plan.world)
    kept = pd.DataFrame({"objective": row.objective, "alignment": "none", "mix": [0.5, 1], "chosen": [False, True]})
    kept.to_csv(plan.results / "feedback_soup.csv", index=False)
    other.results.mkdir()
    shipped = feedback.name_models(None)  # whose runs stand for those of the other models
    monkeypatch.setattr(feedback, "name_models", lambda models: shipped)
    feedback.measure_soups(other, other.rows())
    table = pd.read_csv(other.results / "feedback_soup.csv")
    assert table["split"].tolist() == ["measure"] * 3 and table["chosen"].tolist() == [False, False, True]


@pytest.mark.parametrize("objective", ["caption-contrast", *RIVALS])
def test_a_rival_without_projector_is_run_once_without_alignment(plan, objective):
    row = Row(objective, "none")
    run_rows(replace(plan, seeds=(0,)), row)
    feedback.write_tables(plan, plan.rows())
    assert pd.read_csv(plan.results / "feedback.csv")["align_seed"].isna().all()
    assert [r for r in all_rows() if r.objective == objective] == [row]


def test_a_row_of_the_released_code_takes_its_base_rows_rate_and_has_a_table_of_its_own(plan):
    align_all(plan)
    row = Row("diva, VAE input", "anchored")
    run_rows(replace(plan, seeds=(0,)), ROW, row)
    feedback.write_tables(plan, plan.rows())
    table = pd.read_csv(plan.results / "feedback_released.csv")
    assert table["objective"].tolist() == [row.objective] and table["step"].tolist() == [2]
    base = pd.read_csv(plan.results / "feedback.csv")
    assert set(base["objective"]) == {"diva"} and base["lr"].iloc[-1] == table["lr"].iloc[0]
    assert len(list((plan.results / "records").glob("*.json"))) == 1 + 3 + 2  # stage 1, the rates, one of each row
    made = plan.record(plan.stage_2(row, float(table["lr"].iloc[0]), 0))
    assert made["settings"]["vae_input"] == "imagenet" and "mixes" not in made and "pushes" not in made


def test_a_row_of_the_released_code_differs_in_what_it_names_alone():
    made = Plan()
    for name, (base, change) in feedback.RELEASED.items():
        one, other = (made.stage_2(Row(objective, "anchored"), 1e-4, 0) for objective in (name, base))
        assert one != other and replace(one, **{key: getattr(other, key) for key in change}) == other


def test_the_table_of_the_method_page_is_that_of_the_record():
    page = (ROOT / "docs" / "method.md").read_text().partition("<!-- released")[2].partition("<!-- /released")[0]
    shown = [[cell.strip() for cell in line.split("|")[2:-1]] for line in page.splitlines() if line.startswith("| ")][
        1:
    ]
    scores = ["pairs/mean", "probe/mean", "zeroshot", "nmi"]
    released = pd.read_csv(DATA / "results" / "feedback_released.csv").set_index("objective")
    curves = pd.read_csv(DATA / "results" / "feedback.csv").query("alignment == 'anchored' and seed == 0")
    bases = dict(iter(curves.groupby("objective")))
    rows, last = [bases["diva"].iloc[0][scores]], ""
    for name, (base, _) in feedback.RELEASED.items():
        if base != last:
            rows.append(bases[base].iloc[-1][scores])
        row, last = released.loc[name], base
        rows.append(["diverged"] * 4 if row["diverged"] else row[scores])
    expected = [[v if isinstance(v, str) else f"{100 * v:.1f}" for v in row] for row in rows]
    assert shown == expected


def test_the_tables_at_the_same_score_of_the_results_page_are_those_of_the_record():
    page = (ROOT / "docs" / "results.md").read_text()
    shown = re.findall(r"<!-- matched (\S+) (\S+?)(?::[^\n]*)? -->\n(.*?)<!-- /matched -->", page, re.DOTALL)
    assert len(shown) == 2
    matched = pd.read_csv(DATA / "results" / "feedback_matched.csv")
    for at, measure, block in shown:
        made, lines = tabulate_matched(matched, at, measure).splitlines(), block.splitlines()
        assert lines[:2] == made[:2] and len(lines) >= 7 and set(lines) <= set(made)


def test_the_main_tables_of_the_results_page_are_those_of_the_records():
    page = (ROOT / "docs" / "results.md").read_text()
    shown = re.findall(r"<!-- mixes(?: (\w+-\w+))?[^\n]* -->\n(.*?)<!-- /mixes -->", page, re.DOTALL)
    assert shown
    for models, block in shown:
        plan = Plan(results=DATA / "results" / models)
        mixes = pd.concat([pd.read_csv(plan.results / "feedback_mixes.csv"), feedback.read_soups(plan)])
        made = tabulate_mixes(mixes, ["pairs/mean", "probe/mean", "zeroshot", "nmi"]).splitlines()
        lines = block.splitlines()
        assert lines[:3] == made[:3] and set(lines) <= set(made)
        of_rows, shown_of_rows = ({line.split("|", 2)[2] for line in of} for of in (made, lines))
        assert shown_of_rows == of_rows  # left out is only a row that chose the runs of another


def test_a_row_with_a_rate_of_its_own_takes_it_without_a_trial(plan):
    row = Row("dcr, velocity", "anchored")
    chosen, trials = feedback.choose_trial(plan, row)
    assert chosen["lr"] == 1e-5 and trials.empty
    assert plan.stage_2(row, float(chosen["lr"]), 0).lr == 1e-5


# --- the rule by which a rate is chosen -------------------------------------------------------------------------


def record(start: float, pairs: float, zeroshot: float, diverged: bool = False) -> dict:
    table = pd.DataFrame({"pairs/mean": [0.2, pairs], "zeroshot": [start, zeroshot], "nmi": [0.9, 0.8]})
    return {"evaluations": table, "diverged": diverged}


@pytest.mark.parametrize(
    "ends, chosen, tried",
    [
        # the highest pair score within five points of the start's zero-shot
        ({1e-4: (0.25, 0.95), 2e-4: (0.30, 0.92), 4e-4: (0.40, 0.80)}, 2e-4, 3),
        # none within: the highest sum
        ({1e-4: (0.25, 0.80), 2e-4: (0.40, 0.79), 4e-4: (0.45, 0.70)}, 2e-4, 3),
        # one at the end of the grid widens it, until another is better or twice
        (
            {1e-4: (0.25, 0.95), 2e-4: (0.30, 0.95), 4e-4: (0.40, 0.95), 8e-4: (0.50, 0.95), 16e-4: (0.45, 0.95)},
            8e-4,
            5,
        ),
        ({1e-4: (0.50, 0.95), 2e-4: (0.3, 0.95), 4e-4: (0.2, 0.95), 5e-5: (0.6, 0.95), 25e-6: (0.7, 0.95)}, 25e-6, 5),
        # a diverged run is no candidate
        ({1e-4: (0.25, 0.95), 2e-4: (0.30, 0.95), 4e-4: None, 8e-4: None}, 2e-4, 3),
    ],
)
def test_the_rate_is_chosen_by_the_rule(monkeypatch, ends, chosen, tried):
    asked = []

    def once(plan, settings, report, **facts):
        asked.append(settings.lr)
        lr = min(ends, key=lambda known: abs(known - settings.lr))
        assert lr == pytest.approx(settings.lr)
        return record(0.97, 0.9, 0.99, True) if ends[lr] is None else record(0.97, *ends[lr])

    monkeypatch.setattr(feedback, "run_once", once)
    best, trials = choose_trial(Plan(rates=(1e-4, 2e-4, 4e-4)), ROW, report=lambda encoder: {})
    assert best["lr"] == pytest.approx(chosen) and len(set(asked)) == tried
    assert len(trials) == sum(end is not None for end in list(ends.values())[:tried])


def test_rate_and_mix_are_chosen_together_where_little_is_lost(monkeypatch):
    ends = {  # (lr, mix) -> pairs, zero-shot, NMI; the start has 97 and 90
        (1e-4, 0.5): (0.30, 0.97, 0.89), (1e-4, 1): (0.40, 0.94, 0.88),
        (2e-4, 0.5): (0.35, 0.96, 0.86), (2e-4, 1): (0.60, 0.96, 0.84),
        (4e-4, 0.5): (0.34, 0.95, 0.85), (4e-4, 1): (0.70, 0.90, 0.80),
    }  # fmt: skip

    def once(plan, settings, report, **facts):
        table = pd.DataFrame([(0.2, 0.97, 0.9), ends[settings.lr, 1]], columns=["pairs/mean", "zeroshot", "nmi"])
        half = pd.DataFrame([(0.5, *ends[settings.lr, 0.5])], columns=["mix", *table])
        return {"evaluations": table, "mixes": half.to_dict("list")}

    monkeypatch.setattr(feedback, "run_once", once)
    plan = Plan(rates=(1e-4, 2e-4, 4e-4), wider=0)
    best, trials = choose_trial(plan, Row("diva, mixed", "anchored"), report=lambda encoder: {})
    assert (best["lr"], best["mix"]) == (2e-4, 0.5) and len(trials) == 6
    assert choose_trial(plan, ROW, report=lambda encoder: {})[0]["lr"] == 2e-4


def test_without_records_nothing_is_chosen_and_nothing_trained(tmp_path):
    assert choose_trial(Plan(tmp_path, tmp_path), ROW)[0] is None and not list(tmp_path.iterdir())


def test_other_models_take_what_was_chosen_on_the_shipped_ones_and_choose_nothing(plan, tmp_path, monkeypatch):
    align_all(plan)
    run_rows(replace(plan, seeds=(0,)), ROW)
    other = replace(plan, results=tmp_path / "other", models=tmp_path / "models")
    vars(other)["chooser"] = plan
    monkeypatch.setattr(feedback, "tune", None)
    assert choose_trial(other, ROW, lambda encoder: {})[0]["lr"] == choose_trial(plan, ROW)[0]["lr"]
    with pytest.raises(FileNotFoundError, match=r"diva/image-only: no rate .* run `python -m tools.feedback rates 'd"):
        choose_trial(other, Row("diva", "image-only"), lambda encoder: {})
    assert [*map(str, other.rows())] == [*feedback.REPEATED] and other.seeds_of(ROW) == other.seeds[:3]
    with pytest.raises(ValueError, match="kuea: only on the shipped models"):
        other.rows(["kuea/none"])
    assert Plan(models=tmp_path).chooser == Plan()


@pytest.mark.parametrize(
    "row, asked",
    [
        ("dcr, bounded/image-only", "dcr, bounded/anchored"), ("diva/unpaired", "diva/anchored"),
        ("diva, mixed/placebo", "diva, mixed/image-only"), ("diva, SGD/anchored", "diva/anchored"),
        ("diva/image-only", "diva/image-only"),
    ],
)  # fmt: skip
def test_a_row_takes_the_rate_of_another(row, asked):
    assert [str(feedback.rate_row(row)) for row in read_rows([row])] == [asked]


def test_a_run_that_diverges_is_recorded_as_far_as_it_came(plan):
    align_all(plan)
    values = iter([0.9, 0.6])
    report = lambda encoder: {"pairs/mean": 0.2, "zeroshot": next(values)}  # noqa: E731
    made = feedback.run_once(plan, plan.stage_2(ROW, 1e-4, 0), report, row=str(ROW), split="measure")
    assert made["diverged"] and made["evaluations"]["zeroshot"].tolist() == [0.9]
    assert feedback.run_once(plan, plan.stage_2(ROW, 1e-4, 0), None)["run"] == made["run"]


def test_rows_are_named_by_objective_alignment_or_both():
    assert list(read_rows(["diva/anchored"])) == [ROW]
    assert {row.alignment for row in read_rows(["diva"])} == set(ALIGNMENTS)
    assert {row.objective for row in read_rows(["/anchored"])} == set(OBJECTIVES) - {*CAPTIONED, *RIVALS}
    assert list(read_rows([""])) == Plan().rows() == all_rows()
    with pytest.raises(ValueError, match=r"'dvia/anchored'; did you mean 'diva/anchored'\? expected one of diva"):
        list(read_rows(["dvia/anchored"]))
