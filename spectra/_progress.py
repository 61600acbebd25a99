"""How far a run has come."""

import sys
import time

from spectra import _processes


class Lines:
    """Progress where nobody watches: a line now and then, in a log."""

    PACE = 30.0  # seconds

    def __init__(self, total: int):
        self.total, self.count = total, 0
        self.start = self.last = time.monotonic()

    def update(self, count: int) -> None:
        """Count products, and say so if the last line is some time ago."""
        self.count += count
        if time.monotonic() - self.last >= self.PACE:
            self.last = time.monotonic()
            self._write()

    def close(self) -> None:
        """Say how it ended."""
        self._write()

    def _write(self) -> None:
        seconds = time.monotonic() - self.start
        print(
            f"Lanczos: {self.count:,} of {self.total:,} products, {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )


class Progress:
    """A bar of tqdm where somebody watches, lines in a log elsewhere, or nothing."""

    def __init__(self, show: bool, total: int):
        self.bar = None
        if show and _processes.is_first():
            from tqdm.auto import tqdm

            watched = sys.stderr.isatty() or "ipykernel" in sys.modules
            self.bar = tqdm(total=total, unit="product", desc="Lanczos") if watched else Lines(total)

    def update(self, count: int) -> None:
        """Count products."""
        if self.bar is not None:
            self.bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
