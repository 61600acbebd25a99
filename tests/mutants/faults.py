"""The faults, by hand: what someone could get wrong in the mathematics, and the tests that should say so.

The old text must stand exactly once in its file; `test_mutants.py` checks that, and that the tests exist. A
test is a file of `tests/`, or one function of it; the ones most likely to fail stand first.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One change of one file of the package."""

    name: str
    file: str  # under spectra/
    old: str
    new: str
    tests: tuple[str, ...]  # under tests/

    @property
    def paths(self) -> tuple[str, ...]:
        """The tests as pytest takes them from the root."""
        return tuple(f"tests/{test}" for test in self.tests)


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    """A fault, with its tests last."""
    return Fault(name, file, old, new, tests)


KRYLOV = [
    fault(
        "what a recurrence says of its residual is believed",
        "krylov/linear_step.py",
        "    converged = norm <= problem.target\n    ended",
        "    converged = claimed <= problem.target\n    ended",
        "test_solve.py::test_a_residual_that_float32_does_not_allow_is_not_claimed",
    ),
    fault(
        "an error bound is the residual, not divided by the smallest eigenvalue",
        "krylov/solve.py",
        "(residual + moved) / bound[0], np.inf)",
        "(residual + moved), np.inf)",
        "test_solve.py::test_the_bound_is_not_wide",
    ),
    fault(
        "CG takes any curvature for positive",
        "krylov/linear_step.py",
        "definite = curvature > problem.noise * scale * state.size",
        "definite = curvature > -jnp.inf",
        "test_solve.py::test_cg_says_that_an_operator_is_indefinite",
    ),
    fault(
        "the error of a function is bounded by a thousandth of it",
        "krylov/function_error.py",
        "weights = vectors[0] * vectors[-1]",
        "weights = vectors[0] * vectors[-1] * 1e-3",
        "test_funm.py::test_the_bound_holds",
    ),
    fault(
        "the second Gram-Schmidt pass is off",
        "krylov/orthogonalize.py",
        "REPEAT = 0.1",
        "REPEAT = 1e9",
        "test_orthogonalize.py",
    ),
    fault(
        "the norm after a pass is that before it",
        "krylov/orthogonalize.py",
        "jnp.maximum(square - _square(coefficients), 0)",
        "square",
        "test_orthogonalize.py",
    ),
    fault(
        "the previous vector is added, not subtracted",
        "krylov/recurrence.py",
        "_basis.axpy(-beta_previous, state.previous,",
        "_basis.axpy(beta_previous, state.previous,",
        "test_lanczos.py::test_without_reorthogonalisation_no_basis_is_kept",
    ),
    fault(
        "steps compute in no unit",
        "krylov/basis.py",
        "lambda _: _tree.power_of_two(size),",
        "lambda _: jnp.ones_like(size),",
        "test_scales.py::test_the_answer_follows_the_scale",
    ),
    fault(
        "the floor of eigsh is that of asymmetry",
        "krylov/rounding.py",
        "noise_floor=max(pairs.noise_floor, change)",
        "noise_floor=pairs.noise_floor",
        "test_eigsh.py::test_residual_and_floor_hold_the_rounding_of_a_steep_loss",
    ),
    fault(
        "Chebyshev moments of any map are taken",
        "density/kpm.py",
        "if worst > limit:",
        "if worst > 1e9:",
        "test_kpm.py::test_maps_that_are_not_symmetric_or_not_linear",
    ),
    fault(
        "traces differ with half the variance of the probes",
        "estimators/differences.py",
        "2 / k * np.mean(rests, axis=0)",
        "1 / k * np.mean(rests, axis=0)",
        "test_data.py::test_the_spread_of_traces_lies_in_its_interval",
    ),
    fault(
        "asymmetry is not refused",
        "krylov/recurrence.py",
        "    if worst > limit:",
        "    if worst > 1e9 * limit:",
        "test_bad_input.py::test_functions_that_are_not_symmetric",
    ),
    fault(
        "a segment that is not full is passed over",
        "krylov/basis.py",
        "-(-filled // basis[0][0].shape[1])",
        "filled // basis[0][0].shape[1]",
        "test_orthogonalize.py",
    ),
    fault(
        "the first row of a segment goes to the one before",
        "krylov/basis.py",
        "lax.cond(row // size == i, write,",
        "lax.cond((row - 1) // size == i, write,",
        "test_orthogonalize.py",
    ),
    fault(
        "Gram matrices in the default precision",
        "estimators/blocks.py",
        "((), ()))\n        return lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST)",
        "((), ()))\n        return lax.dot_general(x, y, dims)",
        "test_trace.py::test_matrix_products_inside_jit_are_in_full_precision",
    ),
    fault(
        "no residual is small enough for a breakdown",
        "krylov/recurrence.py",
        "alive = state.alive & (beta > ",
        "alive = state.alive & (beta > 0 * ",
        "test_lanczos.py::test_breakdown_ends_with_exact_values_weights_and_length",
    ),
    fault(
        "rounding is not amplified on its way to a breakdown",
        "_breakdown.py",
        "np.linalg.norm(behind, axis=0).max()",
        "1.0",
        "test_breakdown.py::test_every_probe_ends_with_the_true_length",
    ),
    fault(
        "any small residual may be rounding",
        "_breakdown.py",
        "    if beta[d - 1] <= noise:",
        "    if beta[d - 1] <= 1:",
        "test_breakdown.py::test_a_start_near_two_eigenvectors_is_not_taken_for_their_span",
    ),
    fault(
        "what lies behind a breakdown is kept",
        "density/run.py",
        "        if length is None:",
        "        if True:",
        "test_breakdown.py::test_every_probe_ends_with_the_true_length",
    ),
    fault(
        "copies of an eigenvalue are not looked for",
        "krylov/missing.py",
        "run.missed = 0.0 if not limits or run.exhausted else 1.0",
        "run.missed = 0.0",
        "test_eigsh.py::test_repeated_eigenvalues_have_their_multiplicity_by_default",
    ),
    fault(
        "LM takes the largest values, not the largest moduli",
        "krylov/wanted.py",
        "np.argsort(-np.abs(values), kind",
        "np.argsort(-values, kind",
        "test_eigsh.py::test_every_end_of_every_spectrum",
    ),
    fault(
        "residuals without the eigenvalue's own term",
        "krylov/band.py",
        "columns[self.processed, range(len(values))] -= values",
        "pass",
        "test_eigsh.py::test_every_end_of_every_spectrum",
    ),
]

