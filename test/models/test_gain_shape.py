"""gain_shape.py: levels, the order that they give, and values that come back to their places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.models import gain_shape
from meanflow_audio_codec.models.gain_shape import REFINEMENTS, GainShape, gaussian_fsq
from meanflow_audio_codec.models.quantizers import LEVEL_STEP

BANDS = (0, 0, 1, 2, 2, 2, 0, 1)  # as of two channels, say
FRAMES, FEATURES, NUM_BANDS = 2, len(BANDS), 3


def draw_levels(seed=0, ties=False):
    """Multiples of the step, [2, 5, frames * bands]; few different ones with `ties`."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-3, 3, (2, 5, FRAMES * NUM_BANDS)) if ties else rng.normal(size=(2, 5, FRAMES * NUM_BANDS))
    return jnp.asarray(np.round(levels / LEVEL_STEP) * LEVEL_STEP, jnp.float32)


def slow_order(levels, fsq_levels):
    """The order of (refinement, frame, feature) of one latent by sorting."""
    lower = np.round(np.log(gaussian_fsq(fsq_levels)[2]) / LEVEL_STEP) * LEVEL_STEP
    entries = []
    for refinement, frame, band in np.ndindex(REFINEMENTS, FRAMES, NUM_BANDS):
        level = float(levels[frame * NUM_BANDS + band]) + refinement * lower - gain_shape._TILT * band
        entries.append((-level, len(entries), refinement, frame, band))
    return [
        (refinement * FRAMES + frame) * FEATURES + feature
        for _, _, refinement, frame, band in sorted(entries)
        for feature in range(FEATURES)
        if BANDS[feature] == band
    ]


def test_levels_are_the_rms_of_each_band_and_frame():
    """In nepers, frame after frame of a latent; silence is at the floor."""
    x = np.random.default_rng(0).normal(size=(2, 4, FEATURES)).astype(np.float32)
    x[1, 3] = 0.0
    levels = GainShape(BANDS, FRAMES, 4, 4).levels(jnp.asarray(x)).reshape(2, 4, NUM_BANDS)
    for band in range(NUM_BANDS):
        inside = x[..., np.array(BANDS) == band]
        expected = np.log(np.sqrt((inside**2).mean(-1) + gain_shape.LEVEL_FLOOR**2))
        np.testing.assert_allclose(levels[..., band], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_values_come_in_the_order_of_their_levels(ties):
    """Loud bands first, ties by number; the values sent are those of that order, and come back to where they were."""
    code, levels = GainShape(BANDS, FRAMES, REFINEMENTS * FRAMES * FEATURES, 4), draw_levels(ties=ties)
    order, places = np.asarray(code._order(levels)), np.asarray(code._places(levels))
    for index in np.ndindex(2, 5):
        assert order[index].tolist() == slow_order(levels[index], 4)
        assert places[index][order[index]].tolist() == list(range(len(order[index])))


@pytest.mark.parametrize("fsq_levels", [2, 4, 16])
def test_what_comes_back_is_off_by_the_deviation_that_is_named(fsq_levels):
    """Gaussian coefficients: not sent, sent once, sent twice."""
    bands = tuple(np.repeat(range(4), 64).tolist())
    code = GainShape(bands, 1, 300, fsq_levels)
    rng = np.random.default_rng(0)
    levels = jnp.asarray(np.tile(np.array([2.0, -1.0, 0.5, 2.0]), (1, 400, 1)), jnp.float32)
    shape = jnp.asarray(rng.normal(size=(1, 400, 256)), jnp.float32)
    values, codes, _ = code.quantize(shape, levels)
    known, deviation = (np.asarray(a) for a in code.place(values, levels))
    once = gaussian_fsq(fsq_levels)[2]
    assert codes.shape == (1, 400, 300) and codes.min() >= 0 and codes.max() < fsq_levels
    found = np.unique(deviation.round(6))
    assert len(found) == 3 if fsq_levels < 16 else len(found) >= 2
    sent = 300 - np.sum(deviation < 1, axis=-1)  # values beside the first of each
    assert np.all(sent == np.sum(deviation < 0.99 * once, axis=-1))
    for value, factor in ((1.0, 1.0), (once, 1.0), (once**2, 1.5)):  # what is left over is no Gaussian
        inside = np.isclose(deviation, value, rtol=1e-4)
        if inside.any():
            error = np.sqrt(np.mean((np.asarray(shape)[inside] - known[inside]) ** 2))
            assert value * 0.9 < error < value * factor * 1.1


def test_kept_values_are_the_first_ones():
    code, levels = GainShape(BANDS, FRAMES, 12, 4), draw_levels()
    shape = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, FEATURES)), jnp.float32)
    whole, codes, _ = code.quantize(shape, levels)
    fewer, same, _ = code.quantize(shape, levels, 5)
    np.testing.assert_array_equal(codes, same)
    np.testing.assert_array_equal(fewer[..., :5], whole[..., :5])
    known, deviation = code.place(fewer, levels)
    assert int(np.sum(np.asarray(fewer) != 0)) == 2 * 5 * 5
    np.testing.assert_array_equal(np.asarray(known != 0), np.asarray(deviation < 1))


def test_gradients_pass_the_rounding_to_what_was_sent_alone():
    code, levels = GainShape(BANDS, FRAMES, 4, 4), draw_levels()[:1, :1]
    shape = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, FEATURES)), jnp.float32)
    known = lambda shape: code.place(code.quantize(shape, levels)[0], levels)[0]
    gradient = jax.grad(lambda shape: known(shape).sum())(shape)
    np.testing.assert_array_equal(np.asarray(gradient != 0), np.asarray(known(shape) != 0))
    assert np.asarray(gradient[gradient != 0]).min() > 0


def test_the_order_is_the_same_in_every_program():
    """One by one, in a batch, compiled or not: sums of levels are exact, so nothing depends on their rounding."""
    code, levels = GainShape(BANDS, FRAMES, 20, 4), draw_levels(ties=True)
    whole = np.asarray(code._order(levels))
    np.testing.assert_array_equal(jax.jit(code._order)(levels), whole)
    for index in np.ndindex(2, 5):
        np.testing.assert_array_equal(code._order(levels[index][None, None])[0, 0], whole[index])


@pytest.mark.parametrize("levels, error", [(2, 0.3634), (4, 0.1175)])
def test_gaussian_fsq_is_nearly_the_best_quantizer(levels, error):
    """J. Max, Quantizing for minimum distortion (1960), table 1."""
    assert gaussian_fsq(levels)[2] ** 2 == pytest.approx(error, rel=0.02)
