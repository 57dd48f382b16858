"""How far a run has come: a bar where somebody watches, elsewhere a line every tenth of the way."""

import sys
from types import TracebackType

from tqdm import tqdm


def is_live() -> bool:
    """Whether somebody watches: a terminal, or a notebook's front end (a batch run's cannot be asked for input)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


class Progress:
    """A context that is told every step's loss.

    Args:
        total: steps of the run.
        first: steps that were done before.
        label: of the bar or the lines.
    """

    def __init__(self, total: int, first: int, label: str):
        self.total, self.label = total, label
        self.bar = tqdm(total=total, initial=first, desc=label) if is_live() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, step: int, loss: float) -> None:
        """Step number `step`, counted from 0, is done."""
        done = step + 1
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(loss=f"{loss:.4f}")
        elif done % max(1, self.total // 10) == 0 or done == self.total:
            print(f"{self.label}: step {done}/{self.total}, loss {loss:.4f}", flush=True)
