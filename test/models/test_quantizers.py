"""quantizers.py: values, codes and their inverse agree; gradients are those of the path before rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.models import quantizers

LEVELS = [2, 3, 4, 8]
SHAPE = (1, 24, 8)  # of every latent here, so that each number of levels is compiled once

fsq = jax.jit(quantizers.fsq, static_argnums=1)


def latents(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 2, SHAPE), jnp.float32)


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


@pytest.mark.parametrize("levels", LEVELS)
def test_dequantize_inverts_the_codes(levels):
    """A decoder that reads codes sees what training saw, but for rounding, and codes what it sees as the same codes."""
    quantized, codes, _ = fsq(latents(seed=1), levels)
    np.testing.assert_allclose(quantizers.fsq_dequantize(codes, levels), quantized, rtol=0, atol=2e-7)
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
def test_perplexity_and_bits(levels):
    """Uniform codes use every level, constant codes one; usage is counted per dimension, not over all."""
    uniform = np.arange(24)[:, None] % levels
    constant = np.arange(8)[None, :] % levels  # another one in each dimension
    half = np.where(np.arange(8) < 4, uniform, constant)
    expected = {"uniform": levels, "constant": 1, "half": (levels + 1) / 2}
    for (name, perplexity), codes in zip(expected.items(), (uniform, constant, half), strict=True):
        metrics = fsq(latents_of(codes, levels), levels)[2]
        np.testing.assert_allclose(metrics["perplexity"], perplexity, rtol=1e-5, err_msg=name)
        bits = {"uniform": 1, "constant": 0, "half": 0.5}[name] * np.log2(levels)
        np.testing.assert_allclose(metrics["bits"], bits, rtol=1e-5, err_msg=name)


def test_bits_of_a_skewed_code():
    """Three of four indices 0, one 1: the entropy by hand."""
    metrics = fsq(latents_of(np.arange(24)[:, None] % 4 == 3, 2), 2)[2]
    bits = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    np.testing.assert_allclose(metrics["bits"], bits, rtol=1e-5)
    np.testing.assert_allclose(metrics["perplexity"], 2**bits, rtol=1e-5)
