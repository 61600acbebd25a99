"""The command line: run, show and plot spectra. Results are saved before anything is drawn."""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from spectra import _signals
from spectra._errors import PreemptedError, SpectraError
from spectra._place import Place, ResultElsewhereError, keep_elsewhere
from spectra._processes import is_first

app = typer.Typer(
    help="See the curvature of neural networks: Hessian spectra with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OutDir = Annotated[
    Path,
    typer.Option("--out", help="Folder for spectrum.npz and .png; numbered (spectrum-2) if they are there."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a result that is there already.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Lanczos steps a probe; default 100.")]
Probes = Annotated[int, typer.Option("--probes", help="Random probes.")]
Tol = Annotated[float | None, typer.Option("--tol", help="Stop at this mean width of the CDF's band.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the probes.")]
Kind = Annotated[
    str, typer.Option("--operator", help="hessian, ggn, fisher, mc-fisher, empirical-fisher or covariance.")
]
Block = Annotated[str | None, typer.Option("--block", help="Parameters by path, such as 'Dense_0/*'.")]
By = Annotated[str | None, typer.Option("--blocks", help="All diagonal blocks: by 'layer' or 'leaf'.")]

MeshAxes = Annotated[
    str | None, typer.Option("--mesh", help="Axes of the mesh of all devices, such as data=4,model=2.")
]
Distributed = Annotated[bool, typer.Option("--distributed", help="Join the other processes of this run.")]
Saved = Annotated[
    Path | None, typer.Option("--checkpoint", help="Folder to save the run in, and to go on from.")
]
Minutes = Annotated[float, typer.Option("--checkpoint-minutes", help="Longest time between checkpoints.")]
BasisPlace = Annotated[
    str, typer.Option("--basis", help="Where basis vectors lie: inherit, sharded or host.")
]
BasisDtype = Annotated[
    str | None, typer.Option("--basis-dtype", help="Of stored basis vectors, such as bfloat16.")
]
RESUME = 75
"""Exit code of a run that was ended from outside and goes on when started again (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of every command; with a checkpoint the same command goes on, too."""
ELSEWHERE = 74
"""Exit code of a run that has a result, but could not write it where it was asked for (EX_IOERR)."""


@app.command()
def demo(out: OutDir = Path("spectra-demo"), seed: Seed = 0, force: Force = False):
    """Train a real network on real data, compute its spectrum, save it and draw it."""
    place = Place(out, force)
    place.check()
    typer.echo("Training a 64-256-256-10 network on 1,797 handwritten digits ...")
    try:
        from spectra.demos import digits

        problem = digits.problem(seed)
    except ImportError as error:
        raise typer.Exit(
            _fail(f"{error}. Install the demo's packages: pip install 'spectra-jax[demo]'")
        ) from error
    import jax

    _analyse(problem.operator(), problem.name, place, jax.random.key(seed))


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
):
    """Compute the spectrum of a curvature matrix of a problem of your own, or of its diagonal blocks.

    With --checkpoint the same command goes on where the last one ended; exit code 75 asks for that.
    """
    import jax

    from spectra._scripts import load_problem
    from spectra.checkpoint import Checkpoint
    from spectra.distributed import initialize, make_mesh

    if distributed:
        initialize()
    place = Place(out, force)
    if is_first():
        place.check()
    devices = None if mesh is None and not distributed else make_mesh(mesh or "data=-1")
    problem = load_problem(file, devices)
    options: dict[str, Any] = {"num_probes": probes, "tol": tol, "basis": basis, "basis_dtype": basis_dtype}
    if checkpoint is not None:
        options["checkpoint"] = Checkpoint(checkpoint, minutes=checkpoint_minutes)
    op = problem.operator(operator, key=jax.random.key(seed))
    name = problem.name if operator == "hessian" else f"{problem.name}, {operator}"
    if block is not None:
        op, name = op.block(block), f"{name}, {block}"
    with _signals.watching() if checkpoint else contextlib.nullcontext():
        if blocks is None:
            _analyse(op, name, place, jax.random.key(seed), num_steps=steps, **options)
        else:
            _analyse_blocks(
                op.blocks(by=blocks), name, place, jax.random.key(seed), num_steps=steps or 100, **options
            )


@app.command()
def show(result: Annotated[Path, typer.Argument(help="A saved .npz result.")]):
    """Print a saved result."""
    loaded = _load(result)
    with _about(result):
        text = _table(loaded) if isinstance(loaded, dict) else repr(loaded)
    typer.echo(_printable(text))


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A saved .npz result.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture: .png, .pdf or .svg.")],
    learning_rate: Annotated[float | None, typer.Option(help="Draw the line 2 / learning rate.")] = None,
):
    """Draw the density of a saved result."""
    loaded = _load(result)
    with _about(result):
        _draw(loaded, output, learning_rate)


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A saved .npz result, or the .jsonl of a tracker.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page, .html.")],
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
):
    """Write a saved result as one self-contained page: pictures, tables, what the bands mean, provenance."""
    from spectra.page import write_report

    loaded = _load(result)
    with _about(result):
        page = write_report(loaded, output, title=title, source=result.name)
    typer.echo(f"page     {page}")


