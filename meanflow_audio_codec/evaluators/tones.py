r"""How rough stationary tones come back: the fault of a codec that gets the MDCT's signs wrong.

A stationary sine has MDCT coefficients that change in size and sign from frame to frame (L. Daudet and M. Sandler,
"MDCT analysis of sinusoids: exact results and applications to coding artifacts reduction", IEEE Trans. Speech and
Audio Processing 12, 2004). Only together do they cancel to a constant envelope; a decoder that has the sizes right and
the signs by chance makes of the sine a narrow band of noise, which is heard as rough.

For a tone of f Hz, y the decoded signal without its first and last 0.1 s:

    B(f) = 25 + 75 (1 + 1.4 (f / kHz)^2)^0.69 Hz                               critical bandwidth
    E(t) = |y's analytic signal within f +- B/2|                               envelope
    P(a, b) = sum of |DFT of Blackman-Harris windowed y|^2 over a <= |nu - f| < b Hz

    modulation_depth = sqrt(2) std(E) / mean(E)                 index m of the sinusoidal AM of the same RMS
    sideband_db      = 10 log10 P(15, 300) / P(0, 15)           beside the tone, relative to it
    level_db         = 10 log10 P_y(0, 15) / P_x(0, 15)         x the reference

For a partial of a harmonic sound, whose neighbours are f0 away, B/2 and 300 Hz become at most f0 / 2. AM of index m at
a rate r reads (m, 10 log10 m^2/2) if 15 Hz < r < B/2 - 10 Hz; noise of N W/Hz beside a tone of P watts reads
(sqrt(N B / P), 10 log10(570 N / P)) while it is weak. FM leaves E alone and shows in sideband_db. A band of noise, all
tone lost, reads sqrt(2 (4 / pi - 1)) = 0.74, by Rayleigh's distribution. A perfect tone in float32 reads at most
(0.0001, -90); silence reads (0, 0) and -100 in level.

Sources: relative envelope fluctuation within critical bands as what decides roughness, E. Terhardt, "On the perception
of periodic sound fluctuations (roughness)", Acustica 30, 1974; modulation between 15 and 300 Hz as what is rough,
H. Fastl and E. Zwicker, "Psychoacoustics: Facts and Models", chapter 11; B(f), E. Zwicker and E. Terhardt, "Analytical
expressions for critical-band rate and critical bandwidth", JASA 68, 1980. These are not aspers: no weight of the rate,
no sum over bands.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.fft
from jaxtyping import Float, Float64

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators.common import Context, decode

LOWEST_HZ = 150.0
HIGHEST_SHARE = 0.4  # of the sample rate
FUNDAMENTALS_HZ = (150.0, 450.0)
NUM_PARTIALS = 8
RMS = 0.1  # -20 dBFS, where a constant of 1 is 0
ROUGH_HZ = (15.0, 300.0)
EDGE_SECONDS = 0.1  # the codec has seen no tone before the first sample, and its first frames show it
TRANSITION_HZ = 20.0
STOPBAND_DB = 80.0
MIN_SECONDS = 0.75  # leaves 0.3 s of envelope between the edges and the filter's
SILENCE = 1e-16  # mean square
LIMIT_DB = 100.0


class Evaluator:
    """Decode `num_tones` of `stationary_tones`, of `seconds`, at each `nfe`.

    Raises:
        InputError: images have no tones; or `num_tones` or `seconds` is too small.
    """

    def __init__(self, context: Context, num_tones: int, seconds: float, nfe: tuple[int, ...]):
        if num_tones < 1:
            raise InputError(f"evals of type tones: num_tones={num_tones} must be at least 1")
        self._context, self._nfe = context, nfe
        clips, _ = context.examples(1, seconds)  # of a length that fills whole latents
        if "audio" not in clips:
            raise InputError("evals of type tones: images hold no tones; leave it out")
        _, samples, self._channels = clips["audio"].shape
        if samples < MIN_SECONDS * context.sample_rate:
            raise InputError(
                f"evals of type tones: {samples / context.sample_rate:.2f} s are too short to tell modulation from "
                f"edges; set seconds to {MIN_SECONDS} or more"
            )
        self._tones, self._partials = stationary_tones(num_tones, samples, context.sample_rate)

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yield tones/<measure>_nfe<k>, the mean over partials and channels of each tone, then over tones.

        `level_error_db` is the mean of |level_db|.
        """
        batch = {"audio": np.repeat(self._tones[:, :, None], self._channels, axis=2)}
        for nfe in self._nfe:
            decoded, _ = decode(self._context, state, batch, nfe)
            for name, value in self._measure(np.asarray(decoded, np.float64)).items():
                yield f"tones/{name}_nfe{nfe}", value

    def _measure(self, decoded: Float[np.ndarray, "n s c"]) -> dict[str, float]:
        rate, rows = self._context.sample_rate, []
        for reference, channels, partials in zip(self._tones, decoded, self._partials, strict=True):
            spacing = partials[0] if len(partials) > 1 else np.inf
            found = [
                (
                    modulation_depth(audio, f, rate, spacing),
                    sideband_db(audio, f, rate, spacing),
                    abs(level_db(reference, audio, f, rate)),
                )
                for audio in channels.T
                for f in partials
            ]
            rows.append(np.mean(found, axis=0))
        means = np.mean(rows, axis=0)
        names = ("modulation_depth", "sideband_db", "level_error_db")
        return {name: float(value) for name, value in zip(names, means, strict=True)}


