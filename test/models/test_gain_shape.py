"""gain_shape.py: levels, cells, and codes that go where most is open."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from meanflow_audio_codec.models import gain_shape
from meanflow_audio_codec.models.gain_shape import DEPTH, GainShape, cell_tables
from meanflow_audio_codec.models.quantizers import LEVEL_STEP

BANDS = (0, 0, 1, 2, 2, 2, 0, 1)  # as of two channels, say
FRAMES, FEATURES, NUM_BANDS = 2, len(BANDS), 3
CARDINALITIES = (2, 4, 16)


def draw_levels(seed=0, ties=False):
    """Whole steps, [2, 5, frames * bands]; few different ones with `ties`."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-3, 3, (2, 5, FRAMES * NUM_BANDS)) if ties else rng.normal(size=(2, 5, FRAMES * NUM_BANDS))
    return jnp.asarray(np.round(levels / LEVEL_STEP) * LEVEL_STEP, jnp.float32)


def draw_tokens(levels, code, seed=1):
    """Tokens of these levels with the tails that the tables are made for."""
    rng = np.random.default_rng(seed)
    gain = code.gain(code.of_frames(levels))
    return gain * jnp.asarray(0.93 * rng.standard_t(4, gain.shape), jnp.float32)


def magnitude_cell(v, count):
    """The number of |v|'s cell among `count` and its bounds, from the companding law."""
    cell = min(count - 1, int(count * abs(v) ** 1.5 / (abs(v) ** 1.5 + 1.3**1.5)))
    bounds = [1.3 * (u / (1 - u)) ** (2 / 3) if u < 1 else np.inf for u in (cell / count, (cell + 1) / count)]
    return cell, bounds


def number_of(told, cardinality):
    """The number of the cell that the codes `told` lead to."""
    number = 0
    for code in told:
        number = number * cardinality + 1 + code
    return number


