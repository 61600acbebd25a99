"""Files that appear whole or not at all."""

import contextlib
import os
import platform
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

OLD = 24 * 3600.0
"""Seconds after which a half-written file counts as left behind where its process cannot be asked for."""
_LONGEST = 100  # bytes of a name that its temporary neighbour repeats: names end at 255
_in_use: set[str] = set()  # temporary files that this process is writing


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A new file beside `path`, to be written in the block; it takes its place when the block ends.

    If the block or the disk fails, `path` is what it was before, and nothing is left beside it. A process
    that is killed in the block leaves a `.part` file, which the next one that writes `path` removes.

    Raises:
        FileExistsError: `path` exists, also if it has come to exist meanwhile, and `overwrite` is false.
    """
    path = Path(path)
    sweep(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_start(path)}{_owner()}-", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    _in_use.add(temporary.name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's own mode is for the owner only
        if overwrite:
            os.replace(temporary, path)
        else:
            _publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        _in_use.discard(temporary.name)


def sweep(path: Path) -> None:
    """Remove what processes that were killed left of `path`: files of dead processes, or a day old."""
    # An owner is a host and a process; eight letters alone are tempfile's, in names of earlier versions.
    pattern = re.compile(
        rf"(?:{re.escape(_start(path))}([0-9a-f]{{8}}-\d+)-|{re.escape(path.name)})\w{{8}}\.part"
    )
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            found = pattern.fullmatch(entry.name)
            if found and entry.name not in _in_use and _is_left_behind(entry, found[1]):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_left_behind(entry: os.DirEntry, owner: str | None) -> bool:
    host, _, process = (owner or "").partition("-")
    if host == _host() and os.name == "posix":
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return int(process) == os.getpid()  # of a process that had this number before
    return entry.stat().st_mtime < time.time() - OLD


def _publish(temporary: Path, path: Path) -> None:
    """Give the file its name, unless something else has it: a link, other than a renaming, fails then."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(f"'{path}' exists") from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _start(path: Path) -> str:
    """What the names of all temporary files of `path` begin with."""
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST:
        return f"{path.name}."
    return f"{path.name[: _LONGEST // 4]}~{zlib.crc32(name):08x}."


def _owner() -> str:
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode('utf-8', 'surrogateescape')):08x}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
