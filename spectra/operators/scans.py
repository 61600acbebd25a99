"""Which parameters are stacks of layers, read from a loss's jaxpr: those that `lax.scan` runs over."""

from typing import Any


def scanned_inputs(jaxpr: Any, chosen: tuple[int, ...]) -> dict[int, tuple]:
    """The scans, of one length, that run over each chosen input; without those that anything else uses."""
    scans: dict[int, set[tuple[int, int]]] = {i: set() for i in chosen}
    elsewhere: set[int] = set()
    _follow(jaxpr.jaxpr, {id(jaxpr.jaxpr.invars[i]): i for i in chosen}, scans, elsewhere)
    alone = {i: sorted(found) for i, found in scans.items() if found and i not in elsewhere}
    return {i: tuple(found) for i, found in alone.items() if len({length for _, length in found}) == 1}


def _follow(jaxpr: Any, names: dict[int, int], scans: dict[int, set], elsewhere: set[int]) -> None:
    for eqn in jaxpr.eqns:
        places = {place: names[id(var)] for place, var in enumerate(eqn.invars) if id(var) in names}
        if not places:
            continue
        inner = _inner(eqn)
        if eqn.primitive.name == "convert_element_type":
            names[id(eqn.outvars[0])] = places[0]
        elif eqn.primitive.name == "scan":
            consts, rows = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
            for place, name in places.items():
                if place >= rows:
                    scans[name].add((id(eqn), eqn.params["length"]))
                elif place >= consts:
                    elsewhere.add(name)
            constant = {id(inner.invars[place]): name for place, name in places.items() if place < consts}
            _follow(inner, constant, scans, elsewhere)
        elif inner is not None:
            _follow(inner, {id(inner.invars[p]): name for p, name in places.items()}, scans, elsewhere)
        else:
            elsewhere.update(places.values())
    elsewhere.update(names[id(var)] for var in jaxpr.outvars if id(var) in names)


def _inner(eqn: Any) -> Any:
    """The body of a call, whose arguments are those of the equation."""
    for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
            return inner
    return None