@app.command("export-torch")
def export_torch(
    target: Annotated[str, typer.Argument(help="FILE.py:FUNCTION; it returns (module, example_inputs).")],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder for graph.json and the weights.")],
):
    """Write a PyTorch module as two plain files, which spectra.bridge.load reads without PyTorch."""
    import jax

    from spectra import bridge
    from spectra._scripts import function_of

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
    except PreemptedError as error:
        _fail(str(error))
        _leave(INTERRUPTED if error.signal == signal.SIGINT else RESUME)
    except ResultElsewhereError as error:
        _fail(str(error))
        _leave(ELSEWHERE)
    except (SpectraError, OSError) as error:
        _fail(str(error))
        _leave(1)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _fail(
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


def _fail(message: str) -> int:
    typer.echo(f"error: {_printable(message)}", err=True)
    return 1


def _printable(text: str) -> str:
    """Text without what would steer a terminal: names in files may hold anything."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
    return text.encode("utf-8", "backslashreplace").decode()


def _say(message: str) -> None:
    """Print, in the first process only."""
    if is_first():
        typer.echo(message)


def _analyse(op, name: str, place: Place, key, **options) -> None:
    from spectra.report import spectrum

    _say(f"Computing the spectrum of {name}, {op.size:,} parameters ...")
    report = spectrum(op, key=key, progress=True, name=name, **options)
    _keep(report, repr(report), place)


def _analyse_blocks(blocks, name: str, place: Place, key, **options) -> None:
    from spectra.density import slq

    sizes = sum(block.size for block in blocks.values())
    _say(f"Computing the spectra of {len(blocks)} blocks of {name}, {sizes:,} parameters ...")
    results = slq(blocks, key=key, progress=True, **options)
    _keep(results, _table(results), place)


def _keep(result: Any, text: str, place: Place) -> None:
    """Save, then print, then draw; of several processes the first does it for all."""
    if not is_first():
        return
    failure, path = None, None
    try:
        path = place.keep(result)
    except OSError as error:
        failure = keep_elsewhere(result, error, place)
    finally:  # whatever went wrong, the numbers have been paid for
        typer.echo(f"\n{text}\n")
    if path is None:
        raise failure or AssertionError
    typer.echo(f"result   {path}")
    try:
        _draw(result, path.with_suffix(".png"), None)
    except OSError as error:
        raise ResultElsewhereError(
            f"the picture could not be written ({error.strerror or error}); the result is in '{path}'."
        ) from error


def _table(results: dict) -> str:
    """A line for each block; results of other kinds one after the other."""
    from spectra._summary import Summary
    from spectra.results import Quadrature

    if not all(isinstance(part, Quadrature) for part in results.values()):
        return "\n\n".join(f"{name}\n{part!r}" for name, part in results.items())
    return repr(Summary(results))


def _draw(result: Any, path: Path, learning_rate: float | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from spectra._files import replacing
    from spectra.plotting.gallery import draw

    ax = draw(result, learning_rate=learning_rate)
    if ax is None:
        raise SpectraError(f"a {type(result).__name__} has no picture: spectra show prints it.")
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    kinds = ax.figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise SpectraError(f"'{path}': a picture ends in {', '.join(f'.{kind}' for kind in kinds)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        ax.figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=300)
    typer.echo(f"picture  {path}")


def _load(path: Path) -> Any:
    from spectra.io import load

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
