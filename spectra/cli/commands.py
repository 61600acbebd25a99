"""The command line: run, show and plot spectra. Results are saved before anything is drawn.

What the commands do is in `running` and `showing`, which are imported with the first use: help, version and
completion wait neither for JAX nor for matplotlib.
"""

import io
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

import spectra
from spectra.cli.arguments import (
    BasisDtype,
    BasisPlace,
    Block,
    By,
    Csv,
    Distributed,
    Force,
    ForceFile,
    Json,
    Kind,
    MeshAxes,
    Minutes,
    OutDir,
    Picture,
    Probes,
    Quiet,
    Saved,
    Seed,
    Steps,
    Tol,
)
from spectra.cli.ending import end, require_streams, starting, warn

app = typer.Typer(
    help="See the curvature of neural networks: Hessian spectra with error bars.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spectra {spectra.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", is_eager=True, callback=_print_version, help="Print the version."),
    ] = False,
):
    """See the curvature of neural networks: Hessian spectra with error bars."""


@app.command()
def demo(
    out: OutDir = Path("spectra-demo"),
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
):
    """Train a real network on real data, compute its spectrum, save it and draw it."""
    with starting():
        from spectra.cli import output, running

    running.demo(output.Place(out, force), output.Voice(quiet, _form(as_json)), seed)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Python file with problem() -> spectra.Problem.")],
    out: OutDir = Path("spectra-out"),
    steps: Steps = None,
    probes: Probes = 8,
    tol: Tol = None,
    seed: Seed = 0,
    operator: Kind = "hessian",
    block: Block = None,
    blocks: By = None,
    mesh: MeshAxes = None,
    distributed: Distributed = False,
    checkpoint: Saved = None,
    checkpoint_minutes: Minutes = 10.0,
    basis: BasisPlace = "inherit",
    basis_dtype: BasisDtype = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
):
    """Compute the spectrum of a curvature matrix of your own problem, or of its diagonal blocks.

    With --checkpoint, the same command resumes an interrupted run, which ends with exit code 75.
    """
    with starting():
        from spectra.cli import output, running

    running.run(
        running.Subject(file, operator, block, blocks, mesh, distributed),
        output.Place(out, force),
        output.Voice(quiet, _form(as_json)),
        seed,
        checkpoint,
        checkpoint_minutes,
        num_steps=steps,
        num_probes=probes,
        tol=tol,
        basis=basis,
        basis_dtype=basis_dtype,
    )


@app.command()
def show(
    result: Annotated[Path, typer.Argument(help="A saved .npz result, or the .jsonl of a tracker.")],
    as_json: Json = False,
    as_csv: Csv = False,
):
    """Print a saved result as a table, as JSON with all its fields, or as CSV."""
    form = _form(as_json, as_csv)
    with starting():
        from spectra.cli import output, showing

    showing.show(result, output.Voice(form=form))


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Two or more saved results.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Picture that shows all of them: .png, .pdf or .svg.")
    ] = None,
    as_json: Json = False,
    as_csv: Csv = False,
    force: ForceFile = False,
):
    """Compare spectra: a table with one row per spectrum or per block, and a picture."""
    form = _form(as_json, as_csv)
    if len(results) < 2:
        raise typer.BadParameter("a comparison needs at least two results.")
    if twice := [path for path in results if results.count(path) > 1]:
        raise typer.BadParameter(f"'{twice[0]}' is named twice.")
    with starting():
        from spectra.cli import output, showing

    showing.compare(results, out, output.Voice(form=form), force)


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A saved .npz result, or the .jsonl of a tracker.")],
    output: Picture,
    learning_rate: Annotated[float | None, typer.Option(help="Draw a line at 2 / learning rate.")] = None,
    force: ForceFile = False,
):
    """Draw a saved result: a density, eigenvalues, a history, or a slice of the loss."""
    with starting():
        from spectra.cli import showing

    showing.plot(result, output, learning_rate, force)


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A saved .npz result, or the .jsonl of a tracker.")],
    output: Annotated[
        Path, typer.Option("-o", "--out", "--output", help="The page to write, an .html file.")
    ],
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    force: ForceFile = False,
):
    """Write a saved result as one self-contained page with pictures, tables, legends and provenance."""
    with starting():
        from spectra.cli import showing

    showing.report(result, output, title, force)


@app.command()
def watch(
    runs: Annotated[
        list[Path], typer.Argument(help="The .jsonl files of trackers; they need not exist yet.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Keep rewriting the page to this .html file instead of serving it."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port on this machine, by default 8765; 0 for any free one."),
    ] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds between two reads of the files.")] = 5,
    once: Annotated[bool, typer.Option("--once", help="With --out: write the page once and exit.")] = False,
):
    """Follow training runs on a live page with their pictures, until Ctrl-C.

    The page is served to this machine only, or written to a file that the browser reloads by itself.
    """
    if once and output is None:
        raise typer.BadParameter("--once writes a page: name its file with --out.")
    if port is not None and output is not None:
        raise typer.BadParameter("--port serves the page and --out writes it to a file: choose one of them.")
    with starting():
        from spectra.cli import showing

    showing.watch(runs, output, 8765 if port is None else port, seconds, once)


@app.command("export-torch")
def export_torch(
    target: Annotated[
        str, typer.Argument(help="FILE.py:FUNCTION, where the function returns (module, example_inputs).")
    ],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder for graph.json and the weights.")],
    force: ForceFile = False,
):
    """Export a PyTorch module to two plain files, which spectra.bridge.load reads without PyTorch."""
    with starting():
        from spectra.cli import running

    running.export_torch(target, output, force)


def main() -> None:
    """Entry point: errors of spectra are printed as one message, without a traceback."""
    require_streams()
    os.environ["MPLBACKEND"] = "agg"  # pictures go into files: a backend for windows need not even exist
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ± is no reason to lose a result
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = warn
    try:
        app([_from_home(argument) for argument in sys.argv[1:]])
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError) and "jax" not in sys.modules:
            sys.exit(0)  # nothing was computed: of a help text the head was enough, as in `| head`
        if not done.code:  # all is written: a signal that comes now finds nothing to end
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except BaseException as error:
        end(error)


def _from_home(argument: str) -> str:
    """An argument whose `~/` the shell has left, as bash does in `--out=~/runs`: not a folder named ~."""
    home = os.path.expanduser("~")
    return re.sub(r"^((?:--?[\w-]+=)?)~/", lambda found: f"{found[1]}{home}/", argument)


def _form(as_json: bool = False, as_csv: bool = False) -> str:
    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv exclude each other: choose one.")
    return "json" if as_json else "csv" if as_csv else "text"
