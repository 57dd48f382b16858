import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"
COMMANDS = sorted(path.stem for path in TOOLS.glob("*.py") if "def main(" in path.read_text())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_tool_is_a_command_that_answers_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"tools.{name}", run_name="__main__")
    assert stop.value.code == 0 and f"usage: python -m tools.{name}" in capsys.readouterr().out
