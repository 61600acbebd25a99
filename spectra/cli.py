"""The command line: run, show and plot spectra. Results are saved before anything is drawn."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="See the curvature of neural networks: Hessian spectra with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OutDir = Annotated[Path, typer.Option("--out", help="Folder for spectrum.npz and spectrum.png.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Lanczos steps a probe; default 100.")]
Probes = Annotated[int, typer.Option("--probes", help="Random probes.")]
Tol = Annotated[float | None, typer.Option("--tol", help="Stop at this mean width of the CDF's band.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the probes.")]
Kind = Annotated[
    str, typer.Option("--operator", help="hessian, ggn, fisher, mc-fisher, empirical-fisher or covariance.")
]
Block = Annotated[str | None, typer.Option("--block", help="Parameters by path, such as 'Dense_0/*'.")]
By = Annotated[str | None, typer.Option("--blocks", help="All diagonal blocks: by 'layer' or 'leaf'.")]


@app.command()
def demo(out: OutDir = Path("spectra-demo"), seed: Seed = 0):
    """Train a real network on real data, compute its spectrum, save it and draw it."""
    try:
        from spectra.demos import digits
    except ImportError as error:
        raise typer.Exit(
            _fail(f"{error}. Install the demo's packages: pip install 'spectra-jax[demo]'")
        ) from error
    typer.echo("Training a 64-256-256-10 network on 1,797 handwritten digits ...")
    try:
        problem = digits.problem(seed)
    except ImportError as error:
        raise typer.Exit(
            _fail(f"{error}. Install the demo's packages: pip install 'spectra-jax[demo]'")
        ) from error
    _analyse(problem.operator(), problem.name, out, steps=None, probes=8, tol=None, seed=seed)


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
):
    """Compute the spectrum of a curvature matrix of a problem of your own, or of its diagonal blocks."""
    import jax

    problem = _load_problem(file)
    op = problem.operator(operator, key=jax.random.key(seed))
    name = problem.name if operator == "hessian" else f"{problem.name}, {operator}"
    if block is not None:
        op, name = op.block(block), f"{name}, {block}"
    if blocks is None:
        _analyse(op, name, out, steps=steps, probes=probes, tol=tol, seed=seed)
    else:
        _analyse_blocks(op.blocks(by=blocks), name, out, steps=steps, probes=probes, tol=tol, seed=seed)


@app.command()
def show(result: Annotated[Path, typer.Argument(help="A saved .npz result.")]):
    """Print a saved result."""
    loaded = _load(result)
    typer.echo(_table(loaded) if isinstance(loaded, dict) else repr(loaded))


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A saved .npz result.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture: .png, .pdf or .svg.")],
    learning_rate: Annotated[float | None, typer.Option(help="Draw the line 2 / learning rate.")] = None,
):
    """Draw the density of a saved result."""
    _draw(_load(result), output, learning_rate)


@app.command("export-torch")
def export_torch(
    target: Annotated[str, typer.Argument(help="FILE.py:FUNCTION; it returns (module, example_inputs).")],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder for graph.json and the weights.")],
):
    """Write a PyTorch module as two plain files, which spectra.bridge.load reads without PyTorch."""
    import jax

    from spectra import bridge

    name, _, function = target.rpartition(":")
    if not name or not function:
        raise bridge.BridgeError(f"'{target}': write FILE.py:FUNCTION, the function that builds the module.")
    made = _function_of(Path(name), function, "(module, example_inputs)")()
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
    from spectra._errors import SpectraError

    try:
        app()
    except (SpectraError, FileNotFoundError) as error:
        sys.exit(_fail(str(error)))


def _fail(message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    return 1


def _analyse(op, name: str, out: Path, *, steps, probes: int, tol, seed: int) -> None:
    import jax

    from spectra.report import spectrum

    typer.echo(f"Computing the spectrum of {name}, {op.size:,} parameters ...")
    report = spectrum(
        op,
        key=jax.random.key(seed),
        num_steps=steps,
        num_probes=probes,
        tol=tol,
        progress=True,
        name=name,
    )
    path = report.save(out / "spectrum.npz")
    typer.echo(f"\n{report}\n")
    typer.echo(f"result   {path}")
    picture = out / "spectrum.png"
    _draw(report, picture, None)


def _analyse_blocks(blocks, name: str, out: Path, *, steps, probes: int, tol, seed: int) -> None:
    import jax

    from spectra.density import slq
    from spectra.io import save

    sizes = sum(block.size for block in blocks.values())
    typer.echo(f"Computing the spectra of {len(blocks)} blocks of {name}, {sizes:,} parameters ...")
    key = jax.random.key(seed)
    results = slq(blocks, key=key, num_steps=steps or 100, num_probes=probes, tol=tol, progress=True)
    path = save(results, out / "spectrum.npz")
    typer.echo(f"\n{_table(results)}\n")
    typer.echo(f"result   {path}")
    _draw(results, out / "spectrum.png", None)


def _table(results: dict) -> str:
    """Extremes of every block, a line each."""
    width = max(map(len, results))
    lines = [f"{'block':<{width}}  {'parameters':>10}  {'smallest':>12}  {'largest':>12}"]
    for name, quadrature in results.items():
        low, high = quadrature.range
        lines.append(f"{name:<{width}}  {quadrature.size:>10,}  {low:>12.5g}  {high:>12.5g}")
    return "\n".join(lines)


def _draw(result: Any, path: Path, learning_rate: float | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from spectra.density import spectral_density
    from spectra.plotting import plot_blocks, plot_density
    from spectra.results import Quadrature

    if isinstance(result, dict):
        ax = plot_blocks(result)[0]
    else:
        is_quadrature = isinstance(result, Quadrature)
        density = spectral_density(result) if is_quadrature else getattr(result, "density", result)
        ax = plot_density(density, learning_rate=learning_rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(path, dpi=300)  # pyright: ignore[reportAttributeAccessIssue]
    typer.echo(f"picture  {path}")


def _load(path: Path) -> Any:
    from spectra.io import load

    return load(path)


def _load_problem(file: Path):
    from spectra._errors import SpectraError
    from spectra.problem import Problem

    problem = _function_of(file, "problem", "a spectra.Problem")()
    if not isinstance(problem, Problem):
        raise SpectraError(
            f"problem() in '{file}' returned a {type(problem).__name__}, not a spectra.Problem."
        )
    return problem


def _function_of(file: Path, name: str, result: str) -> Callable[[], Any]:
    """The function of this name in a Python file, which is imported with its folder on the path."""
    from spectra._errors import SpectraError

    if not file.exists():
        raise FileNotFoundError(f"no file '{file}'.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise SpectraError(f"'{file}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise SpectraError(f"'{file}' defines no function {name}() that returns {result}.")
    return getattr(module, name)
