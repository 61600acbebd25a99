"""KFAC and EKFAC: factors in closed form, the cases where they are exact, and what they say of themselves.

Dense truths are Jᵀ H J of `jax.jacobian` or NumPy; `test_operators.py` has a network of two layers in NumPy.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error
from networks import Network, cross_entropy, half_square
from networks import model_fn as small_fn

import spectra

N, TOKENS, WORDS, WIDTH, OUTPUTS = 6, 3, 7, 4, 2
EPS = float(np.finfo(np.float64).eps)
TOLERANCE = 1e4 * EPS
"""Sums of some hundred products, chained over half a dozen layers, with eigenvectors between."""


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape))


def gauss_newton(model_fn, params, inputs):
    """Σ_n J_nᵀ J_n / N, the Gauss-Newton matrix of `half_square`."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jit(jax.jacobian(lambda x: model_fn(unravel(x), inputs)))(flat)
    rows = np.asarray(jacobian).reshape(-1, flat.size)
    return rows.T @ rows / len(inputs)


def leaf_rows(params):
    """{path: the rows of each leaf in the flat vector}."""
    names = spectra.base.paths.leaf_paths(params)
    edges = np.cumsum([0] + [leaf.size for leaf in jax.tree.leaves(params)])
    return {name: np.arange(a, b) for name, a, b in zip(names, edges, edges[1:], strict=False)}


def blocks_of(op, matrix, params):
    """Each block's part of a dense matrix, by the path of its first leaf."""
    rows = list(leaf_rows(params).values())
    return {
        part.place.name: matrix[np.ix_(*[np.concatenate([rows[i] for i in part.place.leaves])] * 2)]
        for part in op.parts
    }


def words_fn(params, ids):
    """An embedding, a norm's scale, projections of several axes, scanned layers, a weight norm."""
    h = params["table"][ids]
    h = h / jnp.sqrt(1 + jnp.mean(h**2, -1, keepdims=True)) * params["scale"] + params["shift"]
    heads = jnp.einsum("ntd,hde->nhte", h, params["split"]) + params["offset"][:, None]
    h = jnp.einsum("nhte,hed->ntd", jnp.sin(heads), params["join"])

    def layer(h, own):
        return jax.checkpoint(lambda h: jnp.tanh(h @ own["w"].T + own["b"]))(h), None

    h = jax.lax.scan(layer, h, params["layers"])[0]
    last = params["gain"] * params["last"] / jnp.linalg.norm(params["last"], axis=0)
    return jax.vmap(lambda own: last.T @ own)(h.mean(1))


def words_params():
    return {
        "table": normal(WORDS, WIDTH),
        "scale": 1 + normal(WIDTH) / 4,
        "shift": normal(WIDTH, seed=1),
        "split": normal(2, WIDTH, 3),
        "offset": normal(2, 3),
        "join": normal(2, 3, WIDTH),
        "layers": {"w": normal(3, WIDTH, WIDTH) / 2, "b": normal(3, WIDTH)},
        "last": normal(WIDTH, OUTPUTS),
        "gain": normal(OUTPUTS),
    }


def words(tokens, examples=N):
    ids = np.random.default_rng(0).integers(0, WORDS, (examples, tokens))
    return jnp.asarray(ids), normal(examples, OUTPUTS, seed=2)


@pytest.mark.slow
def test_layers_of_all_kinds_are_found_and_one_example_of_one_token_is_exact(x64):
    params, data = words_params(), words(1, examples=1)
    op = spectra.KFACOperator(words_fn, half_square, params, data)
    exact = gauss_newton(words_fn, params, data[0])
    own = np.asarray(op.as_matrix())
    for name, block in blocks_of(op, exact, params).items():
        mine = blocks_of(op, own, params)[name]
        layers = params["layers"]["w"].shape[0] if name.startswith("layers") else 1
        if layers > 1:  # blocks between scanned layers are left out
            index = np.concatenate([np.arange(3).repeat(WIDTH**2), np.arange(3).repeat(WIDTH)])
            block = np.where(index[:, None] == index, block, 0)
        assert relative_error(mine, block) <= TOLERANCE, name
    assert op.coverage == {
        "gain": "exact block, 2: mul is no layer",
        "join": "Kronecker, dense, 6 x 4",
        "last": "exact block, 8: mul is no layer",
        "layers/b": "Kronecker, with layers/w",
        "layers/w": "Kronecker, dense, 3 of 4+1 x 4",
        "offset": "Kronecker, with split",
        "scale": "exact block, 4: mul is no layer",
        "shift": "exact block, 4: add is no layer",
        "split": "Kronecker, dense, 4+1 x 6",
        "table": "Kronecker, embedding, 7 x 4",
    }
    assert "leaves: 4 exact block, 6 Kronecker" in repr(op)
    assert {"layers/0", "layers/1", "layers/2", "split"} <= set(op.blocks(by="layer"))


