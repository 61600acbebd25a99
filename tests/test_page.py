"""The report page: in a real browser, on a phone, in the dark, without a network; and notebook views."""

import ast
import base64
import dataclasses
import functools
import hashlib
import html
import html.parser
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import slow_but
from test_pictures import density, history, pairs, plane, quadrature
from typer.testing import CliRunner

import spectra
from spectra.cli import commands as cli
from spectra.report.reading import SCRIPT

HOSTILE = "<script>alert('x')</script> & \"quotes\" http://example.com/a.js"


@functools.cache
def spectrum_report(name="a network"):
    values = np.concatenate([np.linspace(-0.5, 1, 195), [5.0, 10, 20, 40, 80]])
    op = spectra.MatrixOperator(jnp.diag(jnp.asarray(values, jnp.float32)))
    return spectra.spectrum(op, key=jax.random.key(3), num_steps=40, num_probes=2, name=name)


RESULTS = {
    "spectrum": spectrum_report,
    "quadrature": quadrature,
    "density": density,
    "eigenpairs": pairs,
    "history": history,
    "short history": lambda: history(1),
    "landscape": plane,
    "blocks": lambda: {f"a/rather/long/name/of/layer_{i}/Dense": quadrature(seed=i) for i in range(4)},
    "estimate": lambda: spectra.Estimate(1.5, 0.1, 64, "slq"),
    "condition": lambda: spectra.condition_number(
        spectra.MatrixOperator(jnp.diag(jnp.arange(1.0, 9.0))), key=jax.random.key(0)
    ),
}


OWN = SCRIPT.read_text()


