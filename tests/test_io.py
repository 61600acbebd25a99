"""Result files: complete, readable by NumPy alone, atomic, and damage is always noticed."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.results import Interval

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def report():
    op = spectra.MatrixOperator(jnp.diag(jnp.linspace(-1.0, 3.0, 60)))
    return spectra.spectrum(op, key=KEY, num_steps=20, num_probes=2, name="test é")


@pytest.fixture
def saved(report, tmp_path):
    return report.save(tmp_path / "result.npz")


def assert_same(a, b):
    assert type(a) is type(b)
    if hasattr(a, "__dataclass_fields__"):
        for name in a.__dataclass_fields__:
            assert_same(getattr(a, name), getattr(b, name))
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


def test_every_kind_of_result_comes_back_as_it_was(report, tmp_path):
    for result in (report.quadrature, report.density, report.trace):
        path = spectra.save(result, tmp_path / type(result).__name__)
        assert path.suffix == ".npz"
        assert_same(spectra.load(path), result)
    loaded = spectra.load(report.save(tmp_path / "report"))
    assert repr(loaded) == repr(report)
    assert_same(loaded.quadrature, report.quadrature)
    assert_same(loaded.density, report.density)
    assert loaded.provenance == report.provenance
    assert loaded.quadrature.status is report.quadrature.status
    assert isinstance(loaded.largest, Interval)
    for name in ("largest", "smallest", "negative", "near_zero"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(report, name))
    x = np.linspace(-1, 3, 9)
    np.testing.assert_array_equal(loaded.quadrature.cdf(x), report.quadrature.cdf(x))


def test_numpy_alone_reads_everything_without_pickle(saved, report):
    with np.load(saved, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["quadrature/nodes"], report.quadrature.nodes)
        np.testing.assert_array_equal(file["density/grid"], report.density.grid)
        header = json.loads(str(file["header"]))
        assert all(file[name].dtype != object for name in file.files)
    assert header["format"] == "spectra-result"
    assert header["schema"] == 1
    provenance = header["result"]["fields"]["provenance"]["dict"]
    for name in ("spectra", "jax", "device", "key", "seconds", "date"):
        assert name in provenance
    fields = header["result"]["fields"]["quadrature"]["fields"]
    assert fields["num_matvecs"] == 40
    assert fields["status"] == {"status": "complete"}


def test_a_result_of_jit_can_be_saved(tmp_path):
    op = spectra.MatrixOperator(jnp.eye(8))
    q = jax.jit(lambda op: spectra.slq(op, key=KEY, num_steps=3, num_probes=2))(op)
    loaded = spectra.load(spectra.save(q, tmp_path / "q"))
    np.testing.assert_array_equal(loaded.nodes, q.nodes)
    assert loaded.status is spectra.Status.TRACED


@pytest.mark.parametrize(
    "result",
    [1.0, "text", None, {"a": object()}, object()],
    ids=["number", "text", "None", "dict", "object"],
)
def test_what_is_not_a_result_is_not_saved(result, tmp_path):
    with pytest.raises(spectra.SpectraError, match="cannot save a"):
        spectra.save(result, tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["write_array", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(call, saved, report, monkeypatch):
    before = saved.read_bytes()

    def fail(file, *args, **kwargs):
        if hasattr(file, "write"):
            file.write(b"half of a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(np.lib.format if call == "write_array" else os, call, fail)
    with pytest.raises(OSError, match="no space left"):
        report.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_existing_file_is_replaced_and_readable_by_others(saved, report):
    spectra.save(report.trace, saved)
    assert_same(spectra.load(saved), report.trace)
    mask = os.umask(0)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~mask


def refused(path, match=None):
    with pytest.raises(spectra.ResultFileError, match=match) as info:
        spectra.load(path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize("percent", range(0, 100, 10))
def test_truncated_files_are_refused(percent, saved):
    data = saved.read_bytes()
    saved.write_bytes(data[: len(data) * percent // 100])
    refused(saved)


def test_files_that_lack_a_last_byte_or_have_a_foreign_start_are_refused(saved):
    data = saved.read_bytes()
    saved.write_bytes(data[:-1])
    refused(saved)
    saved.write_bytes(b"\x93NUMPY" + data)
    refused(saved)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    path.write_text("a,b\n1,2\n")
    refused(path)
    path.write_bytes(b"")
    refused(path)
    np.savez(path, a=np.ones(3))
    refused(path, "no header")
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    refused(path)
    np.savez(path, header=np.array({"pickled": 1}, dtype=object))
    refused(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        spectra.load(tmp_path / "missing.npz")


QUADRATURE = {"class": "Quadrature", "fields": {}}


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        [],
        {},
        {"format": "other"},
        {"format": "spectra-result", "schema": 2, "result": QUADRATURE},
        {"format": "spectra-result", "schema": 1},
        {"format": "spectra-result", "schema": 1, "result": QUADRATURE},
        {"format": "spectra-result", "schema": 1, "result": "text"},
        {"format": "spectra-result", "schema": 1, "result": None},
        {"format": "spectra-result", "schema": 1, "result": {"status": "complete"}},
        {"format": "spectra-result", "schema": 1, "result": {"class": "Quadrature", "fields": []}},
        {"format": "spectra-result", "schema": 1, "result": {"class": "os", "fields": {}}},
        {"format": "spectra-result", "schema": 1, "result": {"class": [], "fields": {}}},
        {"format": "spectra-result", "schema": 1, "result": {"array": "missing"}},
        {"format": "spectra-result", "schema": 1, "result": {"dict": []}},
    ],
    ids=lambda header: json.dumps(header)[-60:],
)
def test_garbled_headers_are_refused(header, tmp_path):
    path = tmp_path / "x.npz"
    text = header if header == "not json" else json.dumps(header)
    np.savez(path, header=np.array(text), nodes=np.ones(3))
    refused(path)


def test_a_newer_schema_says_what_to_do(saved):
    with np.load(saved) as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("header"))) | {"schema": 7}
    np.savez(saved, header=np.array(json.dumps(header)), **arrays)
    refused(saved, "has schema 7.*update spectra")


def test_a_file_that_lost_an_array_names_it(saved):
    with np.load(saved) as file:
        arrays = dict(file)
    del arrays["quadrature/nodes"]
    np.savez(saved, **arrays)
    refused(saved, "quadrature/nodes")


def test_two_hundred_mutated_files_load_as_they_were_or_are_refused(saved, report):
    """The checksums of the zip format notice damage to contents; the rest is structure."""
    data, rng, noticed = saved.read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        mutated = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 5)):
            mutated[position] ^= int(rng.integers(1, 256))
        saved.write_bytes(bytes(mutated))
        try:
            loaded = spectra.load(saved)
        except spectra.ResultFileError:
            noticed += 1
        else:  # a date or an attribute in the archive's directory, nothing of ours
            assert repr(loaded) == repr(report)
            np.testing.assert_array_equal(loaded.quadrature.nodes, report.quadrature.nodes)
    assert noticed > 100
