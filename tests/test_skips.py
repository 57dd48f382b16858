import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="of no use")
def test_skips():
    pass

@pytest.mark.cuda
def test_needs_cuda():
    pass
"""
SKIP, CUDA = "tests/test_it.py::test_skips | of no use", "cuda: tests/test_it.py::test_needs_cuda | no CUDA device"


@pytest.fixture
def session(tmp_path: Path):
    """A project of three tests; calling it runs them under a list of skips and gives exit code and output."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(bool)\n")  # torch takes seconds

    def run(*lines: str, select: str = "tests") -> tuple[int, str]:
        (tmp_path / "tests" / "skips.txt").write_text("# a comment\n" + "\n".join(lines) + "\n")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", select],
            cwd=tmp_path,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout

    return run


def test_a_session_passes_when_the_skips_are_those_of_the_list_and_prints_them(session):
    code, output = session(SKIP, CUDA)
    assert code == 0, output
    assert SKIP in output and CUDA.removeprefix("cuda: ") in output
    assert "2 skipped, as tests/skips.txt says" in output


def test_a_session_fails_on_a_skip_that_is_not_in_the_list(session):
    code, output = session(CUDA)
    assert code == 1 and f"skipped, but not in tests/skips.txt: {SKIP}" in output


def test_a_session_fails_when_a_test_of_the_list_is_not_skipped(session):
    code, output = session(SKIP, CUDA, "tests/test_it.py::test_passes | of no use")
    assert code == 1 and "in tests/skips.txt, but not skipped: tests/test_it.py::test_passes" in output


def test_a_session_fails_when_the_reason_is_another(session):
    code, output = session(SKIP.replace("no use", "great use"), CUDA)
    assert code == 1 and "for another reason" in output


def test_a_session_of_one_test_is_compared_with_its_own_line_only(session):
    code, output = session(SKIP, CUDA, select="tests/test_it.py::test_passes")
    assert code == 0 and "0 skipped, as" in output
