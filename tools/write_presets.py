"""Write every preset as notebooks/presets/NAME.yaml, for `papermill -f` with notebook 02.

python -m tools.write_presets
"""

from pathlib import Path

from diva_lab.paths import ROOT
from diva_lab.training.presets import PRESETS, preset_yaml

PRESET_FILES = ROOT / "notebooks" / "presets"


def write_presets(folder: Path = PRESET_FILES) -> None:
    """Write `folder`/NAME.yaml for every preset; files of presets that no longer exist are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for name in PRESETS:
        (folder / f"{name}.yaml").write_text(preset_yaml(name), encoding="utf-8")


if __name__ == "__main__":
    write_presets()
