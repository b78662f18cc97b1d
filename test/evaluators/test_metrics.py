"""The metrics against slow loops that follow their definitions, closed forms and silence."""

import inspect

import numpy as np
import pytest
from scipy.signal import get_window, resample_poly

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import metrics

SAMPLE_RATE = 24000
DISTANCES = ("mel_distance", "stft_distance", "mrstft_distance", "lsd_db")


def noise(*shape, seed=0, level=0.1):
    return level * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def slow_magnitudes(audio, fft_length, hop_length, window_length):
    """The textbook STFT in float64: window amid an FFT-long frame, DFT by matrix."""
    s, half, margin = len(audio), fft_length // 2, (fft_length - window_length) // 2
    window = np.zeros(fft_length)
    window[margin : margin + window_length] = get_window("hann", window_length)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(fft_length), np.arange(half + 1)) / fft_length)
    frames = []
    for start in range(-half, s - half + 1, hop_length):
        frame = []
        for i in range(start, start + fft_length):
            while not 0 <= i < s:  # reflect about the first and the last sample
                i = -i if i < 0 else 2 * (s - 1) - i
            frame.append(float(audio[i]))
        frames.append(np.abs((np.array(frame) * window) @ dft))
    return np.array(frames)


def slow_mel_filterbank(sample_rate, window_length, num_mels):
    """Slaney's triangles, one weight at a time."""
    top = metrics.hz_to_mel(sample_rate / 2)
    edges = [float(metrics.mel_to_hz(top * i / (num_mels + 1))) for i in range(num_mels + 2)]
    weights = np.zeros((window_length // 2 + 1, num_mels))
    for f in range(window_length // 2 + 1):
        hz = f * sample_rate / window_length
        for m in range(num_mels):
            low, centre, high = edges[m : m + 3]
            if low < hz <= centre:
                weights[f, m] = (hz - low) / (centre - low) * 2 / (high - low)
            elif centre < hz < high:
                weights[f, m] = (high - hz) / (high - centre) * 2 / (high - low)
    return weights


@pytest.fixture(scope="module")
def pair():
    reference = noise(3000)
    return reference, reference + noise(3000, seed=1, level=0.03)


def test_mel_scale_has_slaneys_fixed_points():
    assert metrics.hz_to_mel(1000.0) == 15
    assert metrics.hz_to_mel(6400.0) == pytest.approx(42, abs=1e-12)
    assert metrics.hz_to_mel(60.0) == pytest.approx(0.9, abs=1e-12)  # librosa's documented example
    hz = np.array([0, 110.0, 999.0, 1000.0, 4400.0, 22050.0])
    np.testing.assert_allclose(metrics.mel_to_hz(metrics.hz_to_mel(hz)), hz, rtol=1e-12)


@pytest.mark.parametrize(("window_length", "num_mels"), [(32, 5), (512, 80)])
def test_mel_filterbank_equals_the_loop(window_length, num_mels):
    fast = metrics.mel_filterbank(SAMPLE_RATE, window_length, num_mels)
    slow = slow_mel_filterbank(SAMPLE_RATE, window_length, num_mels)
    np.testing.assert_allclose(fast, slow, rtol=1e-6, atol=1e-9)


def test_mel_triangles_have_unit_area():
    # Sampled 60 times more finely than in use, so that a sum stands for the integral over Hz.
    bins = metrics.mel_filterbank(SAMPLE_RATE, 32 * 2048, 40)
    np.testing.assert_allclose(bins.sum(0) * SAMPLE_RATE / (32 * 2048), 1, rtol=1e-3)


def test_tables_are_shared_and_read_only():
    assert metrics.hann(512) is metrics.hann(512)
    with pytest.raises(ValueError, match="read-only"):
        metrics.hann(512)[0] = 1


@pytest.mark.parametrize(("fft_length", "hop_length", "window_length"), [(512, 50, 240), (64, 16, 64)])
def test_stft_equals_the_loop(pair, fft_length, hop_length, window_length):
    fast = np.abs(metrics.stft(pair[0], window_length, hop_length, fft_length))
    slow = slow_magnitudes(pair[0], fft_length, hop_length, window_length)
    np.testing.assert_allclose(fast, slow, atol=1e-5)  # float32 against magnitudes near 1


def test_distances_equal_their_definitions(pair):
    reference, decoded = pair
    both = lambda *sizes: (slow_magnitudes(a, *sizes) for a in (reference, decoded))
    mean_abs = lambda a: np.abs(a).mean()
    log = lambda a: np.log10(np.maximum(a, 1e-5))

    mel = 0.0
    for w, m in zip((32, 64, 128, 256, 512, 1024, 2048), (5, 10, 20, 40, 80, 160, 320), strict=True):
        filterbank = slow_mel_filterbank(SAMPLE_RATE, w, m)
        x, y = (a @ filterbank for a in both(w, w // 4, w))
        mel += mean_abs(log(x) - log(y))

    stft = 0.0
    for w in (2048, 512):
        x, y = both(w, w // 4, w)
        stft += mean_abs(2 * log(x) - 2 * log(y)) + mean_abs(x - y)

    mrstft = 0.0
    for sizes in ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200)):
        x, y = (np.maximum(a, 1e-4) for a in both(*sizes))
        mrstft += np.linalg.norm(x - y) / np.linalg.norm(x) + mean_abs(np.log(x) - np.log(y))

    x, y = (20 * np.log10(np.maximum(a / 512, 1e-5)) for a in both(2048, 512, 2048))
    lsd = np.sqrt(((x - y) ** 2).mean(1)).mean()

    found = metrics.audio_metrics(reference, decoded, SAMPLE_RATE)
    expected = {
        "mel_distance": mel,
        "stft_distance": stft,
        "mrstft_distance": mrstft / 3,
        "lsd_db": lsd,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name  # float32 FFT


def test_mel16_is_the_mel_distance_at_16_khz(pair):
    assert metrics.mel16_distance(*pair, 16000) == metrics.mel_distance(*pair, 16000)
    reference, decoded = noise(48000), noise(48000) + noise(48000, seed=1, level=0.03)
    at_16_khz = [resample_poly(a, 1, 3, window=("kaiser", 12)).astype(np.float32) for a in (reference, decoded)]
    expected = metrics.mel_distance(*at_16_khz, 16000)
    assert metrics.mel16_distance(reference, decoded, 48000) == pytest.approx(expected, rel=0.02)  # filters differ


def test_mel16_does_not_see_the_treble():
    reference = noise(48000)
    decoded = reference + 0.1 * np.sin(2 * np.pi * 12000 * np.arange(48000) / 48000).astype(np.float32)
    assert metrics.mel_distance(reference, decoded, 48000) > 0.1
    # What is left are the ends, where the tone begins at once.
    assert metrics.mel16_distance(reference, decoded, 48000) < 0.01
    with pytest.raises(InputError, match="needs 16000 Hz or more"):
        metrics.mel16_distance(reference, decoded, 8000)


def test_full_scale_sine_reads_0_dbfs():
    sine = np.sin(2 * np.pi * 64 * np.arange(8192) / 2048)  # exactly on bin 64
    levels = metrics.spectrogram_dbfs(sine, 2048, 512)[4]
    assert levels.argmax() == 64
    assert levels[64] == pytest.approx(0, abs=1e-4)
    assert levels.min() == -100


def test_identity_is_perfect():
    reference = noise(2, 5000)
    found = metrics.audio_metrics(reference, reference.copy(), SAMPLE_RATE)
    assert all((found[name] == 0).all() for name in DISTANCES)
    np.testing.assert_allclose(found["si_sdr_db"], 100)


def test_si_sdr_of_orthogonal_noise_is_its_level():
    n = np.arange(4800)
    reference, orthogonal = np.sin(2 * np.pi * 10 * n / 4800), np.sin(2 * np.pi * 37 * n / 4800)
    for level_db in (-40.0, 0.0, 17.5):
        decoded = reference + 10 ** (-level_db / 20) * orthogonal
        assert metrics.si_sdr_db(reference, decoded) == pytest.approx(level_db, abs=1e-9)


def test_si_sdr_ignores_gain_offset_and_polarity(pair):
    reference, decoded = (a.astype(np.float64) for a in pair)
    expected = metrics.si_sdr_db(reference, decoded)
    for gain in (-1.0, 1e-3, 30.0):
        changed = metrics.si_sdr_db(reference, gain * decoded + 0.25)
        assert changed == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gain_db", [-6.0, -1.0, 3.0])
def test_gain_costs_its_db_in_lsd(gain_db):
    reference = noise(20000)
    assert metrics.lsd_db(reference, reference * 10 ** (gain_db / 20)) == pytest.approx(abs(gain_db), abs=1e-3)


def test_more_noise_is_worse():
    reference, error = noise(6000), noise(6000, seed=1)
    levels = [metrics.audio_metrics(reference, reference + g * error, 24000) for g in (0.01, 0.1, 1)]
    for name in DISTANCES:
        assert levels[0][name] < levels[1][name] < levels[2][name], name
    assert levels[0]["si_sdr_db"] > levels[1]["si_sdr_db"] > levels[2]["si_sdr_db"]


def test_silence_is_finite():
    sound, silence = noise(4000), np.zeros(4000, np.float32)
    constant = np.full(4000, 0.3, np.float32)  # silent once its mean is removed
    for reference, decoded in [(silence, sound), (sound, silence), (silence, silence)]:
        found = metrics.audio_metrics(reference, decoded, SAMPLE_RATE)
        assert all(np.isfinite(value) for value in found.values()), found
    assert metrics.si_sdr_db(silence, sound) == metrics.si_sdr_db(constant, sound) == -100
    assert metrics.si_sdr_db(sound, silence) == -100
    assert metrics.si_sdr_db(silence, constant) == 100


def test_batch_equals_single():
    reference, decoded = noise(2, 3, 2500), noise(2, 3, 2500, seed=1)
    batch = metrics.audio_metrics(reference, decoded, SAMPLE_RATE)
    for name, values in batch.items():
        assert values.shape == (2, 3) and values.dtype == np.float64
        single = metrics.audio_metrics(reference[1, 2], decoded[1, 2], SAMPLE_RATE)[name]
        assert isinstance(single, np.ndarray) and single.shape == ()
        assert values[1, 2] == single


@pytest.mark.parametrize("samples", [1, 2, 31, 700])
def test_clips_shorter_than_a_window_work(samples):
    found = metrics.audio_metrics(noise(samples), noise(samples, seed=1), SAMPLE_RATE)
    assert all(np.isfinite(value) for value in found.values())


def test_short_clips_are_reflected_repeatedly():
    fast = np.abs(metrics.stft(noise(50), 256, 64))
    np.testing.assert_allclose(fast, slow_magnitudes(noise(50), 256, 64, 256), atol=1e-5)


def test_bad_input_names_the_remedy():
    unchecked = inspect.unwrap(metrics.si_sdr_db)  # where annotations are checked they refuse first
    with pytest.raises(InputError, match="crop the longer"):
        unchecked(noise(2, 100), noise(2, 101))
    with pytest.raises(InputError, match="shape"):
        unchecked(noise(0), noise(0))
    with pytest.raises(InputError, match="decoded holds int16: convert it to float"):
        unchecked(noise(100), np.zeros(100, np.int16))
