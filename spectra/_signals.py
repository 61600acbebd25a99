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
_begun = True


class EndedEarlyError(BaseException):
    """A signal came before there was anything to save; no `except Exception` of a problem stops it."""

    def __init__(self, number: int):
        super().__init__(
            f"the run was asked to end ({signal.Signals(number).name}) and did, before its first product: "
            "nothing has been computed that could be saved. Start the same command again."
        )
        self.signal = number


def pending() -> int:
    """The signal that asked the run under way to end; 0 if none did."""
    return _pending or 0


@contextlib.contextmanager
def watching(*, begun: bool = True) -> Iterator[None]:
    """While the block lasts, SIGTERM and SIGINT are noted; a second SIGINT interrupts as ever.

    Blocks may be nested: what came in an inner one is still known in the outer one. Outside the main
    thread, which alone receives signals, nothing changes.

    Args:
        begun: whether there is, or soon will be, something to save. If not, a signal ends the run at once
            with an `EndedEarlyError`, until `begin()` is called.
    """
    global _pending, _watching, _begun
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    _pending, _watching, _begun = None, True, begun
    before = {number: signal.signal(number, _note) for number in WATCHED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _pending, _watching, _begun = None, False, True


def begin() -> None:
    """From here on there are products to save."""
    global _begun
    _begun = True


def _note(number: int, _frame) -> None:
    global _pending
    if not _begun:
        _pending = number  # heeded at the first product if a bare `except:` swallows the error
        raise EndedEarlyError(number)
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
