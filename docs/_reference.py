"""The reference: sections of `api.md` as pages, on which every inherited member is described once."""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_NAME = re.compile(r"^::: (spectra\.\w+)\n(?!    options)", re.M)


def on_config(config):
    """Put a page for each section into the menu."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    api = next(entry for entry in reference if "API" in entry)
    api["API"] = [{"Overview": api["API"]}, *({title: _page(title)} for title in _sections())]
    return config


def on_files(files, config):
    """Add the pages."""
    package = griffe.load("spectra", search_paths=[ROOT])
    shown: dict[str, str] = {}  # where a member that is defined in one place is described
    for title, text in _sections().items():
        described = _NAME.sub(lambda found: _described(package, found[1], shown), text + "\n")
        files.append(File.generated(config, _page(title), content=f"# {title}\n\n{described}"))
    return files


def on_page_markdown(markdown, page, **_):
    """Make an overview of the page that has the sections."""
    if page.file.src_uri != "api.md":
        return markdown
    lines = [markdown.partition("\n## ")[0]]
    for title, text in _sections().items():
        names = ", ".join(f"[`{name[8:]}`][{name}]" for name in re.findall(r"^::: (\S+)", text, re.M))
        lines.append(f"**[{title}]({_page(title)})**: {names}")
    return "\n\n".join(lines)


def _described(package: griffe.Object, name: str, shown: dict[str, str]) -> str:
    """The directive of a name; what others have described of a class is a line of links."""
    target = package[name.removeprefix("spectra.")]
    target = target.final_target if target.is_alias else target
    if not target.is_class:
        return f"::: {name}\n"
    for member in filter(_is_described, target.members.values()):
        shown.setdefault(member.path, f"{name}.{member.name}")
    new, elsewhere = [], []
    for member in filter(_is_described, (found.final_target for found in target.inherited_members.values())):
        if member.path not in shown:
            shown[member.path] = f"{name}.{member.name}"
            new.append(member.name)
        elif member.name not in target.members:
            elsewhere.append(f"[`{member.name}`][{shown[member.path]}]")
    links = f"\nInherited: {', '.join(elsewhere)}.\n" if elsewhere else ""
    return f"::: {name}\n    options:\n      inherited_members: [{', '.join(new)}]\n{links}"


def _is_described(member: griffe.Object | griffe.Alias) -> bool:
    return not member.is_alias and member.has_docstring and not re.match(r"_(?!_)|__new__$", member.name)


def _sections() -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", (ROOT / "docs" / "api.md").read_text(), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _page(title: str) -> str:
    return f"api-{re.sub(r'[^a-z]+', '-', title.lower())}.md"