def scripts(text):
    """The scripts of a page; the browser is told to run no other than these."""
    found = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    allowed = re.findall(r"'sha256-([^']*)'", text[: text.index("<title>")])
    digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in found]
    assert allowed == digests
    assert text.count("<script") == len(found)
    return found


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed."""

    VOID = ("meta", "img", "br", "link", "use", "path", "image", "rect", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_a_page_is_well_formed_and_loads_nothing(name, tmp_path):
    text = spectra.write_report(RESULTS[name](), tmp_path / "page").read_text()
    page = Reader(text)
    assert not {"link", "iframe", "object", "base"} & set(page.tags)
    assert scripts(text) == ([OWN] if name in ("spectrum", "quadrature", "density", "blocks") else [])
    for label in (value for key, value in page.attributes if key == "aria-label"):
        assert "&" not in label  # no caption has one: it was escaped twice
    for key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "srcset", "data"):
            assert value.startswith(("#", "data:image/png")), (key, value)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "How to reproduce" in text
    assert "Provenance" in text
    # Ids are references within one page: a second definition would be another picture's.
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_text_is_escaped(tmp_path):
    report = spectrum_report(HOSTILE)
    text = spectra.write_report(report, tmp_path / "page.html", title=None).read_text()
    page = Reader(text)
    assert scripts(text) == [OWN]
    assert f"Spectrum of {HOSTILE}" in page.words
    text = spectra.write_report({HOSTILE: quadrature()}, tmp_path / "blocks.html").read_text()
    assert scripts(text) == [OWN]
    assert HOSTILE in Reader(text).words
    assert curve(text)[0]["name"] == HOSTILE


@pytest.mark.slow
def test_the_page_says_what_the_bands_mean_and_how_to_compute_again(tmp_path):
    report = spectrum_report()
    path = report.save(tmp_path / "mine")
    text = spectra.write_report(path, tmp_path / "page").read_text()
    page = " ".join(Reader(text).words)
    for part in (
        "there is no chance in it",
        "With probability 95 %, the whole true curve lies in the coloured area",
        'spectra.load("mine.npz")',
        "np.array([0, 3], np.uint32)",
        "num_steps=40, num_probes=2",
        "quadrature/nodes",
        "2 × 40 float64",
        f"{report.largest.estimate:.6g}",
    ):
        assert part in page, part
    assert text.count("<svg") == 2
    # The key on the page is the key of the run.
    key = jax.random.wrap_key_data(np.array([0, 3], np.uint32))
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(3))).all()


def received(**facts):
    report = spectrum_report()
    return dataclasses.replace(report, provenance=report.provenance | facts)


COMMAND = 'x"; rm -rf ~ #'


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectra", "jax", "key", "date", "source"])
def test_what_a_file_says_enters_no_command_that_a_reader_copies(name, tmp_path):
    """But quoted, as the name of a file; in the table of the provenance it may stand."""
    hostile = {} if name == "source" else {name: COMMAND}
    options = {"source": COMMAND + ".npz"} if name == "source" else {}
    text = spectra.write_report(received(**hostile), tmp_path / "page", **options).read_text()
    commands = [html.unescape(x) for x in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)]
    assert len(commands) == 2 if name == "key" else 3
    for command in commands:
        if name == "source" and "spectra.load" in command:
            found = [x.value for x in ast.walk(ast.parse(command)) if isinstance(x, ast.Constant)]
            assert found == [COMMAND + ".npz"]
        else:
            assert "rm -rf" not in command
    if name in ("spectra", "jax"):
        assert f'=={(spectra if name == "jax" else jax).__version__}"' in commands[-1]  # the other one


def test_only_results_have_a_page(tmp_path):
    with pytest.raises(spectra.SpectraError, match="a int is not a result"):
        spectra.write_report(3, tmp_path / "page")
    with pytest.raises(FileNotFoundError, match="no result file"):
        spectra.write_report(tmp_path / "none.npz", tmp_path / "page")


@pytest.mark.slow
def test_the_command_line_writes_the_page_and_pictures_of_every_kind(tmp_path):
    runner = CliRunner()
    for name in ("eigenpairs", "history", "blocks"):
        path = spectra.save(RESULTS[name](), tmp_path / name)
        page = tmp_path / f"{name}.html"
        done = runner.invoke(cli.app, ["report", str(path), "-o", str(page), "--title", "Mine & yours"])
        assert done.exit_code == 0, done.output
        assert "<h1>Mine &amp; yours</h1>" in page.read_text()
        picture = tmp_path / f"{name}.svg"
        assert runner.invoke(cli.app, ["plot", str(path), "-o", str(picture)]).exit_code == 0
        assert "<svg" in picture.read_text()
    kept = page.read_bytes(), picture.read_bytes()
    for command, output in (("report", tmp_path / "blocks"), ("plot", picture)):  # a page's suffix is added
        done = runner.invoke(cli.app, [command, str(path), "-o", str(output)])
        assert re.search(r"blocks\.\w+' already exists.*--force replaces it", str(done.exception))
    assert (page.read_bytes(), picture.read_bytes()) == kept
    arguments = ["report", str(path), "-o", str(page), "--title", "New", "--force"]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert "<h1>New</h1>" in page.read_text()
    path = spectra.save(RESULTS["estimate"](), tmp_path / "estimate")
    done = runner.invoke(cli.app, ["plot", str(path), "-o", str(tmp_path / "no.png")])
    assert "has no picture" in str(done.exception)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectrum", "quadrature", "density", "eigenpairs", "history", "landscape"])
def test_results_show_a_table_and_a_picture_in_a_notebook(name):
    plt.close("all")
    result = RESULTS[name]()
    view = result._repr_html_()
    page = Reader(view)
    assert {"table", "img"} <= set(page.tags)
    assert "data:image/png;base64," in view
    assert not plt.get_fignums()  # or a notebook would show the picture twice
    assert "img" not in Reader(history(1)._repr_html_()).tags


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(
  e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".wide") && !e.closest("svg"));
document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth,
  getComputedStyle(document.documentElement).backgroundColor,
  getComputedStyle(document.querySelector("svg text, svg path, svg use") || document.body).color,
  wide.map(e => e.tagName)]);
</script>"""


