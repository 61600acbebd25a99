"""Small problems are exact: all eigenvalues where their n products are no more than a run would take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.density.smoothing import resolved_outliers

N = 48
KEY = jax.random.key(0)
A = np.random.default_rng(1).standard_normal((N, N))
A = (A + A.T) / 8
VALUES = np.linalg.eigvalsh(A.astype(np.float32).astype(np.float64))
OP = spectra.MatrixOperator(jnp.asarray(A, jnp.float32))


@pytest.fixture(scope="module")
def report():
    return spectra.spectrum(OP, key=KEY, num_steps=12, num_probes=4)


def test_the_status_says_so_and_everything_is_known(report):
    assert report.status is spectra.Status.EXACT
    assert report.status.ok
    assert report.quadrature.num_matvecs == N
    floor = report.noise_floor
    assert floor < 1e-4
    np.testing.assert_allclose(report.quadrature.resolved, VALUES, rtol=0, atol=floor)
    assert report.trace.value == pytest.approx(VALUES.sum(), abs=2 * report.trace.stderr)
    assert report.trace.stderr < 1e-4
    share = float(np.mean(-floor > VALUES))
    assert set(report.negative) == {share}
    count = int(np.sum(VALUES > 0.2))
    assert set(report.count_above(0.2)) == {count}
    assert report.largest.lower <= VALUES[-1] <= report.largest.upper
    assert report.largest.upper - report.largest.lower <= 2 * floor
    assert report.quadrature.band_width() == 0
    assert "all eigenvalues" in str(report)


@pytest.mark.slow
def test_a_report_lists_the_eigenvalues_that_are_known(report):
    np.testing.assert_allclose(report.eigenvalues, VALUES, rtol=0, atol=report.noise_floor)
    values = np.append(np.linspace(0.0, 1.0, 280), [5.0, 9.0, 9.0, 20.0])  # 9 is no simple eigenvalue
    op = spectra.MatrixOperator(jnp.diag(jnp.asarray(values, jnp.float32)))
    few = spectra.spectrum(op, key=jax.random.key(0), exact=False, num_steps=30, num_probes=4)
    np.testing.assert_allclose(few.eigenvalues, [5.0, 20.0], rtol=0, atol=few.noise_floor)
    assert {round(float(x)) for x in few.outliers} == {5, 9, 20}


def test_functions_of_it_are_exact(report):
    found = spectra.trace_of(report, np.square)
    assert found.value == pytest.approx(np.sum(VALUES**2), rel=1e-5)
    low, _, high = found.interval()
    assert low <= np.sum(VALUES**2) <= high


def test_the_density_is_that_of_the_eigenvalues(report):
    area = np.trapezoid(report.density.density, report.density.grid)
    assert area == pytest.approx(1.0, abs=1e-6)


def test_each_eigenvalue_is_one_stem_and_a_bulk_has_none(report):
    assert len(resolved_outliers(report.quadrature, share=1.0)) == N  # each once, from one of the ends
    narrow = spectra.spectral_density(report.quadrature, bandwidth=1e-3)
    np.testing.assert_allclose(narrow.outliers, VALUES, rtol=0, atol=report.noise_floor)
    wide = spectra.spectral_density(report.quadrature, bandwidth=0.2)
    beside = np.exp(-0.5 * ((VALUES[:, None] - VALUES) / 0.2) ** 2).sum(axis=1)  # eigenvalues within a kernel
    # The curve is interpolated on a grid finer than a tenth of the kernel: to 0.01² / 8 of its curvature.
    kept = np.abs(VALUES[:, None] - wide.outliers).min(axis=1) <= report.noise_floor
    assert kept[beside <= 4.9].all()
    assert not kept[beside >= 5.1].any()
    assert 0 < kept.sum() < N


def test_it_comes_back_from_a_file(report, tmp_path):
    report.save(tmp_path / "report.npz")
    again = spectra.load(tmp_path / "report.npz")
    assert again.status is spectra.Status.EXACT
    np.testing.assert_array_equal(again.quadrature.resolved, report.quadrature.resolved)


def test_it_can_be_refused_and_forced():
    assert spectra.spectrum(OP, key=KEY, num_steps=12, num_probes=4, exact=False).quadrature.num_steps == 12
    assert spectra.spectrum(OP, key=KEY, num_steps=2, num_probes=2).status is not spectra.Status.EXACT
    assert spectra.spectrum(OP, key=KEY, num_steps=2, num_probes=2, exact=True).status is spectra.Status.EXACT
    with pytest.raises(spectra.SpectraError, match="exact="):
        spectra.spectrum(OP, key=KEY, exact="yes")


def test_what_does_not_fit_stays_with_lanczos(monkeypatch):
    monkeypatch.setattr(
        "spectra.base.host.available_bytes", lambda device=None: 40_000
    )  # 3 n² numbers are 27 kB
    found = spectra.spectrum(OP, key=KEY, num_steps=12, num_probes=4)
    assert found.status is not spectra.Status.EXACT


def test_a_checkpoint_asks_for_lanczos(tmp_path):
    found = spectra.spectrum(OP, key=KEY, num_steps=12, num_probes=4, checkpoint=tmp_path / "run")
    assert found.status is not spectra.Status.EXACT
