"""Companding and its inverse at every magnitude, and scales that give unit RMS per band."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.preprocessing.scaling import (
    band_scale,
    band_weight,
    compand,
    denormalize,
    expand,
    normalize,
)
from meanflow_audio_codec.preprocessing.tokenizers import MdctTokenizer

MAGNITUDES = np.concatenate([[0.0], np.logspace(-12, 2, 200)])
VALUES = np.concatenate([-MAGNITUDES[::-1], MAGNITUDES])


@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.65, 1.0])
def test_compand_equals_the_power_law_and_expand_inverts_it(exponent):
    eps = 1e-4
    x = jnp.asarray(VALUES, jnp.float32)
    y = compand(x, exponent, eps)
    exact = np.asarray(x, np.longdouble)  # float64 cancels as well: eps^a - eps^a loses 1e-12
    power_law = (np.abs(exact) + eps) ** np.longdouble(exponent) - eps ** np.longdouble(exponent)
    if exponent == 1:
        power_law = np.abs(exact)
    np.testing.assert_allclose(y, (np.sign(exact) * power_law).astype(np.float64), rtol=1e-5)
    np.testing.assert_allclose(expand(y, exponent, eps), x, rtol=1e-5)
    assert np.all(np.diff(np.asarray(y)) >= 0)


@pytest.mark.parametrize("function", [compand, expand])
@pytest.mark.parametrize("exponent", [0.5, 0.65, 1.0])
def test_gradients_are_the_slope_even_at_zero(function, exponent):
    """At zero it is a eps^(a-1), its inverse for expand: not the 0 of a naive sign(x)."""
    eps = 1e-4
    slope = jax.vmap(jax.grad(lambda x: function(x, exponent, eps)))(jnp.asarray(VALUES, jnp.float32))
    assert np.all(np.isfinite(slope)) and np.all(slope > 0)
    at_zero = jax.grad(lambda x: function(x, exponent, eps))(0.0)
    expected = exponent * eps ** (exponent - 1)
    expected = expected if function is compand else 1 / expected
    assert float(at_zero) == pytest.approx(expected, rel=1e-5)


def test_exponent_one_is_the_identity():
    x = jnp.asarray(VALUES, jnp.float32)
    np.testing.assert_array_equal(compand(x, 1.0, 1e-4), x)
    np.testing.assert_array_equal(expand(x, 1.0, 1e-4), x)


def test_band_scale_gives_unit_rms_per_band():
    bands = np.array([0, 0, 0, 1, 2, 2, 1, 0])
    loudness = np.array([1.0, 0.1, 0.02])[bands] * np.linspace(0.5, 1.5, 8)
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((4, 50, 8)) * loudness, jnp.float32)
    scale = jax.jit(band_scale)(tokens, bands)
    scaled = np.asarray(tokens) / np.asarray(scale)
    for band in range(3):
        assert len(np.unique(scale[bands == band])) == 1
        assert np.sqrt(np.mean(scaled[..., bands == band] ** 2)) == pytest.approx(1, rel=1e-5)


def test_silent_bands_stay_finite():
    bands = np.array([0, 0, 1, 1])
    tokens = jnp.ones((1, 3, 4)).at[..., 2:].set(0.0)
    np.testing.assert_allclose(band_scale(tokens, bands), [1, 1, 1e-3, 1e-3], rtol=1e-6)
    np.testing.assert_array_equal(band_scale(jnp.zeros((1, 3, 4)), bands), np.ones(4))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_normalize_and_its_inverse(exponent):
    bands = np.repeat(np.arange(4), 4)
    spread = 10.0**-bands
    tokens = jnp.asarray(np.random.default_rng(0).laplace(size=(2, 40, 16)) * spread, jnp.float32)
    scale = band_scale(compand(tokens, exponent, 1e-4), bands)
    x = normalize(tokens, scale, exponent, 1e-4)
    rms = np.sqrt(np.mean(np.square(x).reshape(-1, 4, 4), axis=(0, 2)))
    np.testing.assert_allclose(rms, 1, rtol=1e-4)
    np.testing.assert_allclose(denormalize(x, scale, exponent, 1e-4), tokens, rtol=1e-5)


def test_wrong_input_names_the_field():
    for exponent in (0.0, -0.5, 1.5):
        with pytest.raises(InputError, match="exponent"):
            compand(jnp.ones(2), exponent, 1e-4)
    with pytest.raises(InputError, match="eps"):
        expand(jnp.ones(2), 0.5, 0.0)


def test_band_weight_gives_every_band_the_same_sum():
    bands = MdctTokenizer(hop_length=512, group=2).bands(channels=1, sample_rate=44_100)
    weight = band_weight(bands)
    np.testing.assert_allclose(weight.mean(), 1, rtol=1e-6)
    sums = np.bincount(bands, weights=weight)
    np.testing.assert_allclose(sums, sums[0], rtol=1e-6)
    assert weight[0] > 10 * weight[511]
