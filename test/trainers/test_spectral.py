"""The mel loss is the metric, and has gradients everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.evaluators import metrics
from meanflow_audio_codec.trainers import spectral

mel_distance = jax.jit(spectral.mel_distance, static_argnums=2)


@pytest.mark.parametrize("samples", [2000, 5003])
def test_loss_is_the_metric(samples):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, samples)).astype(np.float32) * np.float32([[0.3], [0.01], [0.0]])
    y = x + 0.02 * rng.standard_normal(x.shape).astype(np.float32)
    np.testing.assert_allclose(
        spectral.mel_distance(jnp.asarray(x), jnp.asarray(y), 24_000),
        metrics.mel_distance(x, y, 24_000),
        rtol=1e-4,
        atol=1e-6,
    )


def test_gradient_is_finite_where_there_is_silence():
    x = jnp.zeros((2, 4096)).at[0, 2048:].set(jnp.sin(jnp.arange(2048) / 5))
    gradient = jax.jit(jax.grad(lambda y: spectral.mel_distance(x, y, 24_000).sum()))
    assert np.isfinite(gradient(jnp.zeros_like(x))).all()
    assert np.isfinite(gradient(x)).all()
    half = np.asarray(gradient(x / 2))
    assert np.abs(half[0]).max() > 0 and not half[1].any()


def test_gradient_steps_bring_levels_together():
    rng = np.random.default_rng(1)
    x, y = (jnp.float32(rng.standard_normal((1, 4096)) * level) for level in (0.1, 0.02))
    step = jax.jit(jax.value_and_grad(lambda y: spectral.mel_distance(x, y, 24_000)[0]))
    before, gradient = step(y)
    for _ in range(30):
        distance, gradient = step(y)
        y = y - 0.012 * gradient / jnp.abs(gradient).max()
    assert distance < 0.8 * before
