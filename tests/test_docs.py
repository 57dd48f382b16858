"""README and docs: commands parse, links lead somewhere, examples run, costs follow from the presets."""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from diffusers import UNet2DConditionModel
from packaging.specifiers import SpecifierSet
from papermill.cli import papermill
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode

from diva_lab.benchmark import SCALES
from diva_lab.cli import VERBS, main
from diva_lab.evaluation.table import BENCHMARKS
from diva_lab.llava import scores
from diva_lab.llava.tuning import llava_settings
from diva_lab.models.encoders import ENCODERS
from diva_lab.plan import DEVICES
from diva_lab.training.presets import PRESETS, parse_changes, preset, replace_settings
from diva_lab.workbook.notebooks import declared_parameters

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README, CHANGES = ROOT / "README.md", ROOT / "CHANGELOG.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
GUIDES = [README, *DOCS, ROOT / "CONTRIBUTING.md"]
PAGES = [*GUIDES, CHANGES, ROOT / "LOG.md"]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {*re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE), ".venv/installed"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else ""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def split_commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block; `&&` separates two."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            commands.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        commands += [words] if words else []
    return commands


COMMANDS = [(page, words) for page in GUIDES for block in blocks(page, "sh") for words in split_commands(block)]


# --- commands: parsed, not run ----------------------------------------------------------------------------------


class ParsedError(Exception):
    """Stops a command after its arguments were read."""


def parse(entry, words: list[str]) -> argparse.Namespace:
    """The arguments that an argparse command reads from `words`; nothing after that is run."""
    read = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None, namespace=None):
        raise ParsedError(read(parser, arguments, namespace))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(ParsedError) as parsed:
        entry(words)
    return parsed.value.args[0]


def is_ignored(path: str | Path) -> bool:
    """Whether git ignores a path; a folder that does not exist yet is named with a `/` at its end."""
    return subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", str(path)]).returncode == 0


def check_diva_lab(words: list[str]) -> None:
    args = parse(main, words)
    if args.verb == "train":
        replace_settings(preset(args.preset), parse_changes(args.set))
    if args.verb == "plan":
        assert args.preset in PRESETS and args.device in DEVICES
    if args.verb == "presets" and args.name:
        assert args.name in PRESETS
    if args.verb == "evaluate":
        assert {name.partition(":")[0] for name in args.benchmarks.split(",")} <= BENCHMARKS.keys()
    if args.verb == "llava" and args.what == "train":
        llava_settings(args.llava, args.data, args.images, args.trained, args.set)
    if args.verb == "llava" and args.what == "evaluate":
        assert set(args.benchmarks.split(",")) <= scores.BENCHMARKS.keys()
    if args.verb == "referee":
        assert args.original in ENCODERS
        assert {name.partition(":")[0] for name in (args.benchmarks or "zero-shot").split(",")} <= BENCHMARKS.keys()
    written = {"evaluate": "out", "referee": "out", "export": "folder", "benchmark": "json", "llava": "out"}.get(
        args.verb
    )
    if written and getattr(args, written):
        assert is_ignored(f"{getattr(args, written)}/"), "what a command of the docs writes is ignored by git"


def check_accelerate(words: list[str]) -> None:
    assert words[0] == "launch"
    args = launch_command_parser().parse_args(words[1:])
    assert args.module and args.training_script == "diva_lab"
    check_diva_lab(args.training_script_args)


def check_torchrun(words: list[str]) -> None:
    args = get_args_parser().parse_args(words)
    assert args.module and args.training_script == "diva_lab"
    check_diva_lab(args.training_script_args)


def check_sbatch(words: list[str]) -> None:
    script = next(word for word in words if word.endswith(".sh"))
    assert (ROOT / script).is_file()
    check_diva_lab(["train", *words[words.index(script) + 1 :]])


def check_papermill(words: list[str]) -> None:
    chosen = papermill.make_context("papermill", list(words)).params
    notebook = ROOT / chosen["notebook_path"]
    names = {name for name, _ in chosen["parameters"]}
    for file in chosen["parameters_file"]:
        names |= yaml.safe_load((ROOT / file).read_text()).keys()
    assert names <= declared_parameters(notebook)
    assert (ROOT / chosen["cwd"]).resolve() == notebook.parent, "as JupyterLab and nbval run it"
    assert is_ignored(chosen["output_path"])