@pytest.mark.slow
def test_ekfac_is_the_projection_of_the_matrix_on_its_eigenvectors(x64):
    """The nearest operator with given eigenvectors has <E, F> = |E|² and the trace of F, in each block."""
    params, data = words_params(), words(TOKENS)
    op = spectra.EKFACOperator(words_fn, half_square, params, data)
    exact, own = gauss_newton(words_fn, params, data[0]), np.asarray(op.as_matrix())
    pairs = zip(blocks_of(op, own, params).items(), blocks_of(op, exact, params).values(), strict=True)
    for (name, mine), block in pairs:
        np.testing.assert_allclose(np.trace(mine), np.trace(block), rtol=TOLERANCE, err_msg=name)
        np.testing.assert_allclose(np.sum(mine * block), np.sum(mine**2), rtol=TOLERANCE, err_msg=name)


def patches(image, window, stride):
    """(channels, height, width) to rows of patches, channel first, by loops."""
    _, height, width = image.shape
    return np.array(
        [
            image[:, i : i + window, j : j + window].ravel()
            for i in range(0, height - window + 1, stride)
            for j in range(0, width - window + 1, stride)
        ]
    )


def image_fn(params, x):
    """PyTorch's layout: one convolution with a bias, a linear sum over positions."""
    y = jax.lax.conv_general_dilated(x, params["kernel"], (2, 2), "VALID") + params["bias"][:, None, None]
    return jnp.sum(y * params["weights"], (2, 3))


@pytest.mark.parametrize("sequence", ["expand", pytest.param("reduce", marks=pytest.mark.slow)])
def test_factors_of_a_convolution_are_those_of_patches(sequence, x64):
    params = {"kernel": normal(2, 3, 2, 2), "bias": normal(2), "weights": normal(2, 2, 3)}
    x = normal(N, 3, 4, 6)
    op = spectra.KFACOperator(
        image_fn,
        half_square,
        params,
        (x, normal(N, 2)),
        sequence=sequence,
        wrt=lambda path: path != "weights",
    )
    rows = np.array([patches(np.asarray(image), 2, 2) for image in x])
    rows = np.concatenate([rows, np.ones((N, 6, 1))], -1)
    gradients = np.asarray(params["weights"]).reshape(2, 6)  # ∂f_k/∂y at channel k and each position
    if sequence == "reduce":
        rows, gradients = rows.mean(1, keepdims=True), gradients.sum(1, keepdims=True)
    a = np.einsum("nsi,nsj->ij", rows, rows) / rows.shape[1] / N
    b = np.diag(np.sum(gradients**2, 1))
    assert relative_error(op.factors["kernel"][0], a) <= TOLERANCE
    assert relative_error(op.factors["kernel"][1], b) <= TOLERANCE


def tied_fn(params, ids):
    return (params["E"][ids] @ params["E"].T).mean(1)


