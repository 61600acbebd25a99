"""Arguments and options that commands share, checked before anything is computed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spectra.base import GROUPINGS, OPERATORS, PLACES


def _one_of(flag: str, names: Sequence[str], help: str) -> Any:
    """An option that is one of a few words, which shells complete; checked before anything is computed."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"'{value}' is not one of {', '.join(names)}.")
        return value

    def begun(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return typer.Option(flag, callback=check, autocompletion=begun, help=help)


def _share(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not between 0 and 1.")
    return value


OutDir = Annotated[
    Path,
    typer.Option(
        "-o", "--out", help="Folder for spectrum.npz and .png; numbered (spectrum-2) if they exist."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing result.")]
ForceFile = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Lanczos steps per probe; default 100.")]
Probes = Annotated[int, typer.Option("--probes", min=1, help="Number of random probes.")]
Tol = Annotated[
    float | None,
    typer.Option("--tol", callback=_share, help="Stop when the mean width of the CDF's band is below this."),
]
Seed = Annotated[
    int, typer.Option("--seed", min=-(2**63), max=2**63 - 1, help="Seed of the probes, of 64 bits.")
]
Kind = Annotated[str, _one_of("--operator", OPERATORS, f"Matrix: one of {', '.join(OPERATORS)}.")]
Block = Annotated[
    str | None, typer.Option("--block", help="Only parameters whose paths match, such as 'Dense_0/*'.")
]
By = Annotated[str | None, _one_of("--blocks", GROUPINGS, "All diagonal blocks, by 'layer' or by 'leaf'.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; messages go to stderr.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print the rows of the result as CSV.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only the result: no messages, no progress.")
]
Picture = Annotated[Path, typer.Option("-o", "--out", "--output", help="Picture: .png, .pdf or .svg.")]

MeshAxes = Annotated[
    str | None, typer.Option("--mesh", help="Axes of the mesh of all devices, such as data=4,model=2.")
]
Distributed = Annotated[bool, typer.Option("--distributed", help="Join the other processes of this run.")]
Saved = Annotated[
    Path | None, typer.Option("--checkpoint", help="Folder to save the run in, and to resume it from.")
]
Minutes = Annotated[
    float, typer.Option("--checkpoint-minutes", help="Longest time between checkpoints, in minutes.")
]
BasisPlace = Annotated[
    str, _one_of("--basis", PLACES, f"Where basis vectors are stored: {', '.join(PLACES)}.")
]
BasisDtype = Annotated[
    str | None, typer.Option("--basis-dtype", help="Dtype of stored basis vectors, such as bfloat16.")
]
