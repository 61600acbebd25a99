"""Rematerialisation."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

def checkpoint(
    fun: Callable[P, R], *, prevent_cse: Any = ..., policy: Any = ..., static_argnums: Any = ...
) -> Callable[P, R]: ...

remat = checkpoint
checkpoint_policies: Any

def __getattr__(name: str) -> Any: ...
