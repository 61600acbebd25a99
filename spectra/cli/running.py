"""What the commands do that compute: the spectrum of a problem, of its blocks, the export of a module."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import typer

from spectra import bridge
from spectra.base import host
from spectra.base.host import is_first
from spectra.cli.ending import INTERRUPTED, fail, leave
from spectra.cli.output import Place, Voice, keep, require_free, require_writable
from spectra.cli.scripts import call, function_of, kind_of, load_problem, require_no_arguments
from spectra.density.slq import slq
from spectra.distributed import initialize, make_mesh
from spectra.report.spectrum import spectrum
from spectra.runs.checkpoint import Checkpoint


def demo(place: Place, voice: Voice, seed: int) -> None:
    """The spectrum of a small network that is trained here."""
    place.check()
    with _interruptible("nothing was kept. The same command starts again"):
        voice.say("Training a 64-256-256-10 network on 1,797 handwritten digits ...")
        try:
            from spectra.demos import digits

            problem = digits.problem(seed)
        except ImportError as error:
            raise typer.Exit(
                fail(f"{error}. Install the demo's packages: pip install 'spectra-jax[demo]'")
            ) from error
        _analyse(problem.operator(), problem.name, place, voice, jax.random.key(seed))


class Subject(NamedTuple):
    """Which matrix of which problem: the arguments of `spectra run` that say so."""

    file: Path
    operator: str
    block: str | None
    blocks: str | None
    mesh: str | None
    distributed: bool


def run(
    subject: Subject,
    place: Place,
    voice: Voice,
    seed: int,
    checkpoint: Path | None,
    minutes: float,
    **options: Any,
) -> None:
    """The spectrum of a problem of the user's; `options` are those of `spectra.spectrum`."""
    if subject.distributed:
        initialize()
    watched = host.watching(begun=False) if checkpoint else contextlib.nullcontext()
    if checkpoint is None:
        how = "nothing was kept. With --checkpoint FOLDER a run is saved and can be resumed"
    else:
        how = f"the same command resumes from the last checkpoint in '{checkpoint}', if there is one"
    with _interruptible(how), watched:
        if is_first():
            place.check()
        if checkpoint is not None:
            options["checkpoint"] = Checkpoint(checkpoint, minutes=minutes)
        with voice.others():
            op, name = _operator(subject, jax.random.key(seed))
            parts = None if subject.blocks is None else op.blocks(by=subject.blocks)
        host.begin()
        if parts is None:
            _analyse(op, name, place, voice, jax.random.key(seed), **options)
        else:
            options["num_steps"] = options["num_steps"] or 100
            _analyse_blocks(parts, name, place, voice, jax.random.key(seed), **options)


def _operator(subject: Subject, key: jax.Array) -> tuple[Any, str]:
    spread = subject.mesh is not None or subject.distributed
    problem = load_problem(subject.file, make_mesh(subject.mesh or "data=-1") if spread else None)
    op = problem.operator(subject.operator, key=key)
    name = problem.name if subject.operator == "hessian" else f"{problem.name}, {subject.operator}"
    return (op, name) if subject.block is None else (op.block(subject.block), f"{name}, {subject.block}")


@contextlib.contextmanager
def _interruptible(how: str) -> Iterator[None]:
    """Ctrl-C ends a run with words on how to resume the next one, or this one."""
    try:
        yield
    except KeyboardInterrupt:
        fail(f"interrupted: {how}.")
        leave(INTERRUPTED)


def _analyse(op, name: str, place: Place, voice: Voice, key, **options) -> None:
    voice.say(f"Computing the spectrum of {name}, {op.size:,} parameters ...")
    with voice.others():
        found = spectrum(op, key=key, progress=not voice.quiet, name=name, **options)
    keep(found, place, voice)


def _analyse_blocks(blocks, name: str, place: Place, voice: Voice, key, **options) -> None:
    sizes = sum(block.size for block in blocks.values())
    voice.say(f"Computing the spectra of {len(blocks)} blocks of {name}, {sizes:,} parameters ...")
    with voice.others():
        found = slq(blocks, key=key, progress=not voice.quiet, **options)
    keep(found, place, voice)


def export_torch(target: str, output: Path, force: bool) -> None:
    """The files of a PyTorch module that a function of the user builds."""
    name, _, function = target.rpartition(":")
    if not name or not function:
        raise typer.BadParameter(f"'{target}': pass FILE.py:FUNCTION, the function that builds the module.")
    require_free(force, *(output / name for name in ("graph.json", "weights.safetensors")))
    require_writable(output)
    how = (
        f"the export is not complete. The same command starts it anew, with --force if '{output}' holds files"
    )
    with _interruptible(how):
        file = Path(name)
        make = function_of(file, function, "(module, example_inputs)")
        require_no_arguments(file, make)
        made = call(file, make)
        if not isinstance(made, tuple) or len(made) != 2:
            raise bridge.BridgeError(
                f"{function}() in '{name}' returned {kind_of(made)}, not (module, example_inputs)."
            )
        Voice().say("Exporting ...")
        bridge.export(*made, output)
        with jax.enable_x64(True):
            model = bridge.load(output)
    size = sum(p.size for p in model.params.values())
    batch = "any" if model.dynamic_batch else "only that of the example"
    Voice().say(
        f"module   {type(made[0]).__name__}, {size:,} parameters in {len(model.params)} arrays\n"
        f"graph    {len(model.graph.nodes)} nodes of {len(model.operators)} operators, batch size: {batch}\n"
        f"written  {output / 'graph.json'}\n         {output / 'weights.safetensors'}"
    )
