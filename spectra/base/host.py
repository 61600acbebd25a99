"""The host of a run: memory that is left, threads, other processes, how far it has come, signals to end it.

A signal is noted while the run lasts, and heeded where nothing is lost.
"""

import contextlib
import functools
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import numpy as np

from spectra.base.errors import EndedEarlyError, PreemptedError

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")  # of Linux


def available_bytes(device: Any = None) -> int | None:
    """Free bytes of a device; None where it cannot be asked.

    Of a CPU, its share of MemAvailable, or of what a control group leaves where that is less.
    """
    device = device or jax.local_devices()[0]
    if device.platform != "cpu":
        stats: dict[str, int] = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    try:
        fields = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return None
    # All CPU devices of this process share it.
    return max(0, min([free, *_left_in_groups()])) // jax.local_device_count(device.platform)


def _left_in_groups() -> Generator[int]:
    """What every control group that holds this process leaves: a container's, a job's of a cluster.

    Pages of files count as used there, but the kernel takes them back on demand, as it does for MemAvailable.
    """
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2, one hierarchy for all
            root, limit, used, page = GROUPS, "memory.max", "memory.current", "{}active_file"
        elif "memory" in controllers.split(","):  # version 1
            root, limit, used = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            page = "total_{}active_file"
        else:
            continue
        # In a container the root may be its own group, and the path one that only the machine outside knows.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such group; no limit ("max")
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = folder / "memory.stat"  # not in every sandbox
                pages = dict(each.split() for each in stat.read_text().splitlines()) if stat.exists() else {}
                yield left + sum(int(pages.get(page.format(kind), 0)) for kind in ("", "in"))
            if folder == root:
                break


def resident_bytes() -> int | None:
    """What this process holds in memory; None where the system doesn't say."""
    try:
        return int((PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """JAX's computations on a CPU, where JAX may use one: there float64 and products are what they say."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Hold the BLAS of NumPy and SciPy to one thread; also a decorator. The caller's number comes back."""
    with _pools().limit(limits=1, user_api="blas"):  # of several Python threads the first one decides
        yield


@functools.cache
def _pools() -> "ThreadpoolController":
    from threadpoolctl import ThreadpoolController

    importlib.import_module("scipy.linalg")  # brings a BLAS of its own, which JAX calls as well

    return ThreadpoolController()


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def largest(*values: float) -> tuple[float, ...]:
    """The largest of each number over all processes, which must all call this."""
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import process_allgather

    gathered = np.asarray(process_allgather(np.asarray(values, np.float32)))
    return tuple(float(x) for x in gathered.reshape(jax.process_count(), -1).max(axis=0))


def combined(value: int) -> int:
    """The exclusive or of a 32-bit number over all processes, which must all call this."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    gathered = np.asarray(process_allgather(np.asarray(value, np.uint32))).ravel()
    return functools.reduce(int.__xor__, map(int, gathered))


class Lines:
    """Progress where nobody watches: a line now and then, in a log."""

    PACE = 30.0  # seconds

    def __init__(self, total: int | None, name: str):
        self.total, self.count, self.name, self.text = total, 0, name, ""
        self.start = self.last = time.monotonic()

    def update(self, count: int) -> None:
        """Count products, and say so if the last line is some time ago."""
        self.count += count
        if time.monotonic() - self.last >= self.PACE:
            self.last = time.monotonic()
            self._write()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What the next line says besides; as tqdm's."""
        del refresh
        self.text = f", {text}"

    def close(self) -> None:
        """Say how it ended."""
        self._write()

    def _write(self) -> None:
        seconds = time.monotonic() - self.start
        most = "" if self.total is None else f" of {self.total:,}"
        print(
            f"{self.name}: {self.count:,}{most} products, {seconds:.0f} s{self.text}",
            file=sys.stderr,
            flush=True,
        )


class Progress:
    """A bar of tqdm where somebody watches, lines in a log elsewhere, or nothing.

    Args:
        show: whether to show anything.
        total: products of the whole run; None where they are not known before.
        name: what the run computes.
    """

    def __init__(self, show: bool, total: int | None, name: str = "Lanczos"):
        self.bar = None
        if show and is_first() and sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]
            from tqdm.auto import tqdm

            watched = sys.stderr.isatty() or "ipykernel" in sys.modules
            with contextlib.suppress(OSError):  # a terminal that is gone
                self.bar = tqdm(total=total, unit="product", desc=name) if watched else Lines(total, name)

    def update(self, count: int) -> None:
        """Count products. A terminal or a log that cannot be written any more ends the bar, not the run."""
        if self.bar is not None:
            try:
                self.bar.update(count)
            except OSError:
                self.bar = None

    def note(self, text: str) -> None:
        """How near the run is to its goal."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()


WATCHED = (signal.SIGTERM, signal.SIGINT)
_pending: int | None = None
_watching = False
_begun = True


def pending() -> int:
    """The signal that asked the run under way to end; 0 if none did."""
    return _pending or 0


@contextlib.contextmanager
def watching(*, begun: bool = True) -> Generator[None]:
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
    heeded = [number for number in WATCHED if signal.getsignal(number) is not signal.SIG_IGN]  # as by nohup
    before = {number: signal.signal(number, _note) for number in heeded}
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


def _note(number: int, _frame: object) -> None:
    global _pending
    if not _begun:
        _pending = number  # heeded at the first product if a bare `except:` swallows the error
        raise EndedEarlyError(number)
    if number == signal.SIGINT:
        if _pending == signal.SIGINT:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print("\nending after a last checkpoint; press Ctrl-C again to end at once", file=sys.stderr)
    _pending = number


def end(number: int, where: str, folder: Path, unwritten: str = "") -> NoReturn:
    """Raise for a run that was saved in the folder, or why not; `where` says how far it came."""
    saved = f"its checkpoint is in '{folder}'. The same command resumes from there."
    if unwritten:
        saved = (
            f"but its last checkpoint could not be written to '{folder}': {unwritten}. The same command "
            "resumes from the checkpoint before, or starts anew if there is none."
        )
    name = signal.Signals(number).name
    raise PreemptedError(
        f"the run was asked to end ({name}) and did, {where}; {saved}",
        signal=number,
    )
