"""The measures of stationary tones against modulations and noises whose numbers are known by hand; 10 s."""

import numpy as np
import pytest
from scipy.special import jv

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import common, tones
from meanflow_audio_codec.preprocessing.mdct import imdct, mdct

RATE, SAMPLES = 24000, 48000
TIME = np.arange(SAMPLES) / RATE
STATE = None


def sine(frequency, phase=0.3):
    return 0.1 * np.sqrt(2) * np.sin(2 * np.pi * frequency * TIME + phase)


def noise(density_per_hz, seed=0):
    """White noise of so much power a Hz."""
    return np.sqrt(density_per_hz * RATE / 2) * np.random.default_rng(seed).standard_normal(SAMPLES)


def random_signs(audio, share, seed=0):
    """Negate each MDCT coefficient with a chance of half the share; a larger share flips the same ones and more."""
    coeffs = np.asarray(mdct(audio.astype(np.float32), 128))
    rng = np.random.default_rng(seed)
    flips = (rng.random(coeffs.shape) < share) & (rng.random(coeffs.shape) < 0.5)
    return np.asarray(imdct(np.where(flips, -coeffs, coeffs), 128, length=audio.shape[-1]))


@pytest.mark.parametrize(
    ("frequency", "rate_hz"), [(150.0, 30.0), (440.0, 20.0), (1000.0, 70.0), (4000.0, 187.5), (9600.0, 290.0)]
)
@pytest.mark.parametrize("index", [0.01, 0.1, 1.0])
def test_amplitude_modulation_reads_its_index(frequency, rate_hz, index):
    audio = (1 + index * np.sin(2 * np.pi * rate_hz * TIME)) * sine(frequency)
    assert tones.modulation_depth(audio, frequency, RATE) == pytest.approx(index, rel=0.01)
    # Two sidebands of index / 2 each, beside a tone of 1.
    assert tones.sideband_db(audio, frequency, RATE) == pytest.approx(10 * np.log10(index**2 / 2), abs=0.05)
    assert tones.level_db(sine(frequency), audio, frequency, RATE) == pytest.approx(0, abs=0.01)


def test_modulation_beyond_the_critical_band_is_none_of_its_envelope():
    """At 1 kHz the band ends 81 Hz away; the sidebands count to 300 Hz."""
    for rate_hz, depth, sidebands in ((65.0, 0.2, -17), (97.0, 0.0, -17), (310.0, 0.0, -100)):
        audio = (1 + 0.2 * np.sin(2 * np.pi * rate_hz * TIME)) * sine(1000.0)
        assert tones.modulation_depth(audio, 1000.0, RATE) == pytest.approx(depth, abs=0.002)
        assert tones.sideband_db(audio, 1000.0, RATE) == pytest.approx(sidebands, abs=0.05)


def test_slow_modulation_is_no_sideband():
    audio = (1 + 0.2 * np.sin(2 * np.pi * 5 * TIME)) * sine(1000.0)
    assert tones.modulation_depth(audio, 1000.0, RATE) == pytest.approx(0.2, rel=0.02)  # 7 periods, not whole ones
    assert tones.sideband_db(audio, 1000.0, RATE) < -90


@pytest.mark.parametrize("index", [0.1, 0.5])
def test_frequency_modulation_has_sidebands_and_a_steady_envelope(index):
    """The lines of FM are Bessel functions of its index, 40 Hz apart."""
    audio = 0.1 * np.sqrt(2) * np.sin(2 * np.pi * 4000 * TIME + index * np.sin(2 * np.pi * 40 * TIME))
    expected = 10 * np.log10(2 * np.sum(jv(np.arange(1, 8), index) ** 2) / jv(0, index) ** 2)
    assert tones.sideband_db(audio, 4000.0, RATE) == pytest.approx(expected, abs=0.05)
    assert tones.modulation_depth(audio, 4000.0, RATE) < 1e-3
    assert tones.level_db(sine(4000.0), audio, 4000.0, RATE) == pytest.approx(20 * np.log10(jv(0, index)), abs=0.01)


