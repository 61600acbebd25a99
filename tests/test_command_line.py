"""The command line and the places it reads and writes: nothing is lost, replaced or taken for another."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from children import environment
from test_damage import report, results
from typer.testing import CliRunner

import spectra
from spectra.base import host
from spectra.base.host import Lines, Progress
from spectra.cli import commands, output, running, scripts
from spectra.cli.ending import starting, warn

ROOT = Path(spectra.__file__).parents[1]
PROBLEM = """
import jax.numpy as jnp
import spectra


def problem():
    return spectra.Problem(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(3), jnp.eye(3))
"""


class File(type(Path())):
    """A path that notes how often what lies there was computed."""

    computed: list


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """A file of a problem, whose spectrum costs nothing: that it is computed is counted."""
    mpl.use("Agg")
    file = File(tmp_path / "here" / "problem.py")
    file.parent.mkdir()
    file.write_text(PROBLEM)
    file.computed = []

    def spectrum(*_, **__):
        file.computed.append(1)
        return report()

    monkeypatch.setattr(running, "spectrum", spectrum)
    return file


@pytest.fixture(autouse=True)
def _imports(monkeypatch):
    """What importing problems leaves is gone after a test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if not getattr(sys.modules[name], "__file__", None) or "here" in sys.modules[name].__file__:
            del sys.modules[name]


def invoke(*arguments):
    return CliRunner().invoke(commands.app, [str(argument) for argument in arguments])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_a_second_run_keeps_the_first_ones_result(problem, tmp_path):
    out = tmp_path / "out"
    for _ in range(3):
        done = invoke("run", problem, "--out", out)
        assert done.exit_code == 0, done.output
    assert names(out) == sorted(f"spectrum{n}.{end}" for n in ("", "-2", "-3") for end in ("npz", "png"))
    assert str(out / "spectrum-3.npz") in done.output
    (out / "spectrum.npz").write_text("an older one")
    assert invoke("run", problem, "--out", out, "--force").exit_code == 0
    assert len(names(out)) == 6
    assert repr(spectra.load(out / "spectrum.npz")) == repr(report())