def check_python(words: list[str]) -> None:
    if words[0] == "-c":
        check_imports(words[1])
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-"))
    else:
        assert words[0] == "-m" and words[1].startswith("tools.")
        tool = importlib.import_module(words[1])
        assert parse(tool.main, words[2:]) if hasattr(tool, "main") else not words[2:]


def check_pytest(words: list[str]) -> None:
    markers = [line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    wanted = set(re.findall(r"\w+", " ".join(words[1:]))) - {"and", "or", "not"}
    assert words[0] == "-m" and wanted <= set(markers)


@cache
def hf_options() -> set[str]:
    command = [Path(sys.executable).with_name("hf"), "download", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"})
    return set(re.findall(r"--[\w-]+", done.stdout))


def check_hf(words: list[str]) -> None:
    assert words[0] == "download"
    assert {word for word in words if word.startswith("--")} <= hf_options()
    if "--local-dir" in words:
        assert is_ignored(words[words.index("--local-dir") + 1] + "/")


def check_make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    assert targets and set(targets) <= TARGETS
    for name in (word.partition("=")[0] for word in words if "=" in word):
        assert re.search(rf"\b{name}\b", MAKEFILE)


def check_docker(words: list[str]) -> None:
    assert words[0] in ("build", "run") and (ROOT / "Dockerfile").is_file()
    if words[0] == "run":
        check(words[words.index("diva-lab") + 1 :])  # after the image's name


def check_files(words: list[str]) -> None:
    """Of `conda env create -f FILE` and the like: the files exist."""
    assert all((ROOT / words[k + 1]).is_file() for k, word in enumerate(words) if word == "-f")


CHECKS = {
    "diva-lab": check_diva_lab, "accelerate": check_accelerate, "torchrun": check_torchrun, "sbatch": check_sbatch,
    "papermill": check_papermill, "python": check_python,
    "pytest": check_pytest, "hf": check_hf, "make": check_make, "docker": check_docker, "conda": check_files,
    ".": lambda words: words == [".venv/bin/activate"] or pytest.fail(str(words)),
    "mkdir": lambda words: (words[0] == "-p" and is_ignored(words[1] + "/")) or pytest.fail(str(words)),
    "pip": lambda words: words[0] == "install" or pytest.fail(str(words)),
    "pre-commit": lambda words: words == ["install"] or pytest.fail(str(words)),
    "ruff": lambda words: words in (["check", "."], ["format", "."]) or pytest.fail(str(words)),
}  # fmt: skip


def check(words: list[str]) -> None:
    assert words[0] in CHECKS, f"no check for the command {words[0]!r}; expected one of {', '.join(CHECKS)}"
    CHECKS[words[0]](words[1:])


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{name_of(page)}: {' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_a_command_of_the_docs_parses(page, words):
    check(words)


def test_there_are_commands_of_every_verb():
    verbs = {words[1] for _, words in COMMANDS if words[0] == "diva-lab"} | {"train", "run"}
    assert verbs == VERBS.keys()
    assert any(words[0] == "accelerate" and "train" in words for _, words in COMMANDS)
    assert ["make", "run"] in [words for _, words in COMMANDS]  # `diva-lab run` by its target


@pytest.mark.parametrize("page", [*GUIDES, CHANGES], ids=name_of)
def test_a_command_in_a_sentence_names_what_exists(page):
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        words = span.split()
        if words[0] == "make" and len(words) > 1:
            check_make(words[1:])
        elif words[0] == "diva-lab" and len(words) > 1 and words[1] != "VERB":
            assert words[1] in VERBS
        elif words[:2] == ["python", "-m"] and span.startswith("python -m tools."):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), span
        elif words[0] == "pytest" and len(words) > 1:
            check_pytest(words[1:])
        elif words[:2] == ["accelerate", "launch"]:
            assert words[2:5] == ["-m", "diva_lab", "train"]


# --- Python blocks ----------------------------------------------------------------------------------------------

EXAMPLES = [(page, block) for page in PAGES for block in blocks(page, "python")]


def check_imports(source: str) -> None:
    """Compile a block and resolve each name that it imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"


@pytest.mark.parametrize(("page", "source"), EXAMPLES, ids=[name_of(page) for page, _ in EXAMPLES])
def test_a_python_block_compiles_and_its_imports_resolve(page, source):
    check_imports(source)


FEWER = """
import diva_lab.evaluation.world as world
world.SCENES, world.WORLD_SPLITS = 200, {name: (9, *seeds) for name, (_, *seeds) in world.WORLD_SPLITS.items()}
"""
CLASS_FOLDERS = """
from pathlib import Path
from PIL import Image
from diva_lab.world import World, draw_scenes
scenes = draw_scenes(60, 0)
for i, (image, scene) in enumerate(zip(World().render(scenes), scenes, strict=True)):
    path = Path("data_root/shapes/test") / f"class {scene['class'] % 3}" / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
"""


def run_blocks(sources: list[str], folder: Path) -> str:
    """What the blocks print, each on its own, in one process and with one step of training in place of many."""
    short = [re.sub(r"\bsteps=\d+", "steps=1", source) for source in sources]
    code = "\n".join(f"exec({source!r}, {{}})" for source in (FEWER, CLASS_FOLDERS, *short))
    places = {"DIVA_LAB_RUNS": str(folder / "runs"), "DIVA_LAB_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | places, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_example_and_the_examples_of_extensions_run(tmp_path):
    (example,) = blocks(README, "python")
    printed = run_blocks([example, *blocks(ROOT / "docs" / "extending.md", "python")], tmp_path)
    for measure in ("pairs", "probe", "zeroshot", "nmi", "acc", "ari"):
        assert re.search(rf"^{measure} +\S+ +\S+$", printed, re.MULTILINE), printed
    assert sorted(path.name.rpartition("-s0-")[0] for path in (tmp_path / "runs").iterdir()) == [
        "align-diva", "tune-cosine-diva", "tune-diva",
    ]  # fmt: skip


# --- texts ------------------------------------------------------------------------------------------------------


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [*GUIDES, ROOT / "LOG.md"], ids=name_of)
def test_an_image_is_called_an_image(page):
    assert re.findall(r"\bpictures?\b", page.read_text(), re.IGNORECASE) == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading_of_the_repository(page):
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page))
    for link in (one or other for one, other in links):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/[\w.]+)", README.read_text()))
    assert linked == {name_of(page) for page in DOCS}


def texts() -> list[Path]:
    """The text files that git tracks or would track."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\0")
    kinds = (".md", ".py", ".ipynb", ".toml", ".yml", ".yaml", ".cff", ".txt", "")
    return [ROOT / name for name in listed if name and Path(name).suffix in kinds and (ROOT / name).is_file()]


def test_no_file_refers_to_a_document_that_is_not_here():
    elsewhere = re.compile(r"\b(?:METH" r"OD|DES" r"IGN)\b|(?<![\w/.-])shar" r"ed/")
    named = {name_of(path): elsewhere.findall(path.read_text(errors="ignore")) for path in texts()}
    assert {path: words for path, words in named.items() if words} == {}


def test_a_page_of_the_docs_that_a_file_names_exists():
    for path in texts():
        for name in re.findall(r"\bdocs/\w+\.md\b", path.read_text(errors="ignore")):
            assert (ROOT / name).is_file(), f"{name_of(path)} names {name}"


def test_where_the_address_of_the_repository_is_not_set_nothing_links_to_it():
    urls = PROJECT["project"].get("urls", {})
    assert urls.keys() <= {"Repository"}
    if not urls:
        address = re.compile(r"https?://\S*/diva-lab\b|^repository-code:|git clone", re.MULTILINE)
        named = {name_of(path): address.findall(path.read_text(errors="ignore")) for path in [*PAGES, *habits()]}
        assert {path: links for path, links in named.items() if links} == {}


# --- costs on a GPU ---------------------------------------------------------------------------------------------

GPU = ROOT / "docs" / "gpu.md"
RATE = 65e12  # FLOP/s, which the page states


def cost_rows(text: str) -> dict[tuple[str, int], list[str]]:
    """(preset, stage) -> the other cells of a table whose first cell names them."""
    rows = re.findall(r"^\| `([\w-]+)`(?:, (\d))?[^|]*\|(.*)\|$", text, re.MULTILINE)
    return {(name, int(stage or 2)): [cell.strip() for cell in cells.split("|")] for name, stage, cells in rows}


def test_the_costs_follow_from_the_presets_and_the_counted_flops():
    text = GPU.read_text()
    assert f"assume {RATE / 1e12:.0f} TFLOP/s" in " ".join(text.split())
    costs = cost_rows(text.split("<!-- costs:")[1].split("<!-- /costs -->")[0])
    assert costs.keys() == {("openai-l14-dcr", 1), ("openai-l14-dcr", 2), ("openai-l14-diva", 2)}
    for (name, stage), (tera, micro, steps, exa, hours, *_) in costs.items():
        settings = preset(name, stage)
        assert (int(micro), int(steps)) == (settings.accumulate, settings.steps) and settings.batch == 16
        flops = float(tera) * 1e12 * settings.accumulate * settings.steps
        assert float(exa) == pytest.approx(flops / 1e18, abs=0.1)
        assert float(hours) == pytest.approx(flops / RATE / 3600, rel=0.02)


def test_the_readme_states_the_same_costs():
    costs, short = cost_rows(GPU.read_text()), cost_rows(README.read_text())
    assert short.keys() == {("openai-l14-dcr", 1), ("openai-l14-dcr", 2), ("openai-l14-diva", 2)}
    for key, (hours, memory, disk) in short.items():
        assert [hours, memory.partition(";")[0], disk] == costs[key][4:]


def test_an_evaluation_of_the_unet_takes_the_flops_that_the_page_states():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SCALES["sd21"].unet)
    counts = []
    for side in (224 // 8, 512 // 8):
        inputs = torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.long), torch.empty(1, 77, 1024)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(*(x.to("meta") for x in inputs))
        counts.append(f"{counter.get_total_flops() / 1e12:.2f}".lstrip("0"))
    assert f"takes {counts[0]} TFLOP forward at 224 px and {counts[1]} at 512 px" in " ".join(GPU.read_text().split())


