"""The API page names every public name, once; what repeats the version has the same."""

import re
from collections import Counter
from pathlib import Path

import pytest

import spectra

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"


def test_the_api_page_has_every_public_name_once():
    named = Counter(re.findall(r"^::: spectra\.(\w+)$", PAGE.read_text(), flags=re.M))
    assert named == Counter(spectra.__all__)


def test_the_api_page_has_every_public_name_of_the_bridge():
    members = re.search(r"::: spectra\.bridge\n.*?members: \[(.*?)\]", PAGE.read_text(), flags=re.S)
    assert members is not None
    elsewhere = {"from_torch", "TorchModel"}  # spectra.from_torch and spectra.TorchModel
    assert set(members[1].split(", ")) | elsewhere == set(spectra.bridge.__all__)


def test_the_citation_is_of_this_version():
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert cited == [spectra.__version__]


LANDMARKS = sorted((ROOT / "notebooks" / "landmarks").glob("[0-9]*.py"))
NOTEBOOKS = [*sorted((ROOT / "notebooks").glob("[0-9]*.py")), *LANDMARKS]


@pytest.mark.parametrize("source", LANDMARKS, ids=lambda p: p.stem)
def test_a_landmark_has_25_lines_of_code_and_asserts_its_claim(source):
    lines = [line for line in source.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 25
    assert any(line.strip().startswith("assert ") for line in lines)


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_is_committed_with_its_outputs(source):
    import json

    notebook = json.loads(source.with_suffix(".ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code if "".join(cell["source"]).strip())
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


def test_messages_that_the_page_explains_are_those_of_the_code():
    sources = [path.read_text() for path in (ROOT / "spectra").rglob("*.py")]
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # a message over several lines
    rows = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.M)
    elsewhere = "ModuleNotFoundError"  # Python's own
    assert len(rows) > 10
    for message in rows:
        parts = [part.strip(" '") for part in re.split(r"\.\.\.", message)]
        assert message.startswith(elsewhere) or all(part in text for part in parts), message
