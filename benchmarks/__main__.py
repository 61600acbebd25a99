"""Run all benchmarks and write their tables: `python -m benchmarks [-o FILE]`."""

import argparse
from datetime import date
from pathlib import Path

from benchmarks import memory, product, reorthogonalization, streaming, timing, vocabulary

SECTIONS = {
    "product": product,
    "reorthogonalisation": reorthogonalization,
    "memory": memory,
    "streaming": streaming,
    "vocabulary": vocabulary,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("results") / "cpu.md"
    parser.add_argument("-o", "--output", type=Path, default=default)
    output = parser.parse_args().output
    text = [f"# Benchmarks, {date.today()}", "", timing.machine(), ""]
    for name, module in SECTIONS.items():
        text += [f"## {name}", "", (module.__doc__ or "").strip(), "", *module.main(), ""]
        print("\n".join(text[-4:]))
    output.write_text("\n".join(text))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
