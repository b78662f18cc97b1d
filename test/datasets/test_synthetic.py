"""The built-in music is reproducible, finite, within its levels, varied and free of aliases."""

import concurrent.futures

import numpy as np
import pytest

from meanflow_audio_codec.datasets import synthetic
from meanflow_audio_codec.datasets.synthetic import SyntheticMusic


def level_db(audio):
    return 10 * np.log10(np.mean(np.square(audio)) + 1e-20)


def test_clip_is_a_function_of_seed_and_index():
    music, again = SyntheticMusic(24000, 5000, seed=3), SyntheticMusic(24000, 5000, seed=3)
    later = again[7]
    for i in range(5):
        np.testing.assert_array_equal(music[i], again[i])
    np.testing.assert_array_equal(music[7], later)
    assert not np.array_equal(music[0], music[1])
    assert not np.array_equal(music[0], SyntheticMusic(24000, 5000, seed=4)[0])


def test_threads_draw_the_same_clips():
    music = SyntheticMusic(16000, 4000, seed=1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(music.__getitem__, range(40)))
    for i, clip in enumerate(threaded):
        np.testing.assert_array_equal(clip, music[i])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("samples", [1, 7, 3000])
@pytest.mark.parametrize("sample_rate", [8000, 24000, 44100, 96000])
def test_any_rate_length_and_channel_count(sample_rate, samples, channels):
    music = SyntheticMusic(sample_rate, samples, channels)
    for i in (0, 1, 2, 2**31 - 2):
        clip = music[i]
        assert clip.shape == (samples, channels) and clip.dtype == np.float32
        assert np.isfinite(clip).all() and np.abs(clip).max() <= 0.951


def test_levels_spread_over_their_range_and_no_clip_is_silent():
    music = SyntheticMusic(24000, 32640, 1)
    levels = np.array([level_db(music[i]) for i in range(150)])
    assert levels.min() > -45.0 and levels.max() < -5.99
    assert np.ptp(levels) > 15.0
    assert np.mean(levels < -30.01) < 0.02


def test_timbres_differ_from_clip_to_clip():
    """Spectral centroid and flatness spread over wide ranges: tones, drums and noise all occur."""
    music = SyntheticMusic(24000, 32768)
    frequencies = np.fft.rfftfreq(32768, 1 / 24000)
    centroids, flatness = [], []
    for i in range(80):
        power = np.abs(np.fft.rfft(music[i][:, 0])) ** 2 + 1e-12
        centroids.append((frequencies * power).sum() / power.sum())
        flatness.append(np.exp(np.log(power).mean()) / power.mean())
    low, high = np.percentile(centroids, [10, 90])
    assert high / low > 3.0
    assert np.percentile(flatness, 90) / np.percentile(flatness, 10) > 10.0


def test_stereo_parts_have_different_places():
    music = SyntheticMusic(24000, 24000, 2)
    balances = []
    for i in range(30):
        left, right = music[i].T
        assert not np.array_equal(left, right)
        balances.append(level_db(left) - level_db(right))
    assert np.ptp(balances) > 3.0


@pytest.mark.parametrize("frequency", [55.0, 440.0, 1760.0, 3520.0])
@pytest.mark.parametrize("timbre", ["steel", "reed", "brass"])
def test_tones_have_energy_at_their_harmonics_only(frequency, timbre):
    """What folded at the Nyquist frequency would lie between the harmonics."""
    rate = 24000
    music = SyntheticMusic(rate, rate)
    tone = music._wave(timbre, "bright", frequency).take(music._phase(frequency, 0, rate))
    # One second and a frequency in whole Hz: every harmonic falls on a bin.
    power = np.abs(np.fft.rfft(tone.astype(np.float64))) ** 2
    harmonic = np.zeros(len(power), bool)
    for shift in (-1, 0, 1):  # inc is rounded to 2**-32 of the rate
        harmonic[np.arange(int(frequency), rate // 2, int(frequency)) + shift] = True
    assert power[~harmonic].sum() < 1e-4 * power.sum()  # the table's nearest entry: about -60 dB


def test_notes_are_in_tune():
    """A4 by any wavetable: the strongest harmonic series starts at 440 Hz."""
    music = SyntheticMusic(24000, 24000)
    for method, timbre in synthetic._PLUCKED + synthetic._BOWED + (("strike", "marimba"),):
        bus = np.zeros(24000, np.float32)
        music._note(bus, (method, timbre), 0, 24000.0, 440.0, 0.5)
        spectrum = np.abs(np.fft.rfft(bus * np.hanning(len(bus))))
        peak = int(spectrum[100:].argmax()) + 100
        assert min(abs(peak - k * 440) for k in range(1, 12)) <= 6, (timbre, peak)
