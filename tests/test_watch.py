"""The live page: it follows files as they grow, in whatever state, and is served to this machine alone."""

import dataclasses
import json
import os
import socket
import struct
import threading
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_page import Reader
from typer.testing import CliRunner

import spectra
from spectra.cli import commands
from spectra.report import histories
from spectra.report.encode import decode
from spectra.report.live import LivePage, serve
from spectra.report.plots.history import LARGEST, plot_course


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The lines of a run of four snapshots: the header, then one each."""
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    matrix = jnp.diag(jnp.linspace(0.0, 1.0, 30))
    tracker = spectra.SpectrumTracker(
        lambda t: spectra.MatrixOperator((1 + t) * matrix), 10, path=path, name="<tiny>", num_steps=4
    )
    for step in range(0, 40, 10):
        tracker(
            step, step / 10, loss=np.inf if step == 30 else 2.0 - step / 100, **{"<head>room": 3 - step / 20}
        )
    return path.read_bytes().splitlines(keepends=True)


def words(page):
    return " ".join(Reader(page.text()).words)


def test_the_page_follows_a_file_that_grows_line_by_line(recorded, tmp_path):
    path = tmp_path / "run.jsonl"
    page = LivePage([path], seconds=7)
    assert "not there yet" in words(page)
    path.write_bytes(b"")
    assert "empty so far" in words(page)
    path.write_bytes(recorded[0][:20])
    assert "<h2>Files</h2>" in page.text()  # a header that is still being written
    path.write_bytes(recorded[0])
    assert "none yet" in words(page)
    path.write_bytes(b"".join(recorded[:3]))
    assert "2, steps 0 to 10" in words(page)
    assert page.text().count("<figure>") == 3  # the density, the loss, the headroom
    path.write_bytes(b"".join(recorded[:3]) + recorded[3][:50])  # torn, or being written
    assert "2, steps 0 to 10" in words(page)
    assert "Files" not in words(page)
    path.write_bytes(b"".join(recorded))
    text = page.text()
    assert "4, steps 0 to 30" in words(page)
    assert 'http-equiv="refresh" content="7"' in text
    assert "<head>room" in words(page)  # as text
    assert "script" not in Reader(text).tags
    ids = [value for key, value in Reader(text).attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert page.text() is text  # nothing has changed: nothing is drawn again


@pytest.mark.slow
def test_what_is_wrong_with_a_file_is_on_the_page_and_the_rest_is_shown(recorded, tmp_path):
    damaged, other, gone = (tmp_path / name / "run.jsonl" for name in "abc")
    for path in (damaged, other):
        path.parent.mkdir()
    lines = list(recorded)
    lines[2] = lines[2].replace(b"snapshot", b"snapshut")
    damaged.write_bytes(b"".join(lines))
    other.write_bytes(b"".join(recorded[:3]))
    array = spectra.save(
        spectra.trace(spectra.MatrixOperator(jnp.eye(3)), key=jax.random.key(0)), tmp_path / "t"
    )
    page = LivePage([damaged, other, gone, array])
    shown = words(page)
    assert "is damaged in line 3" in shown
    assert "not there yet" in shown
    assert "holds a Estimate, not the history of a run" in shown
    for folder in "ab":  # one stem, three folders
        assert str(tmp_path / folder / "run") in shown
    # Sharpness, loss and headroom of both on common axes, and two densities.
    assert page.text().count("<figure>") == 5
    other.unlink()
    assert page.text().count("<figure>") == 4


@pytest.mark.slow
def test_it_is_served_to_this_machine_and_to_nobody_else(recorded, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(recorded[:2]))
    with serve(LivePage([path]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert server.server_address[0] == "127.0.0.1"

        def get(where="/", **headers):
            with urllib.request.urlopen(urllib.request.Request(address + where, headers=headers)) as answer:
                return answer.read().decode(), answer.headers

        text, headers = get()
        assert "1, steps 0 to 0" in " ".join(Reader(text).words)
        assert headers["Cache-Control"] == "no-store"
        path.write_bytes(b"".join(recorded))
        assert "4, steps 0 to 30" in " ".join(Reader(get("/?again")[0]).words)
        for where, host, code in (("/../run.jsonl", None, 404), ("/", "elsewhere.example", 403)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(where, **({} if host is None else {"Host": host}))
            assert refused.value.code == code
            refused.value.close()
        with pytest.raises(spectra.SpectraError, match=f"port {server.server_port} cannot be served"):
            serve(LivePage([path]), server.server_port)
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_run_that_cannot_be_shown_hides_no_other(recorded, tmp_path):
    good, bad = (tmp_path / f"{name}.jsonl" for name in ("good", "bad"))
    good.write_bytes(b"".join(recorded))
    header, *lines = (json.loads(line) for line in recorded)
    for line in (header, *lines):
        del line["crc32"]
    for line in lines:  # each field is what it may be, and there is no spectrum like this
        weights = line["snapshot"]["fields"]["quadrature"]["fields"]["weights"]["array"]
        weights["values"] = [0.0 for _ in weights["values"]]
    bad.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    both = LivePage([good, bad])
    assert "bad: cannot be shown: its numbers contradict each other" in words(both)
    assert "is damaged" not in words(both)
    alone = LivePage([good, tmp_path / "gone.jsonl"])
    assert both.text().count("<figure>") == alone.text().count("<figure>")
    assert "bad: cannot be shown" in words(LivePage([bad]))


@pytest.mark.slow
def test_a_page_that_failed_is_made_again(recorded, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(recorded[:2]))
    page = LivePage([path])
    before = page.text()
    path.write_bytes(b"".join(recorded[:3]))
    with monkeypatch.context() as broken:
        broken.setattr("spectra.report.live.assemble", None)
        with pytest.raises(TypeError):
            page.text()
    assert page.text() != before


def test_a_number_of_the_name_sharpness_is_shown_as_it_was_recorded(recorded, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(recorded))
    snapshots = [
        dataclasses.replace(s, scalars={"sharpness": 100.0 + i}) for i, s in enumerate(spectra.load(path))
    ]
    history = spectra.SpectrumHistory(tuple(snapshots), {})
    shown = {name: plot_course({"": history}, name) for name in ("sharpness", LARGEST)}
    drawn = {name: ax.get_lines()[0].get_ydata() for name, ax in shown.items()}
    np.testing.assert_array_equal(drawn["sharpness"], [100, 101, 102, 103])
    np.testing.assert_array_equal(drawn[LARGEST], history.sharpness)
    plt.close("all")


@pytest.mark.slow
def test_a_browser_that_is_closed_before_its_answer_is_no_error(capsys):
    asked, closed = threading.Event(), threading.Event()

    class Slow:
        def text(self):
            asked.set()
            closed.wait(30)
            return "x" * 10**6

    with serve(Slow(), 0) as server:
        server.daemon_threads = False  # wait for the answer at the end
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        browser = socket.create_connection(server.server_address)
        browser.sendall(b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        assert asked.wait(30)
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        browser.close()
        closed.set()
        server.shutdown()
        thread.join()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_page_is_written_beside_a_finished_run(recorded, tmp_path):
    path, out = tmp_path / "run.jsonl", tmp_path / "page.html"
    path.write_bytes(b"".join(recorded))
    done = CliRunner().invoke(commands.app, ["watch", str(path), "-o", str(tmp_path / "page"), "--once"])
    assert done.exit_code == 0, done.output
    assert "4, steps 0 to 30" in " ".join(Reader(out.read_text()).words)
    page = LivePage([path])
    assert page.write(out)
    assert not page.write(out)
    os.utime(path, ns=(0, 0))
    assert page.write(out)
    assert page.write(tmp_path / "new" / "folder" / "page.html")
    refused = CliRunner().invoke(commands.app, ["watch", str(path), "--once"])
    assert refused.exit_code == 2
    assert "--out" in refused.output
    refused = CliRunner().invoke(commands.app, ["watch", str(path), "--port", "0", "-o", str(out)])
    assert refused.exit_code == 2
    assert "--port" in refused.output
    with pytest.raises(spectra.SpectraError, match="no file to watch"):
        LivePage([])


def test_of_a_file_that_grows_only_new_lines_are_decoded(recorded, tmp_path, monkeypatch):
    path, decoded = tmp_path / "run.jsonl", []
    monkeypatch.setattr(
        histories, "decode", lambda stored, array: (decoded.append(stored), decode(stored, array))[1]
    )

    def steps(data):
        path.write_bytes(data)
        return [snapshot.step for snapshot in reader.read()]

    reader = histories.HistoryReader(path)
    assert steps(b"".join(recorded[:3])) == [0, 10]
    assert steps(b"".join(recorded[:3]) + recorded[3][:50]) == [0, 10]  # torn, or being written
    assert steps(b"".join(recorded)) == [0, 10, 20, 30]
    assert len(decoded) == 4
    assert steps(b"".join(recorded[:2])) == [0]  # begun again under the same name
    other = b"".join([*recorded[:2], recorded[4], recorded[3], recorded[4]])
    assert steps(other) == [0, 20, 30, 30]  # in the order of training
    swapped = b"".join([recorded[0], *reversed(recorded[1:])])  # other lines, no fewer bytes
    assert steps(swapped + recorded[1]) == [0, 0, 10, 20, 30]