@pytest.mark.slow
def test_a_result_that_appears_meanwhile_is_kept_too(problem, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save = output.save

    def late(result, path, **options):
        if not out.joinpath("spectrum.npz").exists():
            (out / "spectrum.npz").write_text("of another process")
        return save(result, path, **options)

    monkeypatch.setattr(output, "save", late)
    assert invoke("run", problem, "--out", out).exit_code == 0
    assert names(out) == ["spectrum-2.npz", "spectrum-2.png", "spectrum.npz"]
    assert (out / "spectrum.npz").read_text() == "of another process"


@pytest.mark.parametrize("place", ["a file", "under a file", "a long name", "no room", "read-only"])
def test_a_place_that_cannot_be_written_is_known_before_anything_is_computed(
    place, problem, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    out = {"a file": file, "under a file": file / "out", "a long name": tmp_path / ("a" * 300)}.get(
        place, tmp_path / "o"
    )
    if place == "no room":
        monkeypatch.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    if place == "read-only":
        error = PermissionError(13, "Permission denied")
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(error))
    done = invoke("run", problem, "--out", out)
    assert problem.computed == []
    assert isinstance(done.exception, spectra.SpectraError)
    assert "choose another folder with --out" in str(done.exception)
    assert set(names(tmp_path)) <= {"file", "here", "o"}
    assert list(tmp_path.glob("o/*")) == []


@pytest.mark.slow
def test_a_result_that_cannot_be_written_is_printed_and_kept_elsewhere(problem, tmp_path, monkeypatch):
    out, second = tmp_path / "out", tmp_path / "second"
    second.mkdir()
    save = output.save

    def full(result, path, **options):
        if path.parent == out:
            raise OSError(28, "No space left on device")
        return save(result, path, **options)

    monkeypatch.setattr(output, "save", full)
    monkeypatch.setattr(tempfile, "tempdir", str(second))
    done = invoke("run", problem, "--out", out)
    assert "largest eigenvalue" in done.output
    assert isinstance(done.exception, output.ResultElsewhereError)
    (kept,) = second.rglob("*.npz")
    assert f"saved as '{kept}'" in str(done.exception)
    assert repr(spectra.load(kept)) == repr(report())
    monkeypatch.setattr(output, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    done = invoke("run", problem, "--out", out)
    assert "largest eigenvalue" in done.output
    assert "but saved nowhere" in str(done.exception)


@pytest.mark.slow
def test_a_picture_that_cannot_be_written_costs_no_result(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    done = invoke("run", problem, "--out", tmp_path / "out")
    assert isinstance(done.exception, output.ResultElsewhereError)
    assert "largest eigenvalue" in done.output
    assert names(tmp_path / "out") == ["spectrum.npz"]


def shell(folder, *arguments):
    """The command in a process of its own, which sees no file of the folder by itself, and whose backend of
    matplotlib is one of elsewhere, as that of a notebook is."""
    code = "from spectra.cli.commands import main; main()"
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "latin-1", "MPLBACKEND": "elsewhere"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **ours},
        capture_output=True,
        encoding="latin-1",
    )


SHADOWS = ("spectra", "copy", "typing", "queue", "scipy", "torch", "matplotlib", "jax", "tqdm", "random2")


def test_files_beside_a_problem_hide_no_module_and_are_found_by_it(tmp_path, monkeypatch):
    """`datasets` stands for a package that is installed, too, and that packages import."""
    here, installed = tmp_path / "here", tmp_path / "installed"
    here.mkdir()
    installed.mkdir()
    for name in SHADOWS:
        (here / f"{name}.py").write_text("raise SystemExit('a file beside the problem')")
    (here / "scipy").mkdir()
    (here / "scipy" / "__init__.py").write_text("raise SystemExit('a folder beside the problem')")
    (here / "mine.py").write_text("import datasets, deeper.inner\nX = datasets.WHOSE, deeper.inner.Y")
    (here / "deeper").mkdir()
    (here / "deeper" / "inner.py").write_text("Y = 3")
    (here / "datasets.py").write_text("WHOSE = 'mine'")
    (installed / "datasets.py").write_text("WHOSE = 'installed'")
    (installed / "package_of_another.py").write_text("import calendar, datasets\nX = datasets.WHOSE")
    monkeypatch.syspath_prepend(installed)
    file = here / "random.py"
    file.write_text(
        "import copy, queue, typing, random, scipy.special, package_of_another, mine\n"
        "def problem():\n"
        "    return copy.deepcopy(random.random), package_of_another.X, mine.X\n"
    )
    function = scripts.function_of(file, "problem", "a problem")
    assert callable(function()[0])
    assert function()[1:] == ("installed", ("installed", 3))
    for name in ("datasets", "mine", "package_of_another"):
        sys.modules.pop(name)
    file.write_text("import mine, package_of_another\ndef problem():\n    return mine.X\n")
    assert scripts.function_of(file, "problem", "a problem")() == ("mine", 3)
    import random

    assert random.__file__ != str(file)
    assert sys.path[-1] == str(here)


@pytest.mark.slow
def test_a_run_beside_such_files_in_a_shell_without_umlauts(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for name in SHADOWS:
        (here / f"{name}.py").write_text("raise SystemExit('a file beside the problem')")
    (here / "random.py").write_text(PROBLEM.replace("jnp.eye(3))", "jnp.eye(3), name='$a_b$ ≤')"))
    done = shell(here, "run", "random.py", "--probes", "1")
    assert done.returncode == 0, done.stderr
    assert r"Spectrum of $a_b$ \u2264" in done.stdout
    assert names(here / "spectra-out") == ["spectrum.npz", "spectrum.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nopen('absent.txt')\n", "problem.py', line 2: FileNotFoundError"),
        ("\nimport absent_module\n", "problem.py', line 2: ModuleNotFoundError"),
        ("def problem(:\n", "problem.py', line 1"),
        ("def problem():\n    raise OSError('mine')\n", "problem.py', line 2: OSError: mine"),
    ],
)
def test_what_a_problem_cannot_open_is_said_with_its_line(text, message, problem, tmp_path):
    problem.write_text(text)
    done = invoke("run", problem, "--out", tmp_path / "out")
    assert isinstance(done.exception, spectra.SpectraError)
    assert message in str(done.exception)


