"""How far a run has come: a panel or a bar where somebody watches, elsewhere a line every tenth. And when to stop."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from tqdm.auto import tqdm


def is_live() -> bool:
    """Whether somebody watches: a terminal, or a notebook's front end (a batch run's cannot be asked for input)."""
    return sys.stderr.isatty() or has_front_end()


def has_front_end() -> bool:
    """Whether this is a notebook's kernel whose front end somebody looks at."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


class View(Protocol):
    """What shows a run's progress."""

    def step(self, done: int, line: dict[str, float]) -> None:
        """So many steps are done; `line` is the last one's record, as in metrics.jsonl."""

    def wait(self, text: str) -> None:
        """Nothing is trained for a while; `text` says why."""

    def report(self, done: int, row: dict[str, float | str]) -> None:
        """An evaluation after so many steps has returned `row`, and training goes on."""

    def close(self) -> None:
        """The run is finished or stopped."""


class Lines:
    """A line every tenth of the way, as in a log.

    Args:
        total: steps of the run.
        first: steps that were done before.
        images: of a step.
        label: the run's id.
    """

    def __init__(self, total: int, first: int, images: int, label: str):
        self.total, self.label = total, label

    def step(self, done: int, line: dict[str, float]) -> None:
        if done % max(1, self.total // 10) == 0 or done == self.total:
            print(f"{self.label}: step {done}/{self.total}, loss {line['loss']:.4f}", flush=True)

    def wait(self, text: str) -> None:
        print(f"{self.label}: {text}", flush=True)

    def report(self, done: int, row: dict[str, float | str]) -> None:
        pass

    def close(self) -> None:
        pass


class Bar:
    """A bar, whose rate and time left count training alone; the arguments are those of `Lines`."""

    def __init__(self, total: int, first: int, images: int, label: str):
        self.bar, self.waits = tqdm(total=total, initial=first, desc=label), 0.0

    def step(self, done: int, line: dict[str, float]) -> None:
        self.bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
        self.bar.update()

    def wait(self, text: str) -> None:
        self.waits = time.time()
        self.bar.set_postfix_str(text)

    def report(self, done: int, row: dict[str, float | str]) -> None:
        self.bar.start_t += time.time() - self.waits
        self.bar.last_print_t = time.time()

    def close(self) -> None:
        self.bar.close()


PANELS: list[Callable[[int, int, int, str], View]] = []  # what a notebook shows in place of a bar; the last one counts


class Progress:
    """A context that is told of every step and evaluation of a run, and shows them.

    Args:
        total, first, images, label: as those of `Lines`.
        folder: of the run.
        rank: of this process; only the first one shows more than it is told.
    """

    def __init__(self, total: int, first: int, images: int, label: str, folder: Path, rank: int = 0):
        kind = Lines if rank or not is_live() else PANELS[-1] if PANELS and has_front_end() else Bar
        if kind is not Lines:
            print(f"{label}: {f'{first} of {total} steps done before, ' if first else ''}in {folder}", flush=True)
        self.view: View = kind(total, first, images, label)
        self.seconds = 0.0  # of the last evaluation

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.view.close()

    def advance(self, done: int, line: dict[str, float]) -> None:
        """As `View.step`."""
        self.view.step(done, line)

    @contextmanager
    def evaluate(self, steps: int) -> Iterator[list[dict]]:
        """Within it the run is evaluated after so many steps; the rows that it gives are put into the list."""
        guess = f" (about {self.seconds:.0f} s)" if self.seconds >= 1 else ""
        self.view.wait(f"evaluating after {steps} steps{guess} ...")
        start, rows = time.perf_counter(), []
        yield rows
        self.seconds = time.perf_counter() - start
        self.view.report(steps, rows[-1] if rows else {})


class Stopped(KeyboardInterrupt):
    """What is raised where a run was asked to stop; a notebook shows it as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return ["KeyboardInterrupt: the run was stopped"]


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

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it the first signal raises `Stopped`: in an evaluation, which may take long."""
        self._at_once = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if self._at_once or (again and number == signal.SIGINT):
            raise Stopped
