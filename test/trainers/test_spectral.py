"""The mel loss is the metric, has gradients everywhere, and as an energy distance wants the noise that it is shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.evaluators import metrics
from meanflow_audio_codec.trainers import spectral

pytestmark = pytest.mark.usefixtures("compile_fast")


@jax.jit
def mel_distance(x, y):
    return spectral.mel_distance(spectral.log_mels(x, 24_000), spectral.log_mels(y, 24_000))


@pytest.mark.parametrize("samples", [2000, 5003])
def test_loss_is_the_metric(samples):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, samples)).astype(np.float32) * np.float32([[0.3], [0.01], [0.0]])
    y = x + 0.02 * rng.standard_normal(x.shape).astype(np.float32)
    np.testing.assert_allclose(
        mel_distance(jnp.asarray(x), jnp.asarray(y)),
        metrics.mel_distance(x, y, 24_000),
        rtol=1e-4,
        atol=1e-6,
    )


@jax.jit
def distance_and_gradient(y, x):
    return jax.value_and_grad(lambda y: mel_distance(x, y).sum())(y)


def test_gradient_is_finite_where_there_is_silence():
    x = jnp.zeros((2, 4096)).at[0, 2048:].set(jnp.sin(jnp.arange(2048) / 5))
    assert np.isfinite(distance_and_gradient(jnp.zeros_like(x), x)[1]).all()
    assert np.isfinite(distance_and_gradient(x, x)[1]).all()
    half = np.asarray(distance_and_gradient(x / 2, x)[1])
    assert np.abs(half[0]).max() > 0 and not half[1].any()


def test_gradient_steps_bring_levels_together():
    rng = np.random.default_rng(1)
    x, y = (jnp.float32(rng.standard_normal((2, 4096)) * level) for level in (0.1, 0.02))
    before, gradient = distance_and_gradient(y, x)
    for _ in range(30):
        distance, gradient = distance_and_gradient(y, x)
        y = y - 0.012 * gradient / jnp.abs(gradient).max()
    assert distance < 0.8 * before


def test_energy_distance_is_least_for_noise_of_the_same_law():
    """The distance alone is less for what does not vary."""
    x, y, again = ([jnp.float32(mels)] for mels in np.random.default_rng(2).standard_normal((3, 1, 100, 100)))
    mean = [jnp.zeros_like(x[0])]
    distance, spread, of_mean = (float(spectral.mel_distance(*pair)[0]) for pair in ((x, y), (y, again), (x, mean)))
    assert spread == pytest.approx(distance, rel=0.02)
    assert distance - spread / 2 < of_mean < distance
