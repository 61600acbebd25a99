"""Damaged and forged files, one after the other in a process of its own, and what loading them does.

    python tests/damage.py KIND SEED COUNT FOLDER     KIND: npz, jsonl, graph or weights

FOLDER holds sound files of the kind, from which each is made by chance: bytes changed, cut, doubled; fields,
arrays and shapes exchanged in a file that is well-formed otherwise; now and then a bomb or a pickle. Prints
counts as JSON. An error of spectra is an answer; anything else that is raised, more than 10 seconds, a file
that is opened, a process that is started or code that is run is not.
"""

import contextlib
import functools
import io
import json
import pickle
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

import spectra
from spectra import bridge
from spectra.bridge import schema

SECONDS = 10.0  # of the processor; ten times that on the clock, which also runs for other processes
EVENTS = (
    *("exec", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"),
    *("socket.connect", "ctypes.dlopen", "shutil.rmtree"),
)
NUMBERS = [-1, 0, 1, 2, 7, 2**31, 2**62, 2**64, 10**30, 0.0, 1.5, -1e300, 1e-320, float("nan"), float("inf")]
TEXTS = [
    "",
    "x",
    "a$_$b",
    "\x00\x1b[2J",
    "__import__('os').system('x')",
    "../../etc/passwd",
    "aten.add.Tensor",
]
FORMS = [
    *([], [[]], [1, 2], {}, {"a": 1}, {"float": "nan"}, {"float": "1e9"}, {"status": "complete"}),
    *({"status": "x"}, {"list": []}, {"tuple": [1]}, {"dict": {}}, {"class": "Estimate", "fields": {}}),
    *({"array": "nodes"}, {"ref": "x"}, {"dtype": "object"}, {"tree": {"a/b": 1}}),
]
STRANGE = [None, True, False, *NUMBERS, *TEXTS, *FORMS]


class Hang(BaseException):
    """Loading took more than its time."""


class Payload:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return (eval, ("__import__('os').system('true')",))


def damage(data: bytes, rng: np.random.Generator) -> bytes:
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


def places(value, found=None):
    """All (container, key) of a JSON document."""
    found = [] if found is None else found
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            places(value[key], found)
    return found


def mutate(document, rng: np.random.Generator, strange=STRANGE) -> None:
    """Replace, remove, repeat or exchange one entry anywhere in a JSON document."""
    everywhere = places(document)
    owner, key = everywhere[int(rng.integers(len(everywhere)))]
    kind = rng.integers(6)
    if kind <= 2:
        owner[key] = strange[int(rng.integers(len(strange)))]
    elif kind == 3:
        del owner[key]
    elif kind == 4 and isinstance(owner, list):
        owner.insert(key, owner[key])
    else:
        other, place = everywhere[int(rng.integers(len(everywhere)))]
        owner[key], other[place] = json.loads(json.dumps([other[place], owner[key]]))


def nested(rng: np.random.Generator) -> str:
    """JSON that is deep, or small on disk and large in memory."""
    depth = int(rng.choice([50, 150, 900, 5000, 100_000]))
    texts = (
        "[" * depth,
        '{"dict":{"a":' * depth,
        "[" + "[]," * 5_000_000 + "1]",
        "9" * 5000,
        '{"list":[' * depth,
    )
    text = texts[int(rng.integers(len(texts)))]
    return text + "1" + "]" * depth if text == "[" * depth else text


def changed_array(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An array of another shape, dtype or content."""
    kinds: list[Callable[[], np.ndarray]] = [
        lambda: array[:-1] if array.ndim else array[None],
        lambda: array.T.copy(),
        lambda: array.reshape(-1),
        lambda: array[None],
        lambda: array[..., :0],
        lambda: array.astype(str),
        lambda: array.astype(complex),
        lambda: array.astype("float16"),
        lambda: array.astype("int8"),
        lambda: array.astype(bool),
        lambda: np.array([Payload()], dtype=object),
        lambda: np.full_like(array, np.nan if array.dtype.kind == "f" else 0),
        lambda: np.zeros_like(array),
        lambda: -array if array.dtype.kind != "b" else ~array,
        lambda: array * 0 + (1e308 if array.dtype.kind == "f" else 1),
        lambda: rng.permutation(array.reshape(-1)).reshape(array.shape),
        lambda: np.zeros(3, [("a", "f8"), ("b", "i4")]),
        lambda: np.zeros(20_000_000),
    ]
    with np.errstate(all="ignore"):
        return kinds[int(rng.integers(len(kinds)))]()


def forge_npz(data: bytes, rng: np.random.Generator) -> bytes:
    """A well-formed archive with another header, array or entry."""
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("header")))
    names = list(arrays) or ["none"]
    chosen, kind = names[int(rng.integers(len(names)))], rng.integers(12)
    if kind <= 4:
        mutate(header["result"], rng)
    elif kind <= 7 and arrays:
        arrays[chosen] = changed_array(arrays[chosen], rng)
        if rng.integers(2):  # and a header that agrees
            for owner, key in places(header):
                if key == "array" and owner[key].get("name") == chosen:
                    owner[key] |= {"dtype": arrays[chosen].dtype.name, "shape": list(arrays[chosen].shape)}
    elif kind == 8 and arrays:
        other = names[int(rng.integers(len(names)))]
        arrays[chosen], arrays[other] = arrays[other], arrays[chosen]
    elif kind == 9 and arrays:
        arrays.pop(chosen)
    text = nested(rng) if kind == 10 else json.dumps(header)
    text = '{"format": "spectra-result", "schema": 1, "result": ' + text if kind == 10 else text
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", int(rng.choice([0, 8, 8, 8, 12, 14]))) as archive,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, array in {"header": np.array(text), **arrays}.items():
            part = io.BytesIO()
            np.lib.format.write_array(part, array, allow_pickle=True)
            content = part.getvalue()
            if kind == 11 and name == chosen:
                content = (
                    b"\x93NUMPY\x01\x00v\x00"
                    + f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**40},)}}".ljust(117).encode()
                    + b"\n"
                )
            archive.writestr(f"{name}.npy", content)
            if rng.integers(100) == 0:
                archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def forge_lines(data: bytes, rng: np.random.Generator) -> bytes:
    """Lines that are well-formed, with a checksum or without one, and hold something else."""
    from spectra.report.growing import _line

    lines = data.splitlines(keepends=True)
    at = int(rng.integers(len(lines)))
    document = json.loads(lines[at])
    document.pop("crc32")
    mutate(document, rng)
    if rng.integers(12) == 0:
        lines[at] = nested(rng).encode() + b"\n"
    elif rng.integers(2):
        lines[at] = json.dumps(document).encode() + b"\n"
    else:
        text = json.dumps(document)
        lines[at] = (
            _line(json.loads(text)) if "NaN" not in text and isinstance(document, dict) else text.encode()
        )
    return b"".join(lines)


def forge_graph(data: bytes, rng: np.random.Generator) -> bytes:
    """A well-signed graph with a changed entry, or one that asks for endless work."""
    document = json.loads(data)
    if rng.integers(8):
        strange = [x for x in STRANGE if not (isinstance(x, float) and not np.isfinite(x))]
        for _ in range(int(rng.integers(1, 4))):
            mutate(document, rng, strange)
    else:
        endless(document, rng)
    with contextlib.suppress(TypeError, AttributeError):
        document["digest"] = schema.digest(document)
    return json.dumps(document).encode()


def endless(document, rng: np.random.Generator) -> None:
    """Sizes that grow with each node, and arrays that are cut to pieces."""

    def node(name, op, *args, **kwargs):
        return {"name": name, "op": op, "args": list(args), "kwargs": kwargs, "module": "", "dtype": None,
                "shape": None}  # fmt: skip

    kind, last = int(rng.integers(5)), {"ref": "z39"}
    if kind <= 1:
        op = ("size.mul", "size.add", "size.pow", "size.sum")[int(rng.integers(4))]
        first = node("z0", "size.mul", 2**62, 2**62 if rng.integers(2) else 1)
        rest = [
            node(
                f"z{i}",
                op,
                *([[{"ref": f"z{i - 1}"}] * 9] if op == "size.sum" else [{"ref": f"z{i - 1}"}] * 2),
            )
            for i in range(1, 40)
        ]
    elif kind == 2:
        first = node("z0", "aten.full.default", [int(rng.choice([1000, 2**16, 2**30])), 2], 1.0)
        rest = [node(f"z{i}", "aten.unbind.int", {"ref": "z0"}) for i in range(1, 40)]
    elif kind == 3:
        first = node("z0", "aten.full.default", [1, 1, 4000, 4000], 1.0)
        sizes = ([64, 64], [4096, 1], [3, 3], [2**20, 1])[int(rng.integers(4))]
        rest = [
            node(f"z{i}", "aten.max_pool2d_with_indices.default", {"ref": "z0"}, sizes) for i in range(1, 40)
        ]
    else:
        first = node("z0", "aten.full.default", [2], 1.0)
        rest = [
            node(f"z{i}", "aten.cat.default", [{"ref": f"z{i - 1}"}] * int(rng.choice([2, 40])))
            for i in range(1, 40)
        ]
    document["nodes"] = [first, *rest]
    document["outputs"], document["output_tree"] = [last], {"type": "leaf", "index": 0}


def forge_weights(data: bytes, rng: np.random.Generator) -> bytes:
    """A header that says something else about the same numbers."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    mutate(header, rng)
    text = nested(rng).encode() if rng.integers(20) == 0 else json.dumps(header).encode()
    length = len(text) if rng.integers(10) else int(rng.choice([0, 2**40, 2**63]))
    return length.to_bytes(8, "little") + text + data[8 + length :]


@functools.cache
def bomb() -> bytes:
    """A megabyte that unpacks to one gigabyte."""
    stream = io.BytesIO()
    entry = zipfile.ZipInfo("header.npy")
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(stream, "w") as archive, archive.open(entry, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "<U1", "fortran_order": False, "shape": (2**28,)}
        )
        for _ in range(2**10):
            member.write(bytes(2**20))
    return stream.getvalue()


class Loader:
    """Loads files of one kind and looks at what came out."""

    def __init__(self, kind: str, folder: Path, target: Path, large: bool):
        self.kind, self.target, self.large = kind, target, large
        self.seeds = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES[kind]]
        if kind in ("graph", "weights"):
            (target / "graph.json").write_bytes((folder / "graph.json").read_bytes())
            (target / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())

    def make(self, rng: np.random.Generator) -> bytes:
        seed = self.seeds[int(rng.integers(len(self.seeds)))]
        if self.kind == "npz" and rng.integers(100) == 0:
            return bomb() if self.large and rng.integers(2) else pickle.dumps(Payload())
        return damage(seed, rng) if rng.integers(3) == 0 else FORGE[self.kind](seed, rng)

    def load(self, data: bytes, number: int):
        name = {"graph": "graph.json", "weights": "weights.safetensors"}.get(self.kind, f"x.{self.kind}")
        path = self.target / name
        path.write_bytes(data)
        if self.kind == "graph":
            return bridge.load(self.target)
        if self.kind == "weights":
            return bridge.load_weights(path) if number % 2 else bridge.load(self.target)
        loaded = spectra.load(path)
        parts = loaded.values() if isinstance(loaded, dict) else [loaded]
        return [repr(part) for part in parts]