DENSITY = [
    fault(
        "the CDF's band is for one point, without Bonferroni's factor",
        "_quadrature.py",
        "tail = (1 - level) / (2 * num_nodes)",
        "tail = (1 - level) / 2",
        "test_laws.py",
    ),
    fault(
        "the CDF's band does not know how many probes there are",
        "_quadrature.py",
        "normals = quadrature.num_probes * quadrature.size",
        "normals = quadrature.size",
        "test_laws.py",
    ),
    fault(
        "the bracket of a curve forgets the mass at the point",
        "_brackets.py",
        "sums[left] - _mass(theta, w, r, low)",
        "sums[left]",
        "test_brackets.py",
    ),
    fault(
        "the bracket counts the mass at the point to its left",
        "_brackets.py",
        "np.concatenate([(most - masses).ravel(), gauss - weights])",
        "np.concatenate([most.ravel(), gauss])",
        "test_brackets.py",
    ),
    fault(
        "the bracket does not give way to rounding",
        "_brackets.py",
        "low, high = low - moved, high + moved",
        "pass",
        "test_brackets.py",
    ),
    fault(
        "residuals from the wrong component of the eigenvectors",
        "_quadrature.py",
        "np.abs(beta[length - 1] * vectors[-1])",
        "np.abs(beta[length - 1] * vectors[0])",
        "test_trace_of.py::test_the_bracket_holds_for_the_probes_drawn",
    ),
    fault(
        "Gauss-Radau with the wrong sign",
        "_brackets.py",
        "residuals**2 / (nodes - np.asarray(x)[..., None])",
        "residuals**2 / (np.asarray(x)[..., None] - nodes)",
        "test_trace_of.py::test_the_bracket_holds_for_the_probes_drawn",
    ),
    fault(
        "Gauss-Radau without alternating signs",
        "_brackets.py",
        "residuals * (-1.0) ** np.arange(m)",
        "residuals",
        "test_brackets.py",
    ),
    fault(
        "the noise floor is a millionth of what it is",
        "results/quadrature.py",
        "return scale * max(",
        "return 1e-6 * scale * max(",
        "test_trace_of.py::test_share_of_negative_curvature",
    ),
    fault(
        "the density's band with half the variance",
        "density/bands.py",
        "self.size, self.normals, self.tail = size, num_probes * size, tail",
        "self.size, self.normals, self.tail = size, 2 * num_probes * size, tail",
        "test_laws.py",
    ),
    fault(
        "the density's band is for one point",
        "density/bands.py",
        "return (1 - level) / (2 * max(num_tests, 1.0))",
        "return (1 - level) / 2",
        "test_laws.py",
    ),
    fault(
        "the density's band without the quadrature's error",
        "density/bands.py",
        "total[part] += left + far * (1 + far)",
        "total[part] += far * (1 + far)",
        "test_density.py::test_the_density_of_the_probes_is_within_what_their_quadratures_leave_open",
    ),
    fault(
        "the variation of a function above and below is interchanged",
        "estimators/bracket.py",
        "gauss + float(left @ rise + right @ fall)",
        "gauss + float(right @ rise + left @ fall)",
        "test_trace_of.py::test_the_bracket_of_any_function_holds_for_the_probes_drawn",
    ),
    fault(
        "what lies behind a breakdown inside jit is among the nodes",
        "_quadrature.py",
        "jnp.where(live, alpha, 2 * reach)",
        "alpha",
        "test_slq.py::test_breakdown_gives_exact_nodes_and_nothing_else",
    ),
    fault(
        "means under hats with the wrong sign",
        "density/smoothing.py",
        "- h * np.diff(phi, axis=0)",
        "+ h * np.diff(phi, axis=0)",
        "test_density.py::test_hat_means_agree_with_numerical_integration",
    ),
    fault(
        "odd Chebyshev moments without their correction",
        "density/kpm.py",
        "2 * dots[:, 1] - dots[0, 1]",
        "2 * dots[:, 1]",
        "test_kpm.py::test_moments_are_those_of_the_probes",
    ),
    fault(
        "the Chebyshev series is not damped",
        "density/kpm.py",
        "return ((count - n + 1) * np.cos(q * n) + np.sin(q * n) / np.tan(q)) / (count + 1)",
        "return np.ones(count) + 0 * q * n",
        "test_kpm.py::test_the_density_integrates_to_one_and_lies_in_its_band",
    ),
    fault(
        "known eigenvectors are not taken out",
        "operators/deflated.py",
        "return leaf - jnp.tensordot(",
        "return leaf - 0 * jnp.tensordot(",
        "test_deflation.py::test_rows_contain_the_atoms_with_their_exact_weight",
    ),
    fault(
        "atoms weigh as much as in the complement",
        "density/deflation.py",
        "np.full(known.shape, 1 / n)",
        "np.full(known.shape, 1 / bulk.size)",
        "test_deflation.py::test_rows_contain_the_atoms_with_their_exact_weight",
    ),
    fault(
        "the distance of spectra with natural logarithms",
        "density/distance.py",
        ".sum()) / 2 / np.log(2)",
        ".sum()) / 2",
        "test_blocks.py::test_distances_between_spectra",
    ),
    fault(
        "a checkpoint does not look at the key",
        "density/identity.py",
        '"key": np.asarray(data).ravel().tolist(),',
        '"key": 0 * np.asarray(data).size,',
        "test_checkpoint.py::test_a_checkpoint_of_another_run_is_refused",
    ),
    fault(
        "a checkpoint does not look at the parameters",
        "density/identity.py",
        "tree_digest(op.like) if _tree.has_values(op.like) else 0",
        "0 * tree_digest(op.like)",
        "test_checkpoint.py::test_other_parameters_are_refused_though_the_product_is_the_same",
    ),
]

