"""Many bad and odd inputs at every entry point: each ends in the right result, or in one error of one line.

A case is an entry of a list below: the door through which it comes, what is given, and words of the error that is
expected, or "" where the right result is. A door is a function that takes what is given, in an empty working folder; it
asserts that a result is right. No case may run code that is planted in it, take 30 seconds of a processor, or 4 GB.

To add cases, add entries to a list; to add an entry point, add a function to `DOORS` and a list to `CASES`. What is
given may be a function of the working folder, which makes a file there and returns what the door takes; such cases are
in `corpus_files`. Cases of `SLOW` are left out unless pytest is called with `-m slow`.
"""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import jaxtyping
import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from corpus_files import FILE_DOORS, FILES, LONG, QUICK, Case, report_exit, run_in_process
from papermill.iorw import NoDatesSafeLoader
from papermill.translators import PythonTranslator

from diva_lab import figures
from diva_lab.cli import EXPECTED
from diva_lab.evaluation.results import update_csv
from diva_lab.llava.tuning import LlavaSettings
from diva_lab.training.presets import parse_changes, replace_settings
from diva_lab.training.settings import CHOICES, NAMES, RANGES, Settings
from diva_lab.workbook.parameters import check_parameters
from diva_lab.workbook.report import write_report

matplotlib.use("agg")
SECONDS, KILOBYTES = 30, 4 * 2**20
WAIT = 300  # seconds for a case at the clock, on a machine that does other work too
PLANTED = "__import__('pathlib').Path('pwned').touch()"  # leaves a file where it is run
NAN, INF = float("nan"), float("inf")


# ruff: noqa: E501  (tables of cases)
# --- settings ---------------------------------------------------------------------------------------------------

DEFAULTS = {field.name: field.default for field in fields(Settings)}
KINDS = {field.name: field.type for field in fields(Settings)}
LANGUAGE = {field.name: field.type for field in fields(LlavaSettings)}
BEYOND = {name: [least - 1, most * 2 + 1] for name, (least, most) in RANGES.items()}
NO_NUMBER = [NAN, INF, -INF, "nan", "-inf", "ten", "", None, True, [1], {}, 1j, PLANTED, 10**400, LONG]
SETTINGS = [
    *(Case("settings", {name: value}, f"setting {name}=") for name in RANGES for value in [*BEYOND[name], *NO_NUMBER]),
    *(Case("settings", {name: value}, f"unknown {name}") for name in CHOICES for value in ("nothing", "", None, 3, LONG)),
    *(Case("settings", {name: value}, f"setting {name}") for name in NAMES for value in ("", " ", None, 3, LONG, "a\0b")),
    *(Case("settings", {name: value}, f"setting {name}=") for name, kind in KINDS.items() if kind is bool
      for value in (0, 1, "true", "no", None)),
    *(Case("settings", {"timesteps": value}, "timesteps") for value in ("", "0,0", "-1,2", "nan", "1,x", "1e39,1", 3, LONG)),
    *(Case("settings", {name: str(DEFAULTS[name])}) for name, kind in KINDS.items() if kind is float),
    Case("settings", {"lr": "2e-5"}),
    Case("settings", {"lr": 1}),
    Case("settings", {"encoder": Path("somewhere")}),
    Case("settings", {"steps": Path("3")}, "setting steps="),
    Case("settings", {"prompt": "\ud800"}, "UTF-8"),
    Case("settings", {"prompt": "a photo of 猫 $x$ \\foo"}),
    Case("settings", {"batch": 65_536, "accumulate": 65_536}, "images a step"),
    Case("settings", {"parts": True, "rows": 2}, "parts=True takes all rows"),
    Case("settings", {"objective": "dcr", "batch": 1}, "expected at least 2"),
    Case("settings", {"anchor": "text", "condition": "recap"}, "condition"),
    Case("settings", {"timesteps": "0,0,1,3"}),
]  # fmt: skip


def open_settings(given: dict) -> None:
    """Settings of `train`, or, where only these have it, of `llava train`."""
    if given.keys() <= KINDS.keys():
        settings = Settings(**given)
    else:
        settings = LlavaSettings(**{"llava": "a", "data": "b", "images": "c"} | given)
    for name, value in given.items():
        kind = (KINDS | LANGUAGE)[name]
        assert getattr(settings, name) == (str(value) if isinstance(value, Path) else kind(value))


