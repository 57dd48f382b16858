"""How far a run has come: a bar where somebody watches, elsewhere a line every tenth of the way. And when to stop."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

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


class Stop:
    """A context in which Ctrl-C, SIGTERM or a notebook's stop button ask a run to stop as soon as it can be saved.

    Ctrl-C a second time stops it at once, unsaved. Only a process's main thread is told of signals.

    Attributes:
        asked: whether the run shall stop.
    """

    def __init__(self):
        self.asked, self._at_once, self._before = False, False, {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it the first signal raises KeyboardInterrupt: in an evaluation, which may take long."""
        self._at_once = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if self._at_once or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
