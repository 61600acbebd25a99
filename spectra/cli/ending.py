"""How a command ends: one message for an error, and an exit code that scripts can act on."""

import contextlib
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import typer

from spectra.base.errors import EndedEarlyError, PreemptedError, SpectraError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of every command; with a checkpoint the same command goes on, too."""
RESUME = 75
"""Exit code of a run that was ended from outside and goes on when started again (EX_TEMPFAIL)."""
ELSEWHERE = 74
"""Exit code of a run that has a result, but could not write it where it was asked for (EX_IOERR)."""

_unwritable: weakref.WeakKeyDictionary[Any, OSError] = weakref.WeakKeyDictionary()  # streams, and why


class ResultElsewhereError(SpectraError):
    """The result was computed, but could not be written where it should be; the message says where it is."""


def end(error: BaseException) -> NoReturn:
    """Print an error of spectra, or one that the world around it caused, and leave; raise any other."""
    if isinstance(error, (PreemptedError, EndedEarlyError)):
        fail(str(error))
        leave(INTERRUPTED if error.signal == signal.SIGINT else RESUME)
    if isinstance(error, (SpectraError, OSError)):
        fail(str(error))
        leave(ELSEWHERE if isinstance(error, ResultElsewhereError) else 1)
    if _jax() is not None and isinstance(error, _jax().errors.JaxRuntimeError) and _several():
        fail(
            f"another process of this run was lost: {str(error).splitlines()[0]}\nCheckpoints are kept: with "
            "--checkpoint, the same command resumes the run; give it again on all hosts."
        )
        leave(RESUME)
    raise error


def warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Print a warning as errors are, without the line of whichever package called the command."""
    where = "" if issubclass(category, UserWarning) else f"{filename}, line {lineno}: {category.__name__}: "
    echo(f"warning: {printable(where + str(message))}", err=True)


def echo(text: str, *, err: bool = False) -> OSError | None:
    """Print a line, and return why that was not possible: who reads it may have gone, or the disk of a log
    be full. That ends no run, whose result is not lost; what follows is not tried any more.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # pyright: ignore[reportUnnecessaryComparison]
        return None
    if stream not in _unwritable:
        try:
            typer.echo(text, err=err)
        except OSError as error:
            _unwritable[stream] = error
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what it still holds goes there
    return _unwritable.get(stream)


def require_streams() -> None:
    """Stand-ins for standard streams that whoever started the process has closed: a file that is opened later
    would take their numbers, and messages of XLA go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Let Ctrl-C end the process at once while modules are imported: JAX's makes an ImportError of it."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(code: int) -> NoReturn:
    """End the process; one of several does not wait for the others, which may be gone."""
    if _several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def fail(message: str) -> int:
    """Print an error, and return the exit code that it has unless there is a better one."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    echo(f"error: {printable(message)}", err=True)
    return 1


def printable(text: str) -> str:
    """Text without what would steer a terminal: names in files may hold anything."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
    return text.encode("utf-8", "backslashreplace").decode()


def _jax() -> Any:
    """JAX where a command has imported it: an error before that is not worth the import."""
    return sys.modules.get("jax")


def _several() -> bool:
    """Whether this is one of several processes."""
    return _jax() is not None and _jax().process_count() > 1