# --- habits -----------------------------------------------------------------------------------------------------


def habits() -> list[Path]:
    names = ("Dockerfile", "CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/ci.yml", "pyproject.toml")
    return [ROOT / name for name in names]


HOST = re.compile(r"\b[\w-]+\.(?:com|io|org|net|dev|ai|co)\b")


def test_the_dockerfile_installs_the_pinned_versions_and_names_no_registry():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    assert steps[0][0] == "FROM" and {word for word, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    image, _, version = steps[0][1].partition(":")
    assert image == "python" and SpecifierSet(PROJECT["project"]["requires-python"]).contains(version.split("-")[0])
    commands = [shlex.split(part) for word, rest in steps if word == "RUN" for part in rest.split("&&")]
    (install,) = [words for words in commands if "pip" in words]
    assert install[install.index("-c") + 1] == "constraints.txt" and install[-2:] == ["-e", "."]
    check([*json.loads(dict(steps)["CMD"])[:1], "presets"])
    assert not HOST.search((ROOT / "Dockerfile").read_text())


def test_the_hooks_are_local_and_strip_notebooks_as_the_makefile_does():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    entries = {hook["id"]: shlex.split(hook["entry"]) for hook in repos[0]["hooks"]}
    assert all(hook["language"] == "system" for hook in repos[0]["hooks"])
    assert all(words[0].startswith(".venv/bin/") for words in entries.values())
    flags = re.search(r"^NBSTRIPOUT := (.*)", MAKEFILE.replace("\\\n", " "), re.MULTILINE)[1]
    assert entries["nbstripout"][1:] == shlex.split(flags)
    assert {words[1] for name, words in entries.items() if name.startswith("ruff")} == {"check", "format"}


def test_the_workflow_runs_make_test_with_a_python_that_is_supported():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]
    (version,) = [step["with"]["python-version"] for step in job["steps"] if "with" in step]
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version)


def test_the_citation_has_the_projects_version_and_licence_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["project"]["version"] and citation["license"] == PROJECT["project"]["license"]
    papers = {paper["title"]: paper["identifiers"][0]["value"] for paper in citation["references"]}
    (bibtex,) = blocks(README, "bibtex")
    for title, identifier in papers.items():
        assert f"title={{{title}}}" in " ".join(bibtex.split()) and identifier in bibtex
    assert len(papers) == 2


def test_the_changelog_tells_of_this_version():
    assert re.search(rf"^## {re.escape(PROJECT['project']['version'])}$", CHANGES.read_text(), re.MULTILINE)


def test_the_notebooks_are_named_in_the_readme():
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        assert re.search(rf"\b{path.name[:2]} ", README.read_text())
        assert nbformat.read(path, as_version=4).cells