@pytest.mark.slow
def test_places_that_are_no_files_are_one_message(tmp_path):
    spectra.save(report(), tmp_path / "r.npz")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.py").mkdir()
    long = "a" * 300
    for arguments in (
        ("show", "."),
        ("show", f"{long}.npz"),
        ("plot", "r.npz", "-o", "file/x.png"),
        ("plot", "r.npz", "-o", f"{long}.png"),
        ("report", "r.npz", "-o", "file/x"),
        ("report", ".", "-o", "x"),
        ("run", "folder.py"),
        ("run", f"{long}.py"),
        ("run", "."),
        ("export-torch", f"{long}.py:f", "-o", "x"),
    ):
        before = os.getcwd()
        os.chdir(tmp_path)
        try:
            done = invoke(*arguments)
        finally:
            os.chdir(before)
        assert isinstance(done.exception, (spectra.SpectraError, OSError)), (arguments, done.exception)
    shutil.rmtree(tmp_path / "spectra-out")
    assert names(tmp_path) == ["file", "folder.py", "r.npz"]
    done = shell(tmp_path, "plot", "r.npz", "-o", "file/x.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_a_file_says_moves_no_cursor_and_every_result_is_shown(tmp_path):
    path = spectra.save({"a\x1b]0;title\x07": results()["pairs"], "b": report()}, tmp_path / "x")
    done = invoke("show", path)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "\x07" not in done.output
    assert "Eigenpairs" in done.output
    assert "Spectrum of net" in done.output


def test_numbers_that_contradict_each_other_are_the_files_fault(tmp_path, monkeypatch):
    path = spectra.save(report(), tmp_path / "x")
    monkeypatch.setattr(spectra.SpectrumReport, "rows", lambda _: np.ones(3)[5])
    done = invoke("show", path)
    assert isinstance(done.exception, spectra.SpectraError)
    assert "its numbers contradict each other (IndexError" in str(done.exception)


@pytest.mark.slow
def test_every_command_says_what_it_does_and_the_version():
    for command in ("", "run", "show", "compare", "plot", "report", "watch", "export-torch", "demo"):
        for flag in ("-h", "--help"):
            done = invoke(*command.split(), flag)
            assert done.exit_code == 0
            assert "Usage" in done.output
    assert invoke("--version").output == f"spectra {spectra.__version__}\n"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "spectra", "--version"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == f"spectra {spectra.__version__}\n"


@pytest.mark.parametrize("words", ["--help", "--version"])
def test_help_of_which_only_the_head_is_read_is_no_failure(words):
    with without_reader() as stream:
        done = subprocess.run(
            [sys.executable, "-m", "spectra", words], stdout=stream, stderr=subprocess.PIPE, cwd=ROOT
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "words", ["--help", "--version", "run --help", "show --json --csv x.npz", "compare x.npz", "complete"]
)
def test_help_version_completion_and_refusals_import_no_jax(words):
    """Each would take seconds: they are asked for with every key in a shell that completes."""
    code = (
        "import sys; sys.argv[0] = 'spectra'; from spectra.cli.commands import main\n"
        "try: main()\n"
        "finally: print([name for name in ('jax', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    arguments, environment = words.split(), dict(os.environ)
    if words == "complete":
        arguments = []
        environment |= {"_SPECTRA_COMPLETE": "complete_bash", "COMP_WORDS": "spectra r", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert words != "complete" or done.stdout.split()[:2] == ["run", "report"]
    assert done.returncode == (2 if ".npz" in words else 0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--operator", "hesian"),
        ("--blocks", "module"),
        ("--basis", "disk"),
        ("--steps", 0),
        ("--probes", 0),
        ("--tol", 1.5),
        ("--tol", 0),
    ],
)
def test_arguments_are_checked_before_the_problem_is_loaded(option, value, problem, tmp_path):
    problem.write_text("raise AssertionError('loaded')")
    done = invoke("run", problem, option, value, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert option in done.output
    assert not (tmp_path / "out").exists()


def test_wrong_paths_are_said_in_words(tmp_path):
    path = spectra.save(report(), tmp_path / "x")
    for arguments, words in (
        (("show", tmp_path), f"is a folder, with '{path}': name a file."),
        (("show", tmp_path / "new"), "no result file at"),
        (("plot", path, "-o", path / "a.png"), "a.png' could not be written ("),
        (("watch", path, "--once", "-o", path / "a.html"), "a.html' could not be written ("),
    ):
        done = invoke(*arguments)
        assert words in str(done.exception)
        assert ".part" not in str(done.exception)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is a folder, without results" in str(invoke("plot", empty, "-o", "x.png").exception)
    served = invoke("watch", "run.jsonl", "-o", tmp_path / "page", "--port", 8000)
    assert served.exit_code == 2
    assert "--port" in served.output


@pytest.mark.slow
def test_an_ending_that_nothing_writes_is_a_wrong_argument(tmp_path):
    path = spectra.save(report(), tmp_path / "x")
    for arguments, words in (
        (("report", path, "-o", tmp_path / "a.pdf"), "a page is HTML"),
        (("watch", path, "--once", "-o", tmp_path / "a.pdf"), "a page is HTML"),
        (("plot", path, "-o", tmp_path / "a.docx"), "a picture ends in"),
        (("plot", path, "-o", path), "a picture ends in"),  # nor is the result lost
        (("compare", path, path.with_name("y.npz"), "-o", tmp_path / "a.docx"), "a picture ends in"),
        (("export-torch", "model.py", "-o", tmp_path / "model"), "pass FILE.py:FUNCTION"),
        (("run", "problem.py", "--seed", str(10**20)), "Invalid value for '--seed'"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, arguments
        assert words in unboxed(done.output)
        assert not done.stdout  # said before anything is done
    assert spectra.load(path).status is report().status
    assert list(tmp_path.iterdir()) == [path]


def unboxed(message):
    """A message without its frame and the breaks of its lines."""
    return " ".join(message.replace("\u2502", " ").split())


def test_a_dtype_that_is_none_is_refused_in_words():
    op = spectra.MatrixOperator(np.eye(3))
    with pytest.raises(spectra.SpectraError, match="basis_dtype='float7' is not a dtype"):
        spectra.plan(op, num_steps=2, num_probes=1, basis_dtype="float7")


@pytest.mark.slow
def test_stdout_is_json_alone_and_messages_go_to_stderr(problem, tmp_path):
    done = invoke("run", problem, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == report().to_dict()
    assert "result   " in done.stderr
    shown = invoke("show", tmp_path / "out" / "spectrum.npz", "--json")
    assert json.loads(shown.stdout) == report().to_dict()


@pytest.mark.slow
def test_quiet_prints_the_result_alone(problem, tmp_path):
    done = invoke("run", problem, "-o", tmp_path / "out", "-q")
    assert done.exit_code == 0
    assert done.stdout == f"{report()!r}\n"
    assert done.stderr == ""


@pytest.mark.slow
def test_rows_are_shown_as_csv(tmp_path):
    made = results()
    for name in ("pairs", "history", "blocks", "summary", "layers", "report"):
        path = spectra.save(made[name], tmp_path / name)
        done = invoke("show", path, "--csv")
        assert done.exit_code == 0, done.output
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        part = made[name] if name != "blocks" else spectra.summary(made[name])
        records = part.records()
        assert len(rows) == len(records), name
        for row, record in zip(rows, records, strict=True):
            expected = {key: str(value) for key, value in record.items() if value not in (None, "")}
            assert expected == {key: value for key, value in row.items() if value}
    done = invoke("show", tmp_path / "pairs.npz", "--csv", "--json")
    assert done.exit_code == 2


@pytest.mark.slow
def test_spectra_are_compared_in_a_table_and_in_a_picture(tmp_path):
    made = results()
    (tmp_path / "b").mkdir()
    first = spectra.save(made["report"], tmp_path / "run")
    second = spectra.save(made["quadrature"], tmp_path / "b" / "run")
    blocks = spectra.save(made["blocks"], tmp_path / "blocks")
    done = invoke("compare", first, second, blocks, "--csv", "-o", tmp_path / "all.svg")
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO(done.stdout)))  # alone: messages go to stderr
    alike = [str(tmp_path / "run"), str(tmp_path / "b" / "run")]
    assert [row["layer"] for row in rows] == [*alike, "blocks: a/layer_0", "blocks: a/layer_1"]
    assert (tmp_path / "all.svg").exists()
    assert done.stderr.split() == ["picture", str(tmp_path / "all.svg")]
    again = invoke("compare", first, second, "-o", tmp_path / "all.svg")
    assert "all.svg' already exists" in str(again.exception)
    assert invoke("compare", first).exit_code == 2
    twice = invoke("compare", first, first)
    assert twice.exit_code == 2
    assert "named twice" in twice.output
    pairs = spectra.save(made["pairs"], tmp_path / "pairs")
    refused = invoke("compare", first, pairs)
    assert "a Quadrature or a report is needed" in str(refused.exception)


def test_an_error_in_a_problem_is_shown_from_the_users_first_line_on(problem):
    problem.write_text("def helper(x):\n    return x['missing']\n\n\ndef problem():\n    return helper({})\n")
    done = invoke("run", problem, "--out", problem.parent / "out")
    message = str(done.exception)
    assert isinstance(done.exception, spectra.SpectraError)
    assert "KeyError: 'missing'" in message
    assert "line 2, in helper" in message
    assert str(Path(spectra.__file__).parent) not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build():\n    return {}['missing']\n", "line 2, in build"),
        ("def build(:\n    pass\n", "line 1: invalid syntax\n    def build(:"),
        ("def build():\n    pass\n", "build() in '{file}' returned None, not (module, example_inputs)."),
        ("def build():\n    return 1\n", "returned an int, not"),
        ("\0", "'{file}': source code"),
    ],
)
def test_an_error_in_the_file_of_a_module_is_shown_from_the_users_first_line_on(text, words, tmp_path):
    file = tmp_path / "here.py"
    file.write_text(text)
    done = invoke("export-torch", f"{file}:build", "-o", tmp_path / "out")
    assert isinstance(done.exception, spectra.SpectraError)
    assert words.format(file=file) in str(done.exception)
    assert str(Path(spectra.__file__).parent) not in str(done.exception)


def test_the_home_folder_is_found_where_the_shell_leaves_its_name(monkeypatch, tmp_path):
    """As bash does in `--out=~/runs`: a folder called ~ was made, which asks to be removed by `rm -r ~`."""
    given = ["run", "~/p.py", "--out=~/a=b", "-o", "~/c d", "--block=~x", "~", "a~/b", "--tol=1"]
    meant = ["run", "{}/p.py", "--out={}/a=b", "-o", "{}/c d", "--block=~x", "~", "a~/b", "--tol=1"]
    taken = []
    monkeypatch.setattr(commands, "app", taken.append)
    monkeypatch.setattr(sys, "argv", ["spectra", *given])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("warnings.showwarning", warn)
    commands.main()
    assert taken == [[word.format(tmp_path) for word in meant]]


def test_progress_in_a_log_is_lines(capsys, monkeypatch):
    monkeypatch.setattr(Lines, "PACE", 0.0)
    with Progress(True, 30) as bar:
        for _ in range(3):
            bar.update(10)
    lines = capsys.readouterr().err.splitlines()
    counts = (10, 20, 30, 30)
    assert [line.split(",")[0] for line in lines] == [f"Lanczos: {n} of 30 products" for n in counts]


def interrupt(*_args, **_options):
    raise KeyboardInterrupt


def test_an_interrupted_demo_says_that_nothing_was_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("spectra.demos.digits.problem", interrupt)
    done = invoke("demo", "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert "nothing was kept. The same command starts again." in done.stderr


@pytest.mark.parametrize("saved", [False, True])
def test_an_interrupted_run_says_how_to_resume(problem, tmp_path, monkeypatch, saved):
    monkeypatch.setattr(running, "_analyse", interrupt)
    options = ("--checkpoint", tmp_path / "saved") if saved else ()
    done = invoke("run", problem, "-o", tmp_path / "out", *options)
    assert done.exit_code == 130
    assert (f"checkpoint in '{tmp_path / 'saved'}'" if saved else "With --checkpoint FOLDER") in done.stderr
    assert "Traceback" not in done.output


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback():
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with starting():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` starts a program
        with starting():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_an_interrupt_after_the_run_says_where_the_result_is(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "draw", interrupt)
    done = invoke("run", problem, "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert f"the result is in '{tmp_path / 'out' / 'spectrum.npz'}'" in done.stderr
    assert "nothing was kept" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--json",), ("--quiet",)], ids=["json", "quiet"])
def test_what_a_problem_prints_is_no_part_of_the_result(options, problem, tmp_path, monkeypatch):
    text = "print('loading')\n" + PROBLEM.replace("    return", "    print('made')\n    return")
    problem.write_text(text)

    def spectrum(*_, **__):
        print("traced")
        return report()

    monkeypatch.setattr(running, "spectrum", spectrum)
    done = invoke("run", problem, "-o", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    for word in ("loading", "made", "traced"):
        assert word in done.stderr
        assert word not in done.stdout
    if options == ("--json",):
        assert json.loads(done.stdout)["name"] == "net"
    assert "loading" in invoke("run", problem, "-o", tmp_path / "other").stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit()", r"called sys\.exit\(None\): there is nothing"),
        ("import sys\ndef problem():\n    sys.exit('no data')", r"called sys\.exit\('no data'\)"),
        ("def problem(mesh, rate):\n    return None", "needs several arguments"),
        ("def problem(*, rate):\n    return None", "needs several arguments, or one by its name"),
        ("def problem(rate=3, *rest, seed=0, **options):\n    return rate + seed", "returned an int"),
        ("def problem(**options):\n    return len(options)", "returned an int"),
        ("def problem(x):\n    return x", r"returned None.*Its argument was None, as there is no --mesh"),
        (
            "import spectra\ndef problem():\n    return spectra.Problem",
            r"returned the class, not .*Problem\(",
        ),
    ],
    ids=["at import", "with words", "arguments", "by name", "defaults", "options", "a mesh", "a class"],
)
def test_a_problem_that_ends_the_process_is_no_success(text, message, problem, tmp_path):
    problem.write_text(text)
    done = invoke("run", problem, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert isinstance(done.exception, spectra.SpectraError)
    assert re.search(message, str(done.exception))


def without_reader():
    """A stream into a pipe that nobody reads any more, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [(), ("--json",), ("--quiet",)],
    ids=["text", "json", "quiet"],
)
def test_a_reader_that_has_gone_costs_neither_result_nor_picture(
    form, problem, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdout", without_reader())
    with pytest.raises(
        output.ResultElsewhereError, match=r"not be printed \(Broken pipe\); it is in '.*npz'"
    ):
        commands.app(["run", str(problem), "-o", str(tmp_path / "out"), *form], standalone_mode=False)
    sys.stdout.close()
    assert names(tmp_path / "out") == ["spectrum.npz", "spectrum.png"]
    assert repr(spectra.load(tmp_path / "out" / "spectrum.npz")) == repr(report())


def test_a_reader_that_has_had_enough_of_a_file_is_no_failure(tmp_path, monkeypatch):
    path, other = (spectra.save(report(), tmp_path / name) for name in "ab")
    picture = tmp_path / "both.png"
    for words in (["show", str(path)], ["compare", str(path), str(other), "--out", str(picture)]):
        monkeypatch.setattr(sys, "stdout", without_reader())
        commands.app(words, standalone_mode=False)
        sys.stdout.close()
    assert picture.stat().st_size > 0


@pytest.mark.slow
def test_what_can_be_neither_written_nor_printed_is_kept_elsewhere(problem, tmp_path, monkeypatch):
    save = output.save

    def full(result, path, **options):
        if path.parent == tmp_path / "out":
            raise OSError(28, "No space left on device")
        return save(result, path, **options)

    monkeypatch.setattr(output, "save", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "stdout", without_reader())
    with pytest.raises(
        output.ResultElsewhereError, match=r"printed \(Broken pipe\), but is saved as '.*npz'"
    ):
        commands.app(["run", str(problem), "-o", str(tmp_path / "out")], standalone_mode=False)
    sys.stdout.close()
    (kept,) = tmp_path.rglob("spectrum.npz")
    assert repr(spectra.load(kept)) == repr(report())


@pytest.mark.slow
def test_a_result_that_is_shown_on_a_full_disk_is_said_not_to_be(tmp_path, monkeypatch):
    path = spectra.save(report(), tmp_path / "r")
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    with pytest.raises(spectra.SpectraError, match=r"could not be printed \(No space left on device\)"):
        commands.app(["show", str(path)], standalone_mode=False)
    sys.stdout.close()


def test_an_interrupt_while_the_result_is_printed_says_where_it_is(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(output.Voice, "show", interrupt)
    done = invoke("run", problem, "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert f"the result is in '{tmp_path / 'out' / 'spectrum.npz'}'" in done.stderr
    assert "nothing was kept" not in done.stderr


def test_a_log_that_cannot_be_written_any_more_ends_no_run(monkeypatch):
    """Nor does a warning, or the answer to Ctrl-C."""
    monkeypatch.setattr(host.Lines, "PACE", 0.0)
    monkeypatch.setattr(sys, "stderr", without_reader())
    with host.Progress(True, 10) as bar:
        for _ in range(3):
            bar.update(1)
            bar.note("still")
    warn("of a reader that has gone", UserWarning, "file.py", 1)
    with host.watching():
        signal.raise_signal(signal.SIGINT)
        assert host.pending() == signal.SIGINT
    sys.stderr.close()
    monkeypatch.setattr(sys, "stderr", None)  # as where a window starts a program
    with host.Progress(True, 10) as bar:
        bar.update(1)


CLOSED = """
import os, sys
from spectra.cli.ending import require_streams
require_streams()
print("to nobody", file=sys.stderr)
print(os.open(os.devnull, os.O_RDONLY) > 2)
"""


def test_no_file_takes_the_place_of_a_closed_stream():
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(CLOSED)} 2>&- <&-"
    done = subprocess.run(
        ["sh", "-c", command], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


def test_completion_can_be_installed():
    shown = invoke("--help").output
    assert "--install-completion" in shown
    assert "--show-completion" in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("ru", {"run"}),
        ("run --bl", {"--block", "--blocks"}),
        ("run problem.py --blocks l", {"leaf", "layer"}),
        ("run problem.py --operator gg", {"ggn"}),
        ("run pro", set()),  # files are the shell's own
    ],
)
def test_shells_are_offered_commands_flags_and_words(shell, begun, offered):
    *before, last = ["spectra", *begun.split()]
    asked = {"COMP_WORDS": " ".join([*before, last]), "COMP_CWORD": str(len(before))}
    asked |= {"_TYPER_COMPLETE_ARGS": " ".join([*before, last])}
    asked |= {"_SPECTRA_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    shown = CliRunner().invoke(commands.app, [], env=asked, prog_name="spectra").output
    words = re.findall(r'"(-*\w[\w-]*)"[:)\n]' if shell == "zsh" else r"^\S+", shown, re.M)
    assert set(words) == offered, shown
    assert (shown.strip() == "_files") == (shell == "zsh" and not offered)
