"""Transformations: what JAX's own signatures leave unknown of functions and of what they return."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Literal, ParamSpec, TypeVar, overload

from jax._src.basearray import Array
from jax._src.core import ClosedJaxpr

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")

class Jitted(Generic[P, R]):
    """A compiled function, with the arguments of the function itself."""

    __name__: str
    __wrapped__: Callable[P, R]
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def clear_cache(self) -> None: ...

@overload
def jit(
    fun: Callable[P, R],
    /,
    *,
    in_shardings: Any = ...,
    out_shardings: Any = ...,
    static_argnums: int | Sequence[int] | None = ...,
    static_argnames: str | Iterable[str] | None = ...,
    donate_argnums: int | Sequence[int] | None = ...,
    donate_argnames: str | Iterable[str] | None = ...,
    keep_unused: bool = ...,
    inline: bool = ...,
    compiler_options: dict[str, Any] | None = ...,
) -> Jitted[P, R]: ...
@overload
def jit(
    *,
    in_shardings: Any = ...,
    out_shardings: Any = ...,
    static_argnums: int | Sequence[int] | None = ...,
    static_argnames: str | Iterable[str] | None = ...,
    donate_argnums: int | Sequence[int] | None = ...,
    donate_argnames: str | Iterable[str] | None = ...,
    keep_unused: bool = ...,
    inline: bool = ...,
    compiler_options: dict[str, Any] | None = ...,
) -> Callable[[Callable[P, R]], Jitted[P, R]]: ...
@overload  # by the number of arguments, so that a lambda's have a type
def vmap(
    fun: Callable[[Any], R], in_axes: Any = ..., out_axes: Any = ..., **named: Any
) -> Callable[..., R]: ...
@overload
def vmap(
    fun: Callable[[Any, Any], R], in_axes: Any = ..., out_axes: Any = ..., **named: Any
) -> Callable[..., R]: ...
@overload
def vmap(
    fun: Callable[[Any, Any, Any], R], in_axes: Any = ..., out_axes: Any = ..., **named: Any
) -> Callable[..., R]: ...
@overload
def vmap(
    fun: Callable[..., R], in_axes: Any = ..., out_axes: Any = ..., **named: Any
) -> Callable[..., R]: ...
@overload
def grad(fun: Callable[[Any], Any], **options: Any) -> Callable[..., Any]: ...
@overload
def grad(
    fun: Callable[..., Any], argnums: int | Sequence[int] = ..., has_aux: bool = ..., **options: Any
) -> Callable[..., Any]: ...
def value_and_grad(
    fun: Callable[..., Any], argnums: int | Sequence[int] = ..., has_aux: bool = ..., **options: Any
) -> Callable[..., tuple[Any, Any]]: ...
def hessian(
    fun: Callable[..., Any], argnums: int | Sequence[int] = ..., **options: Any
) -> Callable[..., Any]: ...
def jacfwd(
    fun: Callable[..., Any], argnums: int | Sequence[int] = ..., **options: Any
) -> Callable[..., Any]: ...
def jacrev(
    fun: Callable[..., Any], argnums: int | Sequence[int] = ..., **options: Any
) -> Callable[..., Any]: ...
@overload  # of one argument, so that a lambda's has a type
def jvp(
    fun: Callable[[Any], Any], primals: Any, tangents: Any, has_aux: Literal[False] = ...
) -> tuple[Any, Any]: ...
@overload
def jvp(
    fun: Callable[..., Any], primals: Any, tangents: Any, has_aux: Literal[False] = ...
) -> tuple[Any, Any]: ...
@overload
def jvp(
    fun: Callable[..., Any], primals: Any, tangents: Any, has_aux: Literal[True]
) -> tuple[Any, Any, Any]: ...
@overload
def linearize(
    fun: Callable[..., R], *primals: Any, has_aux: Literal[False] = ...
) -> tuple[R, Callable[..., R]]: ...
@overload
def linearize(
    fun: Callable[..., tuple[R, A]], *primals: Any, has_aux: Literal[True]
) -> tuple[R, Callable[..., R], A]: ...
@overload
def vjp(fun: Callable[[Any], R], primal: Any, /) -> tuple[R, Callable[..., tuple[Any, ...]]]: ...
@overload
def vjp(
    fun: Callable[..., R], *primals: Any, has_aux: Literal[False] = ...
) -> tuple[R, Callable[..., tuple[Any, ...]]]: ...
@overload
def vjp(
    fun: Callable[[Any, Any], tuple[R, A]], a: Any, b: Any, /, *, has_aux: Literal[True]
) -> tuple[R, Callable[..., tuple[Any, ...]], A]: ...
@overload
def vjp(
    fun: Callable[..., tuple[R, A]], *primals: Any, has_aux: Literal[True]
) -> tuple[R, Callable[..., tuple[Any, ...]], A]: ...
def linear_transpose(fun: Callable[..., Any], *primals: Any) -> Callable[..., tuple[Any, ...]]: ...
@overload
def make_jaxpr(
    fun: Callable[..., Any],
    static_argnums: int | Iterable[int] = ...,
    *,
    return_shape: Literal[False] = ...,
    **options: Any,
) -> Callable[..., ClosedJaxpr]: ...
@overload
def make_jaxpr(
    fun: Callable[..., Any],
    static_argnums: int | Iterable[int] = ...,
    *,
    return_shape: Literal[True],
    **options: Any,
) -> Callable[..., tuple[ClosedJaxpr, Any]]: ...
@overload
def eval_shape(fun: Callable[[Any], Any], arg: Any, /) -> Any: ...
@overload
def eval_shape(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...
def device_put(
    x: Any, device: Any = ..., *, src: Any = ..., donate: Any = ..., may_alias: Any = ...
) -> Any: ...
def device_get(x: Any) -> Any: ...
def block_until_ready(x: T) -> T: ...
def live_arrays(platform: str | None = ...) -> list[Array]: ...
def clear_caches() -> None: ...
def __getattr__(name: str) -> Any: ...