@pytest.mark.slow
def test_an_embedding_that_is_the_last_layer_too_keeps_the_partial_traces_of_the_sum(x64):
    table, ids = normal(WORDS, WIDTH), words(TOKENS)[0]
    op = spectra.KFACOperator(tied_fn, half_square, {"E": table}, (ids, normal(N, WORDS)))
    e, h = np.asarray(table), np.asarray(table)[np.asarray(ids)].reshape(-1, WIDTH)
    frequency = np.diag(np.bincount(np.asarray(ids).ravel(), minlength=WORDS) / ids.size)
    # ∂f_k/∂h_s = E_k / S for the lookup; ∂f_k/∂y_sk = 1 / S for the product, both summed over positions
    first = frequency, e.T @ e / TOKENS
    second = np.eye(WORDS) / TOKENS, h.T @ h / len(h)
    rows = sum(np.trace(c) * r for r, c in (first, second))
    columns = sum(np.trace(r) * c for r, c in (first, second))
    dense = np.kron(rows, columns) / sum(np.trace(r) * np.trace(c) for r, c in (first, second))
    assert relative_error(op.as_matrix(), dense) <= TOLERANCE
    assert op.coverage["E"] == "Kronecker, tied, 7 x 4, 2 uses"
    # beyond the limit the words' side is a diagonal, which it is here
    large = spectra.KFACOperator(
        tied_fn, half_square, {"E": table}, (ids, normal(N, WORDS)), factor_limit=WIDTH
    )
    assert large.factors["E"][0].shape == (WORDS,)
    assert relative_error(large.as_matrix(), dense) <= TOLERANCE


def linear_fn(params, x):
    return x @ params["a"] @ params["b"] @ params["c"]


@pytest.mark.slow
@pytest.mark.parametrize("sequence", ["expand", "reduce"])
def test_deep_linear_networks_with_squared_error_are_exact(sequence, x64):
    """Bernacchia et al. 2018, and arXiv:2311.00636, propositions 1 and 2, for expand and reduce."""
    params = {"a": normal(3, 5), "b": normal(5, 4), "c": normal(4, OUTPUTS)}
    x = normal(N, TOKENS, 3)

    def pooled(params, x):
        return linear_fn(params, x).mean(1)

    def each_token(outputs, targets):
        return half_square(outputs, targets)

    if sequence == "expand":
        model_fn, loss_fn, y = linear_fn, each_token, normal(N, TOKENS, OUTPUTS)
        rows = x.reshape(-1, 3)
    else:
        model_fn, loss_fn, y = pooled, half_square, normal(N, OUTPUTS)
        rows = x.mean(1)
    op = spectra.KFACOperator(model_fn, loss_fn, params, (x, y), sequence=sequence)
    exact = gauss_newton(linear_fn, params, rows)
    own = np.asarray(op.as_matrix())
    for name, block in blocks_of(op, exact, params).items():
        assert relative_error(blocks_of(op, own, params)[name], block) <= TOLERANCE, name


def small(kind="type2", cls=spectra.KFACOperator, loss_fn=cross_entropy, data=None, **options):
    net = Network()
    targets = net.labels if loss_fn is cross_entropy else net.real
    data = (jnp.asarray(net.x), jnp.asarray(targets)) if data is None else data
    return cls(small_fn, loss_fn, net.params(), data, kind=kind, **options)


@pytest.mark.slow
@pytest.mark.parametrize("loss_fn", [cross_entropy, half_square], ids=["ce", "mse"])
@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_the_kinds_are_those_of_the_fisher_matrix_with_the_same_samples(kind, loss_fn, x64):
    options = {"key": jax.random.key(3)} if kind == "mc" else {}
    fisher = np.asarray(small(kind, spectra.FisherOperator, loss_fn, **options).as_matrix())
    ekfac = small(kind, spectra.EKFACOperator, loss_fn, **options)
    np.testing.assert_allclose(ekfac.trace(), np.trace(fisher), rtol=TOLERANCE)
    own, params = np.asarray(ekfac.as_matrix()), Network().params()
    for name, block in blocks_of(ekfac, fisher, params).items():
        mine = blocks_of(ekfac, own, params)[name]
        np.testing.assert_allclose(np.sum(mine * block), np.sum(mine**2), rtol=TOLERANCE)


@pytest.mark.slow
def test_many_samples_tend_to_the_exact_root(x64):
    """The last layer's B is a mean of `samples` N matrices of norm at most 2: Hoeffding, 6 deviations."""
    samples = 4000
    exact, sampled = small(), small("mc", key=jax.random.key(1), num_samples=samples)
    for mine, other in zip(sampled.factors["A"], exact.factors["A"], strict=True):
        assert np.abs(mine - other).max() <= 6 * 2 / np.sqrt(samples * len(Network().x))


