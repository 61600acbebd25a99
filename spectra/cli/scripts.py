"""Python files of the user: a function in them that makes what the command line works on."""

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from spectra.base.errors import SpectraError
from spectra.models.problem import Problem

# What spectra itself stands on, and may still import: a file of such a name beside the problem is not it.
_OURS = frozenset((
    "spectra", "jax", "jaxlib", "flax", "optax", "orbax", "numpy", "scipy", "matplotlib", "mpl_toolkits",
    "safetensors", "threadpoolctl", "tqdm", "typer", "sklearn", "torch", "ml_dtypes", "PIL",
))  # fmt: skip
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_IN_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_loaded: set[str] = set()  # names in `sys.modules` of files that were imported here


def load_problem(file: Path, mesh: Any = None) -> Problem:
    """The problem of a file, on the mesh if there is one; its function may take the mesh as an argument."""
    make: Callable[..., Any] = function_of(file, "problem", "a spectra.Problem")
    given = _taken(file, make, mesh)
    problem = call(file, make, *given)
    if not isinstance(problem, Problem):
        what = "the class" if problem is Problem else kind_of(problem)
        words = f" Its argument was {'the mesh' if mesh is not None else 'None, as there is no --mesh'}."
        raise SpectraError(
            f"problem() in '{file}' returned {what}, not a spectra.Problem(loss_fn, params, data)."
            + (words if given else "")
        )
    return problem if mesh is None else problem.on(mesh)


def _taken(file: Path, make: Callable[..., Any], mesh: Any) -> list[Any]:
    """The arguments for `problem`: the mesh if there is one, or if its only argument has no default."""
    first, needed = _inputs(make)
    if any(one is not first for one in needed):
        raise SpectraError(
            f"problem() in '{file}' needs several arguments, or one by its name: it is given a mesh, or none."
        )
    return [] if first is None or (mesh is None and not needed) else [mesh]


def require_no_arguments(file: Path, make: Callable[..., Any]) -> None:
    """Raise unless a function of the user's can be called without arguments."""
    needed = [one.name for one in _inputs(make)[1]]
    if needed:
        name = getattr(make, "__name__", "the function")
        raise SpectraError(
            f"{name}() in '{file}' needs {', '.join(needed)}: it is called without arguments. Give them "
            "defaults, or name another function that sets them."
        )


def _inputs(make: Callable[..., Any]) -> tuple[inspect.Parameter | None, list[inspect.Parameter]]:
    """The first parameter that a value in its place goes to, and all that need one."""
    inputs = inspect.signature(make).parameters.values()
    first = next((one for one in inputs if one.kind in _IN_PLACE), None)
    return first, [one for one in inputs if one.default is one.empty and one.kind not in _ANY]


def kind_of(value: Any) -> str:
    """What a function of the user's has returned, in words."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def function_of(file: Path, name: str, result: str) -> Callable[..., Any]:
    """The function of this name in a Python file, which is imported and finds the files beside it."""
    if not file.exists():
        raise FileNotFoundError(f"there is no file '{file}'.")
    module_name, location = _name(file.stem), _location(file)
    spec = importlib.util.spec_from_file_location(module_name, location)
    if spec is None or spec.loader is None or not file.is_file():
        raise SpectraError(f"'{file}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    _show_neighbours(str(location.parent))
    sys.modules[module_name] = module
    _loaded.add(module_name)
    call(file, spec.loader.exec_module, module)
    if not callable(getattr(module, name, None)):
        raise SpectraError(f"'{file}' defines no function {name}() that returns {result}.")
    return getattr(module, name)


def call(file: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what the user wrote; what it cannot import or open is one message, with the line of the file."""
    try:
        return function(*arguments)
    except SpectraError:
        raise
    except SystemExit as error:  # which would end the command as if all were done, or without a word why
        raise SpectraError(
            f"'{file}' called sys.exit({error.code!r}): there is nothing to work on."
        ) from error
    except SyntaxError as error:
        line = "" if error.text is None else f"\n    {error.text.strip()}"
        place = f"'{file}'" if error.lineno is None else f"'{error.filename}', line {error.lineno}"
        raise SpectraError(f"{place}: {error.msg}{line}") from error  # of null bytes Python says no place
    except (OSError, ImportError) as error:
        line, trace = None, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(_location(file)):
                line = trace.tb_lineno
            trace = trace.tb_next
        if line is None:
            raise
        raise SpectraError(f"'{file}', line {line}: {type(error).__name__}: {error}") from error
    except Exception as error:
        own = _from_the_files_lines(error, file)
        if own is None:
            raise
        raise SpectraError(f"'{file}' raised an error.\n{own}") from error


def _from_the_files_lines(error: Exception, file: Path) -> str | None:
    """The traceback from the first line of the user's file on; None where there is no such line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != str(_location(file)):
        trace = trace.tb_next
    return None if trace is None else "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _show_neighbours(folder: str) -> None:
    """Let the files of a folder be imported, without their hiding what others mean by the same name."""
    if folder not in sys.path:
        sys.path.append(folder)  # last: `copy.py` beside the problem is not the standard library's
    if not any(isinstance(finder, _Beside) and finder.folder == folder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Beside(folder))


class _Beside(importlib.abc.MetaPathFinder):
    """Finds the files beside a problem for itself and for each other, before packages of their names.

    Other importers are not shown them: a package that imports `datasets` means the package.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is not None or _is_taken(fullname) or not _importer().startswith(self.folder + os.sep):
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, [self.folder])
        return found if found is not None and found.loader is not None else None


def _importer() -> str:
    """File of the code whose `import` is being executed."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and name.partition(".")[0] not in ("importlib", "_frozen_importlib"):
            return str(frame.f_globals.get("__file__", ""))
        frame = frame.f_back
    return ""


def _is_taken(name: str) -> bool:
    return name in sys.stdlib_module_names or name in _OURS


def _name(stem: str) -> str:
    """What a problem's module is called: as its file, unless that is another module's name."""
    taken = _is_taken(stem) or (stem in sys.modules and stem not in _loaded)
    return f"problem_{stem}" if taken else stem


def _location(file: Path) -> Path:
    return file.parent.resolve() / file.name