@pytest.mark.parametrize("frequency", [700.0, 2500.0])
def test_noise_of_known_level(frequency):
    """Weak noise moves the envelope by its part in phase with the tone: depth = (noise in the band / tone)^(1/2)."""
    density, tone = 1e-8, 0.01
    depth = np.sqrt(density * tones.critical_bandwidth(frequency) / tone)
    found = [sine(frequency) + noise(density, seed) for seed in range(20)]
    depths = [tones.modulation_depth(audio, frequency, RATE) for audio in found]
    sidebands = [tones.sideband_db(audio, frequency, RATE) for audio in found]
    assert np.sqrt(np.mean(np.square(depths))) == pytest.approx(depth, rel=0.05)  # 20 x 1.5 s x 100 Hz: 2 %
    assert np.mean(sidebands) == pytest.approx(10 * np.log10(570 * density / tone), abs=0.2)


def test_noise_alone_reads_as_rayleigh():
    depths = [tones.modulation_depth(noise(1e-6, seed), 3000.0, RATE) for seed in range(10)]
    assert np.mean(depths) == pytest.approx(np.sqrt(2 * (4 / np.pi - 1)), rel=0.05)


@pytest.mark.parametrize("gain", [0.1, 0.5, 2.0])
def test_gain_is_a_level_and_no_modulation(gain):
    audio = gain * sine(1234.5)
    assert tones.level_db(sine(1234.5), audio, 1234.5, RATE) == pytest.approx(20 * np.log10(gain), abs=1e-6)
    assert tones.modulation_depth(audio, 1234.5, RATE) < 1e-4
    assert tones.sideband_db(audio, 1234.5, RATE) < -90


def test_silence_is_finite():
    silence = np.zeros(SAMPLES, np.float32)
    assert tones.modulation_depth(silence, 500.0, RATE) == 0
    assert tones.sideband_db(silence, 500.0, RATE) == 0
    assert tones.level_db(sine(500.0), silence, 500.0, RATE) == -100


@pytest.mark.parametrize(("rate", "samples"), [(24000, 18000), (24000, 24000), (44100, 44100), (8000, 16000)])
def test_perfect_tones_read_nothing(rate, samples):
    """As the docstring says: below (0.0001, -90)."""
    audio, partials = tones.stationary_tones(8, samples, rate)
    for tone, frequencies in zip(audio, partials, strict=True):
        spacing = frequencies[0] if len(frequencies) > 1 else np.inf
        for frequency in frequencies:
            assert tones.modulation_depth(tone, frequency, rate, spacing) < 1e-4
            assert tones.sideband_db(tone, frequency, rate, spacing) < -90


def test_random_signs_are_rough_and_the_more_the_rougher():
    audio, partials = tones.stationary_tones(8, SAMPLES, RATE)
    shares = (0.0, 0.02, 0.1, 0.3, 1.0)
    pairs = list(zip(audio, partials, strict=True))
    for tone, (frequency, *higher) in pairs:
        spacing = frequency if higher else np.inf
        spoilt = [random_signs(tone, share) for share in shares]
        sidebands = [tones.sideband_db(s, frequency, RATE, spacing) for s in spoilt]
        assert sidebands[0] < -90 and sidebands[-1] > 0  # as much noise as tone
        assert all(a < b for a, b in zip(sidebands, sidebands[1:], strict=False))
    # The envelope of one tone saturates; that of all grows.
    depths = [
        np.mean([tones.modulation_depth(random_signs(a, share), p[0], RATE) for a, p in pairs]) for share in shares
    ]
    assert depths[0] < 1e-3 and depths[-1] > 0.35
    assert all(a < b for a, b in zip(depths, depths[1:], strict=False))


def test_stationary_tones_are_what_they_say():
    audio, partials = tones.stationary_tones(12, SAMPLES, RATE)
    assert audio.dtype == np.float32 and audio.shape == (12, SAMPLES)
    np.testing.assert_allclose(np.sqrt(np.mean(audio.astype(np.float64) ** 2, axis=1)), 0.1, rtol=2e-3)
    assert np.abs(audio).max() < 1
    assert [len(p) for p in partials] == [1] * 9 + [8] * 3
    edges = 150 * (0.4 * RATE / 150) ** (np.arange(10) / 9)
    assert all(low <= f < high for low, f, high in zip(edges, np.concatenate(partials[:9]), edges[1:], strict=False))
    spectra = np.abs(np.fft.rfft(audio * np.hanning(SAMPLES)))
    for spectrum, frequencies in zip(spectra, partials, strict=True):
        loudest = spectrum.argmax() * RATE / SAMPLES
        assert loudest == pytest.approx(frequencies[0], abs=RATE / SAMPLES)
    np.testing.assert_array_equal(tones.stationary_tones(12, SAMPLES, RATE)[0], audio)


