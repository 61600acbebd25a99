"""What is made while the site is built: pages of the notebooks and of the changelog, the gallery, formulas.

Formulas become MathML, which browsers draw by themselves, and pictures of the gallery SVG in the colours of
the page: nothing is loaded from elsewhere, in light and in dark.
"""

import base64
import html
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LANDMARKS = (
    "Well-known results of the field, each reproduced in at most 25 lines of code and in a minute or less on "
    "two cores, with an assertion of its claim."
)


def on_config(config):
    """Put the notebooks on disk and the changelog into the menu."""
    notebooks = next(entry["Notebooks"] for entry in config.nav if "Notebooks" in entry)
    notebooks += [f"notebooks/{_name(path)}.md" for path in _notebooks()]
    notebooks.append({"Landmark results": [f"notebooks/{_name(path)}.md" for path in _landmarks()]})
    config.nav.append({"Changes": "changelog.md"})
    return config


def on_files(files, config):
    """Add the pages and pictures that are made here."""
    add = lambda name, content: files.append(File.generated(config, name, content=content))  # noqa: E731
    add("changelog.md", (ROOT / "CHANGELOG.md").read_text())
    rows = [
        "# Notebooks",
        "",
        "All notebooks are executed in continuous integration; their sources are in `notebooks/`.",
        "",
    ]
    for path in [*_notebooks(), *_landmarks()]:
        text, pictures = _page(path)
        add(f"notebooks/{_name(path)}.md", text)
        for name, data in pictures.items():
            add(f"notebooks/{name}", data)
        if path == _landmarks()[0]:
            rows += ["", "## Landmark results", "", LANDMARKS, ""]
        rows.append(f"* [{text.splitlines()[0].lstrip('# ')}]({_name(path)}.md)")
    add("notebooks/index.md", "\n".join(rows) + "\n")
    return files


def on_page_markdown(markdown, page, **_):
    """Draw the pictures of the gallery under the lines that make them."""
    if page.file.src_uri != "gallery.md":
        return markdown
    import matplotlib

    matplotlib.use("Agg")
    names: dict = {}
    return re.sub(
        r"```python\n# (.*?)\n(.*?)```", lambda found: _drawn(found, names), markdown, flags=re.DOTALL
    )


def on_page_content(content, **_):
    """Formulas, which arithmatex marks, as MathML."""
    formula = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'

    def draw(found):
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return re.sub(formula, draw, content, flags=re.DOTALL)


def _drawn(found: re.Match, names: dict) -> str:
    """A block of the gallery, and under it the picture, whose first line describes it."""
    from spectra.report.plots.gallery import svg

    label, code = found[1], found[2]
    if "ax = " not in code:
        exec(code, names)
        return found[0]

    def make():
        exec(code, names)
        return names["ax"]

    picture = re.sub(r"\n\s*\n", "\n", svg(make, label))
    return f'{found[0]}\n\n<div class="picture">{picture}</div>\n'


def _notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def _landmarks() -> list[Path]:
    return sorted((ROOT / "notebooks" / "landmarks").glob("[0-9][0-9]_*.ipynb"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT / "notebooks").with_suffix("").as_posix()


def _page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts, pictures, heading = [], {}, ""
    for i, cell in enumerate(nbformat.read(path, 4).cells):
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.*)", cell.source, re.M) or [heading])[-1]
            parts.append(cell.source.replace("](../docs/", "](../").replace(".ipynb)", ".md)"))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for j, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{i}-{j}.png"
                pictures[path.relative_to(ROOT / "notebooks").with_name(name).as_posix()] = base64.b64decode(
                    data["image/png"]
                )
                parts.append(f"![{heading}: what the lines above draw]({name}){{ width=560 }}")
            elif text := output.get("text", data.get("text/plain", "")).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n", pictures
