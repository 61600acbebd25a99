"""The command line: run, show and plot spectra. Results are saved before anything is drawn."""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from spectra.base import progress
from spectra.base.errors import PreemptedError, SpectraError
from spectra.base.host import is_first
from spectra.base.paths import GROUPINGS
from spectra.cli.output import (
    INTERRUPTED,
    Place,
    ResultElsewhereError,
    Voice,
    draw,
    fail,
    keep,
    picture_path,
    require_free,
)
from spectra.krylov.plan import PLACES
from spectra.models.problem import OPERATORS

app = typer.Typer(
    help="See the curvature of neural networks: Hessian spectra with error bars.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _one_of(*names: str) -> Callable[[str | None], str | None]:
    """A check of an argument that is one of a few words, before anything is computed."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"'{value}' is not one of {', '.join(names)}.")
        return value

    return check


def _print_version(wanted: bool) -> None:
    if wanted:
        import spectra

        typer.echo(f"spectra {spectra.__version__}")
        raise typer.Exit


def _share(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not between 0 and 1.")
    return value


OutDir = Annotated[
    Path,
    typer.Option(
        "-o", "--out", help="Folder for spectrum.npz and .png; numbered (spectrum-2) if they are there."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a result that is there already.")]
ForceFile = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Lanczos steps per probe; default 100.")]
Probes = Annotated[int, typer.Option("--probes", min=1, help="Random probes.")]
Tol = Annotated[
    float | None,
    typer.Option("--tol", callback=_share, help="Stop at this mean width of the CDF's band."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the probes.")]
Kind = Annotated[
    str,
    typer.Option("--operator", callback=_one_of(*OPERATORS), help=f"One of {', '.join(OPERATORS)}."),
]
Block = Annotated[str | None, typer.Option("--block", help="Parameters by path, such as 'Dense_0/*'.")]
By = Annotated[
    str | None,
    typer.Option("--blocks", callback=_one_of(*GROUPINGS), help="All diagonal blocks: by 'layer' or 'leaf'."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; messages go to stderr.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print the rows of the result as CSV.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No messages and no progress: the result alone.")]
Picture = Annotated[Path, typer.Option("-o", "--out", "--output", help="Picture: .png, .pdf or .svg.")]

MeshAxes = Annotated[
    str | None, typer.Option("--mesh", help="Axes of the mesh of all devices, such as data=4,model=2.")
]
Distributed = Annotated[bool, typer.Option("--distributed", help="Join the other processes of this run.")]
Saved = Annotated[
    Path | None, typer.Option("--checkpoint", help="Folder to save the run in, and to go on from.")
]
Minutes = Annotated[float, typer.Option("--checkpoint-minutes", help="Longest time between checkpoints.")]
BasisPlace = Annotated[
    str,
    typer.Option("--basis", callback=_one_of(*PLACES), help=f"Where basis vectors lie: {', '.join(PLACES)}."),
]
BasisDtype = Annotated[
    str | None, typer.Option("--basis-dtype", help="Of stored basis vectors, such as bfloat16.")
]
RESUME = 75
"""Exit code of a run that was ended from outside and goes on when started again (EX_TEMPFAIL)."""
ELSEWHERE = 74
"""Exit code of a run that has a result, but could not write it where it was asked for (EX_IOERR)."""


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
    place, voice = Place(out, force), _voice(quiet, as_json)
    place.check()
    voice.say("Training a 64-256-256-10 network on 1,797 handwritten digits ...")
    try:
        from spectra.demos import digits

        problem = digits.problem(seed)
    except ImportError as error:
        raise typer.Exit(
            fail(f"{error}. Install the demo's packages: pip install 'spectra-jax[demo]'")
        ) from error
    import jax

    _analyse(problem.operator(), problem.name, place, voice, jax.random.key(seed))


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
    """Compute the spectrum of a curvature matrix of a problem of your own, or of its diagonal blocks.

    With --checkpoint the same command goes on where the last one ended; exit code 75 asks for that.
    """
    import jax

    from spectra.cli.scripts import load_problem
    from spectra.distributed import initialize, make_mesh
    from spectra.runs.checkpoint import Checkpoint

    if distributed:
        initialize()
    watched = progress.watching(begun=False) if checkpoint else contextlib.nullcontext()
    with _interruptible(checkpoint), watched:
        place, voice = Place(out, force), _voice(quiet, as_json)
        if is_first():
            place.check()
        devices = None if mesh is None and not distributed else make_mesh(mesh or "data=-1")
        problem = load_problem(file, devices)
        options: dict[str, Any] = {
            "num_probes": probes,
            "tol": tol,
            "basis": basis,
            "basis_dtype": basis_dtype,
        }
        if checkpoint is not None:
            options["checkpoint"] = Checkpoint(checkpoint, minutes=checkpoint_minutes)
        op = problem.operator(operator, key=jax.random.key(seed))
        name = problem.name if operator == "hessian" else f"{problem.name}, {operator}"
        if block is not None:
            op, name = op.block(block), f"{name}, {block}"
        parts = None if blocks is None else op.blocks(by=blocks)
        progress.begin()
        if parts is None:
            _analyse(op, name, place, voice, jax.random.key(seed), num_steps=steps, **options)
        else:
            options["num_steps"] = steps or 100
            _analyse_blocks(parts, name, place, voice, jax.random.key(seed), **options)


@app.command()
def show(
    result: Annotated[Path, typer.Argument(help="A saved .npz result, or the .jsonl of a tracker.")],
    as_json: Json = False,
    as_csv: Csv = False,
):
    """Print a saved result: as a table, as JSON with all of its fields, or as rows of CSV."""
    voice, loaded = _voice(False, as_json, as_csv), _load(result)
    with _about(result):
        voice.show(loaded)


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Two saved results or more.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Picture of all in one: .png, .pdf or .svg.")
    ] = None,
    as_json: Json = False,
    as_csv: Csv = False,
    force: ForceFile = False,
):
    """Compare spectra: a table with a row for each, or for each block, and a picture."""
    from spectra.report.summary import Summary

    if out is not None:
        require_free(force, picture_path(out))
    if len(results) < 2:
        raise typer.BadParameter("a comparison needs two results or more.")
    table = Summary({name: q for path in results for name, q in _spectra_of(path, results).items()})
    _voice(False, as_json, as_csv).show(table)
    if out is not None:
        draw(table.quadratures, out, Voice())


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A saved .npz result, or the .jsonl of a tracker.")],
    output: Picture,
    learning_rate: Annotated[float | None, typer.Option(help="Draw the line 2 / learning rate.")] = None,
    force: ForceFile = False,
):
    """Draw a saved result: a density, eigenvalues, a history or the loss in a plane."""
    require_free(force, picture_path(output))
    loaded = _load(result)
    with _about(result):
        draw(loaded, output, Voice(), learning_rate)


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A saved .npz result, or the .jsonl of a tracker.")],
    output: Annotated[Path, typer.Option("-o", "--out", "--output", help="The page, .html.")],
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    force: ForceFile = False,
):
    """Write a saved result as one self-contained page: pictures, tables, what the bands mean, provenance."""
    from spectra.report.page import page_path, write_report

    require_free(force, page_path(output))
    loaded = _load(result)
    with _about(result):
        page = write_report(loaded, output, title=title, source=result.name)
    typer.echo(f"page     {page}")


@app.command()
def watch(
    runs: Annotated[
        list[Path], typer.Argument(help="The .jsonl files of trackers; they may not be there yet.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Write the page to this .html, again and again, instead of serving it."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port on this machine, 8765 by default; 0 takes a free one."),
    ] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Time between two looks at the files.")] = 5,
    once: Annotated[bool, typer.Option("--once", help="With --out: write the page once and end.")] = False,
):
    """Follow runs while they train: a live page with their pictures, until Ctrl-C.

    Served on this machine alone, or written to a file that a browser reloads by itself.
    """
    import matplotlib

    from spectra.report.live import LivePage, serve
    from spectra.report.page import page_path

    matplotlib.use("Agg")  # pages are drawn in threads, which have no windows
    if once and output is None:
        raise typer.BadParameter("--once writes a page: say where with --out.")
    if port is not None and output is not None:
        raise typer.BadParameter("--port serves the page, --out writes it to a file: leave one of them out.")
    page = LivePage(runs, seconds)
    with contextlib.suppress(KeyboardInterrupt):
        if output is None:
            with serve(page, 8765 if port is None else port) as server:
                typer.echo(f"page     http://127.0.0.1:{server.server_port}/   (Ctrl-C ends)")
                server.serve_forever()
        else:
            path = page_path(output)
            page.write(path)
            typer.echo(f"page     {path}")
            while not once:
                time.sleep(seconds)
                page.write(path)


@app.command("export-torch")
def export_torch(
    target: Annotated[str, typer.Argument(help="FILE.py:FUNCTION; it returns (module, example_inputs).")],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder for graph.json and the weights.")],
    force: ForceFile = False,
):
    """Write a PyTorch module as two plain files, which spectra.bridge.load reads without PyTorch."""
    import jax

    from spectra import bridge
    from spectra.cli.scripts import function_of

    require_free(force, *(output / name for name in ("graph.json", "weights.safetensors")))
    name, _, function = target.rpartition(":")
    if not name or not function:
        raise bridge.BridgeError(f"'{target}': write FILE.py:FUNCTION, the function that builds the module.")
    made = function_of(Path(name), function, "(module, example_inputs)")()
    if not isinstance(made, tuple) or len(made) != 2:
        raise bridge.BridgeError(
            f"{function}() in '{name}' returned a {type(made).__name__}, not (module, example_inputs)."
        )
    typer.echo("Exporting ...")
    bridge.export(*made, output)
    with jax.enable_x64(True):
        model = bridge.load(output)
    size = sum(p.size for p in model.params.values())
    batch = "any" if model.dynamic_batch else "the example's only"
    typer.echo(
        f"module   {type(made[0]).__name__}, {size:,} parameters in {len(model.params)} arrays\n"
        f"graph    {len(model.graph.nodes)} nodes of {len(model.operators)} operators, batch size: {batch}\n"
        f"written  {output / 'graph.json'}\n         {output / 'weights.safetensors'}"
    )


def main() -> None:
    """Entry point: errors of spectra are printed as one message, without a traceback."""
    import jax

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ± is no reason to lose a result
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as done:
        if not done.code:  # all is written: a signal that comes now finds nothing to end
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except (PreemptedError, progress.EndedEarlyError) as error:
        fail(str(error))
        _leave(INTERRUPTED if error.signal == signal.SIGINT else RESUME)
    except ResultElsewhereError as error:
        fail(str(error))
        _leave(ELSEWHERE)
    except (SpectraError, OSError) as error:
        fail(str(error))
        _leave(1)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        fail(
            f"another process of this run was lost: {str(error).splitlines()[0]}\nWhat was saved with "
            "--checkpoint stays: start the same command again on all hosts."
        )
        _leave(RESUME)


def _leave(code: int) -> NoReturn:
    """End the process; one of several does not wait for the others, which may be gone."""
    import jax

    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def _interruptible(checkpoint: Path | None) -> Iterator[None]:
    """Ctrl-C ends a run with words on how to resume the next one, or this one."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint is None:
            how = "nothing was kept. With --checkpoint FOLDER a run saves itself, and can be resumed"
        else:
            how = f"the same command resumes from the last checkpoint in '{checkpoint}', if there is one"
        fail(f"interrupted: {how}.")
        _leave(INTERRUPTED)


def _voice(quiet: bool, as_json: bool = False, as_csv: bool = False) -> Voice:
    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv are two forms of one result: choose one.")
    return Voice(quiet, "json" if as_json else "csv" if as_csv else "text")


def _analyse(op, name: str, place: Place, voice: Voice, key, **options) -> None:
    from spectra.report.spectrum import spectrum

    voice.say(f"Computing the spectrum of {name}, {op.size:,} parameters ...")
    keep(spectrum(op, key=key, progress=not voice.quiet, name=name, **options), place, voice)


def _analyse_blocks(blocks, name: str, place: Place, voice: Voice, key, **options) -> None:
    from spectra.density.slq import slq

    sizes = sum(block.size for block in blocks.values())
    voice.say(f"Computing the spectra of {len(blocks)} blocks of {name}, {sizes:,} parameters ...")
    keep(slq(blocks, key=key, progress=not voice.quiet, **options), place, voice)


def _spectra_of(path: Path, among: list[Path]) -> dict[str, Any]:
    """The quadratures of a file, named after it, with its folder where another file has the same name."""
    from spectra.results import as_quadrature

    loaded = _load(path)
    name = path.stem if sum(other.stem == path.stem for other in among) == 1 else str(path.with_suffix(""))
    if isinstance(loaded, dict):
        return {f"{name}: {block}": as_quadrature(part) for block, part in loaded.items()}
    return {name: as_quadrature(loaded)}


def _load(path: Path) -> Any:
    from spectra.report.files import load

    return load(path)


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Numbers that pass every check and cannot be shown all the same are the file's fault, in words."""
    try:
        yield
    except (SpectraError, OSError):
        raise
    except Exception as error:
        raise SpectraError(
            f"'{path}' cannot be shown: its numbers contradict each other ({type(error).__name__}: {error})."
        ) from error