ESTIMATORS = [
    fault(
        "intervals of one side",
        "results/estimates.py",
        "tail = (1 + level) / 2",
        "tail = level",
        "test_laws.py",
    ),
    fault(
        "Student's t with a degree of freedom too many",
        "estimators/diagonal.py",
        'dof": float(max(done - 1, 1))',
        'dof": float(done)',
        "test_laws.py",
    ),
    fault(
        "the spread divides by m, not by m - 1",
        "estimators/diagonal.py",
        "axis=0) / (m * (m - 1))",
        "axis=0) / (m * m)",
        "test_diagonal.py::test_xdiag_equals_a_naive_leave_one_out",
    ),
    fault(
        "Rademacher probes are normal ones",
        "estimators/blocks.py",
        "distribution = getattr(jax.random, kind)",
        "distribution = jax.random.normal",
        "test_trace.py::test_the_trace_of_a_sum_of_squares_is_exactly_four",
    ),
    fault(
        "probes from a cube, not from the sphere",
        "_tree.py",
        "jax.random.normal)",
        "jax.random.uniform)",
        "test_slq.py::test_moments_up_to_degree_2m_minus_1_are_those_of_the_probes",
    ),
    fault(
        "leaves of a probe share a key",
        "_tree.py",
        "return distribution(jax.random.fold_in(key, i), row, dtype)",
        "return distribution(jax.random.fold_in(key, 0 * i), row, dtype)",
        "test_basis.py::test_every_leaf_is_drawn_with_a_key_of_its_own",
    ),
    fault(
        "the covariance of leave-one-out estimates is dropped",
        "estimators/leave_one_out.py",
        "return xp.mean(values, axis=-1), spread + covariance",
        "return xp.mean(values, axis=-1), spread + 0 * covariance",
        "test_trace.py::test_sketches_equal_a_naive_leave_one_out",
    ),
    fault(
        "XTrace scales probes by the wrong dimension",
        "estimators/leave_one_out.py",
        "((size - (m - len(removed))) / square if resphere else 1)",
        "((size - m) / square if resphere else 1)",
        "test_trace.py::test_sketches_equal_a_naive_leave_one_out",
    ),
    fault(
        "Hutch++ forgets the part along its sketch",
        "estimators/low_rank.py",
        "fixed = xp.trace(2 * qz -",
        "fixed = xp.trace(1 * qz -",
        "test_trace.py::test_degenerate_operators_are_exact",
    ),
    fault(
        "batches of a diagonal weigh the same",
        "estimators/diagonal.py",
        "share = (k / (done + k))",
        "share = (k / (k + k) + 0 * done)",
        "test_diagonal.py::test_the_batch_of_probes_changes_rounding_only",
    ),
    fault(
        "XDiag without the product of two directions",
        "estimators/diagonal.py",
        "return a * (weights * w - b)",
        "return a * (weights * w)",
        "test_diagonal.py::test_xdiag_equals_a_naive_leave_one_out",
    ),
    fault(
        "the log-determinant forgets the shift",
        "estimators/functions.py",
        "lambda x: _module(x).log(x + shift)",
        "lambda x: _module(x).log(x + 0 * shift)",
        "test_trace_of.py::test_rank_deficient_operators_need_a_shift_and_get_advice",
    ),
    fault(
        "the smallest eigenvalue of a condition number is the one before it",
        "estimators/condition.py",
        "smallest = float(sizes[nullity]) if rank else 0.0",
        "smallest = float(sizes[nullity - 1]) if rank else 0.0",
        "test_condition.py::test_hilbert_matrices",
    ),
    fault(
        "the spread over subsets divides by s, not by s - 1",
        "variability.py",
        "return float(np.std(self.trace, ddof=1))",
        "return float(np.std(self.trace))",
        "test_data.py::test_variance_of_the_data_is_told_apart_from_that_of_the_probes",
    ),
]

