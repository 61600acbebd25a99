"""Result files: complete, readable by NumPy alone, atomic, and damage is always noticed."""

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.base import files
from spectra.report import npz
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_file_system_without_modes_costs_no_result(saved, report, monkeypatch):
    def chmod(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(type(saved), "chmod", chmod)
    spectra.save(report.trace, saved)
    assert_same(spectra.load(saved), report.trace)


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


@pytest.mark.slow
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


def rewritten(path, change):
    """The file again, its arrays and its header changed."""
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("header")))
    change(header, arrays)
    np.savez_compressed(path, header=np.array(json.dumps(header)), **arrays)


def forms(header):
    """All forms of arrays in a header."""
    if isinstance(header, dict):
        if isinstance(header.get("array"), dict):
            yield header
        for value in header.values():
            yield from forms(value)


def test_files_of_first_versions_are_read(saved, report):
    """They name arrays, without dtype and shape, and write NaN as Python does."""

    def change(header, arrays):
        for form in list(forms(header)):
            form["array"] = form["array"]["name"]
        header["result"]["fields"]["provenance"]["dict"]["seconds"] = float("nan")
        header["result"]["fields"].pop("level")

    rewritten(saved, change)
    loaded = spectra.load(saved)
    assert_same(loaded.quadrature, report.quadrature)
    assert_same(loaded.density, report.density)
    assert np.isnan(loaded.provenance["seconds"])
    assert loaded.level is None


COLLIDING = {
    "a path and a name": {"a": {"b": 1}, "a/b": 2},
    "one of the archive's": {"w": 1, "w.npy": 2},
    "a zero": {"a\0b": 1, "a\0c": 2},
    "numbered already": {"a": {"b": 1}, "a/b": 2, "a/b~2": 3},
    "long": {"x" * 300 + "a": 1, "x" * 300 + "b": 2, "y" * 70000: 3},
    "words of NumPy's": {"header": 1, "file": 2, "allow_pickle": 3},
    "half a character": {chr(0xD800): 1, chr(0xDFFF): 2, "_": 3},
}


@pytest.mark.parametrize("name", COLLIDING)
def test_no_two_arrays_share_a_name(name, tmp_path):
    tree = jax.tree.map(lambda x: np.full((2, 3), float(x)), COLLIDING[name])
    path = spectra.save(tree, tmp_path / "x")
    assert jax.tree.map(np.array_equal, spectra.load(path), tree) == jax.tree.map(lambda _: True, tree)
    with np.load(path) as file:  # NumPy alone sees as many
        assert len(file.files) == 1 + len(jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "int8", ">f4", "bool"])
