"""What is skipped is printed, and must be what tests/skips.txt says.

Each line of that file is `test id | reason`. A line that begins with `cuda: ` holds only where there is no CUDA device,
one with `network: ` or `browser: ` only where the test was skipped indeed.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

SKIPS = Path(__file__).with_name("skips.txt")
NO_CUDA = "no CUDA device"
ran: set[str] = set()
outcomes: Counter[str] = Counter()  # of the corpus of odd inputs
skipped: dict[str, str] = {}


def has_cuda() -> bool:
    import torch  # not above: jaxtyping's hook has to come first

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    pytest_runtest_logreport(report)  # a module that skips itself


def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> None:
    ran.add(report.nodeid)
    if getattr(report, "when", "") == "call":
        outcomes.update(value for name, value in report.user_properties if name == "outcome")
    if report.skipped and not hasattr(report, "wasxfail"):
        skipped[report.nodeid] = str(report.longrepr[2]).removeprefix("Skipped: ")


def expected_skips() -> dict[str, str]:
    """Test id -> reason, for this machine and the tests of this session."""
    expected = {}
    for line in SKIPS.read_text().splitlines() if SKIPS.exists() else []:
        if line.strip() and not line.startswith("#"):
            kind, test, reason = re.fullmatch(r"(?:(cuda|network|browser): )?(.+?) \| (.+)", line).groups()
            had = has_cuda() if kind == "cuda" else bool(kind) and test not in skipped
            if test in ran and not had:
                expected[test] = reason
    return expected


def complaints() -> list[str]:
    expected = expected_skips()
    lines = [f"skipped, but not in tests/skips.txt: {t} | {r}" for t, r in skipped.items() if t not in expected]
    lines += [f"in tests/skips.txt, but not skipped: {t} | {r}" for t, r in expected.items() if t not in skipped]
    lines += [
        f"skipped for another reason than in tests/skips.txt: {t} | {skipped[t]} (expected: {r})"
        for t, r in expected.items()
        if t in skipped and skipped[t] != r
    ]
    return lines


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and complaints():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if outcomes:
        terminalreporter.section("odd inputs, by outcome")
        terminalreporter.line(", ".join(f"{name}: {n}" for name, n in sorted(outcomes.items())))
    terminalreporter.section("skipped tests")
    for test, reason in sorted(skipped.items()):
        terminalreporter.line(f"{test} | {reason}")
    wrong = complaints()
    for line in wrong:
        terminalreporter.line(f"ERROR: {line}", red=True)
    if not wrong:
        terminalreporter.line(f"{len(skipped)} skipped, as tests/skips.txt says")


# --- small random models, made once (imports inside: jaxtyping's hook has to come first) ------------------------


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random CLIP."""
    from small_models import write_clip

    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def small_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random latent diffusion model."""
    from small_models import write_diffusion

    return write_diffusion(tmp_path_factory.mktemp("models") / "diffusion")


@pytest.fixture(scope="session")
def small_unclip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random unCLIP decoder of the small CLIP's embeddings."""
    from small_models import write_unclip

    return write_unclip(tmp_path_factory.mktemp("models") / "unclip")


@pytest.fixture(scope="session")
def small_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random DINOv2."""
    from small_models import write_dinov2

    return write_dinov2(tmp_path_factory.mktemp("models") / "vision")


@pytest.fixture(scope="session")
def settings_of(small_settings, small_unclip: Path, small_vision: Path):
    """Objective -> `small_settings` with it, and with the models that it reads."""
    from dataclasses import replace

    from diva_lab.objectives import OBJECTIVES
    from diva_lab.objectives.step import models_of

    def settings(objective: str):
        denoiser = str(small_unclip) if "decoder" in models_of(OBJECTIVES[objective]) else small_settings.denoiser
        return replace(small_settings, objective=objective, denoiser=denoiser, teacher=str(small_vision))

    return settings


@pytest.fixture(scope="session")
def small_settings(small_clip: Path, small_diffusion: Path):
    """Settings of the small models: four steps of three pictures, a new projector, full precision."""
    from diva_lab.training.settings import Settings

    return Settings(
        str(small_clip), str(small_diffusion), projector="new", steps=4, batch=3, lora_rank=4, precision="no"
    )