def test_inverses_eigenvalues_and_determinants_are_those_of_the_dense_matrix(x64):
    op = small()
    dense, n = np.asarray(op.as_matrix()), op.size
    values = np.linalg.eigvalsh(dense)
    np.testing.assert_allclose(op.eigenvalues(), values, atol=TOLERANCE * values[-1])
    np.testing.assert_allclose(op.trace(), values.sum(), rtol=TOLERANCE)
    np.testing.assert_allclose(op.logdet(0.1), np.log(values + 0.1).sum(), rtol=TOLERANCE)
    # the inverse amplifies rounding by its condition, |K| / δ < 10
    assert (
        relative_error(op.inverse(0.1).as_matrix(), np.linalg.inv(dense + 0.1 * np.eye(n))) <= 10 * TOLERANCE
    )
    a, b = (np.asarray(side) for side in op.factors["B"])
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b)))
    split = (
        np.linalg.inv(a + pi * 0.1**0.5 * np.eye(len(a))),
        np.linalg.inv(b + 0.1**0.5 / pi * np.eye(len(b))),
    )
    heuristic = op.inverse(0.1, method="heuristic")
    for mine, expected in zip(heuristic.factors["B"], split, strict=True):
        assert relative_error(mine, expected) <= 10 * TOLERANCE
    for mine, side in zip(op.factor_eigenvalues()["B"], (a, b), strict=True):
        np.testing.assert_allclose(mine, np.linalg.eigvalsh(side), atol=TOLERANCE * np.trace(side))
    with pytest.raises(spectra.SpectraError, match="no positive definite inverse"):
        op.inverse(0.0)  # softmax has a null direction
    with pytest.raises(spectra.SpectraError, match="method='both'"):
        op.inverse(1.0, method="both")


def masked_loss(outputs, targets):
    labels, mask = targets
    terms = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], 1)[:, 0]
    return -jnp.sum(mask * terms) / jnp.sum(mask)


def count(batch):
    return batch[1][1].sum()


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [None, 4])
def test_padded_examples_change_nothing(microbatch, x64):
    net = Network()
    x = np.concatenate([net.x, np.full((3, 2), 7.0)])
    labels, mask = np.append(net.labels, [0, 1, 2]), np.append(np.ones(len(net.x)), np.zeros(3))
    data = tuple(jax.tree.map(jnp.asarray, (x, (labels, mask))))
    padded = spectra.KFACOperator(
        small_fn, masked_loss, net.params(), data, weight_fn=count, microbatch=microbatch
    )
    assert relative_error(padded.as_matrix(), small().as_matrix()) <= TOLERANCE


def coupled_fn(params, x):
    return (x - x.mean(0)) @ params["w"]


def contrastive(outputs, labels):
    """The trace of EKFAC was 97 times that of the matrix for such a loss."""
    scores = jax.nn.log_softmax(outputs @ outputs.T)
    return -jnp.mean(jnp.where(labels[:, None] == labels, scores, 0))


def log_of_mean(outputs, targets):
    return jnp.log(jnp.mean(jnp.exp(outputs**2)))


@pytest.mark.parametrize("loss_fn", [contrastive, log_of_mean])
def test_a_loss_that_sets_examples_against_each_other_is_refused(loss_fn, x64):
    data = normal(N, 3), jnp.arange(N) % OUTPUTS
    with pytest.raises(spectra.StructureError, match="sets examples against each other"):
        spectra.EKFACOperator(lambda p, x: jnp.tanh(x @ p["w"]), loss_fn, {"w": normal(3, OUTPUTS)}, data)


def negated(outputs, labels):
    return -cross_entropy(outputs, labels)


def saddle(outputs, targets):
    """Of its two outputs the second has a tenth of the curvature of the first, negative."""
    return jnp.mean((outputs - targets) ** 2 @ jnp.array([1.0, -0.1]))


