"""Small problems on the host hold BLAS to one thread, and give the caller's number back."""

import threading

import jax
import jax.numpy as jnp
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import spectra
from spectra._blas import one_thread


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


def test_krylov_methods_use_it_between_their_steps():
    """Products see the caller's number: only the problems between them are held to one thread."""
    seen = []

    def product(v):
        seen.append(threads())
        return v * jnp.arange(1.0, 101.0)

    def mv(v):
        return jax.pure_callback(product, v, v)

    pairs = spectra.eigsh(spectra.FunctionOperator(mv, jnp.zeros(100)), 2, key=jax.random.key(0))
    assert pairs.converged.all()
    assert {2} in seen
    assert threads() == {2}
