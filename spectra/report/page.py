"""One HTML file with everything in it: no network, one script of its own, light and dark, paper and phone."""

import base64
import hashlib
import html
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from spectra.base.calls import checked
from spectra.base.errors import SpectraError, Status
from spectra.base.files import make_folder_of, replacing
from spectra.report.encode import CLASSES, encode
from spectra.report.files import load
from spectra.report.reading import SCRIPT
from spectra.report.sections import Section, pairs_table, paragraph, sections, table
from spectra.report.spectrum import ZERO_TOL, SpectrumReport
from spectra.results import SpectrumHistory, format_bytes

CSS = Path(__file__).with_name("page.css")
# The page may load nothing and run nothing but its own script, and browsers hold it to that.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VERSION = re.compile(r"\d{1,4}(\.\d{1,6}){0,3}([.+]?[a-z]{1,8}\d{0,12}){0,3}", re.ASCII)
_KEY = re.compile(r"\[\d{1,10}(, \d{1,10}){0,7}\]", re.ASCII)
_OTHERS = (".pdf", ".png", ".svg", ".npz", ".json", ".jsonl", ".csv")
_ARRAYS = 40  # rows of the table of contents


@checked
def write_report(
    result: Any, path: str | os.PathLike, *, title: str | None = None, source: str | None = None
) -> Path:
    """Write a result as one self-contained HTML page.

    Plots are inline SVG in the colours of the page, which follows the reader's light or dark setting; tables
    fit a phone; nothing is loaded from the network. On a density curve, a pointer, a finger or the arrow keys
    show the eigenvalue, the density and the number of eigenvalues beyond.

    Args:
        result: any result, a dict of results by name, or the path of a file that `save` or a tracker wrote.
        path: file to write; `.html` is added if missing. An existing file is overwritten.
        title: title of the page; default: the name in the result.
        source: name of the result file, for the instructions on how to reproduce it; default: from `result`.

    Returns:
        The path that was written.

    Raises:
        SpectraError: `result` is not a result, or the path is that of a picture or a result file.
        FileNotFoundError: there is no such result file.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 100)))
        >>> report = spectra.spectrum(op, key=jax.random.key(0), num_steps=20, num_probes=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = spectra.write_report(report, folder + "/report").read_text()
        >>> page.startswith("<!DOCTYPE html>"), "://" in page
        (True, False)
    """
    if isinstance(result, (str, os.PathLike)):
        source = source or Path(result).name
        result = load(result)
    if type(result).__name__ not in CLASSES and not isinstance(result, dict):
        raise SpectraError(f"a {type(result).__name__} is not a result of spectra; nothing to report.")
    path = page_path(path)
    make_folder_of(path)
    text = page(result, title or _title(result), source or "RESULT.npz")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def page_path(path: str | os.PathLike) -> Path:
    """Where a page of this name is written.

    Raises:
        SpectraError: the name is that of a picture or of a result file.
    """
    path = Path(path)
    if path.suffix.lower() in _OTHERS:
        raise SpectraError(f"'{path}': a page is HTML, so name it .html; `spectra plot` draws pictures.")
    return path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")


def page(result: Any, title: str, source: str) -> str:
    """The page as text."""
    facts = _provenance(result)
    parts = [*sections(result), _reproduce(result, facts, source), _contents(result, facts)]
    kind = [] if title == _kind(result) else [_kind(result)]
    date = [f"{str(facts['date'])[:16].replace('T', ' ')} UTC"] if "date" in facts else []
    return assemble(title, ", ".join(kind + date), parts)


def assemble(title: str, subtitle: str, parts: list[Section], refresh: int | None = None) -> str:
    """A page of sections; `refresh`: seconds after which a browser asks for it again."""
    body = "\n".join(f"<section><h2>{html.escape(part.title)}</h2>{part.body}</section>" for part in parts)
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">\n'
    policy, script = POLICY, ""
    if "data-curve=" in body:
        code = SCRIPT.read_text()
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy, script = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{code}</script>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{CSS.read_text()}</style>\n</head>\n<body>\n"
        f'<header><h1>{html.escape(title)}</h1><p class="quiet">{html.escape(subtitle)}</p></header>\n'
        f"{body}\n{script}</body>\n</html>\n"
    )


def _title(result: Any) -> str:
    if isinstance(result, SpectrumReport):
        return f"Spectrum of {result.name}"
    if isinstance(result, SpectrumHistory):
        return f"Spectrum along training of {result.provenance.get('name', 'H')}"
    return "Spectra of blocks" if isinstance(result, dict) else _kind(result)


def _kind(result: Any) -> str:
    if isinstance(result, dict):
        return f"{len(result)} results of spectra"
    return f"{type(result).__name__} of spectra"


def _provenance(result: Any) -> dict[str, Any]:
    return dict(getattr(result, "provenance", {}))


def _reproduce(result: Any, facts: dict[str, Any], source: str) -> Section:
    """The commands that show the file again and that compute it again."""
    # A reader copies these commands: what a received file says enters them as numbers or as quoted text only.
    again = f"import spectra\n\nresult = spectra.load({json.dumps(source)})\nprint(result)"
    text = paragraph("To look at the result again:") + f"<pre>{html.escape(again)}</pre>"
    names = {"spectra-jax": "spectra", "jax": "jax"}
    versions = [
        f'"{name}=={facts[key]}"' for name, key in names.items() if _VERSION.fullmatch(str(facts.get(key)))
    ]
    key = str(facts.get("key", "[0, 0]"))
    if isinstance(result, SpectrumReport) and _KEY.fullmatch(key):
        command = (
            "import jax, numpy as np, spectra\n\n"
            f"key = jax.random.wrap_key_data(np.array({key}, np.uint32))\n"
            f"report = spectra.spectrum(op, key=key, {_options(result)})"
        )
        text += paragraph("To compute it again, where op is the same operator on the same data:")
        text += f"<pre>{html.escape(command)}</pre>"
    if versions:
        text += paragraph("In an environment with the versions of the run:")
        text += f"<pre>{html.escape('pip install ' + ' '.join(versions))}</pre>"
    return Section("How to reproduce", text)


def _options(report: SpectrumReport) -> str:
    """The arguments by which `spectrum` does the same again."""
    q = report.quadrature
    if q.status is Status.EXACT:
        options = "exact=True"
    else:
        options = f"num_steps={q.num_steps:d}, num_probes={q.num_probes:d}"
        if q.coefficients is not None:
            options += ', basis="none"'
        elif q.num_steps * q.num_probes >= q.size:
            options += ", exact=False"
    return options if report.zero_tol == ZERO_TOL else f"{options}, zero_tol={float(report.zero_tol)!r}"


def _contents(result: Any, facts: dict[str, Any]) -> Section:
    """Provenance, and what the result file holds."""
    arrays: list[list[str]] = []

    def store(name: str, array: np.ndarray) -> str:
        shape = " × ".join(map(str, array.shape))
        arrays.append([name, f"{shape} {array.dtype}", format_bytes(array.nbytes)])
        return name

    encode(result, store)
    rows = [(name.replace("_", " "), _shown(value)) for name, value in facts.items() if value != ""]
    text = pairs_table(rows) if rows else ""
    if arrays:
        text += paragraph("Arrays in the result file:")
        text += table([["name", "numbers", "size"], *arrays[:_ARRAYS]])
    if len(arrays) > _ARRAYS:
        text += paragraph(f"and {len(arrays) - _ARRAYS} more.")
    return Section("Provenance", text)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
