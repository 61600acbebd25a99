"""Run the Python code blocks of a Markdown file in one namespace, as a reader would paste them."""

import re
import sys
from pathlib import Path


def main(path: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", Path(path).read_text(), flags=re.S | re.M)
    if not blocks:
        raise SystemExit(f"{path} has no Python blocks")
    namespace: dict = {}
    for block in blocks:
        print(block)
        exec(compile(block, path, "exec"), namespace)
    print(f"{len(blocks)} blocks of {path} ran")


if __name__ == "__main__":
    main(sys.argv[1])
