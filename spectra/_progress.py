"""How far a run has come."""

import sys
import time

from spectra import _processes


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
        if show and _processes.is_first():
            from tqdm.auto import tqdm

            watched = sys.stderr.isatty() or "ipykernel" in sys.modules
            self.bar = tqdm(total=total, unit="product", desc=name) if watched else Lines(total, name)

    def update(self, count: int) -> None:
        """Count products."""
        if self.bar is not None:
            self.bar.update(count)

    def note(self, text: str) -> None:
        """How near the run is to its goal."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
