"""train_state.py: the average's warm-up by hand, and a state that starts where it should."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meanflow_audio_codec.models.train_state import TrainState, ema_update


@pytest.mark.parametrize(
    ("step", "decay", "rate"),
    [(0, 0.999, 1 / 10), (1, 0.999, 2 / 11), (90, 0.999, 91 / 100), (90, 0.5, 0.5), (100_000, 0.999, 0.999)],
)
def test_average_warms_up(step, decay, rate):
    ema = ema_update({"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 4.0])}, jnp.array(step), decay)
    np.testing.assert_allclose(ema["w"], [rate + 3 * (1 - rate), -2 * rate + 4 * (1 - rate)], rtol=1e-6)


def test_average_over_three_steps():
    """From 0 over parameters 1, 2, 3 with rates 1/10, 2/11, 3/12."""
    ema = jnp.zeros(())
    for step, params in enumerate([1.0, 2.0, 3.0]):
        ema = ema_update(ema, jnp.array(params), jnp.array(step), 0.999)
    by_hand = (((0.9 * 1) * 2 / 11 + 2 * 9 / 11) * 3 / 12) + 3 * 9 / 12
    np.testing.assert_allclose(ema, by_hand, rtol=1e-6)


def test_no_decay_follows_the_parameters_and_full_decay_ends_the_warm_up_late():
    """Decay 0 is no average; decay 1 never reaches its limit, so the average never freezes."""
    old, new = jnp.array(1.0), jnp.array(2.0)
    assert ema_update(old, new, jnp.array(10**6), 0.0) == new
    assert ema_update(old, new, jnp.array(10**4), 1.0) > old


def test_a_state_starts_at_its_parameters():
    params = {"w": jnp.arange(3.0)}
    state = TrainState.create(params, optax.sgd(0.1, momentum=0.9), jnp.ones(3))
    assert (state.step, state.step.dtype) == (0, jnp.int32)
    np.testing.assert_array_equal(state.ema_params["w"], params["w"])
    assert state.ema_params["w"] is not state.params["w"]  # a donated buffer may be given once only