@pytest.mark.parametrize("loss_fn", [negated, saddle])
def test_a_loss_whose_negative_curvature_would_be_left_out_is_refused(loss_fn, x64):
    """The matrix of the first was zero, with a trace of 1e-7 of that of its negative in float32."""
    targets = jnp.arange(N) % OUTPUTS if loss_fn is negated else normal(N, OUTPUTS)
    data = normal(N, 3), targets
    with pytest.raises(spectra.StructureError, match="not convex in the model's outputs"):
        spectra.KFACOperator(lambda p, x: jnp.tanh(x @ p["w"]), loss_fn, {"w": normal(3, OUTPUTS)}, data)


def two_sides(outputs, targets):
    """A binary cross-entropy in a form that loses its digits where a sigmoid rounds to one, from 17 on."""
    sides = jax.nn.sigmoid(outputs), jax.nn.sigmoid(-outputs)
    return -jnp.mean(targets * jnp.log(sides[0]) + (1 - targets) * jnp.log(sides[1]))


def test_a_loss_is_convex_whatever_signs_rounding_gives_its_curvature():
    data = jnp.eye(6), jax.nn.one_hot(jnp.arange(6) % 3, 3)
    sure = 18 * jnp.sign(jnp.asarray(normal(6, 3), jnp.float32))
    op = spectra.KFACOperator(lambda p, x: x @ p, two_sides, sure, data)
    assert op.size == 18


@pytest.mark.slow
def test_what_has_no_gradients_of_single_examples_is_refused(x64):
    data = normal(N, 3), normal(N, OUTPUTS)
    with pytest.raises(spectra.StructureError, match="change with the others of its batch"):
        spectra.KFACOperator(coupled_fn, half_square, {"w": normal(3, OUTPUTS)}, data)
    by_numpy = lambda p, x: jax.pure_callback(np.sin, x, x) @ p["w"]  # noqa: E731
    with pytest.raises(spectra.StructureError, match=r"cannot be mapped over its examples by jax\.vmap"):
        spectra.KFACOperator(by_numpy, half_square, {"w": normal(3, OUTPUTS)}, data)
    with pytest.raises(spectra.SpectraError, match="sequence='mean'"):
        small(sequence="mean")
    with pytest.raises(spectra.SpectraError, match="num_samples=3"):
        small(num_samples=3)


@pytest.mark.slow
def test_an_operator_is_made_inside_jit_and_equals_the_one_made_outside(x64):
    net = Network()
    data = jnp.asarray(net.x), jnp.asarray(net.labels)
    inside = jax.jit(lambda p, d: spectra.KFACOperator(small_fn, cross_entropy, p, d).as_matrix())
    assert relative_error(inside(net.params(), data), small().as_matrix()) <= TOLERANCE


CHOICES = (
    ("cross_entropy", "mse"),
    ("type2", "empirical"),
    ("expand", "reduce"),
    (False, True),  # whether EKFAC
    ("joint", "separate"),
)
PEERS = ("dense", "convolution", "attention", "embedding")


def pairwise(network):
    """Eight of the 32 combinations: any two choices in all four ways, and all 32 over the four networks.

    These are the runs of a fractional factorial design, those with two given parities.
    """
    parities = divmod(PEERS.index(network), 2)
    for bits in itertools.product((0, 1), repeat=len(CHOICES)):
        loss, kind, sequence, corrected, bias = bits
        if (loss ^ kind ^ sequence, loss ^ corrected ^ bias) == parities:
            yield network, *(choice[bit] for choice, bit in zip(CHOICES, bits, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "loss", "kind", "sequence", "corrected", "bias"),
    [case for network in PEERS for case in pairwise(network)],
)
def test_curvlinops_has_the_same(network, loss, kind, sequence, corrected, bias, x64):
    """`python -m benchmarks.kfac_peers` compares all 32 for each network."""
    pytest.importorskip("curvlinops")
    from benchmarks.kfac_peers import compare, unique

    if not unique(network, sequence, corrected):
        pytest.skip("any basis of a null space has its own EKFAC")
    assert compare(network, loss, kind=kind, sequence=sequence, corrected=corrected, bias=bias) <= 1e-5