OPERATORS = [
    fault(
        "the gradient in the place of its derivative",
        "operators/products.py",
        "return jax.jvp(gradient, (params,), (v,))[1]",
        "return jax.jvp(gradient, (params,), (v,))[0]",
        "test_closed_forms.py",
    ),
    fault(
        "a central difference over one step, not over two",
        "operators/products.py",
        "_tree.scale(1 / (2 * per_unit),",
        "_tree.scale(1 / per_unit,",
        "test_hessian_modes.py::test_a_first_order_loss_falls_back_to_finite_differences",
    ),
    fault(
        "the fallback passes over reverse mode",
        "operators/modes.py",
        'for mode in MODES if piece.mode == "auto" else (piece.mode,):',
        'for mode in MODES[::2] if piece.mode == "auto" else (piece.mode,):',
        "test_hessian_modes.py::test_a_custom_vjp_falls_back_to_reverse_over_reverse",
    ),
    fault(
        "the Gauss-Newton matrix without the loss's curvature",
        "operators/ggn.py",
        "return pull(self._curvature(outputs, targets, push(v)))",
        "return pull(push(v))",
        "test_curvature_matrices.py::test_gauss_newton_matrix",
    ),
    fault(
        "the rest of the examples is dropped",
        "operators/accumulate.py",
        "total = jax.tree.map(jnp.add, total, weighted(cut.last))",
        "pass",
        "test_data.py::test_any_cut_of_the_data_gives_the_same_hessian",
    ),
    fault(
        "batches of a stream weigh the same",
        "stream.py",
        "return cls(source, tuple(weights / weights.sum()), indices, ",
        "return cls(source, tuple(np.full(len(weights), 1 / len(weights))), indices, ",
        "test_data.py::test_any_cut_of_the_data_gives_the_same_hessian",
    ),
    fault(
        "losses that are no mean are cut all the same",
        "operators/means.py",
        "raise DataError(_message(op, cuts[0], here, there))",
        "return True",
        "test_means.py::test_losses_that_are_no_mean_are_refused_where_they_are_cut",
    ),
    fault(
        "losses are compared at the given parameters alone",
        "operators/means.py",
        "zip((op.params, far), found, strict=True)]\n    return",
        "zip((op.params,), found)]\n    return",
        "test_means.py::test_values_that_coincide_do_not_hide_a_loss_that_is_no_mean",
    ),
    fault(
        "leaves that examples share are cut with them",
        "data.py",
        "index in chosen or np.ndim(leaf) == 0",
        "np.ndim(leaf) == 0",
        "test_batches.py::test_leaves_that_examples_share_are_not_cut",
    ),
    fault(
        "chosen leaves go to each other's places",
        "_tree.py",
        "for index, leaf in zip(indices, jax.tree.leaves(kept), strict=True):",
        "for index, leaf in zip(reversed(indices), jax.tree.leaves(kept), strict=True):",
        "test_blocks.py::test_a_block_is_a_principal_submatrix",
    ),
    fault(
        "the parts of a trace under each other's names",
        "estimators/run.py",
        "dict(zip(self.groups, x, strict=False))",
        "dict(zip(reversed(self.groups), x, strict=False))",
        "test_trace.py::test_groups_share_the_products",
    ),
    fault(
        "the blocks on the diagonal of a dense Hessian are doubled",
        "operators/dense.py",
        "jnp.where(same, 0.5, 1.0)",
        "jnp.where(same, 1.0, 1.0)",
        "test_dense.py",
    ),
    fault(
        "the mean gradient is added to the covariance",
        "operators/covariance.py",
        "_tree.axpy(-_tree.vdot(self.mean, v), self.mean, product)",
        "_tree.axpy(_tree.vdot(self.mean, v), self.mean, product)",
        "test_curvature_matrices.py::test_empirical_fisher_is_the_second_moment_of_gradients",
    ),
    fault(
        "scores of a Fisher matrix weigh as their squares",
        "operators/fisher.py",
        "jax.tree.map(lambda g: jnp.sqrt(weight).astype(g.dtype) * g, gradient)",
        "jax.tree.map(lambda g: weight.astype(g.dtype) * g, gradient)",
        "test_curvature_matrices.py::test_empirical_fisher_is_the_second_moment_of_gradients",
    ),
    fault(
        "sampled targets with the inverse of their deviation",
        "operators/likelihood.py",
        "outputs + noise / jnp.sqrt(precision)",
        "outputs + noise * jnp.sqrt(precision)",
        "test_laws.py",
    ),
    fault(
        "Adam's second moment without its bias correction",
        "operators/optimizers.py",
        "return jnp.sqrt(nu / (1 - b2**count) + eps_root) + eps",
        "return jnp.sqrt(nu + eps_root) + eps",
        "test_preconditioned.py",
    ),
    fault(
        "Adam's momentum without its bias correction",
        "operators/preconditioned.py",
        '["b1"] ** ',
        '["b1"] * 0 * ',
        "test_preconditioned.py",
    ),
    fault(
        "P on both sides, not its root",
        "operators/preconditioned.py",
        "(1 / jnp.sqrt(x))",
        "(1 / x)",
        "test_preconditioned.py",
    ),
    fault(
        "snapshots of training multiply by the first operator",
        "training/tracker.py",
        "op = self.op_factory(*state)",
        'op = vars(self).setdefault("_first", self.op_factory(*state))',
        "test_tracker.py::test_every_snapshot_has_the_eigenvalues_of_the_dense_hessian",
    ),
]

