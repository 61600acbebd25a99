"""Figures of compiled programs as text: what the pages of TPUs and GPUs share."""

from collections.abc import Iterable, Mapping
from typing import Any


def partner(known: dict, step: dict, program: str) -> dict | None:
    """The figures of another program of the same case."""
    same = ("topology", "size", "form", "precision", "layout")
    found = (r for r in known.values() if r["program"] == program and all(r[k] == step[k] for k in same))
    return next((r for r in found if "failed" not in r), None)


def seconds(r: dict) -> str:
    return f"{r['compile_s']:.0f} ({r['compile_cpu_s']:.0f})"


def memory(r: dict, limits: Mapping[str, Any]) -> str:
    """Memory of one device, of the one that `limits` has under the name of the topology."""
    limit = limits[r["topology"].split(":")[0]].memory
    fits = "" if r["memory"] <= limit else ", does not fit"
    return f"{r['memory'] / 2**30:.2f} of {limit / 2**30:.0f} GiB{fits}"


def floor(r: dict) -> float:
    """Bytes of two Gram-Schmidt passes: four reads of all rows, 4 bytes a number."""
    return 16 * r["rows"] * r["numbers_a_chip"]


def gathers(step: dict, gradient: dict) -> str:
    """A sentence on the collectives of a step beside those of the gradient."""
    own = gradient["collectives"]
    pairs = {k: (v, own[k]) for k, v in step["collectives"].items() if k in own}
    text = ", ".join(f"{mine[1] / its[1]:.2f} times the {k} bytes" for k, (mine, its) in pairs.items())
    other = [k for k in step["collectives"] if k != "all-reduce"]
    larger = [k for k in other if k not in own or step["collectives"][k][2] > 2 * own[k][2]]
    verdict = (
        f"other ones: {larger}" if larger else "none is more than twice as large, and none of another kind"
    )
    return (
        f"the step has {text} of the gradient's own program (it gathers the vector as well as the "
        f"parameters, layer by layer); of its gathers {verdict}."
    )


def collectives(r: dict, share: float = 1.0) -> str:
    def one(kind, count, size):
        unit, scale = next(
            (u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if size >= s or s == 1
        )
        return f"{count:.0f} {kind} ({size / scale:.3g} {unit})"

    found = {
        kind: [share * number for number in r["collectives"][kind][:2]] for kind in sorted(r["collectives"])
    }
    return ", ".join(one(kind, *numbers) for kind, numbers in found.items()) or "none"


def short(reason: str) -> str:
    for start in ("RESOURCE_EXHAUSTED: ", "CompileTimeHbmOom: "):
        reason = reason.split(start)[-1]
    return reason.split("HLO module")[0].strip().rstrip(".")


def shares(known: dict, programs: Iterable[str], products: Mapping[str, int]) -> list[str]:
    """What programs gather for each of their products, in what the gradient gathers."""
    lines = []
    for r in known.values():
        gradient = partner(known, r, "gradient") if r["program"] in programs else None
        if gradient is None or "failed" in r:
            continue
        (_, total, largest), (_, own, own_largest) = (x["collectives"]["all-gather"] for x in (r, gradient))
        count = products.get(r["program"], 1)
        lines.append(
            f"* {r['topology']}, {r['program']}: {total / own / count:.2f} times the all-gather bytes of "
            f"the gradient for a product, and {largest / own_largest:.2f} times its largest gather."
        )
    return lines