@pytest.mark.parametrize("made", ["trace", "eigenbasis"])
def test_derivatives_are_those_of_the_factors(made, x64):
    """Of the activations in A, too, and through the zero eigenvalue of a softmax's Hessian."""
    network = Network()
    data = jnp.asarray(network.x), jnp.asarray(network.labels)
    along = {"A": jnp.cos(jnp.arange(9.0)).reshape(3, 3), "B": jnp.ones((3, 2)), "c": jnp.arange(3.0)}

    def number(params):
        if made == "trace":
            return spectra.KFACOperator(small_fn, cross_entropy, params, data).trace()
        return spectra.EKFACOperator(small_fn, cross_entropy, params, data).logdet(0.1)

    def at(step):
        return number(jax.tree.map(lambda x, d: x + step * d, network.params(), along))

    differences = (at(1e-4) - at(-1e-4)) / 2e-4
    gradient = jax.grad(number)(network.params())
    slope = sum(jnp.vdot(gradient[name], along[name]) for name in along)
    np.testing.assert_allclose(slope, differences, rtol=1e-5)


@pytest.mark.slow
def test_an_inverse_has_its_derivative_where_eigenvalues_are_equal(x64):
    """Two inputs of five numbers leave a null space of three, and both eigenvalues of B are one.

    Those of eigenvectors divide by the gaps, which are roundings. K = xᵀx/N ⊗ I, so the truth is that of a
    dense inverse.
    """
    x, along, v, weight = normal(2, 5), normal(2, 5, seed=1), normal(5, 2, seed=2), normal(5, 2)

    def form(x):
        op = spectra.KFACOperator(lambda w, x: x @ w, half_square, weight, (x, jnp.zeros((2, 2))))
        return jnp.vdot(v, op.inverse(0.1).mv(v))

    def dense(x):
        return jnp.vdot(v, jnp.linalg.solve(x.T @ x / len(x) + 0.1 * jnp.eye(5), v))

    expected, slope = (jax.jvp(f, (x,), (along,)) for f in (dense, form))
    np.testing.assert_allclose(slope, expected, rtol=TOLERANCE)
    np.testing.assert_allclose(
        jax.grad(form)(x), jax.grad(dense)(x), rtol=0, atol=TOLERANCE * abs(expected[0])
    )


@pytest.mark.slow
@pytest.mark.parametrize("cls", [spectra.KFACOperator, spectra.EKFACOperator])
def test_the_determinant_of_a_singular_matrix_is_not_made_of_rounding(cls):
    """Two inputs of five numbers leave a null space of three, which in float32 has eigenvalues of 1e-9."""
    x, weight = normal(2, 5), normal(5, 2)
    op = cls(lambda w, x: x @ w, half_square, weight, (x, jnp.zeros((2, 2))))
    assert op.logdet() == -np.inf
    data = jnp.diag(jnp.array([1.0, 0.1])), jnp.zeros((2, 2))
    small = cls(lambda w, x: x @ w, half_square, jnp.ones((2, 2)), data)
    np.testing.assert_allclose(small.logdet(), 2 * np.log(0.5 * 0.005), rtol=1e-5)


@pytest.mark.slow
def test_a_word_that_is_read_seldom_is_no_rounding():
    """The factor of an embedding is a diagonal: 1e-9 of it is known as well as the rest."""
    ids, weights = jnp.arange(2), jnp.array([1.0, 1e-9])
    op = spectra.KFACOperator(
        lambda w, batch: w[batch[0]],
        lambda outputs, batch: half_square(outputs, jnp.zeros(2)),
        jnp.eye(2),
        ((ids, weights), weights),
        weight_fn=lambda batch: batch[1][0],
    )
    np.testing.assert_allclose(op.logdet(), 2 * np.log(1e-9), rtol=1e-5)
    assert np.all(np.isfinite(op.inverse(0.0).mv(jnp.ones((2, 2)))))


@pytest.mark.slow
def test_a_leaf_that_the_model_does_not_use_is_said_to_be_none(x64):
    data = jnp.asarray(np.eye(3, 2)), jnp.zeros((3, 2))
    params = {"used": jnp.eye(2), "left": jnp.ones(3)}
    op = spectra.KFACOperator(lambda p, x: x @ p["used"], half_square, params, data)
    assert op.coverage["left"] == "exact block, 3: no output depends on it"
    assert not jnp.any(op.block("left").as_matrix())