def test_dtypes_come_back(dtype, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    loaded = spectra.load(spectra.save({"x": array, "y": array.T, "z": array[:, :0]}, tmp_path / "x"))
    assert loaded["x"].dtype == jnp.dtype(dtype).newbyteorder("=")
    for name, original in (("x", array), ("y", array.T), ("z", array[:, :0])):
        np.testing.assert_array_equal(loaded[name].astype(float), original.astype(float))
        loaded[name][...] = 0  # an array of one's own


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    deep = np.ones(2)
    for _ in range(200):
        deep = {"a": deep}
    for tree, message in (
        (deep, "nested more than"),
        ({"a": 2**70}, "more than 64 bits"),
        ({"a": np.array(["text"])}, "cannot save an array of dtype"),
        ({"a": 1j}, "cannot save a complex"),
    ):
        with pytest.raises(spectra.SpectraError, match=message):
            spectra.save(tree, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def with_nan(result, field):
    return dataclasses.replace(result, **{field: np.full_like(getattr(result, field), np.nan)})


@pytest.mark.parametrize("name", ["quadrature", "pairs", "report"])
def test_nan_in_place_of_a_spectrum_is_no_complete_result(name, report, tmp_path, monkeypatch):
    """What computes one raises; inside jit it is NaN, and its status says "traced"."""
    quadrature = with_nan(report.quadrature, "nodes")
    op = spectra.DiagonalOperator(jnp.arange(1.0, 9.0))
    lost = {
        "quadrature": quadrature,
        "report": dataclasses.replace(report, quadrature=quadrature),
        "pairs": with_nan(spectra.eigsh(op, 2, key=KEY), "values"),
    }[name]
    with pytest.raises(spectra.SpectraError, match=r"cannot save .*is NaN or infinite, and the status"):
        spectra.save(lost, tmp_path / "x")
    monkeypatch.setattr("spectra.report.encode.contradiction", lambda result: None)  # a file from elsewhere
    path = spectra.save(lost, tmp_path / "x")
    with pytest.raises(spectra.ResultFileError, match="is NaN or infinite, and the status is"):
        spectra.load(path)
    traced = dataclasses.replace(quadrature, status=spectra.Status.TRACED)
    assert np.isnan(spectra.load(spectra.save(traced, tmp_path / "y")).nodes).all()


def test_a_file_claims_no_more_memory_than_its_size_allows(tmp_path, monkeypatch):
    """The limit is checked on the directory of the archive: nothing is unpacked before."""
    path = tmp_path / "bomb.npz"
    spectra.save({"zeros": np.zeros(10**6), "noise": np.random.default_rng(0).random(10**5)}, path)
    size = path.stat().st_size
    monkeypatch.setattr(npz, "COMPRESSED", 8 * 10**6 - 16 * size)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was unpacked"))
    refused(path, r"claim to hold 8,\d{3},\d{3}, which no file that spectra writes does")


def test_large_arrays_are_stored_and_what_is_written_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "COMPRESSED", 10**6)
    tree = {
        "small": np.zeros(100_000),
        "large": np.zeros(200_000),
    }  # 1.6 MB that would pack to some hundred bytes
    path = spectra.save(tree, tmp_path / "x")
    assert path.stat().st_size > 1.5e6
    assert jax.tree.map(np.array_equal, spectra.load(path), tree) == {"small": True, "large": True}


def test_an_array_of_another_shape_or_dtype_is_refused(saved):
    data = saved.read_bytes()
    changes = {
        r"weights has shape \(2, 20\): 2 for probes = 1": lambda a: a.update(
            {"quadrature/nodes": a["quadrature/nodes"][:1]}
        ),
        "has dtype complex128": lambda a: a.update({"density/grid": a["density/grid"] + 0j}),
        "weights has entries below 0": lambda a: a.update({"quadrature/weights": -a["quadrature/weights"]}),
        "a density has points": lambda a: a.update(
            {k: v[:0] for k, v in a.items() if k.startswith("density")}
        ),
    }
    for message, change in changes.items():
        saved.write_bytes(data)

        def agree(header, arrays, change=change):
            change(arrays)
            for form in forms(header):
                array = arrays[form["array"]["name"]]
                form["array"] |= {"dtype": array.dtype.name, "shape": list(array.shape)}

        rewritten(saved, agree)
        refused(saved, message)
    saved.write_bytes(data)
    rewritten(saved, lambda _, a: a.update({"density/grid": a["density/grid"].astype("f4")}))
    refused(saved, "is float32, not float64")


def test_a_place_that_is_no_file_is_refused_in_words(tmp_path):
    for path in (tmp_path, tmp_path / ("a" * 300)):
        refused(path, "cannot be read")
    with pytest.raises(spectra.ResultFileError, match="cannot be read"):
        spectra.load("a\0b")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path, other = tmp_path / "x.npz", tmp_path / "x.npz.mine.part"
    other.write_text("of the user")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (tmp_path / f"x.npz.{files._host()}-{ended.pid}-abcd_123.part").write_text("half")
    old = tmp_path / "x.npzabcd1234.part"  # as earlier versions called theirs
    old.write_text("old")
    assert len(list(tmp_path.iterdir())) == 3
    with files.replacing(path) as temporary:
        assert temporary.exists()
        files.sweep(path)  # another save of the same file in this process
        assert temporary.exists()
        assert sorted(tmp_path.iterdir()) == sorted([other, old, temporary])
        temporary.write_text("whole")
    os.utime(old, (0, 0))
    files.sweep(path)
    assert sorted(tmp_path.iterdir()) == sorted([other, path])


@pytest.mark.parametrize("links", [True, False])
def test_an_existing_file_is_kept_where_that_is_asked(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    path = spectra.save({"a": np.ones(2)}, tmp_path / "x", overwrite=False)
    with pytest.raises(FileExistsError):
        spectra.save({"a": np.zeros(2)}, path, overwrite=False)
    assert spectra.load(path)["a"].sum() == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("below", ["x.npz", "deeper/still/x.npz"])
@pytest.mark.parametrize("write", [spectra.save, spectra.write_report], ids=["save", "report"])
def test_a_file_in_the_place_of_a_folder_is_named(write, below, tmp_path):
    file = tmp_path / "results"
    file.touch()
    path = (file / below).with_suffix(".npz" if write is spectra.save else ".html")
    with pytest.raises(NotADirectoryError, match=r"in the place of a folder of '.*x\.\w+': '.*results'$"):
        write(spectra.Estimate(1.0, 0.1, 4, "slq"), path)


def test_a_name_with_a_zero_byte_is_refused(tmp_path):
    with pytest.raises(spectra.SpectraError, match="holds a zero byte"):
        spectra.save(spectra.Estimate(1.0, 0.1, 4, "slq"), str(tmp_path / "a\0b"))


def test_the_memory_of_json_is_bounded_before_it_is_read():
    for text in (b"[[]]" * 50, b'{"a": {"b": 1.5}}' * 20, '["日本", "é"]'.encode() * 20, b"1, 2, 3, " * 50):
        value = (
            b"["
            + b",".join([text.strip(b", ").replace(b"]" + b"[", b"],[").replace(b"}{", b"},{")] * 50)
            + b"]"
        )
        tracemalloc.start()
        kept = files.parse(value)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kept
        assert peak <= files.memory_of(value) + 1000
    with pytest.raises(files.JsonError, match="would take"):
        files.parse(b"[" + b"[]," * 1000 + b"1]", max_bytes=10_000)
    with pytest.raises(files.JsonError, match="nested"):
        files.parse(b"[" * 100_000)


def test_the_name_of_a_folder_is_no_file(tmp_path):
    with pytest.raises(spectra.SpectraError, match="is a folder: pass the name of a file in it"):
        spectra.save(spectra.Estimate(1.0, 0.1, 4, "slq"), ".")
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run", f"{tmp_path}/new/"):
        with pytest.raises(spectra.SpectraError, match="is a folder: pass the name of a file in it"):
            spectra.save(spectra.Estimate(1.0, 0.1, 4, "slq"), path)
    assert not (tmp_path / "run.npz").exists()