BRIDGE = [
    fault(
        "equal elements do not share the derivative of what is scattered",
        "bridge/_ops_index.py",
        "change / jnp.maximum(count, 1)",
        "change",
        "bridge/test_bridge_ties.py::test_values_and_gradients_at_ties",
    ),
    fault(
        "the later of equal elements does not take over a running maximum",
        "bridge/_ops_order.py",
        "return _running(self, dim, jnp.greater_equal)",
        "return _running(self, dim, jnp.greater)",
        "bridge/test_bridge_ties.py::test_values_and_gradients_at_ties",
    ),
    fault(
        "eigenvectors of any norm",
        "bridge/_ops_factor.py",
        "(dvalues, dV - V * along)",
        "(dvalues, dV)",
        "bridge/test_bridge_functions.py::test_own_formulas_have_the_derivatives_of_pytorch",
    ),
    fault(
        "a branch sees the names around it",
        "bridge/_checker.py",
        "outside, self.names = self.names, set()",
        "outside, self.names = self.names, set(self.names)",
        "bridge/test_bridge_branches.py",
    ),
    fault(
        "a convolution's padding by the other axis",
        "bridge/_ops_conv.py",
        '"padding": [(p, p) for p in padding]',
        '"padding": [(p, p) for p in reversed(padding)]',
        "bridge/test_bridge_lopsided.py",
    ),
    fault(
        "a transposed convolution's kernel is not reversed",
        "bridge/_ops_conv.py",
        "return jnp.flip(weight, range(2, weight.ndim))",
        "return weight",
        "bridge/test_bridge_lopsided.py",
    ),
    fault(
        "a norm's eps beside the root, not under it",
        "bridge/_ops_norm.py",
        "rstd = lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + eps)",
        "rstd = 1 / (jnp.sqrt(jnp.mean(centred * centred, axes, keepdims=True)) + eps)",
        "bridge/test_bridge_lopsided.py",
    ),
    fault(
        "GELU always by tanh",
        "bridge/_ops_activation.py",
        '    if approximate == "tanh":',
        "    if True:",
        "bridge/test_bridge_lopsided.py",
    ),
    fault(
        "ReLU has derivative one at zero",
        "bridge/_ops_activation.py",
        "return jnp.where(self <= 0, jnp.zeros_like(self), self)",
        "return jnp.where(self < 0, jnp.zeros_like(self), self)",
        "bridge/test_bridge_derivatives.py::test_gradients_at_kinks",
    ),
    fault(
        "attention scales by the width, not by its root",
        "bridge/_ops_attention.py",
        "query.shape[-1] ** -0.5",
        "query.shape[-1] ** -1.0",
        "bridge/test_bridge_lopsided.py",
    ),
    fault(
        "gates of an LSTM in another order",
        "bridge/_ops_rnn.py",
        "i, f, g, o = jnp.split(",
        "f, i, g, o = jnp.split(",
        "bridge/test_bridge_lopsided.py",
    ),
    fault(
        "a variance never corrected",
        "bridge/_ops_reduce.py",
        "max(count - correction, 0)",
        "max(count - 0 * correction, 0)",
        "bridge/test_bridge_lopsided.py",
    ),
    fault(
        "average pooling counts the padding always",
        "bridge/_ops_pool.py",
        "jnp.asarray(end - start if count_include_pad else inside, dtype)",
        "jnp.asarray(end - start, dtype)",
        "bridge/test_bridge_lopsided.py",
    ),
    fault(
        "label smoothing forgets the number of classes",
        "bridge/_losses.py",
        "- smoothing / classes * jnp.sum(w * log_probs, -1)",
        "- smoothing * jnp.sum(w * log_probs, -1)",
        "bridge/test_bridge_losses.py::test_cross_entropy",
    ),
    fault(
        "ignored targets count in a batch's weight",
        "bridge/_objective.py",
        "return jnp.sum(keep).astype(float)",
        "return jnp.asarray(keep.size, float)",
        "bridge/test_bridge_losses.py::test_weighted_batches_average_to_the_whole",
    ),
    fault(
        "a tied weight counts twice",
        "bridge/_lower.py",
        "key = self.first.setdefault(id(value), name)",
        "key = self.first[id(value)] = name",
        "bridge/test_bridge_model_object.py::test_tied_and_frozen_parameters",
    ),
    fault(
        "a square kernel is not transposed for Flax",
        "bridge/_match.py",
        "return value.T.reshape(shape) if split_out or split_in else None",
        "return (value if rows == columns else value.T).reshape(shape) if split_out or split_in else None",
        "bridge/test_bridge_flax.py::test_nnx",
    ),
]

FAULTS = [*KRYLOV, *DENSITY, *ESTIMATORS, *OPERATORS, *BRIDGE]
