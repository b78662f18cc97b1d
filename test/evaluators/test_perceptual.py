"""The packages' measures are reached at the rate in their name; absent ones leave a line."""

import importlib.util
import math

import numpy as np
import pytest

from meanflow_audio_codec.evaluators import perceptual

RATE = 44100


def voice(seconds=1.5, rate=RATE):
    """A buzz with vowels that come and go, taken for speech."""
    n = np.arange(int(seconds * rate)) / rate
    buzz = sum(np.sin(2 * np.pi * 120 * k * n) * math.exp(-(((120 * k - 700) / 900) ** 2)) for k in range(1, 60))
    return (0.1 * buzz * np.clip(np.sin(2 * np.pi * 2 * n), 0, 1)).astype(np.float32)


def noisy(audio, level):
    return audio + level * np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)


def metric(name):
    found, lines = perceptual.find_metrics()
    if name not in found:
        pytest.skip(next(line for line in lines if line.startswith(name)))
    return found[name]


def test_every_measure_is_found_or_has_a_line():
    found, lines = perceptual.find_metrics()
    missing = {line.split()[0] for line in lines}
    assert set(found) | missing == {*perceptual.SPEECH_METRICS, *perceptual.AUDIO_METRICS}
    assert not set(found) & missing


def test_absent_packages_leave_a_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found, lines = perceptual.find_metrics()
    assert not found and len(lines) == 6
    assert 'pesq_wb_16k is left out: pesq is not installed (pip install "meanflow_audio_codec[eval]")' in lines


def test_visqol_for_speech_needs_the_lattice_runtime(monkeypatch):
    installed = {"visqol", "zimtohrli"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert set(perceptual.find_metrics()[0]) == {"visqol_audio_48k", "zimtohrli_mos_48k"}


@pytest.mark.parametrize(
    ("name", "best"),
    [("zimtohrli_mos_48k", 5.0), ("pesq_wb_16k", 4.64), ("stoi_16k", 1.0), ("estoi_16k", 1.0)],
)
def test_the_original_is_best_and_noise_costs(name, best):
    measure, audio = metric(name), voice(3.0)
    values = [measure(audio, noisy(audio, level), RATE) for level in (0.0, 0.003, 0.1)]
    assert values[0] == pytest.approx(best, abs=0.02)
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("name", ["visqol_audio_48k", "visqol_speech_16k"])
def test_visqol(name):
    measure, audio = metric(name), voice()
    original, coded = (measure(audio, noisy(audio, level), RATE) for level in (0.0, 0.03))
    assert 3.5 < original <= 5 and coded < original - 0.5


@pytest.mark.parametrize(("name", "extended"), [("stoi_16k", False), ("estoi_16k", True)])
def test_stoi_is_given_16_khz(name, extended):
    measure = metric(name)
    from pystoi import stoi

    audio = voice(3.0, 16000)
    expected = stoi(audio, noisy(audio, 0.03), 16000, extended)
    assert measure(audio, noisy(audio, 0.03), 16000) == pytest.approx(expected, abs=1e-6)


def test_pesq_is_wide_band():
    measure = metric("pesq_wb_16k")
    from pesq import pesq

    audio = voice(3.0, 16000)
    assert measure(audio, noisy(audio, 0.01), 16000) == pytest.approx(pesq(16000, audio, noisy(audio, 0.01), "wb"))


@pytest.mark.parametrize("name", ["visqol_audio_48k", "visqol_speech_16k", "stoi_16k", "estoi_16k", "pesq_wb_16k"])
def test_too_short_for_a_measure_is_none(name):
    audio = voice(0.2)
    assert metric(name)(audio, audio, RATE) is None
