import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def committed() -> list[Path]:
    """The files that git tracks or would track."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# --- commands and texts -----------------------------------------------------------------------------------------


def test_the_makefile_has_the_promised_targets_and_help_names_each():
    promised = {"help", "run", "test", "lab", "site", "figures", "pretrain", "study", "gpu-check", "clean"}
    assert promised <= TARGETS
    printed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([\w-]+)", printed, re.MULTILINE)) == promised


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert re.search(r"^make test$", script.read_text(), re.MULTILINE)
    assert script.stat().st_mode & 0o111, "not executable"


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_no_committed_file_names_a_path_of_one_machine():
    machine = re.compile(rb"(?<![\w./:~-])/(?:root|work|home/\w+|Users/\w+|mnt|opt|scratch)/\w|\b[A-Z]:\\Users\\")
    found = {}
    for path in committed():
        if path.suffix not in (".png", ".jpg", ".safetensors"):
            found[str(path.relative_to(ROOT))] = [match.decode() for match in machine.findall(path.read_bytes())]
    assert {name: paths for name, paths in found.items() if paths} == {}
