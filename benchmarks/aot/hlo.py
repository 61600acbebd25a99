"""What a compiled program moves: collectives by kind, bytes between a device and its HBM, kernels, copies.

XLA's own "bytes accessed" counts every operand of every instruction: what lies in VMEM (memory space 1)
like what lies in HBM, both sides of a prefetch, and the buffers that a conditional only passes on. Here an
instruction counts the operands and results that lie in HBM; a fusion that slices an operand counts the
slice; a conditional counts its most expensive branch, a loop its body times its trips. A row is put into a
basis by one conditional for each segment, on a GPU by one scatter for each, of which one writes: together
they count as one.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
FREE |= {"async-update"}
IN_PLACE = ("dynamic-update-slice", "scatter")
PUT = "jit(dynamic_update_index_in_dim)/"  # in a conditional
SCATTERED = "vmap()/scatter"  # on a GPU
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\](\{[^}]*\})?")
_BITS = {"pred": 8}
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)")


@dataclasses.dataclass
class Instruction:
    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str


@dataclasses.dataclass
class Traffic:
    """Totals of one execution on one device."""

    hbm: float = 0.0
    kernels: int = 0
    count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    largest: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Traffic", times: int = 1) -> None:
        self.hbm += times * other.hbm
        self.kernels += times * other.kernels
        for kind in other.count:
            self.count[kind] += times * other.count[kind]
            self.bytes[kind] += times * other.bytes[kind]
            self.largest[kind] = max(self.largest[kind], other.largest[kind])


def size_of(shape: str, *, hbm_only: bool = False) -> int:
    """Bytes of all arrays in a shape; of those in HBM."""
    total = 0
    for kind, dims, layout in _SHAPE.findall(shape):
        if hbm_only and "S(" in layout:
            continue
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind[1:]) or 32)
        total += math.prod(map(int, filter(None, dims.split(",")))) * bits // 8
    return total


def numbers_in(shape: str) -> int:
    """Numbers in all arrays of a shape."""
    return sum(math.prod(map(int, filter(None, dims.split(",")))) for _, dims, _ in _SHAPE.findall(shape))


class Program:
    """The computations of an HLO module in text form."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._known: dict[str, Traffic] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = re.match(r"^(ENTRY )?%([\w.-]+) \(.*\{$", line)
            if head:
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
                continue
            found = _INSTRUCTION.match(line)
            if found:
                arguments = found[5].split("), ")[0]
                operands = re.findall(r"%([\w.-]+)", arguments)
                current[found[2]] = Instruction(found[2], found[3], found[4], operands, found[5])
        for instruction in self.instructions():
            self._name_asynchronous(instruction)

    def _name_asynchronous(self, i: Instruction) -> None:
        """`async-start` of one slice, copy or collective by its short name; of anything else, a call."""
        if i.op == "async-start":
            ops = [x.op for x in self.computations[_CALLED.findall(i.rest)[0]].values() if x.op not in FREE]
            short = len(ops) == 1 and (ops[0] in KINDS or ops[0] in ("copy", "slice", "dynamic-slice"))
            i.op = f"{ops[0]}-start" if short else "call"

    def traffic(self) -> Traffic:
        """Totals of one run of the program."""
        return self._of(self.entry)

    def precisions(self) -> collections.Counter:
        """Matrix products by the precision of their operands."""
        found: collections.Counter = collections.Counter()
        for instruction in self.instructions():
            if instruction.op in ("dot", "convolution"):
                stated = re.search(r"operand_precision=\{(\w+)", instruction.rest)
                algorithm = re.search(r"algorithm=(\w+)", instruction.rest)
                found[algorithm[1] if algorithm else stated[1] if stated else "default"] += 1
            elif "__cublas" in instruction.rest:
                stated = re.search(r'operand_precision":\["(\w+)', instruction.rest)
                found["cuBLAS, " + (stated[1] if stated else "default").lower()] += 1
        return found

    def instructions(self):
        for computation in self.computations.values():
            yield from computation.values()

    def step(self) -> Traffic:
        """Totals of one trip of the first loop."""
        return self._of(_body(self._loop()))

    def recurrence(self) -> float:
        """HBM bytes of a Lanczos step outside the product: of what lies neither in a loop inside the loop
        over steps, as the model's layers do, nor bears the name of a derivative, nor is a collective: those
        of the recurrence carry coefficients, those without a name weights."""

        def chosen(i: Instruction) -> bool:
            return i.op != "while" and i.op.removesuffix("-start") not in KINDS and "jvp(" not in i.rest

        return self._total(_body(self._loop()), chosen).hbm

    def copies(self, shapes: set[tuple[int, ...]]) -> int:
        """Instructions that copy an array of one of these shapes; of segments: copies of a basis."""
        return sum(
            i.op in ("copy", "copy-start") and any(dims in shapes for dims in _dims(i.shape))
            for i in self.instructions()
        )

    def conditionals(self) -> int:
        """Conditionals that one trip of the first loop meets, those in branches included."""
        return self._conditionals(_body(self._loop()))

    def _conditionals(self, name: str) -> int:
        found = 0
        for i in self.computations[name].values():
            if i.op == "conditional":
                found += 1 + max(map(self._conditionals, _branches(i)))
            elif i.op in ("while", "call"):
                found += self._conditionals(_body(i) if i.op == "while" else _CALLED.findall(i.rest)[0])
        return found

    def _loop(self) -> Instruction:
        return next(i for i in self.computations[self.entry].values() if i.op == "while")

    def _of(self, name: str) -> Traffic:
        if name not in self._known:
            self._known[name] = self._total(name, lambda i: True)
        return self._known[name]

    def _total(self, name: str, chosen: Callable[[Instruction], bool]) -> Traffic:
        total, scope, seen = Traffic(), self.computations[name], set()
        rows = [i for i in scope.values() if i.op in ("conditional", "fusion") and self._puts_row(i)]
        for instruction in scope.values():
            if instruction in rows[1:]:
                total.kernels += instruction.op == "fusion"  # it runs, and writes nothing
            elif chosen(instruction):
                self._count(instruction, scope, total, seen)
        return total

    def _count(self, i: Instruction, scope, total: Traffic, seen: set) -> None:
        kind = i.op.removesuffix("-start")
        if kind in KINDS:
            _collective(kind, i, scope, total)
        if i.op == "while":
            condition = re.search(r"condition=%([\w.-]+)", i.rest)
            assert condition
            total.add(self._of(_body(i)), self._trips(condition[1], i.rest))
        elif i.op == "conditional":
            branches = map(self._of, _branches(i))
            total.add(max(branches, key=lambda t: (t.hbm, sum(t.bytes.values()))))
        elif i.op == "call":
            total.add(self._of(_CALLED.findall(i.rest)[0]))
        elif i.op == "fusion":
            called = _CALLED.findall(i.rest)[0]
            written = size_of(i.shape, hbm_only=True) - self._left_in_place(called)
            total.kernels += 1
            total.hbm += max(0, written) + self._operands(i, called, scope)
            for inner in self.computations[called].values():
                self._inner_collective(inner, called, total, seen)
        elif i.op not in FREE and not i.op.endswith("-done"):
            total.kernels += 1
            total.hbm += _plain_bytes(i, scope)

    def _inner_collective(self, inner: Instruction, called: str, total: Traffic, seen: set) -> None:
        """A collective inside a fusion; an asynchronous one is spread over several, with one identity."""
        kind = inner.op.removesuffix("-start")
        if inner.op == "fusion":
            deeper = _CALLED.findall(inner.rest)[0]
            for instruction in self.computations[deeper].values():
                self._inner_collective(instruction, deeper, total, seen)
        if kind not in KINDS:
            return
        chain = re.search(r'chain_id="(\d+)"', inner.rest)
        channel = re.search(r"channel_id=(\d+)", inner.rest)
        identity = (chain and chain[1], channel and channel[1], inner.shape.split("{")[0])
        if not (chain and identity in seen):
            seen.add(identity)
            kind = "reduce-scatter" if "scatter" in called and kind == "all-reduce" else kind
            _collective(kind, inner, self.computations[called], total)

    def _puts_row(self, i: Instruction) -> bool:
        """Whether a conditional or a scatter is that of `spectra.krylov.basis.put`."""
        if i.op == "fusion":
            inner = self.computations[_CALLED.findall(i.rest)[0]].values()
            return any(x.op == "scatter" and SCATTERED in x.rest for x in inner)
        inner = (x for branch in _branches(i) for x in self.computations[branch].values())
        return any(x.op == "fusion" and PUT in x.rest for x in inner)

    def _trips(self, condition: str, rest: str) -> int:
        known = re.search(r'known_trip_count[^}]*?"(\d+)"', rest)
        if known:
            return int(known[1])
        names = [condition]  # the bound is a constant of the condition, or of a fusion in it
        for instruction in self.computations[condition].values():
            names += _CALLED.findall(instruction.rest)
        bounds = [
            int(i.rest.split(")")[0])
            for name in names
            for i in self.computations[name].values()
            if i.op == "constant" and re.fullmatch(r"\d+", i.rest.split(")")[0])
        ]
        return max(bounds, default=1)

    def _left_in_place(self, called: str) -> int:
        """HBM bytes of a fusion's results that it does not touch: all but the slice of what it updates."""
        inner, left = self.computations[called], 0
        for x in inner.values():
            if x.op in IN_PLACE:
                source = inner[x.operands[0]]
                while source.op == "bitcast":
                    source = inner[source.operands[0]]
                if source.op == "parameter":
                    whole = size_of(x.shape, hbm_only=True)
                    part = inner[x.operands[1 if x.op == "dynamic-update-slice" else 2]]
                    left += whole and whole - size_of(part.shape)
        return left

    def _operands(self, i: Instruction, called: str, scope) -> float:
        """HBM bytes that a fusion reads: of an operand that it only slices, the slices."""
        inner = list(self.computations[called].values())
        parameters = {x.name: int(x.rest.split(")")[0]) for x in inner if x.op == "parameter"}
        read = 0.0
        for name, index in parameters.items():
            operand = scope.get(i.operands[index]) if index < len(i.operands) else None
            full = size_of(operand.shape, hbm_only=True) if operand else 0
            names, users = _uses(name, inner)
            slices = [x for x in users if x.op in ("slice", "dynamic-slice") and x.operands[0] in names]
            if users and len(slices) == len(users):
                full = min(full, sum(size_of(x.shape) for x in slices))
            elif users and all(x.op in IN_PLACE and x.operands[0] in names for x in users):
                full = 0  # written in place; the slice is counted as result
            read += full
        return read


def _uses(name: str, inner: list[Instruction]) -> tuple[set[str], list[Instruction]]:
    """The names of a parameter of a fusion, in whatever shape, and the instructions that use it."""
    names = {name}
    for x in inner:
        if x.op == "bitcast" and x.operands[0] in names:
            names.add(x.name)
    return names, [x for x in inner if x.op != "bitcast" and names & set(x.operands)]


def _dims(shape: str) -> list[tuple[int, ...]]:
    """The arrays in a shape, as lists of lengths."""
    return [tuple(map(int, filter(None, dims.split(",")))) for _, dims, _ in _SHAPE.findall(shape)]


def _body(i: Instruction) -> str:
    """Name of the computation that a loop repeats."""
    found = re.search(r"body=%([\w.-]+)", i.rest)
    assert found
    return found[1]


def _branches(i: Instruction) -> list[str]:
    """Names of the computations of a conditional."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
    return re.findall(r"%([\w.-]+)", listed[1]) if listed else _CALLED.findall(i.rest)


def _plain_bytes(i: Instruction, scope) -> float:
    if i.op in ("dynamic-update-slice", "dynamic-slice", "slice"):
        part = scope.get(i.operands[1]).shape if i.op == "dynamic-update-slice" else i.shape
        return 2 * size_of(part, hbm_only=True)
    if i.op.endswith("-start"):  # the result names both ends; of a slice, the source is the whole
        ends = [m.group(0) for m in _SHAPE.finditer(i.shape)][:2]
        small = min(map(size_of, ends), default=0)
        copies = i.op in ("copy-start", "slice-start", "dynamic-slice-start")
        return copies * small * sum(size_of(end, hbm_only=True) > 0 for end in ends)
    operands = sum(size_of(scope[o].shape, hbm_only=True) for o in i.operands if o in scope)
    results = re.sub(r"s8\[\d+\]", "", i.shape) if i.op == "custom-call" else i.shape  # without a workspace
    return size_of(results, hbm_only=True) + operands


def _collective(kind: str, i: Instruction, scope, total: Traffic) -> None:
    """A collective by the larger of what goes in and what comes out of a device."""
    into = sum(size_of(scope[o].shape) for o in i.operands if o in scope)
    out = size_of(i.shape) - (into if i.op.endswith("-start") else 0)
    total.count[kind] += 1
    total.bytes[kind] += max(into, out)
    total.largest[kind] = max(total.largest[kind], max(into, out))
