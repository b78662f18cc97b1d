"""gain_shape.py: levels, widths that both sides agree on, cells, and what they tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from meanflow_audio_codec.models import gain_shape
from meanflow_audio_codec.models.gain_shape import CELLS, NUM_CLASSES, STEPS, GainShape, cell_tables
from meanflow_audio_codec.models.quantizers import LEVEL_STEP

BANDS = (0, 0, 1, 2, 2, 2, 0, 1)  # as of two channels, say
FRAMES, FEATURES, NUM_BANDS = 2, len(BANDS), 3
CODE = GainShape(BANDS, FRAMES)


def draw_levels(seed=0, spread=1.0, shape=(2, 5)):
    """Whole steps, [2, 5, frames * bands]."""
    levels = spread * np.random.default_rng(seed).normal(size=(*shape, FRAMES * NUM_BANDS))
    return jnp.asarray(np.round(levels / LEVEL_STEP) * LEVEL_STEP, jnp.float32)


def draw_tokens(levels, seed=1):
    """Tokens of these levels with the tails that the tables are made for."""
    gain = CODE.gain(CODE.of_frames(levels))
    return gain * jnp.asarray(0.93 * np.random.default_rng(seed).standard_t(4, gain.shape), jnp.float32)


def steps(step, levels):
    return jnp.full(levels.shape[:2], step)


def slow_cell(x, level, band, step):
    """The cell of one coefficient and the width of those near 0, from their definitions."""
    ratio = (
        int(np.floor(round(level / LEVEL_STEP) * gain_shape.SHARE / 256)) - gain_shape.TILT * band - 16 * (64 - step)
    )
    width = np.exp(level - ratio * LEVEL_STEP)
    if ratio // 64 < -10:
        return 0, width
    v = abs(x) / width
    v = v if v < 16 else 16 * (1 + np.log(v / 16))
    return int(np.sign(x)) * min(CELLS - 1, int(v + 0.4)), width


def test_levels_are_the_rms_of_each_band_and_frame():
    """In nepers, frame after frame of a latent; silence is at the floor."""
    x = np.random.default_rng(0).normal(size=(2, 4, FEATURES)).astype(np.float32)
    x[1, 3] = 0.0
    levels = CODE.levels(jnp.asarray(x)).reshape(2, 4, NUM_BANDS)
    for band in range(NUM_BANDS):
        inside = x[..., np.array(BANDS) == band]
        expected = np.log(np.sqrt((inside**2).mean(-1) + gain_shape.LEVEL_FLOOR**2))
        np.testing.assert_allclose(levels[..., band], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [0, 40, 64, 90, 140, 255])
def test_cells_are_those_of_a_quantizer_with_a_dead_zone(step):
    levels = draw_levels()
    x = draw_tokens(levels)
    q = np.asarray(jax.jit(CODE.quantize)(x, levels, steps(step, levels)))
    by_frame = np.asarray(CODE.of_frames(levels))
    for place in np.ndindex(*q.shape):
        band = BANDS[place[2]]
        cell, _ = slow_cell(float(x[place]), float(by_frame[place[:2]][band]), band, step)
        assert q[place] == cell
    assert np.abs(q).max() < CELLS and (step > 0 or not q.any()) and (step < 255 or np.median(np.abs(q)) == CELLS - 1)


def test_loud_bands_and_high_ones_have_wider_cells():
    """By 90 of the 256 steps by which they are louder, and by TILT; a finer step by 1/16 neper, everywhere."""
    levels = np.array([0, 256, 256], np.int32)
    low, loud, high = levels - gain_shape.openness(levels, np.array([64]))
    assert (low, loud, high) == (0, 90 + gain_shape.TILT, 90 + 2 * gain_shape.TILT)
    finer = gain_shape.openness(levels, np.array([65])) - gain_shape.openness(levels, np.array([64]))
    np.testing.assert_array_equal(finer, 16)


def test_openness_is_the_same_in_every_program():
    """Numpy, as the entropy coder has it, and the network, compiled or not."""
    levels = draw_levels(spread=3.0)
    step = jnp.asarray(np.random.default_rng(2).integers(0, STEPS, levels.shape[:2]))
    own = np.asarray(CODE.openness(levels, step))
    np.testing.assert_array_equal(jax.jit(CODE.openness)(levels, step), own)
    whole = np.round(np.asarray(levels) / LEVEL_STEP).astype(np.int32).reshape(2, 5, FRAMES, NUM_BANDS)
    in_numpy = gain_shape.openness(whole, np.asarray(step)[..., None, None])
    np.testing.assert_array_equal(in_numpy.reshape(own.shape), own)
    classes = gain_shape.openness_class(own)
    assert classes.min() == -1 and classes.max() == NUM_CLASSES - 1


@pytest.mark.parametrize("number", [0, 9, 18, NUM_CLASSES - 1])
def test_tables_are_the_moments_of_the_law(number):
    """Of Student's law between the bounds of a cell, by quadrature."""
    means, deviations, shares = (table[number] for table in cell_tables())
    law, ratio = stats.t(4, scale=0.93), np.exp((number - 10 + 0.5) / 4)
    assert shares.sum() == pytest.approx(1.0, rel=1e-5)
    for cell in (0, 1, 2, 5, 16, 30):
        low, high = (16 * np.exp(b / 16 - 1) if b > 16 else b for b in (cell - 0.4, cell + 0.6))
        nodes = np.linspace(max(low, 0), high, 2001) / ratio
        share, first, second = (integrate.simpson(2 * law.pdf(nodes) * nodes**p, x=nodes) for p in range(3))
        assert shares[cell] == pytest.approx(share, rel=0.02, abs=1e-6)
        if share < 1e-4:
            continue
        mean = first / share * ratio if cell else 0.0
        assert means[cell] == pytest.approx(mean, rel=0.01)
        assert deviations[cell] == pytest.approx(np.sqrt(second / share * ratio**2 - mean**2), rel=0.03)


