"""Plant one fault after another in a copy of the checkout, and say which tests notice.

    python -m tests.mutants                         all faults of `faults.py`
    python -m tests.mutants --only NAME --only NAME
    python -m tests.mutants --list                  names and files
    python -m tests.mutants --table docs/mutants.md writes the results there, below the line "## Results"

The copy is first tested as it is. A fault then meets the tests that `faults.py` names for it, and if it
survives these, the whole default suite. It is killed by a test that fails, or that does not end; not by
code that cannot be imported, which is an error in the fault. The exit status is 1 if more than one fault in
twenty survives. Nothing of the checkout itself is touched.
"""

import argparse
import datetime
import importlib.metadata
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "venv", "build", "dist", "site", "*.egg-info", ".*_cache", ".hypothesis"
)
SHARE = 0.95
"""Of the faults that have to be killed."""
PASSED, FAILED = 0, 1  # exit codes of pytest; all others say that it did not come to test
HEADING = "## Results\n"


class MutantError(Exception):
    """What is wrong with a fault or with the copy, for the reader of the log."""


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended."""

    code: int | None  # exit code, None if it was stopped at the time limit
    failed: tuple[str, ...]
    seconds: float
    text: str


@dataclass(frozen=True)
class Verdict:
    """What became of a fault."""

    fault: Fault
    killed: bool
    by: tuple[str, ...]  # tests
    note: str
    seconds: float


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of the checkout, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="spectra-mutant-") as folder:
        target = Path(folder) / "checkout"
        shutil.copytree(ROOT, target, ignore=LEFT_OUT)
        yield target


def mutated(fault: Fault, root: Path) -> str:
    """The file of a fault with the fault in it."""
    text = (root / "spectra" / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise MutantError(
            f"{fault.name}: its text stands {text.count(fault.old)} times in spectra/{fault.file}, not once; "
            "bring tests/mutants/faults.py up to date."
        )
    return text.replace(fault.old, fault.new)


def run(tests: tuple[str, ...], folder: Path, limit: float, *, to_the_end: bool = False) -> Outcome:
    """Run tests in a copy, up to the first failure; without names the default suite."""
    report = folder / "mutants.xml"
    options = ["-q", "-n", "0", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *([] if to_the_end else ["-x"]), *tests]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    started = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text = process.communicate(timeout=limit)[0]
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests have started
            text, code = process.communicate()[0], None
    return Outcome(code, _failures(report), time.monotonic() - started, text)


def _failures(report: Path) -> tuple[str, ...]:
    """Names of the tests that failed, as pytest takes them."""
    if not report.exists():
        return ()
    cases = xml.etree.ElementTree.parse(report).iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    report.unlink()
    return tuple(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in failed)


def try_fault(fault: Fault, limit: float, named_only: bool) -> Verdict:
    """Plant one fault and run tests until one fails."""
    with copy() as folder:
        source = folder / "spectra" / fault.file
        source.write_text(mutated(fault, folder))
        spent = 0.0
        for tests in (fault.paths,) if named_only else (fault.paths, ()):
            outcome = run(tests, folder, limit)
            spent += outcome.seconds
            if outcome.code is None:
                return Verdict(fault, True, (), f"stopped after {limit:.0f} s", spent)
            if outcome.code == FAILED:
                # The suite as a whole was not tested without the fault.
                fair = bool(tests) or _passes_without(outcome.failed, limit)
                note = "" if fair else "fails without the fault, too"
                return Verdict(fault, fair, outcome.failed, note, spent)
            if outcome.code != PASSED:
                print(outcome.text[-3000:], file=sys.stderr)
                return Verdict(fault, False, (), f"no test was run (exit code {outcome.code})", spent)
        return Verdict(fault, False, (), "survived", spent)


def _passes_without(tests: tuple[str, ...], limit: float) -> bool:
    with copy() as folder:
        return run(tests, folder, limit).code == PASSED


def check_copy(faults: list[Fault], limit: float) -> float:
    """Test the copy without a fault; the seconds that it took."""
    for fault in faults:
        mutated(fault, ROOT)
    with copy() as folder:
        asked = [sys.executable, "-c", "import spectra; print(spectra.__file__)"]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        found = subprocess.run(asked, cwd=folder, env=environment, text=True, capture_output=True, check=True)
        if not Path(found.stdout.strip()).is_relative_to(folder):
            raise MutantError(f"the copy is not what is imported, but {found.stdout.strip()}")
        outcome = run(
            tuple(dict.fromkeys(p for f in faults for p in f.paths)), folder, limit, to_the_end=True
        )
    if outcome.code != PASSED:
        raise MutantError(f"without a fault: {outcome.failed or outcome.code}\n{outcome.text[-3000:]}")
    return outcome.seconds


def row(verdict: Verdict) -> str:
    """One line of the table."""
    by = ", ".join(f"`{test.removeprefix('tests/')}`" for test in verdict.by)
    cells = [verdict.fault.name, f"`{verdict.fault.file}`", by, f"{verdict.seconds:.0f}"]
    cells[2] = " ".join(filter(None, [by, verdict.note])) if verdict.killed else f"**{verdict.note}** {by}"
    return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"


def table(verdicts: list[Verdict], seconds: float) -> str:
    """The results as Markdown."""
    killed = sum(v.killed for v in verdicts)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch"))
    day = datetime.datetime.now(datetime.UTC).date()
    head = (
        f"{killed} of {len(verdicts)} faults killed, {day}, {versions}, Python {platform.python_version()}; "
    )
    head += f"{seconds / 60:.0f} minutes. Seconds are those of the runs of pytest up to the first failure.\n"
    lines = ["| fault | in | killed by | seconds |", "|---|---|---|---|", *map(row, verdicts)]
    return head + "\n" + "\n".join(lines) + "\n"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="a fault; may be repeated")
    parser.add_argument("--list", action="store_true", help="names and files of the faults")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in one process")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that one run of tests may take")
    parser.add_argument("--named-only", action="store_true", help="not the whole suite where these survive")
    parser.add_argument("--table", type=Path, help="page whose results are replaced")
    options = parser.parse_args()
    unknown = {*(options.only or ())} - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no fault is named {sorted(unknown)}; --list has them all")
    faults = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    if options.list:
        print(*(f"{fault.name}: spectra/{fault.file}" for fault in faults), sep="\n")
        return 0
    started = time.monotonic()
    print(f"without a fault: passed in {check_copy(faults, options.limit):.0f} s", flush=True)
    verdicts = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for verdict in pool.map(lambda fault: try_fault(fault, options.limit, options.named_only), faults):
            print(row(verdict), flush=True)
            verdicts.append(verdict)
    results = table(verdicts, time.monotonic() - started)
    print("\n" + results.partition("\n")[0])
    if options.table:
        page = options.table.read_text().partition(HEADING)[0]
        options.table.write_text(page + HEADING + "\n" + results)
    return int(sum(v.killed for v in verdicts) < math.ceil(SHARE * len(verdicts)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MutantError as error:
        sys.exit(str(error))