def slow_codes(v, levels, cardinality, count, share=0.0):
    """The codes of one latent's coefficients v [frame * feature] over their gain, one by one, and what they say."""
    means, deviations = cell_tables(cardinality)
    loudness = np.log(np.sqrt(means**2 + np.exp(deviations * LEVEL_STEP) ** 2)) / LEVEL_STEP
    told, codes, moved = [[] for _ in v], [], [0] * len(v)
    for _ in range(count):
        best = None
        for i in range(len(v)):
            if len(told[i]) < DEPTH:
                band = BANDS[i % FEATURES]
                steps = round(levels[i // FEATURES * NUM_BANDS + band] / LEVEL_STEP) - gain_shape._TILT * band
                steps += moved[i] + deviations[number_of(told[i], cardinality)]
                if best is None or steps > best[0]:
                    best = steps, i
        i, depth = best[1], len(told[best[1]])
        cell, _ = magnitude_cell(v[i] * np.exp(-moved[i] * LEVEL_STEP), cardinality ** (depth + 1) // 2)
        if depth:
            code = cell % cardinality
        else:
            code = cardinality // 2 + (cell if v[i] >= 0 else -1 - cell)
        before = loudness[number_of(told[i], cardinality)]
        told[i].append(code)
        codes.append(code)
        after = loudness[number_of(told[i], cardinality)]
        for j in range(len(v)):
            frames, features = abs(i // FEATURES - j // FEATURES), abs(i % FEATURES - j % FEATURES)
            part = {(1, 0): 1.0, (2, 0): 0.5, (0, 1): 0.5, (1, 1): 0.5}.get((frames, features))
            if part and not told[j]:
                moved[j] += round(part * share * after) - round(part * share * before)
    numbers = [number_of(t, cardinality) for t in told]
    return codes, np.exp(np.array(moved) * LEVEL_STEP) * [means[numbers], np.exp(deviations[numbers] * LEVEL_STEP)]


def test_levels_are_the_rms_of_each_band_and_frame():
    """In nepers, frame after frame of a latent; silence is at the floor."""
    x = np.random.default_rng(0).normal(size=(2, 4, FEATURES)).astype(np.float32)
    x[1, 3] = 0.0
    levels = GainShape(BANDS, FRAMES, 4, 4).levels(jnp.asarray(x)).reshape(2, 4, NUM_BANDS)
    for band in range(NUM_BANDS):
        inside = x[..., np.array(BANDS) == band]
        expected = np.log(np.sqrt((inside**2).mean(-1) + gain_shape.LEVEL_FLOOR**2))
        np.testing.assert_allclose(levels[..., band], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cardinality", CARDINALITIES)
def test_cells_are_nested_intervals_of_the_companding_law(cardinality):
    """Mean and deviation are those of Student's law between the bounds, by quadrature; negative cells mirror."""
    means, deviations = cell_tables(cardinality)
    law = stats.t(4, scale=0.93)
    rng = np.random.default_rng(0)
    assert len(means) == len(deviations) == sum(cardinality**depth for depth in range(DEPTH + 1))
    assert (means[0], deviations[0]) == (0, 0)
    for v in (*rng.standard_t(3, 8), 60.0, -60.0, 1e-3):
        number = 0
        for depth in range(1, DEPTH + 1):
            count = cardinality**depth // 2
            cell, (low, high) = magnitude_cell(v, count)
            below = cardinality ** (depth - 1)
            first = cardinality // 2 + (cell // below if v > 0 else -1 - cell // below)
            number = sum(cardinality**d for d in range(depth)) + first * below + cell % below
            high = min(high, 1e4)
            nodes = np.geomspace(max(low, 1e-4), high, 20001)
            moments = [integrate.simpson(law.pdf(nodes) * nodes**power, x=nodes) for power in range(3)]
            mean = moments[1] / moments[0]
            deviation = np.sqrt(moments[2] / moments[0] - mean**2)
            assert means[number] == pytest.approx(np.sign(v) * mean, rel=0.02, abs=2e-4)
            assert deviations[number] * LEVEL_STEP == pytest.approx(np.log(deviation), abs=0.1)


@pytest.mark.parametrize("cardinality", CARDINALITIES)
@pytest.mark.parametrize(("ties", "share"), [(False, 0.0), (True, 0.0), (False, 0.4), (True, 0.25)])
def test_each_code_goes_to_the_coefficient_of_which_most_is_open(cardinality, ties, share):
    """By plain search; equals in the order of their places. To the last code that there is."""
    levels = draw_levels(ties=ties)
    code = GainShape(BANDS, FRAMES, DEPTH * FRAMES * FEATURES, cardinality, share)
    x = draw_tokens(levels, code)
    codes = np.asarray(code.encode(x, levels).codes)
    v = np.asarray(x / code.gain(code.of_frames(levels))).reshape(2, 5, -1)
    for kept in (FEATURES, code.num_codes):
        said = np.stack(
            [np.asarray(a).reshape(2, 5, -1) for a in code.known(code.decode(jnp.asarray(codes), levels), kept)]
        )
        for index in ((0, 0), (1, 3)):
            expected, what = slow_codes(v[index], np.asarray(levels[index]), cardinality, kept, share)
            assert codes[index][:kept].tolist() == expected
            np.testing.assert_allclose(said[:, *index], what, rtol=1e-4)


@pytest.mark.parametrize("cardinality", CARDINALITIES)
def test_what_comes_back_is_off_by_the_deviation_that_is_named(cardinality):
    """Over many coefficients of the law: of each number of codes, none among them."""
    code = GainShape(tuple(np.repeat(range(4), 64).tolist()), 1, 300, cardinality)
    levels = jnp.asarray(np.tile(np.array([2.0, -1.0, 0.5, 2.0]), (1, 400, 1)), jnp.float32)
    x = draw_tokens(levels, code)
    said = code.encode(x, levels)
    codes = said.codes
    assert codes.shape == (1, 400, 300) and codes.min() >= 0 and codes.max() < cardinality
    known, deviation = (np.asarray(a) for a in code.known(said))
    w = (np.asarray(x / code.gain(code.of_frames(levels))) - known) / deviation
    level = lambda w: np.sqrt(np.mean(np.clip(w, -10, 10) ** 2))
    assert level(w[known != 0]) == pytest.approx(1.0, abs=0.1)
    assert level(w[known == 0]) == pytest.approx(0.93 * np.sqrt(2), abs=0.1)  # the law's; levels are to give 1
    assert np.mean(w[known != 0]) == pytest.approx(0.0, abs=0.05)
    # The bits are where they pay: what is left over is far below what as many coefficients told once would leave.
    gain = np.asarray(code.gain(code.of_frames(levels)))
    assert np.sum((gain * deviation * w) ** 2) < {2: 0.3, 4: 0.1, 16: 0.01}[cardinality] * np.sum(np.asarray(x) ** 2)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_kept_codes_are_the_first_ones(share):
    code, levels = GainShape(BANDS, FRAMES, 12, 4, share), draw_levels()
    said = code.encode(draw_tokens(levels, code), levels)
    few = [code.known(code.decode(said.codes[..., :kept], levels)) for kept in (0, 5)]
    for kept, expected in zip((0, 5), few, strict=True):
        for one, other in zip(code.known(said, kept), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    by_clip = code.known(said, jnp.array([0, 5]))
    for i, expected in enumerate(few):
        for one, other in zip(by_clip, expected, strict=True):
            np.testing.assert_array_equal(one[i], other[i])
    assert not np.any(few[0][0]) and np.all(few[0][1] == 1)
    assert 0 < np.sum(few[1][0] != 0) <= 5 * 10


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_codes_are_the_same_in_every_program(share):
    """One by one, in a batch, compiled or not: steps are whole numbers, so nothing depends on their rounding."""
    code, levels = GainShape(BANDS, FRAMES, 20, 4, share), draw_levels(ties=True)
    x = draw_tokens(levels, code)
    said = code.encode(x, levels)
    whole, (known, _) = np.asarray(said.codes), code.known(said)
    np.testing.assert_array_equal(jax.jit(code.encode)(x, levels).codes, whole)
    for row, latent in np.ndindex(2, 5):
        frames = slice(latent * FRAMES, (latent + 1) * FRAMES)
        one = levels[row, latent][None, None]
        np.testing.assert_array_equal(code.encode(x[row : row + 1, frames], one).codes[0, 0], whole[row, latent])
        alone, _ = code.known(code.decode(jnp.asarray(whole[row, latent][None, None]), one))
        np.testing.assert_array_equal(alone[0], known[row, frames])


def test_neighbours_find_what_sounds_in_bursts():
    """Coefficients loud in company, at random places: as many codes leave less of them."""
    rng = np.random.default_rng(0)
    loud = np.exp(2 * rng.normal(size=(1, 200, 1, 16)) * (rng.random((1, 200, 1, 16)) < 0.3))
    x = jnp.asarray(loud * rng.normal(size=(1, 200, 4, 16)), jnp.float32).reshape(1, 800, 16)
    left = []
    for share in (0.0, 0.25):
        code = GainShape((0,) * 16, 4, 32, 4, share)
        levels = jnp.round(code.levels(x) / LEVEL_STEP) * LEVEL_STEP
        known, deviation = code.known(code.encode(x, levels))
        shape = np.asarray(x / code.gain(code.of_frames(levels)))
        left.append(np.mean((shape - known) ** 2))
        assert np.sqrt(np.mean(np.clip((shape - known) / deviation, -10, 10) ** 2)) == pytest.approx(1.0, abs=0.3)
    assert left[1] < 0.9 * left[0], left