@pytest.mark.parametrize("step", [50, 70, 100])
def test_what_comes_back_is_off_by_the_deviation_that_is_named(step):
    levels = draw_levels(shape=(2, 2000))
    x = draw_tokens(levels)
    q = CODE.quantize(x, levels, steps(step, levels))
    known, deviation = (np.asarray(a) for a in CODE.known(q, levels, steps(step, levels)))
    w = (np.asarray(x / CODE.gain(CODE.of_frames(levels))) - known) / deviation
    said, q = deviation != 1, np.asarray(q)
    for part in (q == 0, q != 0):
        assert np.sqrt(np.mean(np.clip(w[part & said], -10, 10) ** 2)) == pytest.approx(1.0, abs=0.1)
    assert np.mean(w[q > 0]) == pytest.approx(0.0, abs=0.1) and not known[q == 0].any()
    assert not known[~said].any() and (step > 50 or not said.all())


def test_bits_are_the_entropy_of_the_cells():
    """Of the law, by class; a finer step takes more, and nothing is said of what is far below."""
    levels = draw_levels(shape=(2, 2000), spread=0.3)
    x = draw_tokens(levels)
    for step in (50, 70, 90):
        q = np.asarray(CODE.quantize(x, levels, steps(step, levels)))
        classes = np.asarray(gain_shape.openness_class(CODE.openness(levels, steps(step, levels))))
        classes = classes[..., np.array(BANDS)]
        spent = 0.0
        for number in np.unique(classes[classes >= 0]):
            cells = q[classes == number]
            share = np.unique(cells, return_counts=True)[1] / len(cells)
            spent -= len(cells) * np.sum(share * np.log2(share))
        assert np.mean(CODE.bits(levels, steps(step, levels))) == pytest.approx(spent / 4000, rel=0.03)


def test_step_for_is_the_finest_within_the_bits():
    levels = draw_levels(spread=2.0)
    for bits in (2, 5, 20, 30):
        step = CODE.step_for(levels, jnp.array([bits, 2 * bits]))
        assert (np.asarray(step) == np.asarray(step)[:, :1]).all()  # one for all latents of a clip
        allowed = np.array([bits, 2 * bits])
        assert (np.asarray(CODE.bits(levels, step)) <= allowed).all()
        assert (np.asarray(CODE.bits(levels, step + 1)) > allowed).all()