def test_partials_stay_below_the_highest_frequency():
    _, partials = tones.stationary_tones(8, 6000, 8000)
    assert all(p.max() < 3200 for p in partials)
    assert [len(p) for p in partials[6:]] == [8, int(3200 / partials[7][0])]


# --- the evaluator


def evaluator(decode, num_tones=5, nfe=(1,), channels=1, samples=SAMPLES, batch_size=2):
    calls = []

    def reconstruct(state, batch, seeds, nfe):
        calls.append((seeds.tolist(), batch["audio"].shape, nfe))
        return decode(batch["audio"], nfe), np.zeros(len(seeds), np.float32)

    def examples(num, seconds):
        return {"audio": np.zeros((num, samples, channels), np.float32)}, ["clip"] * num

    fields = dict.fromkeys(common.Context._fields)
    fields |= dict(predict_fns={"reconstruct": reconstruct}, examples=examples, sample_rate=RATE, batch_size=batch_size)
    return tones.Evaluator(common.Context(**fields), num_tones, samples / RATE, nfe), calls


def test_evaluator_of_a_perfect_codec():
    measure, calls = evaluator(lambda audio, nfe: audio, nfe=(1, 4), channels=2)
    scores = dict(measure.run(STATE))
    names = ("modulation_depth", "sideband_db", "level_error_db")
    assert set(scores) == {f"tones/{name}_nfe{nfe}" for name in names for nfe in (1, 4)}
    assert all(type(value) is float for value in scores.values())
    assert scores["tones/modulation_depth_nfe4"] < 1e-4
    assert scores["tones/sideband_db_nfe4"] < -90
    assert scores["tones/level_error_db_nfe4"] == 0
    assert [shape for _, shape, _ in calls[:3]] == [(2, SAMPLES, 2), (2, SAMPLES, 2), (1, SAMPLES, 2)]
    assert [seeds for seeds, _, _ in calls[:3]] == [[0, 1], [2, 3], [4]]
    assert [nfe for _, _, nfe in calls] == [1, 1, 1, 4, 4, 4]
    assert dict(measure.run(STATE)) == scores


def test_evaluator_tells_what_the_decoder_did_at_each_nfe():
    """One evaluation modulates by 0.2 at 30 Hz and loses 6 dB in every second channel; two are silent."""
    wave = (1 + 0.2 * np.sin(2 * np.pi * 30 * TIME))[:, None] * np.array([1, 0.5])
    measure, _ = evaluator(lambda audio, nfe: audio * wave if nfe == 1 else 0 * audio, nfe=(1, 2), channels=2)
    scores = dict(measure.run(STATE))
    assert scores["tones/modulation_depth_nfe1"] == pytest.approx(0.2, rel=0.02)
    assert scores["tones/sideband_db_nfe1"] == pytest.approx(10 * np.log10(0.02), abs=0.05)
    assert scores["tones/level_error_db_nfe1"] == pytest.approx(20 * np.log10(2) / 2, abs=0.01)
    assert scores["tones/modulation_depth_nfe2"] == scores["tones/sideband_db_nfe2"] == 0
    assert scores["tones/level_error_db_nfe2"] == 100


def test_evaluator_refuses_what_it_cannot_measure():
    with pytest.raises(InputError, match="0.50 s are too short .* set seconds to 0.75"):
        evaluator(None, samples=12000)
    with pytest.raises(InputError, match="num_tones=0"):
        evaluator(None, num_tones=0)
    fields = dict.fromkeys(common.Context._fields) | {"examples": lambda num, seconds: ({"image": np.zeros(1)}, [""])}
    with pytest.raises(InputError, match="images hold no tones"):
        tones.Evaluator(common.Context(**fields), 4, 1.0, (1,))
