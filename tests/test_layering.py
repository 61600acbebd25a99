"""Imports flow one way, the public names are declared once, and each documents itself."""

import ast
import doctest
import graphlib
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import spectra
from spectra.operators.arguments import DataOptions

ROOT = Path(spectra.__file__).parent
# A module may import from earlier layers, and from its own.
LAYERS = [
    {"base"},
    {"quadrature"},
    {"results"},
    {"operators"},
    {"distributed"},
    {"runs"},
    {"krylov"},
    {"density"},
    {"estimators"},
    {"models"},
    {"bridge"},
    {"report"},
    {"training"},
    {"public"},  # the public names
    {"demos"},
    {"cli"},
]
# Methods of results that need a later layer (`.plot()`, `.save()`, `.basis`) call what it provides: see
# `spectra.results.base.provides`.


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        if relative.parts not in (("__init__",), ("__main__",)):
            yield path, relative.parts[0]


def level(name: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert found, f"the module spectra/{name} has no layer; give it one here"
    return found[0]


def imports(tree):
    """Name of the imported unit for every import of the package, at the top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "spectra":
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("spectra."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("spectra."))


def test_every_layer_names_modules_that_exist():
    existing = {unit for _, unit in modules()}
    assert set().union(*LAYERS) == existing


@pytest.mark.parametrize(("path", "unit"), list(modules()), ids=lambda x: getattr(x, "stem", x))
def test_imports_flow_one_way(path, unit):
    for name in imports(ast.parse(path.read_text())):
        assert level(name) <= level(unit), f"{path.name} imports the later layer {name}"


def needed(node, names):
    """The modules that one imports, at the top and in functions, without those for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").partition(".")[0] == "spectra":
            inner = {f"{child.module}.{alias.name}" for alias in child.names}
            yield from inner & names
            if inner - names and child.module in names:
                yield child.module
        elif isinstance(child, ast.Import):
            yield from {alias.name for alias in child.names} & names
        yield from needed(child, names)


def test_no_module_imports_itself_through_others():
    parts = {path: path.relative_to(ROOT.parent).with_suffix("").parts for path, _ in modules()}
    names = {path: ".".join(p for p in of if p != "__init__") for path, of in parts.items()}
    graph = {
        name: set(needed(ast.parse(path.read_text()), set(names.values()))) for path, name in names.items()
    }
    assert len(tuple(graphlib.TopologicalSorter(graph).static_order())) == len(names)  # a circle is an error


def test_no_module_needs_a_private_part_of_jax():
    for path, _ in modules():
        text = path.read_text()
        assert "jax._src" not in text, path
        assert "jax.config.update" not in text, f"{path}: global flags are the user's"


def test_programs_are_compiled_in_one_way():
    """With the options of the platform. The bridge compiles each operator alone, with options of its own;
    what `krylov.basis` calls a program is part of others."""
    for path, unit in modules():
        if unit not in ("bridge", "demos") and path.stem not in ("programs", "basis"):
            calls = re.findall(r"^@jax\.jit|= jax\.jit\(|partial\(jax\.jit", path.read_text(), flags=re.M)
            assert not calls, path


def test_public_names_are_declared_once_and_sorted():
    tree = ast.parse((ROOT / "public.py").read_text())
    imported = [
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == sorted(spectra.__all__)
    assert len(set(spectra.__all__)) == len(spectra.__all__)
    assert spectra.__all__ == sorted(spectra.__all__)


PUBLIC = [(name, getattr(spectra, name)) for name in spectra.__all__]
FUNCTIONS = [(name, x) for name, x in PUBLIC if inspect.isfunction(x)]
TAKE_OPTIONS = [x for _, x in PUBLIC if "**options: see `" in (inspect.getdoc(x) or "")]


@pytest.mark.parametrize(("name", "value"), PUBLIC)
def test_public_names_have_docstrings(name, value):
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for member, attribute in vars(value).items():
            if not member.startswith("_") and callable(attribute):
                assert inspect.getdoc(getattr(value, member)), f"{name}.{member}"


@pytest.mark.parametrize(("name", "value"), FUNCTIONS)
def test_public_functions_have_an_example(name, value):
    text = inspect.getdoc(value)
    assert "Examples:" in text
    assert doctest.DocTestParser().get_examples(text) or "See `" in text, name
    assert text.split("\n", 1)[0].endswith("."), "one verb line first"


@pytest.mark.parametrize(("name", "value"), FUNCTIONS)
def test_every_argument_of_a_public_function_is_documented(name, value):
    text = inspect.getdoc(value)
    if "Args:" in text:
        elsewhere = DataOptions.__annotations__ if "**options:" in text else ()
        for argument in set(inspect.signature(value).parameters) - set(elsewhere):
            assert f"{argument}:" in text, f"{name}({argument})"


@pytest.mark.parametrize("value", TAKE_OPTIONS)
def test_help_shows_the_options_that_all_operators_share(value):
    parameters = inspect.signature(value).parameters
    assert set(DataOptions.__annotations__) < set(parameters)
    assert not any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    assert parameters["matmul_precision"].default == "float32"


def test_a_name_is_imported_with_the_first_that_is_asked_for():
    code = (
        "import sys, spectra; print('jax' in sys.modules); from spectra import slq; "
        "from spectra.density.slq import slq as same; print(slq is same is spectra.slq); "
        "print(set(spectra.__all__) <= set(dir(spectra))); print(spectra.slqq)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"]
    assert "module 'spectra' has no attribute 'slqq'. Did you mean: 'slq'?" in done.stderr


def test_star_takes_the_public_names_alone():
    names: dict = {}
    exec("from spectra import *", names)
    assert set(names) - {"__builtins__"} == set(spectra.__all__)


def test_an_unpickled_result_can_do_what_later_modules_provide(tmp_path):
    (tmp_path / "estimate").write_bytes(pickle.dumps(spectra.Estimate(1.0, 0.1, 10, "probes")))
    code = (
        "import pickle, sys; held = pickle.load(open('estimate', 'rb')); "
        "print('spectra.report.files' in sys.modules); print(held.save('estimate').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["False", "estimate.npz"], done.stderr


def test_importing_needs_no_optional_dependency():
    code = (
        "import sys, spectra; spectra.slq; heavy = ('torch', 'sklearn', 'matplotlib', 'typer', 'flax'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def _loss(params, batch):
    inputs, targets = batch
    return jnp.mean((jnp.tanh(inputs @ params["hidden"]) @ params["out"] - targets) ** 2)


def test_a_call_of_slq_can_be_followed():
    """How many files and functions a plain call passes through, and how deep: what CONTRIBUTING states.

    No other test has these shapes: a program that is compiled already would hide what it calls.
    """
    params = {"hidden": jnp.full((3, 5), 0.1), "out": jnp.ones((5, 1))}
    op = spectra.HessianOperator(_loss, params, (jnp.eye(3), jnp.ones((3, 1))))
    seen, stack, deepest = set(), [], 0

    def look(frame, event, _):
        nonlocal deepest
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(ROOT)):
            return
        if code.co_name.startswith("<"):  # comprehensions and lambdas belong to their function
            return
        if event == "call":
            seen.add((code.co_filename, code.co_qualname))
            stack.append(code)
            deepest = max(deepest, len(stack))
        elif stack:
            stack.pop()

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        spectra.slq(op, key=jax.random.key(0), num_steps=4, num_probes=2)
    finally:
        sys.setprofile(before)
    functions = [name for _, name in seen if not name.rpartition(".")[2].startswith("__")]
    files = sorted({str(Path(file).relative_to(ROOT)) for file, _ in seen})
    assert len(files) <= 21, files
    assert len(functions) <= 125, sorted(functions)
    assert deepest <= 14
