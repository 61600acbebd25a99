"""The two files: round trips without PyTorch, damage, and hostile content."""

import copy
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import bridge_reference as reference
import jax
import numpy as np
import pytest
import torch
from bridge_cases import CASES
from model_families import TOLERANCES, inputs_of, prepare
from torch.utils import _pytree

from spectra import bridge
from spectra.bridge import BridgeError, schema
from spectra.bridge import weights as _safetensors
from spectra.bridge.operators.registry import OPERATORS

# PyTorch's own note on a kernel that it does not use.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def _write_case(name: str, folder: Path, dtype: torch.dtype) -> None:
    """Export at batch three; keep inputs, a vector and PyTorch's results at batch four."""
    case = CASES[name]
    with jax.enable_x64(dtype == torch.float64), reference.precision(dtype, case.heavy):
        module, example = prepare(case, dtype, 3)
        bridge.export(module, example, folder, **case.options)
        inputs = inputs_of(case, dtype, 4)
        rng = np.random.default_rng(0)
        params = bridge.load(folder).params
        vector = {k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in params.items()}
        results = reference.torch_derivatives(copy.deepcopy(module), inputs, vector, case.twin)
    arguments = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    leaves = [x for x in _pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    arrays = {f"input/{i}": x.numpy() for i, x in enumerate(leaves)}
    arrays |= {f"output/{i}": x for i, x in enumerate(results[0])}
    for kind, tree in zip(("vector", "gradient", "product"), (vector, *results[1:]), strict=True):
        arrays |= {f"{kind}/{k}": x for k, x in tree.items()}
    np.savez(folder / "case.npz", **arrays)


def _check_without_torch(names: list[str], folder: Path, dtype: torch.dtype) -> None:
    for name in names:
        _write_case(name, folder / name, dtype)
    program = Path(__file__).with_name("without_torch.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", program, *(folder / name for name in names)],
        check=False,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": str(int(dtype == torch.float64)),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = {Path(w[0]).name: tuple(map(float, w[1:])) for w in map(str.split, done.stdout.splitlines())}
    assert set(errors) == set(names)
    wrong = {
        n: e for n, e in errors.items() if any(x >= y for x, y in zip(e, TOLERANCES[dtype], strict=True))
    }
    assert not wrong


@pytest.mark.slow
def test_round_trip_without_torch(tmp_path):
    _check_without_torch(["tied_detached", "embedding_bags"], tmp_path, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_all_round_trips_without_torch(tmp_path, dtype):
    _check_without_torch(list(CASES), tmp_path, dtype)


@pytest.mark.slow
def test_files_are_equivalent_to_memory(tmp_path):
    module, example = prepare(CASES["tied_detached"], torch.float32, 3)
    bridge.export(module, example, tmp_path / "model")
    loaded = bridge.load(tmp_path / "model")
    direct = bridge.from_torch(module, example)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "graph.json",
        "weights.safetensors",
    ]
    assert list(loaded.params) == list(direct.params)
    ids = example[0].numpy()
    for a, b in zip(
        jax.tree.leaves(jax.jit(loaded.apply)(loaded.params, ids)),
        jax.tree.leaves(jax.jit(direct.apply)(direct.params, ids)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bytes(tmp_path):
    module, example = prepare(CASES["cnn"], torch.float32, 3)
    for name in ("a", "b"):
        bridge.export(module, example, tmp_path / name)
    for file in ("graph.json", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a small model with most features of the schema."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    module, example = prepare(CASES["tied_detached"], torch.float32, 3)
    bridge.export(module, example, folder)
    return (folder / "graph.json").read_bytes(), (folder / "weights.safetensors").read_bytes()


def _load(folder: Path, graph: bytes, weights: bytes):
    (folder / "graph.json").write_bytes(graph)
    (folder / "weights.safetensors").write_bytes(weights)
    return bridge.load(folder)


def _damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Truncate, change, insert, repeat or remove bytes."""
    kind, at = rng.integers(5), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:]
    if kind == 3:
        return data + data[at:]
    return data[:at] + data[at + 1 + int(rng.integers(8)) :]


def _same(model, other) -> bool:
    kinds = ("params", "buffers", "constants")
    arrays = [
        {k: np.asarray(v).tobytes() for n in kinds for k, v in getattr(m, n).items()} for m in (model, other)
    ]
    return model.graph == other.graph and arrays[0] == arrays[1]


@pytest.mark.slow
def test_damaged_files(files, tmp_path):
    """500 damaged graphs and 500 damaged weights: an error of the bridge, or the very same model.

    A byte that lands between two tokens of the graph as a space leaves the document what it was.
    """
    rng = np.random.default_rng(0)
    original, refused = _load(tmp_path, *files), 0
    for index in range(1000):
        damaged = list(files)
        damaged[index % 2] = _damage(files[index % 2], rng)
        try:
            model = _load(tmp_path, *damaged)
        except BridgeError:
            refused += 1
        else:
            assert index % 2 == 0, "weights have no second form"
            assert _same(model, original)
    assert refused > 990


_STRANGE = [None, True, -1, 0, 1, 2**31, 2**40, 2**62, 10**30, 1.5, "", "x", "aten.add.Tensor",
            "__import__", [], [[]], {}, {"ref": "x"}, {"ref": 1}, {"dtype": "object"},
            {"float": "inf"}, {"float": "1e9"}, ["../../etc/passwd"]]  # fmt: skip


def _places(value, found):
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            _places(value[key], found)
    return found


def _neighbours(value):
    """Values close to one of a document: what a changed digit, letter or comma makes of it."""
    if isinstance(value, bool):
        return [not value, int(value)]
    if isinstance(value, (int, float)):
        return [value + 1, -value - 1, value * 2 + 1, str(value)]
    if isinstance(value, str):
        return [value + "_", value[1:] + "x", value.swapcase() + "0"]
    if isinstance(value, list):
        return [[*value, 0], [*value, None], value[1:] or [1]]
    return [{**value, "x": 0}, [value], 0] if isinstance(value, dict) else [0, False, ""]


@pytest.mark.slow
def test_every_changed_field_is_refused(files):
    """Each field of the document in turn: removed, or another value, also of another type that is equal.

    JSON tells 1, 1.0 and true apart, Python's == does not: the digest is over the text.
    """
    document = json.loads(files[0])
    places, changed = _places(document, []), 0
    assert len(places) > 250
    for owner, key in places:
        value = owner[key]
        equal = [float(value)] if type(value) is int else [int(value)] if value in (0.0, 1.0) else []
        for other in [*_neighbours(value), *_STRANGE[:7], *equal]:
            if type(other) is type(value) and other == value:
                continue
            owner[key] = other
            with pytest.raises(BridgeError):
                schema.parse(json.dumps(document).encode(), "graph.json")
            changed += 1
        owner[key] = value
        if isinstance(owner, dict):
            order = list(owner.items())
            del owner[key]
            with pytest.raises(BridgeError):
                schema.parse(json.dumps(document).encode(), "graph.json")
            owner.clear()
            owner.update(order)
    assert changed > 10 * len(places)
    assert schema.parse(json.dumps(document).encode(), "graph.json") == schema.parse(files[0], "graph.json")


def _mutate(graph: bytes, rng: np.random.Generator) -> bytes:
    """Replace, remove, repeat or exchange one entry anywhere in the document, and sign it again."""
    document = json.loads(graph)
    places = _places(document, [])
    owner, key = places[int(rng.integers(len(places)))]
    kind = rng.integers(4)
    if kind == 0:
        owner[key] = _STRANGE[int(rng.integers(len(_STRANGE)))]
    elif kind == 1:
        del owner[key]
    elif kind == 2 and isinstance(owner, list):
        owner.insert(key, owner[key])
    else:
        other, place = places[int(rng.integers(len(places)))]
        owner[key], other[place] = json.loads(json.dumps([other[place], owner[key]]))
    document["digest"] = schema.digest(document)
    return json.dumps(document).encode()


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, 1000])
def test_forged_graphs(count, files, tmp_path):
    """Well-signed graphs, one entry changed: an error, or a graph that still evaluates."""
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(count):
        try:
            model = _load(tmp_path, _mutate(files[0], rng), files[1])
        except BridgeError:
            refused += 1
        else:
            assert isinstance(model, bridge.TorchModel)
    assert refused > count / 2


def _forged(files, change) -> bytes:
    document = json.loads(files[0])
    change(document)
    document["digest"] = schema.digest(document)
    return json.dumps(document).encode()


def _node(document, op):
    return next(n for n in document["nodes"] if n["op"] == op)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: _node(d, "aten.linear.default").update(op="os.system"), "os.system"),
        (lambda d: d["nodes"].reverse(), "not defined before"),
        (lambda d: d["nodes"][0].update(name=d["nodes"][1]["name"]), "defined twice|not defined"),
        (lambda d: d["tensors"][0].update(shape=[2**50]), "integer from"),
        (lambda d: d["tensors"][0].update(shape=[2**20, 2**20]), "at most"),
        (lambda d: d["tensors"][0].update(dtype="object"), "dtype"),
        (lambda d: d["inputs"][0].update(shape=["other", 4]), "unknown symbol"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(format="pickle"), "not a spectra-graph"),
        (lambda d: d.update(extra=1), "unknown fields"),
        (lambda d: d.update(symbols=[{"name": "s", "example": 0}]), "integer from"),
        (lambda d: d.update(aliases={"a": "nothing"}), "aliases"),
        (lambda d: d["output_tree"].update(type="object"), "tree"),
        (lambda d: _node(d, "aten.linear.default").update(kwargs={"nope": 1}), "do not fit"),
        (lambda d: _node(d, "aten.linear.default").update(shape=[3, 4, 9]), "PyTorch"),
    ],
)
def test_forged_fields(files, tmp_path, change, message):
    with pytest.raises(BridgeError, match=message):
        _load(tmp_path, _forged(files, change), files[1])


def _chain(op, first, last=40, arguments=lambda ref: [ref, ref]):
    """Nodes of which each takes the one before it."""

    def node(name, op, args):
        rest = {"kwargs": {}, "module": "", "dtype": None, "shape": None}
        return {"name": name, "op": op, "args": args, **rest}

    rest = [node(f"z{i}", op, arguments({"ref": f"z{i - 1}"})) for i in range(1, last)]
    return {
        "nodes": [node("z0", *first), *rest],
        "outputs": [{"ref": f"z{last - 1}"}],
        "output_tree": {"type": "leaf", "index": 0},
    }


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (_chain("size.mul", ("size.mul", [2**62, 2**62])), "64-bit"),
        (_chain("size.mul", ("size.add", [2**40, 1])), "64-bit"),
        (_chain("size.pow", ("size.add", [2, 2])), "64-bit|exponent"),
        (_chain("size.add", ("size.add", [2**62, 2**61]), 80), "64-bit"),
        (_chain("size.sum", ("size.neg", [-(2**62)]), arguments=lambda ref: [[ref] * 9]), "64-bit"),
        (_chain("size.ceil", ("size.float", [1e300]), arguments=lambda ref: [ref]), "64-bit"),
        pytest.param(
         _chain("aten.unbind.int", ("aten.full.default", [[2**15, 2], 1.0]), 9, lambda _: [{"ref": "z0"}]),
         "more work", marks=pytest.mark.slow),
        (_chain("aten.im2col.default", ("aten.full.default", [[1, 1, 99, 99], 1.0]), arguments=lambda _:
                [{"ref": "z0"}, [60, 60], [1, 1], [0, 0], [1, 1]]), "more work"),
        (_chain("aten.cat.default", ("aten.full.default", [[2], 1.0]), arguments=lambda ref: [[ref] * 3]),
         "elements"),
        (_chain("aten.reflection_pad1d.default", ("aten.full.default", [[1, 3], 1.0]), 2,
                lambda ref: [ref, [2**24, 0]]), "reflection by"),
        (_chain("aten.avg_pool1d.default", ("aten.full.default", [[1, 1, 5], 1.0]), 2,
                lambda ref: [ref, [3], [1], [2**20]]), "half of the kernel|windows"),
        (_chain("aten.avg_pool1d.default", ("aten.full.default", [[1, 1, 2**24], 1.0]), 2,
                lambda ref: [ref, [3], [1], [1]]), "more work|windows"),
    ],
)  # fmt: skip
def test_a_small_graph_cannot_ask_for_endless_work(files, tmp_path, nodes, message):
    began = time.process_time()
    with pytest.raises(BridgeError, match=message):
        _load(tmp_path, _forged(files, lambda d: d.update(nodes)), files[1])
    assert time.process_time() - began < 10


def test_sizes_up_to_the_largest_are_computed():
    ops = {name: OPERATORS[f"size.{name}"] for name in ("mul", "pow", "sub", "floor", "sum", "floordiv")}
    assert ops["sub"](-(2**62), 2**62) == -(2**63)
    assert ops["mul"](2**31, 2**32 - 1) == 2**63 - 2**31
    assert ops["pow"](2, 62) == 2**62
    assert ops["floor"](2.0**62) == 2**62
    assert ops["sum"]([2**62, -(2**62), 5]) == 5
    assert ops["floordiv"](-7, 2) == -4


def test_inputs_of_impossible_sizes(files, tmp_path):
    def change(document):
        document["symbols"] = [{"name": "s", "example": 2**31}]
        document["inputs"][0]["shape"] = ["s", "s", "s"]

    with pytest.raises(BridgeError, match="more than"):
        _load(tmp_path, _forged(files, change), files[1])


@pytest.mark.slow
def test_a_pytorch_file_takes_no_more_memory_than_its_length_allows(tmp_path):
    """A view of one number is a gigabyte as an array; a packed archive holds more than it is long."""
    torch.save({"w": torch.zeros(1).expand(2**18, 2**10)}, tmp_path / "view.pt")
    with pytest.raises(BridgeError, match="many times its own length"):
        bridge.load_weights(tmp_path / "view.pt")
    torch.save({"w": torch.zeros(60_000_000)}, tmp_path / "sound.pt")
    sound = zipfile.ZipFile(tmp_path / "sound.pt")
    with sound, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for entry in sound.namelist():
            packed.writestr(entry, sound.read(entry))
    with pytest.raises(BridgeError, match="more than its own length"):
        bridge.load_weights(tmp_path / "packed.pt")
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared.view(2, 3), "c": shared.expand(4, 6)}, tmp_path / "tied.pt")
    assert bridge.load_weights(tmp_path / "tied.pt")["c"].shape == (4, 6)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04K\x01.",
        b"[" * 100_000,
        b'{"format": NaN}',
        b'{"format": 1e999}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b"null",
    ],
)
def test_not_a_graph(files, tmp_path, data):
    with pytest.raises(BridgeError):
        _load(tmp_path, data, files[1])


def _header(header, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def _entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"1234567", _header({}, length=2**63), _header(b"{", b""), _header([1]),
        _header({"a": _entry()}), _header({"a": _entry(shape=(2**40,))}, b"0000"),
        _header({"a": _entry(shape=(2**62, 4))}, b"0000"),
        _header({"a": _entry(shape=(-1,))}, b"0000"),
        _header({"a": _entry("F99")}, b"0000"), _header({"a": _entry(offsets=(0, 2**40))}, b"0000"),
        _header({"a": _entry(), "b": _entry()}, b"0000"), _header({"a": _entry()}, b"00000"),
        _header({"a": _entry(offsets=(4, 8))}, b"0" * 8), _header({"a": 3}, b"0000"),
        _header(b"[" * 100_000),
        _header({"a": _entry("BOOL", (4,))}, b"\x00\x01\x02\x01"),
        _header({"a": _entry(shape=(True,))}, b"0000"), b"\x80\x04\x95" + b"0" * 64,
    ],
)  # fmt: skip
def test_not_safetensors(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(BridgeError):
        _safetensors.read(tmp_path / "x.safetensors")


def test_damaged_weights_alone(files, tmp_path):
    """Without a digest beside it, a changed byte among the numbers is another number; nothing else is."""
    rng = np.random.default_rng(2)
    path, refused = tmp_path / "x.safetensors", 0
    for _ in range(300):
        path.write_bytes(_damage(files[1], rng))
        try:
            arrays = bridge.load_weights(path)
        except BridgeError:
            refused += 1
        else:
            assert all(isinstance(x, np.ndarray) for x in arrays.values())
    assert refused > 100


@pytest.mark.slow
def test_what_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, kind in (("file", "a file"), ("link", "a link that leads nowhere")):
        with pytest.raises(BridgeError, match=f"{name}: it is {kind}, and an exported"):
            bridge.export(torch.nn.Linear(2, 1), torch.ones(3, 2), tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("path", ["nothing", "nothing/at/all"])
def test_missing_folder(tmp_path, path):
    with pytest.raises(BridgeError, match=r"graph\.json"):
        bridge.load(tmp_path / path)


def test_weights_of_another_model(files, tmp_path):
    _safetensors.write(tmp_path / "w.safetensors", {"a": np.zeros(3, np.float32)})
    with pytest.raises(BridgeError, match="not the file"):
        _load(tmp_path, files[0], (tmp_path / "w.safetensors").read_bytes())
