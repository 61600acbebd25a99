"""Signals that ask a run to end: noted while it lasts, heeded where nothing is lost."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from spectra._errors import PreemptedError

WATCHED = (signal.SIGTERM, signal.SIGINT)
_pending: int | None = None
_watching = False


def pending() -> int:
    """The signal that asked the run under way to end; 0 if none did."""
    return _pending or 0


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """While the block lasts, SIGTERM and SIGINT are noted; a second SIGINT interrupts as ever.

    Blocks may be nested: what came in an inner one is still known in the outer one. Outside the main
    thread, which alone receives signals, nothing changes.
    """
    global _pending, _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    _pending, _watching = None, True
    before = {number: signal.signal(number, _note) for number in WATCHED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _pending, _watching = None, False


def _note(number: int, _frame) -> None:
    global _pending
    if number == signal.SIGINT:
        if _pending == signal.SIGINT:
            raise KeyboardInterrupt
        print("\nending after a last checkpoint; press Ctrl-C again to end at once", file=sys.stderr)
    _pending = number


def end(number: int, where: str, folder) -> NoReturn:
    """Raise for a run that was saved in the folder; `where` says how far it came."""
    name = signal.Signals(number).name
    raise PreemptedError(
        f"the run was asked to end ({name}) and did, {where}; its checkpoint is in '{folder}'. "
        "The same command goes on from there.",
        signal=number,
    )
