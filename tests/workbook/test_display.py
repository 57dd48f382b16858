import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from figure_records import DRAWN
from PIL import Image

from diva_lab.figures import describe
from diva_lab.workbook import display
from diva_lab.workbook.display import drop_python_version, make_show

MAKEFILE = Path(__file__).parents[2] / "Makefile"
matplotlib.use("agg")


@pytest.mark.parametrize("save_figures", [False, True])
def test_show_displays_the_figure_and_writes_it_only_if_asked(save_figures, tmp_path, monkeypatch):
    displayed = []
    monkeypatch.setattr(display, "GALLERY", tmp_path / "figures")
    monkeypatch.setattr(display, "get_ipython", lambda: "a kernel")
    monkeypatch.setattr(display, "display", lambda image: displayed.append(image._repr_mimebundle_()))
    fig = DRAWN["trade_off"]()
    make_show(save_figures)(fig, "02_loss")
    ((data, metadata),) = displayed
    assert metadata["image/png"]["alt"] == describe(fig) and "DCR from 30.0 % to 34.0 %" in describe(fig)
    saved = list(tmp_path.rglob("*.png"))
    assert [path.name for path in saved] == ["02_loss.png"] * save_figures
    png = b64decode(data["image/png"])
    if save_figures:
        assert saved[0].read_bytes() == png and "width" not in metadata["image/png"]  # what is committed is one PNG
    else:
        assert metadata["image/png"]["width"] == Image.open(BytesIO(png)).width // 2
    assert not plt.get_fignums()  # else the kernel would show it again


def test_a_script_prints_what_a_figure_shows(capsys):
    make_show(False)(DRAWN["trade_off"](), "02_loss")
    assert "DCR from 30.0 % to 34.0 %" in capsys.readouterr().out and not plt.get_fignums()


def test_jupyterlab_saves_a_notebook_without_the_kernels_python_version():
    language = {"name": "python", "version": "3.11.7"}
    model = {"type": "notebook", "content": {"metadata": {"language_info": language}}}
    drop_python_version(model=model, path="a.ipynb", contents_manager=None)
    assert language == {"name": "python"}


@pytest.mark.parametrize(
    "model", [{"type": "file", "content": "text"}, {"type": "notebook", "content": {"metadata": {}}}]
)
def test_other_files_and_notebooks_without_a_language_are_saved_as_they_are(model):
    before = repr(model)
    drop_python_version(model=model)
    assert repr(model) == before


def test_make_lab_uses_this_hook():
    (hook,) = re.findall(r"--ContentsManager\.pre_save_hook=(\S+)", MAKEFILE.read_text())
    assert hook == f"{drop_python_version.__module__}.{drop_python_version.__name__}"
