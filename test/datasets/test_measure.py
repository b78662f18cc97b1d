"""The bandwidth against filters and encoders whose edge is known; levels against numpy on the same samples."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr

from meanflow_audio_codec.datasets.measure import bandwidth, measure_file
from meanflow_audio_codec.errors import InputError

RATE = 44100
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "audio"


def white(seconds, seed=0):
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE))


def pink(seconds):
    spectrum = np.fft.rfft(white(seconds))
    return np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)))


def low_pass(audio, edge, rate=RATE):
    return scipy.signal.fftconvolve(audio, scipy.signal.firwin(1001, edge, fs=rate, window=("kaiser", 10)), "same")


def at_level(audio, level_db):
    return audio * 10 ** (level_db / 20) / np.sqrt(np.mean(audio**2))


def write(path, audio, rate=RATE, subtype="PCM_16", **settings):
    soundfile.write(path, audio, rate, subtype=subtype, **settings)
    return path


@pytest.mark.parametrize("edge", [4000, 8000, 11000, 16000, 19000])
@pytest.mark.parametrize("noise", [white, pink])
@pytest.mark.parametrize("level_db", [-15, -30, -50])
def test_low_passed_noise_at_any_level_ends_at_the_filter(tmp_path, edge, noise, level_db):
    path = write(tmp_path / "a.wav", at_level(low_pass(noise(4), edge), level_db))
    assert abs(bandwidth(path) - edge) < 150


@pytest.mark.parametrize("noise", [white, pink])
def test_full_band_reaches_half_the_rate(tmp_path, noise):
    assert bandwidth(write(tmp_path / "a.flac", at_level(noise(3), -20))) > 21500


@pytest.mark.parametrize("kbps, edge", [(128, 16500), (320, 20000)])  # LAME's low-pass filters for these
def test_mp3_ends_at_the_encoders_filter(tmp_path, kbps, edge):
    noise = at_level(np.stack([pink(4), pink(4)], axis=1), -20)
    quality = (320 - kbps) / (320 - 32)
    path = tmp_path / "a.mp3"
    write(path, noise, subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=quality)
    assert abs(path.stat().st_size * 8 / 4 / 1000 - kbps) < 20
    assert abs(bandwidth(path) - edge) < 700


def test_upsampled_audio_keeps_its_old_bandwidth(tmp_path):
    path = write(tmp_path / "a.ogg", soxr.resample(at_level(pink(4), -20), 16000, 48000), 48000, "VORBIS")
    assert 7300 < bandwidth(path) < 8200


@pytest.mark.parametrize("level_db", [-3, -60])
def test_tone_ends_at_its_frequency(tmp_path, level_db):
    tone = at_level(np.sin(2 * np.pi * 1000 * np.arange(3 * RATE) / RATE), level_db)
    assert abs(bandwidth(write(tmp_path / "a.wav", tone)) - 1000) < 100


def test_silence_dither_and_offset_have_no_bandwidth(tmp_path):
    dither = (np.random.default_rng(0).uniform(-1, 1, (2, 2 * RATE)).sum(axis=0)) / 2**16
    for audio in (np.zeros(2 * RATE), dither, np.full(2 * RATE, 0.1), np.zeros(5)):
        assert bandwidth(write(tmp_path / "a.wav", audio)) == 0.0


@pytest.mark.parametrize("place", [0.5, 1 / 32, 0.2])
def test_one_click_is_not_bandwidth(tmp_path, place):
    for level_db, expected in ((-20, 8000), (-200, 0)):
        audio = at_level(low_pass(pink(3), 8000), level_db)
        audio[int(place * len(audio))] = 0.99
        assert abs(bandwidth(write(tmp_path / "a.wav", audio)) - expected) < 150


def test_treble_heard_now_and_then_counts(tmp_path):
    audio = at_level(low_pass(pink(10), 5000), -20)
    beat = np.arange(len(audio)) % RATE < RATE // 4
    audio += beat * at_level(low_pass(white(10, seed=1), 16000), -40)
    assert abs(bandwidth(write(tmp_path / "a.wav", audio)) - 16000) < 150


@pytest.mark.parametrize("frames", [500, 3000, 9000, 30000])
def test_short_files_are_measured_too(tmp_path, frames):
    path = write(tmp_path / "a.wav", at_level(low_pass(pink(2), 8000), -20)[RATE : RATE + frames])
    assert abs(bandwidth(path) - 8000) < 700


def test_side_channel_counts_and_rates_do_not(tmp_path):
    treble = at_level(low_pass(white(3), 30000, 96000), -30)
    path = write(tmp_path / "a.wav", np.stack([treble, -treble], axis=1), 96000)
    assert abs(bandwidth(path) - 30000) < 300


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared audio is absent")
def test_real_recordings():
    low, high = {}, {}
    for path in sorted(SHARED.glob("*/*")):
        if path.name.startswith("speech_kerstin"):  # wideband speech within 48 kHz Opus
            low[path.name] = (6000, 8200)
        elif path.suffix == ".mp3" or "citychill" in path.name:  # low-passed below 16 kHz by the encoder
            low[path.name] = (11000, 16000)
        elif path.name.startswith("music_sonicpi_loop"):  # never lossy
            high[path.name] = (21000, 22050)
        else:
            continue
        least, most = {**low, **high}[path.name]
        assert least < bandwidth(path) <= most, path.name
    assert len(low) > 10 and len(high) > 5


def test_levels_are_those_of_the_samples(tmp_path):
    audio = np.concatenate([at_level(white(1.0), -20), np.zeros(RATE), at_level(white(0.55), -50)])
    audio = np.stack([audio, 0.5 * audio], axis=1)
    audio[1000] = (-1.5, 1.25)
    audio[2000:2010] = 1.0
    found = measure_file(write(tmp_path / "a.wav", audio, subtype="FLOAT"))
    assert (found.sample_rate, found.channels, found.format, found.subtype) == (RATE, 2, "WAV", "FLOAT")
    assert (found.frames, found.duration) == (len(audio), len(audio) / RATE)
    assert found.peak == 1.5
    assert found.rms_db == pytest.approx(10 * np.log10(np.mean(audio**2)), abs=1e-4)
    assert found.silent_seconds == 1.0
    assert found.clipped_share == 22 / audio.size
    assert found.not_finite == 0
    assert found.bandwidth_hz == bandwidth(tmp_path / "a.wav")


def test_silence_counts_stretches_of_a_tenth_of_a_second(tmp_path):
    quiet, loud = at_level(white(0.1), -63), at_level(white(0.1), -50)
    audio = np.concatenate([loud, quiet, quiet, loud, quiet[: RATE // 20]])
    assert measure_file(write(tmp_path / "a.wav", audio, subtype="FLOAT")).silent_seconds == pytest.approx(0.25)


def test_digital_silence(tmp_path):
    found = measure_file(write(tmp_path / "a.flac", np.zeros((RATE, 2))))
    assert (found.peak, found.rms_db, found.bandwidth_hz) == (0.0, -math.inf, 0.0)
    assert found.silent_seconds == found.duration == 1.0


def test_values_that_are_not_finite_are_counted_and_taken_for_zero(tmp_path):
    audio = np.full((2 * RATE, 2), 0.25)
    audio[100:110, 0] = np.nan
    audio[RATE + 50, 1] = -np.inf
    found = measure_file(write(tmp_path / "a.wav", audio, subtype="FLOAT"))
    assert (found.not_finite, found.peak) == (11, 0.25)
    assert found.rms_db == pytest.approx(10 * np.log10(0.0625), abs=1e-3)
    assert found.bandwidth_hz == 0.0


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_a_truncated_file_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, at_level(white(5), -20), RATE)
    whole = measure_file(path)
    assert whole.frames == 5 * RATE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if suffix == "ogg":  # an Ogg file announces no length: it is shorter, which libsndfile cannot know
        assert measure_file(path).frames < whole.frames
        return
    with pytest.raises(InputError, match=r"cut\.\w+ (ends early, after|does not decode).*remove the file"):
        measure_file(path)


def test_what_is_no_audio_is_refused_by_name(tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio " * 100)
    write(tmp_path / "none.wav", np.zeros(0))
    for measure in (measure_file, bandwidth):
        with pytest.raises(InputError, match=r"text\.wav does not decode"):
            measure(tmp_path / "text.wav")
        with pytest.raises(InputError, match=r"absent\.wav does not decode"):
            measure(tmp_path / "absent.wav")
    with pytest.raises(InputError, match=r"none\.wav holds no audio"):
        measure_file(tmp_path / "none.wav")
    assert bandwidth(tmp_path / "none.wav") == 0.0
