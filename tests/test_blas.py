"""Small problems on the host hold BLAS to one thread, and give the caller's number back."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import spectra
from spectra.base import host
from spectra.base.host import one_thread
from spectra.krylov import dense


def threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def _two_threads():
    with one_thread():  # loads the BLAS of SciPy, too
        pass
    with threadpool_limits(2, "blas"):
        if threads() != {2}:
            pytest.skip("this BLAS cannot be told its number of threads")
        yield


def test_inside_there_is_one_and_after_it_what_there_was():
    with one_thread():
        assert threads() == {1}
        with one_thread():
            assert threads() == {1}
        assert threads() == {1}
    assert threads() == {2}


def test_overlapping_users_in_two_threads_give_the_number_back():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with one_thread():
            entered.set()
            leave.wait()

    worker = threading.Thread(target=other)
    with one_thread():
        worker.start()
        entered.wait()
        assert threads() == {1}
    leave.set()
    worker.join()
    assert threads() == {2}


def test_errors_give_it_back():
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert threads() == {2}


METHODS = {
    "eigsh": lambda op, key: spectra.eigsh(op, 2, key=key).values,
    "smallest": lambda op, key: spectra.eigsh(op, 2, which="SM", key=key, tol=0.1).values,
    "xtrace": lambda op, key: spectra.trace(op, key=key, method="xtrace").value,
    "xnystrace": lambda op, key: spectra.trace(op, key=key, method="xnystrace").value,
    "hutch++": lambda op, key: spectra.trace(op, key=key, method="hutch++").value,
    "xdiag": lambda op, key: spectra.diagonal(op, key=key, method="xdiag").value,
    "kpm": lambda op, key: spectra.kpm(op, key=key, num_moments=8).moments,
    "logdet": lambda op, key: spectra.logdet(op, key=key, num_steps=8).value,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_use_it_between_their_products(name, monkeypatch):
    """Small problems run on one thread, and products see the number of the caller."""
    limited, seen = [], []

    class Pools:
        def limit(self, **limits):
            limited.append(limits)
            return pools.limit(**limits)

    pools = host._pools()
    monkeypatch.setattr(dense, "LARGEST", 50)
    monkeypatch.setattr(host, "_pools", Pools)

    def product(v):
        seen.append(threads())
        return v * jnp.arange(1.0, 101.0)

    def mv(v):
        return jax.pure_callback(product, v, v, vmap_method="sequential")

    result = METHODS[name](spectra.FunctionOperator(mv, jnp.zeros(100)), jax.random.key(0))
    assert np.isfinite(result).all()
    assert limited
    assert all(limits == {"limits": 1, "user_api": "blas"} for limits in limited)
    assert all(number == {2} for number in seen)
    assert seen
    assert threads() == {2}