def stationary_tones(
    num_tones: int, samples: int, sample_rate: int
) -> tuple[Float[np.ndarray, "n s"], list[Float64[np.ndarray, "p"]]]:
    """Make test tones that last the whole clip, the same ones on every call.

    Three in four are single sines, one in each of as many equal intervals from 150 Hz to 0.4 sample_rate, at a random
    place in it, so that no part of an MDCT bin is favoured. The others are harmonic: up to 8 partials of amplitude 1/k
    below 0.4 sample_rate, their fundamentals likewise from 150 to 450 Hz. Phases are random, the level is -20 dBFS (RMS
    0.1).

    Args:
        num_tones: At least 1.
        samples: Length.
        sample_rate: Hz.

    Returns:
        Audio in float32, and of each tone the frequencies of its partials in Hz, the fundamental first.
    """
    rng = np.random.default_rng(0)
    top = HIGHEST_SHARE * sample_rate
    num_stacks = num_tones // 4
    sines = _one_in_each_interval(rng, LOWEST_HZ, top, num_tones - num_stacks)
    fundamentals = _one_in_each_interval(rng, *FUNDAMENTALS_HZ, num_stacks)
    partials = [np.array([f]) for f in sines]
    partials += [f0 * np.arange(1, max(1, min(NUM_PARTIALS, int(top / f0))) + 1) for f0 in fundamentals]
    time = np.arange(samples) / sample_rate
    tones = []
    for frequencies in partials:
        phases = 2 * np.pi * rng.random(len(frequencies))
        waves = np.sin(2 * np.pi * frequencies[:, None] * time + phases[:, None])
        amplitudes = frequencies[0] / frequencies
        tones.append(amplitudes @ waves * RMS / np.sqrt(np.sum(amplitudes**2) / 2))
    return np.array(tones, np.float32), partials


def modulation_depth(
    audio: Float[np.ndarray, " s"], frequency: float, sample_rate: int, spacing: float = np.inf
) -> float:
    """Return sqrt(2) std(E) / mean(E) of the tone's envelope in its critical band: 0 is steady.

    Args:
        audio: Signal of MIN_SECONDS or more.
        frequency: The tone's, in Hz.
        sample_rate: Hz.
        spacing: From one partial to the next, in Hz.
    """
    half = min(critical_bandwidth(frequency), spacing) / 2
    inner = _inner(audio, sample_rate)
    # Down to 0 Hz, then a low-pass in place of a band-pass; only where the filter sees signal alone.
    shifted = inner * np.exp(-2j * np.pi * frequency / sample_rate * np.arange(len(inner)))
    taps = _low_pass(half, sample_rate)
    size = scipy.fft.next_fast_len(len(inner))
    filtered = scipy.fft.ifft(scipy.fft.fft(shifted, size) * scipy.fft.fft(taps, size))[len(taps) - 1 : len(inner)]
    envelope = 2 * np.abs(filtered)
    if np.mean(envelope**2) <= SILENCE:
        return 0.0
    return float(np.sqrt(2) * envelope.std() / envelope.mean())