SUFFIXES = {"npz": (".npz",), "jsonl": (".jsonl",), "graph": (".json",), "weights": (".safetensors",)}
FORGE = {"npz": forge_npz, "jsonl": forge_lines, "graph": forge_graph, "weights": forge_weights}


def run(kind: str, seed: int, count: int, folder: Path) -> dict:
    """Load so many files; counts of what came out."""
    rng, counts, wrong, slowest, ran = np.random.default_rng(seed), Counter(), [], 0.0, []
    watching = False

    def watch(event, _):
        if watching and event in EVENTS:
            ran.append(event)

    def stop(*_):
        raise Hang

    with tempfile.TemporaryDirectory() as target:
        loader = Loader(kind, folder, Path(target), large=count > 500)
        for data in loader.seeds:  # sound files load, and import what loading needs
            loader.load(data, 1)
        sys.addaudithook(watch)
        before = [(number, signal.signal(number, stop)) for number in (signal.SIGPROF, signal.SIGALRM)]
        try:
            for number in range(count):
                data = loader.make(rng)
                began = time.process_time()
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
                watching = True
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        loader.load(data, number)
                    counts["loaded"] += 1
                except spectra.SpectraError:
                    counts["refused"] += 1
                except Hang:
                    wrong.append(f"{number}: more than {SECONDS} s")
                except Exception as error:
                    wrong.append(f"{number}: {error!r}"[:200])
                finally:
                    watching = False
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                slowest = max(slowest, time.process_time() - began)
        finally:
            for number, handler in before:
                signal.signal(number, handler)
    return {
        "loaded": 0,
        "refused": 0,
        **counts,
        "wrong": wrong,
        "ran": ran,
        "slowest": slowest,
        "peak": _peak(),
    }


def _peak() -> float:
    """MiB of memory at the peak of this program; `ru_maxrss` begins with what its parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        return (
            next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) / 2**10
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
