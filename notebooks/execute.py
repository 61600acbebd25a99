"""Execute the notebooks from their sources, two at a time, and fail if one of them fails.

    python -m notebooks.execute                 all of them; nothing is written
    python -m notebooks.execute --write 03      the third, and keep its outputs in the .ipynb
    python -m notebooks.execute landmarks       the landmark results; landmarks/03 is the third of them

Without --write the committed .ipynb must have the cells of its source. No output may go to stderr (a
warning is an error here too), show a path of the machine or an object's address.
"""

import argparse
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).parent
SOURCES = "[0-9][0-9]_*.py"
SECONDS = 600  # of one cell
PRIVATE = re.compile(r"/(?:home|root|tmp|usr|opt|work)/|[A-Z]:\\| at 0x[0-9a-f]")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class NotebookError(Exception):
    """What is wrong with a notebook, for the reader of the log."""


def sources(names: list[str]) -> list[Path]:
    """The sources whose names start with one of `names`; all without names."""
    found = {
        label(path): path for folder in (HERE, HERE / "landmarks") for path in sorted(folder.glob(SOURCES))
    }
    chosen = [path for name, path in found.items() if not names or name.startswith(tuple(names))]
    if not chosen:
        raise SystemExit(f"no notebook starts with {names}; there are {list(found)}")
    return chosen


def label(source: Path) -> str:
    """`03_condition_numbers`, or `landmarks/03_gradient_overlap`."""
    return source.relative_to(HERE).with_suffix("").as_posix()


def read(source: Path):
    """The notebook of a source, without outputs, with names of cells that do not change."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict({})
    return notebook


def require_pair(source: Path, notebook) -> None:
    """The committed .ipynb has the cells of its source."""
    paired = source.with_suffix(".ipynb")
    if not paired.exists():
        raise NotebookError(f"{paired.name} is missing: run with --write")
    cells = [[(c.cell_type, c.source) for c in n.cells] for n in (notebook, nbformat.read(paired, 4))]
    if cells[0] != cells[1]:
        raise NotebookError(f"{paired.name} is not what {source.name} gives: run with --write")


def require_clean(notebook) -> None:
    """No warnings, no paths of this machine, no addresses."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            if output.get("name") == "stderr":
                raise NotebookError(f"a cell wrote to stderr: {text}")
            if found := PRIVATE.search(text):
                raise NotebookError(f"an output holds a path or an address: {text[found.start() :][:60]!r}")


def execute(source: Path, write: bool) -> float:
    """Run one notebook; returns seconds."""
    notebook, start = read(source), time.perf_counter()
    if not write:
        require_pair(source, notebook)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )  # fmt: skip
    client.execute()
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    require_clean(notebook)
    if write:
        nbformat.write(notebook, source.with_suffix(".ipynb"))
    return time.perf_counter() - start


def main() -> None:
    """Read the command line, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 03; default: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the .ipynb")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time; default 2")
    options = parser.parse_args()
    # The kernels inherit the environment: pictures go into the notebook whatever the shell has set.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    failed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {s: pool.submit(execute, s, options.write) for s in sources(options.names)}
        for source, run in runs.items():
            try:
                print(f"{label(source)}: {run.result():.0f} s", flush=True)
            except (NotebookError, CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                failed.append(label(source))
                print(f"{label(source)}: FAILED\n{ANSI.sub('', str(error))}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} notebooks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