def sideband_db(audio: Float[np.ndarray, " s"], frequency: float, sample_rate: int, spacing: float = np.inf) -> float:
    """Return the power from 15 to 300 Hz beside the tone relative to the tone's, in dB within [-100, 100].

    Args:
        audio: Signal of MIN_SECONDS or more.
        frequency: The tone's, in Hz.
        sample_rate: Hz.
        spacing: From one partial to the next, in Hz.
    """
    distance, power = _spectrum(audio, frequency, sample_rate)
    low, high = ROUGH_HZ
    beside = (distance >= low) & (distance < min(high, spacing / 2))
    return _ratio_db(power[beside].sum(), power[distance < low].sum())


def level_db(
    reference: Float[np.ndarray, " s"], decoded: Float[np.ndarray, " s"], frequency: float, sample_rate: int
) -> float:
    """Return the tone's level, within 15 Hz, relative to the reference's, in dB within [-100, 100]."""
    spectra = (_spectrum(audio, frequency, sample_rate) for audio in (decoded, reference))
    return _ratio_db(*(power[distance < ROUGH_HZ[0]].sum() for distance, power in spectra))


def critical_bandwidth(frequency: float) -> float:
    """Return Zwicker and Terhardt's critical bandwidth in Hz: about 100 Hz below 500 Hz, a fifth of f above."""
    return 25 + 75 * (1 + 1.4 * (frequency / 1000) ** 2) ** 0.69


def _one_in_each_interval(rng: np.random.Generator, low: float, high: float, count: int) -> np.ndarray:
    return low * (high / low) ** ((np.arange(count) + rng.random(count)) / max(count, 1))


def _inner(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    edge = round(EDGE_SECONDS * sample_rate)
    return audio[edge : len(audio) - edge].astype(np.float64)


@functools.lru_cache
def _low_pass(half_width: float, sample_rate: int) -> np.ndarray:
    """Design a Kaiser-windowed sinc: flat to 10 Hz below `half_width` (Hz), -80 dB from 10 Hz above it."""
    # J. Kaiser, "Nonrecursive digital filter design using the I0-sinh window function" (1974).
    taps = 1 + int((STOPBAND_DB - 7.95) / (2.285 * 2 * np.pi * TRANSITION_HZ / sample_rate))
    time = np.arange(taps) - (taps - 1) / 2
    ideal = np.sinc(2 * half_width / sample_rate * time)
    windowed = ideal * np.kaiser(taps, 0.1102 * (STOPBAND_DB - 8.7))
    return windowed / windowed.sum()


def _spectrum(audio: np.ndarray, frequency: float, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each bin's distance from `frequency` in Hz, and its mean square."""
    inner = _inner(audio, sample_rate)
    window = _blackman_harris(len(inner))
    spectrum = scipy.fft.rfft(inner * window)
    distance = np.abs(np.arange(len(spectrum)) * sample_rate / len(inner) - frequency)
    return distance, 2 * (spectrum.real**2 + spectrum.imag**2) / (len(inner) * np.sum(window**2))


@functools.lru_cache
def _blackman_harris(length: int) -> np.ndarray:
    """Return the periodic 4-term window of -92 dB sidelobes (F. Harris, Proc. IEEE 66, 1978)."""
    phase = 2 * np.pi * np.arange(length) / length
    return sum(a * np.cos(k * phase) for k, a in enumerate((0.35875, -0.48829, 0.14128, -0.01168)))


def _ratio_db(power: float, reference: float) -> float:
    ratio = 10 * np.log10(max(power, SILENCE) / max(reference, SILENCE))
    return float(np.clip(ratio, -LIMIT_DB, LIMIT_DB))
