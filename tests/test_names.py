"""Tests that are slow, and benchmarks, are seldom run: what they name of the package exists nevertheless."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("tests", "benchmarks", "notebooks") for path in (ROOT / folder).rglob("*.py")]


def imported(tree):
    """Local names of the package's modules; anything that is imported from them is looked up."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.asname or alias.name for alias in node.names if alias.name == "spectra"]
            modules.update(dict.fromkeys(names, importlib.import_module("spectra")))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "spectra":
            for alias in node.names:
                found = importlib.import_module(node.module)
                if alias.name != "*" and not hasattr(found, alias.name):  # a module that nothing has imported
                    importlib.import_module(f"{node.module}.{alias.name}")
                if isinstance(member := getattr(found, alias.name, None), ModuleType):
                    modules[alias.asname or alias.name] = member
    return modules


def missing(path):
    tree = ast.parse(path.read_text(encoding="utf8"))
    modules = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and not hasattr(module, node.attr):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.id}.{node.attr}"


def test_what_tests_and_benchmarks_name_of_the_package_exists():
    assert not [name for path in FILES for name in missing(path)]
