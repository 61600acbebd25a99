"""Run the Python code blocks of Markdown files as a reader would paste them, each file in one namespace.

Blocks fenced with `py` show other libraries' code and are not run.
"""

import contextlib
import re
import sys
import tempfile
from pathlib import Path

import programs


def run(path: Path) -> int:
    text, namespace, count = path.read_text(), {}, 0
    for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.S | re.M):
        count += 1
        print(block[1])
        above = "\n" * text.count("\n", 0, block.start(1))  # so that errors name the line of the page
        exec(compile(above + block[1], str(path), "exec"), namespace)
    print(f"{count} blocks of {path.name} ran", flush=True)
    namespace.clear()
    programs.release()
    return count


def main(paths: list[str]) -> None:
    files = [Path(path).resolve() for path in paths]
    # What the examples write goes to a folder of its own, which is left before it is removed.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if not sum(map(run, files)):
            raise SystemExit(f"{paths} have no Python blocks")


if __name__ == "__main__":
    programs.share_context()
    programs.seldom_collect()
    main(sys.argv[1:])