YAML = [
    Case("yaml", "stage2: {lr: 2e-5}"),
    Case("yaml", "stage2: {lr: 2.0e-5, steps: 10}"),
    Case("yaml", "{}"),
    Case("yaml", "seeds: [0, 3]"),
    Case("yaml", "stage2: {lr: .nan}", "setting lr=nan"),
    Case("yaml", "stage2: {lr: .inf}", "setting lr=inf"),
    Case("yaml", "stage2: {steps: 1e3}", "setting steps='1e3'"),
    Case("yaml", "stage2: {steps: 0x10000000000}", "setting steps="),
    Case("yaml", "stage2: {flips: 'no'}", "setting flips='no'"),
    Case("yaml", "stage2: {stpes: 3}", "unknown setting 'stpes'"),
    Case("yaml", "stage2: {seed: -3}", "setting seed=-3"),
    Case("yaml", "stage2: {lr: 2026-01-01}", "setting lr="),
    Case("yaml", "stage2: [lr, 1]", "expected dict"),
    Case("yaml", "stage2: 3", "expected dict"),
    Case("yaml", "seeds: -1", "seeds=-1"),
    Case("yaml", "seeds: 99999999999", "seeds="),
    Case("yaml", "seeds: [0, -1]", "expected a whole number from 0"),
    Case("yaml", f"stage2: {{prompt: \"{PLANTED}\"}}"),
    Case("yaml", f"stage2: {{objective: \"{PLANTED}\"}}", "unknown objective"),
    Case("yaml", f"stage2: {{lr: \"{PLANTED}\"}}", "setting lr="),
    Case("yaml", "stage2: {prompt: '\"; open(\"pwned\", \"w\"); \"'}"),
    Case("yaml", "stage2: {prompt: \"\\\\\\\"; open('pwned', 'w') #\"}"),
    Case("yaml", "stage2: !!python/object/apply:os.mkdir [pwned]", "python/object"),
    Case("yaml", "stage2: {lr: !!python/name:os.system }", "python/name"),
    Case("yaml", "seeds: !!python/object/new:os.mkdir [pwned]", "python/object"),
]  # fmt: skip


