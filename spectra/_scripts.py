"""Python files of the user: a function in them that makes what the command line works on."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectra._errors import SpectraError
from spectra.problem import Problem


def load_problem(file: Path, mesh: Any = None) -> Problem:
    """The problem of a file, on the mesh if there is one; its function may take the mesh as an argument."""
    make: Callable[..., Any] = function_of(file, "problem", "a spectra.Problem")
    problem = make(mesh) if inspect.signature(make).parameters else make()
    if not isinstance(problem, Problem):
        raise SpectraError(
            f"problem() in '{file}' returned a {type(problem).__name__}, not a spectra.Problem."
        )
    return problem if mesh is None else problem.on(mesh)


def function_of(file: Path, name: str, result: str) -> Callable[[], Any]:
    """The function of this name in a Python file, which is imported with its folder on the path."""
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
