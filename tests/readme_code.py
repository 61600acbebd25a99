"""Run the Python code blocks of Markdown files as a reader would paste them, each file in one namespace.

Blocks fenced with `py` show other libraries' code and are not run.
"""

import os
import re
import sys
import tempfile
from pathlib import Path


def run(path: Path) -> int:
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.S | re.M)
    namespace: dict = {}
    for block in blocks:
        print(block)
        exec(compile(block, str(path), "exec"), namespace)
    print(f"{len(blocks)} blocks of {path.name} ran")
    return len(blocks)


def main(paths: list[str]) -> None:
    files = [Path(path).resolve() for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # what the examples write goes there
        if not sum(map(run, files)):
            raise SystemExit(f"{paths} have no Python blocks")
        os.chdir("/")


if __name__ == "__main__":
    main(sys.argv[1:])
