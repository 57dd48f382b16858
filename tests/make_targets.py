"""What `make lab` and `make site` start, read from the Makefile."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def make_words(pattern: str) -> list[str]:
    """The words of the text of the Makefile that `pattern` finds, as the shell reads them."""
    return shlex.split(re.search(pattern, MAKEFILE, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " "))


def build_site(out: Path, trees: Path) -> Path:
    """Build the site in `out`, without network and warnings; `trees` keeps what Sphinx has read."""
    words = [str(trees) if word == "build/doctrees" else word for word in make_words(r"^SITE := python ([^\n]*)$")]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    env = os.environ | nowhere | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words, str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return out


@contextmanager
def start_lab(folder: Path, own: Path) -> Iterator[str]:
    """The address of a JupyterLab that runs in a copy of the repository, with runs and settings in the folder `own`."""
    words = [str(Path(sys.executable).with_name("jupyter")), *make_words(r"^lab: .*?\n\t\S+ (.*?) \$\(ARGS\)$")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words += [f"--port={port}", "--no-browser", "--IdentityProvider.token=", "--ServerApp.allow_root=True"]
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
              "JUPYTERLAB_WORKSPACES_DIR", "DIVA_LAB_RUNS")  # fmt: skip
    env = os.environ | {name: str(own / name) for name in places}
    env |= {"JUPYTER_PREFER_ENV_PATH": "1", "DIVA_LAB_FAST": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}
    news = own / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')  # else JupyterLab asks
    with open(own / "log.txt", "w") as log:
        server = subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        yield wait_for(f"http://127.0.0.1:{port}/lab", server)
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen) -> str:
    """Wait until a server answers."""
    for _ in range(120):
        try:
            urllib.request.urlopen(address, timeout=5)
            return address
        except OSError:
            assert server.poll() is None, "the server has stopped"
            time.sleep(1)
    raise TimeoutError(address)
