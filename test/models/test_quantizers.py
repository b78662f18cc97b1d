"""quantizers.py: values, codes and their inverse agree; gradients pass; fewer codebooks are a prefix of more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meanflow_audio_codec.models import quantizers

LEVELS = [2, 3, 4, 8]
SHAPE = (1, 24, 8)  # of every latent of FSQ here, so that each number of levels is compiled once

fsq = jax.jit(quantizers.fsq, static_argnums=1)


def latents(seed=0, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 2, shape), jnp.float32)


def latents_of(codes, levels):
    """Latents at the centres of `codes`, the outermost ones far out."""
    unit = np.clip(2 * np.asarray(codes, np.float64) / (levels - 1) - 1, -0.9999, 0.9999)
    return jnp.asarray(np.arctanh(np.broadcast_to(unit, SHAPE)), jnp.float32)


@pytest.mark.parametrize("levels", LEVELS)
def test_values_are_the_nearest_of_equidistant_levels(levels):
    """The oracle tries them all."""
    y = latents()
    quantized, codes, _ = fsq(y, levels)
    grid = np.linspace(-1, 1, levels)
    nearest = np.abs(np.tanh(y, dtype=np.float64)[..., None] - grid).argmin(-1)
    np.testing.assert_array_equal(codes, nearest)
    np.testing.assert_allclose(quantized, grid[nearest], atol=1e-6)
    assert codes.dtype == jnp.int32


@pytest.mark.parametrize("levels", [*LEVELS, 5, 7, 11, 16])
def test_dequantize_gives_the_very_values_and_they_give_the_codes(levels):
    """A decoder that reads codes sees what training saw, compiled or not, and codes what it sees as the same codes."""
    quantized, codes, _ = fsq(latents(seed=1), levels)
    np.testing.assert_array_equal(quantizers.fsq_dequantize(codes, levels), quantized)
    np.testing.assert_array_equal(jax.jit(quantizers.fsq_dequantize, static_argnums=1)(codes, levels), quantized)
    np.testing.assert_array_equal(fsq(latents_of(codes, levels), levels)[1], codes)


@pytest.mark.parametrize("levels", LEVELS)
def test_range_is_closed_and_reached(levels):
    far = jnp.broadcast_to(jnp.array([-1e9, -50.0, -9.0, 0.0, 0.1, 9.0, 50.0, 1e9]), SHAPE)
    quantized, codes, _ = fsq(far, levels)
    np.testing.assert_allclose([quantized.min(), quantized.max()], [-1, 1], rtol=1e-6)
    assert (codes.min(), codes.max()) == (0, levels - 1)


@pytest.mark.parametrize("levels", [2, 3])
def test_gradient_is_that_of_tanh(levels):
    y, weight = latents(), latents(seed=2)
    _, vjp = jax.vjp(lambda y: fsq(y, levels)[0], y)
    np.testing.assert_allclose(vjp(weight)[0], weight * (1 - np.tanh(y) ** 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
def test_perplexity_bits_and_usage(levels):
    """Uniform codes use every level, constant codes one; all is counted per dimension, not over all."""
    uniform = np.arange(24)[:, None] % levels
    constant = np.arange(8)[None, :] % levels  # another one in each dimension
    half = np.where(np.arange(8) < 4, uniform, constant)
    expected = {"uniform": levels, "constant": 1, "half": (levels + 1) / 2}
    for (name, perplexity), codes in zip(expected.items(), (uniform, constant, half), strict=True):
        metrics = fsq(latents_of(codes, levels), levels)[2]
        np.testing.assert_allclose(metrics["perplexity"], perplexity, rtol=1e-5, err_msg=name)
        bits = {"uniform": 1, "constant": 0, "half": 0.5}[name] * np.log2(levels)
        np.testing.assert_allclose(metrics["bits"], bits, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(metrics["usage"], perplexity / levels, rtol=1e-5, err_msg=name)


def test_bits_of_a_skewed_code():
    """Three of four indices 0, one 1: the entropy by hand."""
    metrics = fsq(latents_of(np.arange(24)[:, None] % 4 == 3, 2), 2)[2]
    bits = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    np.testing.assert_allclose(metrics["bits"], bits, rtol=1e-5)
    np.testing.assert_allclose(metrics["perplexity"], 2**bits, rtol=1e-5)


# --- fewer codebooks


@pytest.mark.parametrize("levels", [3, 4])
def test_dimensions_that_are_not_kept_are_zero_and_learn_nothing(levels):
    """With an even number of levels too; per clip, and the codes stay."""
    y = latents(shape=(3, 24, 8))
    whole, codes, _ = fsq(y, levels)
    kept = jnp.array([8, 1, 5])
    some, same_codes, _ = fsq(y, levels, kept)
    np.testing.assert_array_equal(same_codes, codes)
    for row, count in enumerate(kept):
        np.testing.assert_array_equal(some[row, :, :count], whole[row, :, :count])
        np.testing.assert_array_equal(some[row, :, count:], 0)
        np.testing.assert_array_equal(fsq(y, levels, int(count))[0][row], some[row])
    gradient = jax.grad(lambda y: fsq(y, levels, kept)[0].sum())(y)
    np.testing.assert_array_equal(gradient != 0, np.arange(8) < kept[:, None, None] + np.zeros((24, 1)))


def test_draws_are_shares_and_uniform():
    """40,000 clips: 30 % keep any of three numbers alike, the others all."""
    draw = functools.partial(quantizers.draw_kept, rows=40_000, choices=(3, 5, 8))
    counts = np.bincount(draw(jax.random.key(0), dropout=0.3), minlength=9) / 40_000
    np.testing.assert_allclose(counts, [0, 0, 0, 0.1, 0, 0.1, 0, 0, 0.8], atol=0.006)  # 3 deviations
    np.testing.assert_array_equal(draw(jax.random.key(0), dropout=0.3), draw(jax.random.key(0), dropout=0.3))
    assert np.any(draw(jax.random.key(0), dropout=0.3) != draw(jax.random.key(1), dropout=0.3))
    assert set(np.unique(draw(jax.random.key(0), dropout=0.0))) == {8}
    np.testing.assert_allclose(np.mean(draw(jax.random.key(0), dropout=1.0)), 16 / 3, atol=0.05)


# --- RVQ

BOOKS, ENTRIES, DIM = 3, 16, 8
RVQ = quantizers.ResidualQuantizer(BOOKS, ENTRIES, DIM)
Y = latents(seed=3, shape=(2, 12, DIM))


@pytest.fixture(scope="module")
def params():
    """Random ones, the biases too."""
    shapes = jax.eval_shape(RVQ.init, jax.random.key(0), Y)
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(0, 0.5, leaf.shape), jnp.float32), shapes)


quantize = jax.jit(RVQ.apply)


def in_float64(params):
    return [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p) for p in params["params"].values()]


def unit(v):
    return v / np.sqrt((v**2).sum(-1, keepdims=True))


def slope_of_unit(v):
    return (np.eye(len(v)) - np.outer(unit(v), unit(v))) / np.sqrt((v**2).sum())


def by_hand(params, vector, kept):
    """RVQ of one vector in float64: latents, codes, loss, and the matrix of d latents / d vector, straight through."""
    residual, left = np.asarray(vector, np.float64), np.eye(DIM)
    quantized, slope, codes, loss = np.zeros(DIM), np.zeros((DIM, DIM)), [], 0.0
    for book, p in enumerate(in_float64(params)):
        y = residual @ p["project_in"] + p["bias_in"]
        distances = ((unit(y) - unit(p["codebook"])) ** 2).sum(-1)
        codes.append(distances.argmin())
        approximation = unit(p["codebook"][codes[-1]]) @ p["project_out"] + p["bias_out"]
        residual = residual - approximation
        step = left @ p["project_in"] @ slope_of_unit(y) @ p["project_out"]
        left = left - step
        if book < kept:
            quantized, slope = quantized + approximation, slope + step
            loss += 1.25 * distances.min() / 8 / BOOKS  # means over dimensions and codebooks
    return quantized, codes, loss, slope


@pytest.mark.parametrize("kept", [(3, 3), (1, 1), (3, 2)])
def test_rvq_equals_a_slow_loop(params, kept):
    """Latents, codes, loss and gradient, which passes as if each entry were the vector that it stands for."""
    (quantized, codes, metrics), vjp = jax.vjp(lambda y: quantize(params, y, jnp.array(kept)), Y)
    rows = [[by_hand(params, vector, kept[row]) for vector in Y[row]] for row in range(2)]
    expected, expected_codes, losses, slopes = (np.array([[v[i] for v in row] for row in rows]) for i in range(4))
    np.testing.assert_array_equal(codes, expected_codes)
    assert codes.dtype == jnp.int32
    np.testing.assert_allclose(quantized, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
    weight = latents(seed=4, shape=Y.shape)
    no_tangent = np.zeros(codes.shape, jax.dtypes.float0)
    (gradient,) = vjp((weight, no_tangent, {name: jnp.zeros(()) for name in metrics}))
    np.testing.assert_allclose(gradient, np.einsum("bmk,bmjk->bmj", weight, slopes), rtol=1e-4, atol=1e-4)
    used = [len(np.unique(codes[..., book])) / ENTRIES for book in range(BOOKS)]
    np.testing.assert_allclose(metrics["usage"], np.mean(used), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rvq_dequantizes_as_many_codes_as_it_gets(params, count):
    quantized, codes, _ = quantize(params, Y, jnp.int32(count))
    decoded = RVQ.apply(params, codes[..., :count], method="dequantize")
    np.testing.assert_allclose(decoded, quantized, rtol=0, atol=1e-6)
    if count == BOOKS:
        np.testing.assert_array_equal(quantize(params, Y, None)[0], quantized)


def test_only_kept_codebooks_learn(params):
    @jax.grad
    def gradient(params):
        quantized, _, metrics = quantize(params, Y, 2)
        return jnp.sum(quantized**2) + metrics["loss"]

    learns = [[bool(np.any(leaf)) for leaf in jax.tree.leaves(p)] for p in gradient(params)["params"].values()]
    assert all(learns[0]) and all(learns[1]) and not any(learns[2])


def test_entries_and_latents_pull_at_each_other(params):
    """The entry with weight 1, the latent with 0.25, both on the sphere; entries that are not chosen stay."""
    one = quantizers.VectorQuantizer(ENTRIES, DIM)
    params = {"params": params["params"]["quantizers_0"]}
    loss = lambda params, y: jnp.mean(one.apply(params, y)[2])
    by_params, by_latents = jax.grad(loss, argnums=(0, 1))(params, Y)
    (p,) = in_float64({"params": params})
    codes = np.asarray(one.apply(params, Y)[1])
    codebook, latents = np.zeros((ENTRIES, 8)), np.zeros(Y.shape)
    for row, i in np.ndindex(codes.shape):
        entry, y = p["codebook"][codes[row, i]], np.asarray(Y[row, i], np.float64) @ p["project_in"] + p["bias_in"]
        pull = 2 * (unit(entry) - unit(y)) / codes.size / 8
        codebook[codes[row, i]] += pull @ slope_of_unit(entry)
        latents[row, i] = -0.25 * pull @ slope_of_unit(y) @ p["project_in"].T
    np.testing.assert_allclose(by_params["params"]["codebook"], codebook, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(by_latents, latents, rtol=1e-4, atol=1e-7)


def test_untrained_rvq_approaches_its_latents():
    """Each codebook takes away from Gaussian latents in a space of its own."""
    y = latents(seed=6, shape=(4, 64, 32)) / 2
    rvq = quantizers.ResidualQuantizer(8, num_entries=64, latent_dim=32)
    params = jax.jit(rvq.init)(jax.random.key(0), y)
    error = jax.jit(lambda count: jnp.mean((rvq.apply(params, y, count)[0] - y) ** 2))
    errors = [float(error(count)) for count in range(1, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * np.mean(y**2), errors


def test_rvq_learns_and_uses_its_entries():
    """Adam on Gaussian latents: each codebook explains more of them, and nearly all entries are in use."""
    y = latents(seed=5, shape=(4, 64, DIM)) / 2
    tx = optax.adam(1e-2)

    def loss(params):
        quantized, _, metrics = RVQ.apply(params, y)
        return jnp.mean((quantized - y) ** 2) + metrics["loss"], metrics

    @jax.jit
    def train(params):
        def step(carry, _):
            params, opt_state = carry
            gradients, metrics = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(gradients, opt_state)
            return (optax.apply_updates(params, updates), opt_state), metrics["usage"]

        (params, _), usage = jax.lax.scan(step, (params, tx.init(params)), length=400)
        return params, usage[-1]

    params, usage = train(RVQ.init(jax.random.key(0), y))
    error = jax.jit(lambda count: jnp.mean((RVQ.apply(params, y, count)[0] - y) ** 2))
    errors = [float(error(count)) for count in (1, 2, 3)]
    assert errors[2] < 0.8 * errors[1] and errors[1] < 0.8 * errors[0] < 0.8, errors
    assert usage > 0.9


def test_fitted_levels_are_those_of_the_data():
    """Of no more laws than entries each gets its own, so that later stages have nothing to do; gradients stop."""
    rng = np.random.default_rng(0)
    laws = rng.normal(0, 3, (20, 4)).astype(np.float32)
    levels = jnp.asarray(laws[rng.integers(20, size=2000)])
    codebook = quantizers.fit_levels(levels, 2)
    assert codebook.shape == (2, 256, 4)
    assert np.all(np.diff(codebook.mean(-1)) >= 0)
    model, y = quantizers.LevelQuantizer(num_stages=2, dim=4), levels[None, :50]
    params = {"params": {"codebook": codebook}}
    codes = model.apply(params, y)
    assert codes.shape == (1, 50, 2) and codes.min() >= 0 and codes.max() < 256
    np.testing.assert_allclose(model.apply(params, codes, method="dequantize"), y, atol=quantizers.LEVEL_STEP / 2)
    loss = lambda params: jnp.sum(model.apply(params, model.apply(params, y), method="dequantize") ** 2)
    assert not np.any(jax.grad(loss)(params)["params"]["codebook"])


def test_each_level_stage_halves_what_is_left():
    """Not quite: 8 bits for 4 Gaussian numbers leave a quarter of their amplitude at best, 2^(-8/4)."""
    levels = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 4)), jnp.float32)
    codebook = quantizers.fit_levels(levels, 2)
    for stages, bound in ((1, 0.35), (2, 0.15)):
        model, params = quantizers.LevelQuantizer(num_stages=stages, dim=4), {"params": {"codebook": codebook[:stages]}}
        decoded = model.apply(params, model.apply(params, levels[None]), method="dequantize")
        assert np.std(decoded[0] - levels) < bound


def test_level_sums_are_nearer_than_those_of_the_nearest_entries():
    """Of vectors that the entries were not made from; and the codes are of that very sum."""
    rng = np.random.default_rng(0)
    fitted, fresh = jnp.asarray(rng.normal(size=(2, 4000, 8)), jnp.float32)
    codebook = quantizers.fit_levels(fitted, 4)
    model, params = quantizers.LevelQuantizer(num_stages=4, dim=8), {"params": {"codebook": codebook}}
    codes = model.apply(params, fresh[None])
    assert codes.shape == (1, 4000, 4) and codes.min() >= 0 and codes.max() < 256
    left_over = greedy = np.asarray(fresh, np.float64)
    for stage, entries in enumerate(np.asarray(codebook)):
        left_over = left_over - entries[np.asarray(codes[0, :, stage])]
        greedy = greedy - entries[np.argmin(((greedy[:, None] - entries) ** 2).sum(-1), axis=1)]
    np.testing.assert_allclose(model.apply(params, codes, method="dequantize")[0], fresh - left_over, atol=1e-5)
    assert np.std(left_over) < 0.95 * np.std(greedy)