def browse(path, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([*command, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIGHT, DARK = ("1", "rgb(255, 255, 255)"), ("0", "rgb(20, 23, 26)")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("scheme", "ground"), slow_but([LIGHT, DARK], LIGHT))
def test_a_phone_shows_the_page_without_scrolling_sideways_in_light_and_dark(tmp_path, scheme, ground):
    for name in ("spectrum", "history", "blocks", "eigenpairs"):
        page = spectra.write_report(RESULTS[name](), tmp_path / name)
        framed = tmp_path / "framed.html"
        # Headless windows have a least width; a frame is as narrow as a phone. Scripts need another policy.
        content = re.sub(
            'content="default-src[^"]*', "content=\"script-src 'unsafe-inline'", page.read_text()
        )
        (tmp_path / "inner.html").write_text(content.replace("</body>", MEASURE + "</body>"))
        framed.write_text(
            "<iframe id=f src=inner.html width=360 height=700></iframe><script>onload = () => {"
            "document.body.append(document.getElementById('f').contentDocument.title)}</script>"
        )
        options = ("--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={scheme}")
        dom = browse(framed, *options, "--dump-dom")
        found = re.search(r"\[(\d+),(\d+),\"(rgb[^\"]*)\",\"(rgb[^\"]*)\",(\[.*?\])\]", dom)
        assert found, dom[-500:]
        width, scroll, background, ink, wide = found.groups()
        assert int(scroll) <= int(width) <= 360
        assert wide == "[]"
        assert background == ground
        lightness = [sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in (background, ink)]
        assert abs(lightness[0] - lightness[1]) > 0.6


def curve(text):
    return json.loads(html.unescape(re.search(r'data-curve="([^"]*)"', text)[1]))


def test_every_point_of_the_curve_can_be_read_and_counts_are_those_of_the_quadrature(tmp_path):
    report = spectrum_report()
    found = curve(spectra.write_report(report, tmp_path / "page").read_text())
    assert len(found["x"]) == len(found["y"]) == len(found["text"])
    assert found["x"] == sorted(found["x"])
    counted = [
        re.match(r"λ = (\S+): ([\d,]+)(?: \[.*?\])? of 200 eigenvalues (\w+)", t) for t in found["text"]
    ]
    for value, count, side in (match.groups() for match in counted if match):
        lower, middle, upper = report.quadrature.cdf(float(value))
        share = middle if side == "below" else 1 - middle
        assert (float(value) < 0) == (side == "below")
        # The printed λ has four digits, so that it may lie on the other side of a node next to it.
        assert abs(float(count) - 200 * share) <= 0.5 + 200 * (upper - lower) + 1
    singles = [t for t in found["text"] if "a single eigenvalue" in t]
    assert len(singles) == len(report.density.outliers) >= 1
    assert f"λ = {report.density.outliers[-1]:.6g}: a single eigenvalue, the largest" in singles[-1]


DRIVE = """<iframe id=f src=page.html width=600 height=900></iframe><script>onload = () => {
const page = document.getElementById("f").contentDocument, view = page.defaultView;
const box = page.querySelector("[data-curve]"), svg = box.querySelector("svg");
const slider = box.querySelector("input"), seen = [], look = () => {
  const line = svg.querySelector("line.mark").getBoundingClientRect();
  const text = box.querySelector("output").textContent, spoken = slider.getAttribute("aria-valuetext");
  seen.push([slider.value, text, spoken, line.left]);
};
look();
slider.value = slider.max;
slider.dispatchEvent(new view.Event("input"));
look();
const area = svg.getBoundingClientRect(), at = area.left + area.width / 2;
const place = { clientX: at, clientY: area.top + 9, bubbles: true };
svg.dispatchEvent(new view.PointerEvent("pointermove", place));
look();
const shown = getComputedStyle(box.querySelector(".read")).display;
document.body.append("SEEN" + JSON.stringify([seen, at, shown]) + "END");
}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_pointer_and_slider_read_the_curve_in_a_browser(tmp_path):
    found = curve(spectra.write_report(spectrum_report(), tmp_path / "page").read_text())
    (tmp_path / "drive.html").write_text(DRIVE)
    dom = browse(tmp_path / "drive.html", "--allow-file-access-from-files", "--dump-dom")
    seen, at, display = json.loads(html.unescape(re.search(r"SEEN(\[.*?\])END", dom)[1]))
    assert display == "block"  # the page's own policy lets its script run
    for index, text, spoken, _ in seen:
        assert text == spoken == found["text"][int(index)]
    assert int(seen[0][0]) == found["y"].index(min(found["y"]))  # at first, the peak
    assert int(seen[1][0]) == len(found["x"]) - 1
    assert abs(seen[2][3] - at) < 3  # pixels: half the distance of two points, and the line's width


def test_the_curve_of_a_block_is_drawn_where_its_numbers_are_read(tmp_path):
    blocks = {"wide": quadrature(), "narrow": quadrature(0.1, seed=2), "smooth": density()}
    found = curve(spectra.write_report(blocks, tmp_path / "page").read_text())
    assert [each["name"] for each in found] == ["wide", "narrow"]  # the rows of the table
    for each in found:
        # Nothing is read where a block has no curve; four digits of λ are printed.
        grid = spectra.spectral_density(blocks[each["name"]]).grid
        read = [float(re.search(r"λ = (\S+):", text)[1]) for text in each["text"]]
        assert grid[0] - 1e-3 * abs(grid[0]) <= min(read) < max(read) <= 1.001 * grid[-1]
        subpaths = each["paths"]["line"].split("M")[1:]
        points = np.array([[float(x) for x in p.split(",")] for part in subpaths for p in part.split("L")])
        top, bottom = each["ends"]
        assert points[:, 1].min() >= top
        assert points[:, 1].max() <= bottom + 0.05  # rounded to a tenth
        stems = [i for i, text in enumerate(each["text"]) if "single" in text or "stands alone" in text]
        places = [i for i in range(len(each["text"])) if i not in stems]
        read = np.array([[each["x"][i], each["y"][i]] for i in places])
        # Where both know the curve they agree: where it is flat, on a tenth of a unit each.
        steep = np.gradient(read[:, 1], read[:, 0])
        flat = (abs(steep) < 0.5) & (read[:, 1] < bottom - 5) & (read[:, 0] > points[0, 0])
        drawn = np.interp(read[flat, 0], points[:, 0], points[:, 1])
        assert flat.sum() > 20
        np.testing.assert_allclose(drawn, read[flat, 1], atol=0.3)
        assert each["paths"]["stems"].count("M") == len(stems)
        assert each["paths"]["band"].count("M") == 1


CHOOSE = """<iframe id=f src=page.html width=390 height=900></iframe><script>onload = () => {
const page = document.getElementById("f").contentDocument, box = page.querySelector("[data-curve]");
const seen = [], look = () => seen.push([
  box.querySelector("output").textContent, box.querySelector("path.line").getAttribute("d"),
  [...page.querySelectorAll("input[type=radio]")].map(button => button.checked)]);
look();
page.querySelectorAll("input[type=radio]")[2].click();
look();
page.querySelectorAll("tbody tr")[1].lastChild.click();
look();
document.body.append("SEEN" + JSON.stringify(seen) + "END");
}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_row_of_the_table_chooses_the_block_that_is_drawn(tmp_path):
    found = curve(spectra.write_report(RESULTS["blocks"](), tmp_path / "page").read_text())
    (tmp_path / "choose.html").write_text(CHOOSE)
    dom = browse(tmp_path / "choose.html", "--allow-file-access-from-files", "--dump-dom")
    seen = json.loads(html.unescape(re.search(r"SEEN(\[.*?\])END", dom)[1]))
    for (text, path, buttons), number in zip(seen, (0, 2, 1), strict=True):
        assert text.startswith(f"{found[number]['name']}: λ = ")
        assert path == found[number]["paths"]["line"]
        assert buttons == [i == number for i in range(4)]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_asks_for_nothing_and_draws_the_picture(tmp_path):
    page = spectra.write_report(spectrum_report(), tmp_path / "page")
    log, shot = tmp_path / "net.json", tmp_path / "shot.png"
    quiet = ("--disable-background-networking", "--disable-component-update", "--no-first-run")
    browse(page, *quiet, f"--log-net-log={log}", f"--screenshot={shot}", "--window-size=900,2400")
    asked = set(re.findall(r'"url":"((?:https?|file)://[^"]*)"', log.read_text()))
    assert {url for url in asked if "page.html" in url or url.startswith("file")} <= {page.as_uri()}
    picture = plt.imread(shot)[..., :3]
    blue = np.abs(picture - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=-1) < 0.05
    assert blue.sum() > 200  # the curve
