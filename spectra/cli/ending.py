"""How a command ends: one message for an error, and an exit code that scripts can act on."""

import contextlib
import os
import re
import signal
import sys
import threading
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
    typer.echo(f"warning: {printable(where + str(message))}", err=True)


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
    sys.stdout.flush()
    typer.echo(f"error: {printable(message)}", err=True)
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