def open_notebook_parameters(text: str) -> None:
    """Read a file of parameters as papermill does, put it into a notebook as papermill does, and check it there."""
    try:
        loaded = yaml.load(text, Loader=NoDatesSafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    scope = {"stage2": {}, "seeds": 1}
    exec(PythonTranslator.codify(loaded), scope)
    assert repr({name: scope[name] for name in loaded}) == repr(loaded)
    check({name: scope[name] for name in ("stage2", "seeds")}, stage2=dict, seeds=(range(1, 10_001), list[int]))
    replace_settings(Settings(), scope["stage2"])


CHECKED = [
    *(Case("parameters", (value, float)) for value in (0, 0.5, "2e-5", " 1 ")),
    *(Case("parameters", (value, float), "x=") for value in (NAN, INF, "inf", "", PLANTED, None, True, [0.1], 10**400)),
    *(Case("parameters", (value, int), "x=") for value in (-1, 2**32, "3", 3.0, True, None, [], NAN)),
    *(Case("parameters", (value, list[int]), "x=") for value in (3, "3", [0, -1], [0.5], [True], [[0]], {0: 1})),
    *(Case("parameters", (value, range(1000)), "x=") for value in (-1, 1000, 2.0, "5", True, None)),
    *(Case("parameters", (value, str), "x=") for value in (3, None, ["a"], b"a")),
    Case("parameters", (0, range(1000))),
    Case("parameters", ([], list[str])),
    Case("parameters", (LONG, str)),
]


def check(scope: dict, **expected: object) -> None:
    """`check_parameters`; of its error the first line, the others list the right names and types."""
    try:
        check_parameters(scope, **expected)
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def check_one(given: tuple[object, object]) -> None:
    value, kind = given
    scope = {"x": value}
    check(scope, x=kind)
    assert scope["x"] == (float(value) if kind is float else value)


# --- the command line -------------------------------------------------------------------------------------------

TRAIN = ("train", "--preset", "openai-l14-dcr", "--shards", "world")
EVALUATE = ("evaluate", "--encoder", "tiny", "--benchmarks", "world")
NO_COUNT = ("-1", "1.5", "1e3", "nan", "inf", "", "ten", "\u0663", "9" * 30, "0x10", "1_0", PLANTED, LONG)
ARGUMENTS = {  # the beginning of a command -> its arguments that are whole numbers
    ("run",): ("--steps", "--seeds"),
    EVALUATE: ("--seed", "--max-images", "--workers"),
    ("benchmark", "input"): ("--batch", "--rounds", "--workers", "--files", "--threads"),
}
COMMANDS = [
    *(Case("command", (*start, f"{name}={value}"), f"argument {name}")
      for start, names in ARGUMENTS.items() for name in names for value in NO_COUNT),
    *(Case("command", ("benchmark", "input", name, "0"), f"argument {name}") for name in ("--batch", "--rounds", "--threads")),
    *(Case("command", ("run", "--seeds", value), "which ones (0,1,2)") for value in ("0", "1,,2", ",", "0,-1", "10001")),
    *(Case("command", ("run", "--only", value), "no notebook") for value in ("99", "", "00,", "00;01", PLANTED)),
    *(Case("command", ("run", "--images", value), value.strip() or "--images") for value in
      ("", " ", "nowhere", "nowhere/*.tar", "world:x", "hf:")),
    *(Case("command", (*TRAIN, "--set", change), "--set") for change in
      ("lr", "=1", "lr=", "lr=fast", "stpes=3", "flips=maybe", f"lr={PLANTED}", f"steps={'(' * 9999}", "steps=[[[")),
    *(Case("command", (*TRAIN, "--set", f"{name}={value}"), f"setting {name}=") for name, value in
      (("lr", "-1"), ("lr", "1e999"), ("clip", "-1"), ("tau", "0"), ("tau", "1e-30"), ("lora_dropout", "1"), ("seed", "-1"),
       ("batch", "0"), ("batch", 10**12), ("steps", "1.5"), ("steps", "True"), ("flips", "1"), ("encoder", ""))),
    Case("command", (*TRAIN, "--set", "lr=1", "lr=2"), "given twice"),
    Case("command", (*TRAIN, "--set", "lr=1", "--set", "clip=-1"), "setting clip=-1"),
    Case("command", (*TRAIN, "--set", "clip=-1", "--set", "lr=1"), "setting clip=-1"),
    Case("command", (*TRAIN, "--set", "objective=" + PLANTED), "unknown objective"),
    Case("command", (*TRAIN, "--out", "a.txt/runs"), "a.txt is no folder"),
    Case("command", ("train",), "--preset"),
    *(Case("command", ("train", "--preset", value, "--shards", "world"), "unknown preset") for value in ("", "dcr", LONG)),
    Case("command", ("train", "--preset", "openai-l14-dcr", "--shards", ""), "setting images=''"),
    Case("command", (*TRAIN, "--projector", ""), "setting projector=''"),
    *(Case("command", ("evaluate", "--encoder", "tiny", "--benchmarks", value), "expected") for value in
      ("", ",", "nothing", "world,nothing", PLANTED)),
    Case("command", (*EVALUATE, "--features", "all"), "unknown features 'all'"),
    Case("command", (*EVALUATE, "--precision", "fp8"), "unknown precision 'fp8'"),
    Case("command", (*EVALUATE, "--out", "a.txt/results.csv"), "is no folder"),
    Case("command", (*EVALUATE, "--out", "a.txt"), "a.txt: columns"),
    Case("command", ("evaluate", "--encoder", "tiny", "--benchmarks", "knn", "--root", "nowhere"), "nowhere"),
    Case("command", ("evaluate", "--benchmarks", "world"), "--encoder"),
    Case("command", ("export", "nowhere", "out"), "nowhere: no run here"),
    Case("command", ("export", "a.txt", "out"), "a.txt: no run here"),
    Case("command", ("export", LONG, "out"), "File name too long"),
    Case("command", ("export", "nowhere"), "folder"),
    Case("command", ("benchmark", "sleep"), "invalid choice: 'sleep'"),
    Case("command", ("benchmark", "dcr-step", "--scale", "huge"), "--scale huge: expected one of"),
    Case("command", ("benchmark", "input", "--precision", "fp8"), "invalid choice: 'fp8'"),
    Case("command", ("benchmark", "input", "--json", "a.txt/out.json"), "is no folder"),
    *(Case("command", ("presets", name), "unknown preset") for name in ("", "../x", "openai-l14", LONG, "a\0b", PLANTED)),
    Case("command", ("presets", "one", "two"), "unrecognized arguments: two"),
    Case("command", ("presets",)),
    Case("command", ("presets", "openai-l14-dcr")),
    Case("command", ("tune",), "invalid choice: 'tune'"),
    Case("command", ("presets", "--seed", "1"), "unrecognized arguments"),
    Case("command", (), "VERB"),
    Case("command", (LONG,), "invalid choice"),
]  # fmt: skip


# --- texts in tables, figures and the report --------------------------------------------------------------------

TEXTS = [
    "", " ", "$", "$x$", "$x", "$\\frac$", "\\foo", "\\$5", "_x", "a\nb", "a\rb", "a\r\nb", 'say "yes", no', "a,b;c\td", "NA", "null",
    "nan", "None", "001", "1e5", "=1+1", "<b>x</b>", "&amp;", "猫 🙂 é", "\ufeffx", "\u202ex", "%s {x} {{x}}", PLANTED, "'; --", LONG,
]  # fmt: skip


def keep_in_csv(text: str) -> None:
    """A text comes back from a table as it was written, and a second row of the same key takes the first one's place."""
    rows = pd.DataFrame({"encoder": ["tiny", text], "value": [1.0, 0.1], "note": ["", text]})
    for value in (0.1, 0.2):
        update_csv(Path("t.csv"), rows.assign(value=value), ["encoder"])
    back = pd.read_csv("t.csv", keep_default_na=False)
    assert back["encoder"].astype(str).tolist() == ["tiny", text] or text in ("001", "1e5")
    assert len(back) == 2 and back["value"].tolist() == [0.2, 0.2]


def draw_in_figures(text: str) -> None:
    """A text is drawn as it stands, shortened where it is long."""
    image = np.zeros((2, 2, 8, 8, 3), np.uint8)
    cosines = pd.DataFrame(0.1, index=range(2), columns=["t1i1", "t1i2", "t2i1", "t2i2"])
    pairs = pd.DataFrame({"pattern": [text, "b"], "statement_1": text, "statement_2": "b"})
    ends = {f"{name}{end}": 0.5 for name in ("Fur", text or "-") for end in ("", "/low", "/high")}
    quality = pd.DataFrame({"attribute": ["a", text], "share": 0.5, "low": 0.4, "high": 0.6, "n": 9})
    drawn = [
        figures.image_grid(image[0], [text, "b"], title=text, source=text),
        figures.minimal_pairs(pairs, image, {text: cosines}, text),
        figures.radar(pd.DataFrame([ends], index=[text]), source=text),
        figures.drawn_attributes(quality),
        figures.answers([text, "b"], image, [[text, "b"]] * 2, {text: [[text, text]] * 2}, text),
    ]
    for figure in drawn:
        figure.canvas.draw()
        assert max(figure.get_size_inches()) < 20
        assert not any(part.get_parse_math() for part in figure.findobj(matplotlib.text.Text) if "$" in part.get_text())
        assert max(len(part.get_text()) for part in figure.findobj(matplotlib.text.Text)) < 2500
        matplotlib.pyplot.close(figure)
    if words := text.split():
        shown = " ".join(part.get_text() for part in drawn[0].findobj(matplotlib.text.Text))
        assert words[0][:10] in shown


ACTIVE = [
    "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](java\tscript:alert(1))", "[x](data:text/html,<b>)",
    "[x](vbscript:x)", "[x](file:///etc/passwd)", "[x](//elsewhere.org)", "[x](../secret.html)", "![x](http://elsewhere.org/a.png)",
    '<a href="javascript:alert(1)">x</a>', '<a href=" &#106;avascript:alert(1)">x</a>', '<base href="http://elsewhere.org/">',
    "<script>alert(1)</script>", "<scr<script></script>ipt>alert(1)</script>", '<script src="http://elsewhere.org/a.js"></script>',
    '<img src=x onerror="alert(1)">', '<img src="data:image/svg+xml;base64,PHN2Zz4=">', "<svg onload=alert(1)></svg>",
    "<svg><a xlink:href='javascript:alert(1)'>x</a></svg>", '<iframe src="http://elsewhere.org"></iframe>', "<object data=x></object>",
    '<meta http-equiv="refresh" content="0;url=http://elsewhere.org">', '<link rel="stylesheet" href="http://elsewhere.org/a.css">',
    "<style>body{background:url(http://elsewhere.org)}</style>", '<p style="background:url(http://elsewhere.org)">x</p>',
    '<form action="http://elsewhere.org"><input autofocus onfocus=alert(1)></form>', "</section></body><script>alert(1)</script>",
    '<details open ontoggle="alert(1)">x</details>', "<!--<img src=x onerror=alert(1)>-->", '"><img src=x onerror=alert(1)>',
    '<math><mtext><img src=x onerror=alert(1)></mtext></math>', r"$\href{javascript:alert(1)}{x}$",
    r"$$\text{<img src=x onerror=alert(1)>}$$", r"$\text{&lt;img src=x onerror=alert(1)&gt;}$", "# [x](javascript:alert(1)) <img src=x onerror=alert(1)>",
]  # fmt: skip
ALLOWED = {"href": r"(https?://|#)", "src": r"data:image/(png|jpeg|gif|webp);base64,"}


class Harmless(HTMLParser):
    """Asserts that a page has neither a tag that runs or loads, nor such an attribute."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "base", "link", "iframe", "object", "embed", "form", "input", "svg"), tag
        assert tag != "meta" or dict(attributes).keys() <= {"charset", "name", "content"}
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("srcset", "action", "formaction"), name
            assert name != "style" or value == "text-align: unset;", value  # of pandas' tables
            assert name not in ("href", "src", "xlink:href", "data") or re.match(ALLOWED[name], value or ""), value


def report_on(text: str) -> None:
    """A report that has a text in prose, output, heading, table and facts runs and loads nothing, and shows a table."""
    cell = nbformat.v4.new_code_cell("0")
    data = [
        {"text/html": text},
        {"text/markdown": text},
        {"text/plain": text},
        {"image/svg+xml": text},
        {"text/latex": text},
    ]
    cell.outputs = [nbformat.v4.new_output("display_data", part) for part in data]
    cell.outputs += [
        nbformat.v4.new_output("stream", text=text),
        nbformat.v4.new_output("error", ename=text, evalue=text),
    ]
    prose = [
        nbformat.v4.new_markdown_cell(source) for source in (text, f"# {text}", "[good](https://x.org/) **stays**")
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=[*prose, cell]), "00_x.ipynb")
    summary = pd.DataFrame({"objective": [text], "seed": 0, "note": text, "run": text})
    write_report(Path("report.html"), [Path("00_x.ipynb")], summary, {text: text, "settings": {"prompt": text}})
    page = Path("report.html").read_text(encoding="utf-8")
    Harmless().feed(page)
    assert page.count("<style") == 1 and '<a href="https://x.org/">good</a> <strong>stays</strong>' in page


# --- the frame --------------------------------------------------------------------------------------------------


def run_real_command(argv: tuple[str, ...]) -> None:
    """Run `python -m diva_lab` as a process of its own."""
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "diva_lab", *argv], capture_output=True, encoding="utf-8", timeout=WAIT,
        env=os.environ | {"PYTHONPATH": root, "DIVA_LAB_CACHE": os.getcwd()},
    )  # fmt: skip
    report_exit(done.returncode, done.stdout, done.stderr)


ONE_STEP = ("encoder=tiny", "denoiser=tiny", "steps=1", "batch=2", "accumulate=1", "vae_px=0")
SLOW = [
    Case("real command", ("presets",)),
    Case("real command", ("presets", "nothing"), "unknown preset"),
    Case("real command", (*TRAIN, "--set", "lr=nan"), "--set"),
    Case("real command", (*TRAIN, "--out", "runs", "--set", *ONE_STEP)),
    Case("real command", (*EVALUATE, "--seed", "-1"), "argument --seed"),
    Case("real command", ("evaluate", "--encoder", "nowhere/model", "--benchmarks", "emoji"), "nowhere/model"),
    Case("real command", ("evaluate", "--encoder", "tiny", "--benchmarks", "emoji", "--out", "é $.csv")),
    Case("real command", ("export", "nowhere", "out"), "no run here"),
]
SLOW += [case for k, case in enumerate(SETTINGS) if k % 3]
SLOW += [Case(door, text) for door in ("figures", "report") for k, text in enumerate(TEXTS) if k % 4]
DOORS: dict[str, Callable[[object], None]] = {
    "settings": open_settings,
    "yaml": open_notebook_parameters,
    "parameters": check_one,
    "command": run_in_process,
    "csv": keep_in_csv,
    "figures": draw_in_figures,
    "report": report_on,
    "real command": run_real_command,
    **FILE_DOORS,
}
CASES = [
    *SETTINGS[::3], *YAML, *CHECKED, *COMMANDS,
    *(Case("csv", text) for text in TEXTS),
    *(Case(door, text) for door in ("figures", "report") for text in TEXTS[::4]),
    *(Case("report", text) for text in ACTIVE),
]  # fmt: skip
OFTEN = [case for k, case in enumerate(FILES) if k % 40 == 0 or str(case.given) in QUICK]
CASES += OFTEN
SLOW += [case for case in FILES if case not in OFTEN]
MARKED = [pytest.param(case, id=str(case)) for case in CASES]
MARKED += [pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in SLOW]


def end_of(case: Case, folder: Path) -> tuple[str, str]:
    """How a case ends, `right result` or `one clear error`, and the error's text; anything else is raised."""
    given = case.given(folder) if callable(case.given) else case.given
    try:
        DOORS[case.door](given)
    except EXPECTED as error:
        return "one clear error", str(error)
    return "right result", ""


def used() -> tuple[float, int]:
    """Seconds of a processor and the most kilobytes that this process and its children have used so far."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in each), max(one.ru_maxrss for one in each)


@pytest.fixture
def without_annotations():
    """What a user has: in tests alone, annotations are checked, and a wrong type would not reach our own error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def alarm():
    """What waits without end, as on a pipe, fails."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not at its end after {WAIT} seconds"))
    signal.alarm(WAIT)
    yield
    signal.alarm(0)


@pytest.mark.usefixtures("without_annotations", "alarm")
@pytest.mark.filterwarnings("ignore:.*Glyph.*missing from font")
@pytest.mark.parametrize("case", MARKED)
def test_an_odd_input_ends_in_the_right_result_or_in_one_clear_error(
    case, tmp_path, monkeypatch, capsys, record_property, small_clip, small_diffusion
):
    monkeypatch.chdir(tmp_path)
    for name, value in (("capture", capsys), ("clip", small_clip), ("diffusion", small_diffusion)):
        monkeypatch.setattr(Case, name, value, raising=False)
    before = used()
    end, error = end_of(case, tmp_path)
    taken, grown = (after - first for first, after in zip(before, used(), strict=True))
    record_property("outcome", f"{case.door}, {end}")
    assert case.error in error and bool(case.error) == bool(error), error or f"no error; expected: {case.error}"
    assert case.door == "command" or "\n" not in error.strip("\n").replace("\n- ", "")
    assert not Path("pwned").exists(), "planted code was run"
    assert taken < SECONDS and grown < KILOBYTES


def test_the_corpus_has_400_cases_and_every_number_of_the_settings_has_a_range():
    assert len(CASES) >= 400 and {case.door for case in [*CASES, *SLOW]} == set(DOORS)
    assert {name for name, kind in (KINDS | LANGUAGE).items() if kind in (int, float)} == set(RANGES)
    assert replace(Settings(), **parse_changes(["lr=2e-5", "flips=False"])) == Settings(lr=2e-5, flips=False)
