r"""Distances between a reference and its decoded version, in numpy, one value a clip.

Convention: x is the reference, y the decoded audio, both in [-1, 1] with time as the last axis;
X and Y are magnitudes |STFT|, not normalised. Every STFT has periodic Hann windows centred on
multiples of the hop, the signal reflected at both ends, so 1 + s // hop frames. A clip shorter than
half a window is reflected as often as it takes; a single sample is repeated.

    SI-SDR   10 log10 |a x|^2 / |y - a x|^2, a = <x, y> / <x, x>, after the means are removed
    mel      sum over 7 windows of mean |log10 max(M X, 1e-5) - log10 max(M Y, 1e-5)|
    mel16    mel of both resampled to 16 kHz: blind above 8 kHz
    STFT     sum over 2 windows of mean |log10 max(X, 1e-5)^2 - log10 max(Y, 1e-5)^2| + mean |X - Y|
    MR-STFT  mean over 3 sizes of ||X - Y|| / ||X|| + mean |ln X - ln Y|, with X, Y >= 1e-4
    LSD      mean over frames of the RMS over bins of 20 log10 X/Y, both at least -100 dBFS

Sources: SI-SDR, Le Roux et al., "SDR - half-baked or well done?" (arXiv 1811.02508). mel and STFT,
the losses of DAC, Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN" (arXiv
2306.06546), with the numbers of its `conf/base.yml`. MR-STFT, Yamamoto et al., "Parallel WaveGAN"
(arXiv 1910.11480), with the defaults of auraloss 0.4.

Traps: DAC's tables are at 44.1 kHz and -16 LUFS. At another rate the windows span other times and
the mels another band, and STFT depends on the level, so values compare only at one rate and level.
The FFT runs in float32 as in the published codes, which puts its rounding noise near 1e-7 of a
frame's largest bin: between loud and nearly empty bins the logarithms see that noise.
"""

import functools
from collections.abc import Callable

import numpy as np
import scipy.fft
import soxr
from jaxtyping import Complex64, Float, Float32, Float64

from meanflow_audio_codec.errors import InputError

MEL_SCALES = (
    (32, 5),
    (64, 10),
    (128, 20),
    (256, 40),
    (512, 80),
    (1024, 160),
    (2048, 320),
)  # window, mels
STFT_WINDOWS = (2048, 512)
MRSTFT_SIZES = ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200))  # FFT, hop, window
LSD_WINDOW = 2048
CLAMP = 1e-5  # on magnitudes and mels (DAC)
MEL16_HZ = 16000
FLOOR_DBFS = -100.0
SI_SDR_LIMIT_DB = 100.0
SILENCE = 1e-20  # mean square after the mean is removed; float32 rounding of a constant stays below it


def audio_metrics(
    reference: Float[np.ndarray, "*b s"], decoded: Float[np.ndarray, "*b s"], sample_rate: int
) -> dict[str, Float64[np.ndarray, "*b"]]:
    """Compute every metric of this module.

    Args:
        reference: Audio in [-1, 1].
        decoded: What the codec made of it, aligned with the reference.
        sample_rate: Hz.

    Returns:
        `si_sdr_db` (dB, higher is better) and the distances `mel_distance`, `stft_distance`,
        `mrstft_distance` (no unit) and `lsd_db` (dB), which are 0 for identical signals. Finite for
        finite input, silence included.

    Raises:
        InputError: The two differ in shape, hold no samples or are not floating point.
    """
    return {
        "si_sdr_db": si_sdr_db(reference, decoded),
        "mel_distance": mel_distance(reference, decoded, sample_rate),
        "stft_distance": stft_distance(reference, decoded),
        "mrstft_distance": mrstft_distance(reference, decoded),
        "lsd_db": lsd_db(reference, decoded),
    }


def si_sdr_db(reference: Float[np.ndarray, "*b s"], decoded: Float[np.ndarray, "*b s"]) -> Float64[np.ndarray, "*b"]:
    """Compute the scale-invariant signal-to-distortion ratio, in dB within [-100, 100].

    Both signals lose their mean, and the gain is fitted on the reference. A silent clip (constant,
    mean square below 1e-20) has no such ratio: -100 if one of the two is silent, 100 if both are.
    Leave silent references out of averages.
    """
    return _each_clip(_si_sdr_db, reference, decoded)


def mel_distance(
    reference: Float[np.ndarray, "*b s"], decoded: Float[np.ndarray, "*b s"], sample_rate: int
) -> Float64[np.ndarray, "*b"]:
    """Compute DAC's mel distance: 7 windows of 32 to 2048, 5 to 320 mels to sample_rate / 2."""
    return _each_clip(functools.partial(_mel_distance, sample_rate=sample_rate), reference, decoded)


def mel16_distance(
    reference: Float[np.ndarray, "*b s"], decoded: Float[np.ndarray, "*b s"], sample_rate: int
) -> Float64[np.ndarray, "*b"]:
    """Compute the mel distance up to 8 kHz, of both signals resampled to 16 kHz.

    Full-band mel and STFT distances of a decoder that leaves the treble out measure little else; this one does not see
    the treble, so the two together tell bandwidth from fidelity.

    Raises:
        InputError: See `audio_metrics`, or `sample_rate` is below 16 kHz.
    """
    if sample_rate < MEL16_HZ:
        raise InputError(f"sample_rate={sample_rate}: mel16 looks up to 8 kHz, so needs {MEL16_HZ} Hz or more")
    return _each_clip(functools.partial(_mel16_distance, sample_rate=sample_rate), reference, decoded)


def stft_distance(
    reference: Float[np.ndarray, "*b s"], decoded: Float[np.ndarray, "*b s"]
) -> Float64[np.ndarray, "*b"]:
    """Compute DAC's STFT distance, log plus linear magnitudes. It depends on the level."""
    return _each_clip(_stft_distance, reference, decoded)


def mrstft_distance(
    reference: Float[np.ndarray, "*b s"], decoded: Float[np.ndarray, "*b s"]
) -> Float64[np.ndarray, "*b"]:
    """Compute auraloss' multi-resolution STFT distance: spectral convergence plus ln magnitudes."""
    return _each_clip(_mrstft_distance, reference, decoded)


def lsd_db(reference: Float[np.ndarray, "*b s"], decoded: Float[np.ndarray, "*b s"]) -> Float64[np.ndarray, "*b"]:
    """Compute the log-spectral distance in dB. A gain of g dB costs |g| unless bins are floored."""
    return _each_clip(_lsd_db, reference, decoded)


def stft(
    audio: Float[np.ndarray, " s"],
    window_length: int,
    hop_length: int,
    fft_length: int | None = None,
) -> Complex64[np.ndarray, "l f"]:
    """Compute the centred STFT with a periodic Hann window, zero-padded to `fft_length`."""
    # Other codes put a window shorter than the FFT in the middle of the frame: another phase, the
    # same magnitudes.
    padded = np.pad(audio.astype(np.float32), window_length // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, window_length)[::hop_length]
    return scipy.fft.rfft(frames * hann(window_length), n=fft_length, axis=-1)


def spectrogram_dbfs(audio: Float[np.ndarray, " s"], window_length: int, hop_length: int) -> Float32[np.ndarray, "l f"]:
    """Compute the spectrogram in dB where a full-scale sine on a bin reads 0, floored at -100."""
    full_scale = (window_length / 4) ** 2  # Hann sums to w / 2, and half of it goes to -f
    power = _power(stft(audio, window_length, hop_length)) / full_scale
    return np.maximum(10 * np.log10(np.maximum(power, 1e-20)), FLOOR_DBFS, dtype=np.float32)


@functools.lru_cache
def hann(window_length: int) -> Float32[np.ndarray, " w"]:
    """Return the periodic Hann window (shared: read only)."""
    return _frozen(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_length) / window_length))


@functools.lru_cache
def mel_filterbank(sample_rate: int, window_length: int, num_mels: int) -> Float32[np.ndarray, "f m"]:
    """Return triangles on Slaney's mel scale to sample_rate / 2, of unit area in Hz as in librosa.

    Shared: read only. A triangle narrower than the spacing of the bins may hold none of them; it
    reads 0 in both signals and costs nothing.
    """
    frequencies = np.linspace(0, sample_rate / 2, window_length // 2 + 1)[:, None]
    edges = mel_to_hz(np.linspace(0, hz_to_mel(sample_rate / 2), num_mels + 2))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    return _frozen(np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low))


def hz_to_mel(hz: float | np.ndarray) -> np.ndarray:
    """Map Hz to Slaney's mels: linear to 1000 Hz = 15 mels, then 27 mels for each factor 6.4."""
    hz = np.asarray(hz, np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def mel_to_hz(mel: float | np.ndarray) -> np.ndarray:
    """Invert `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def _each_clip(metric: Callable, reference: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Apply `metric` clip by clip: bounded memory, and a batch equals its clips bit for bit."""
    if reference.shape != decoded.shape or reference.ndim == 0 or reference.shape[-1] == 0:
        raise InputError(
            f"reference {reference.shape} and decoded {decoded.shape} must have one shape "
            "[..., samples]: crop the longer"
        )
    for name, audio in (("reference", reference), ("decoded", decoded)):
        if not np.issubdtype(audio.dtype, np.floating):
            raise InputError(f"{name} holds {audio.dtype}: convert it to float in [-1, 1]")
    *batch, samples = reference.shape
    pairs = zip(reference.reshape(-1, samples), decoded.reshape(-1, samples), strict=True)
    return np.array([metric(x, y) for x, y in pairs], np.float64).reshape(batch)


def _si_sdr_db(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (a.astype(np.float64) - a.mean(dtype=np.float64) for a in (x, y))
    silent_x, silent_y = (a @ a <= SILENCE * a.size for a in (x, y))
    if silent_x or silent_y:
        return SI_SDR_LIMIT_DB if silent_x and silent_y else -SI_SDR_LIMIT_DB
    target = (x @ y) / (x @ x) * x
    distortion = y - target
    eps = 10 ** (-SI_SDR_LIMIT_DB / 10) * (y @ y)  # relative to y, so that no gain of y shows
    return 10 * np.log10(max(target @ target, eps) / max(distortion @ distortion, eps))


def _mel_distance(x: np.ndarray, y: np.ndarray, sample_rate: int) -> float:
    total = 0.0
    for window_length, num_mels in MEL_SCALES:
        filterbank = mel_filterbank(sample_rate, window_length, num_mels)
        x_mel, y_mel = (np.sqrt(_power(stft(a, window_length, window_length // 4))) @ filterbank for a in (x, y))
        total += _mean_abs(np.log10(np.maximum(x_mel, CLAMP) / np.maximum(y_mel, CLAMP)))
    return total


def _mel16_distance(x: np.ndarray, y: np.ndarray, sample_rate: int) -> float:
    return _mel_distance(*(soxr.resample(a, sample_rate, MEL16_HZ, "HQ") for a in (x, y)), MEL16_HZ)


def _stft_distance(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for window_length in STFT_WINDOWS:
        x_mag, y_mag = (np.sqrt(_power(stft(a, window_length, window_length // 4))) for a in (x, y))
        total += 2 * _mean_abs(np.log10(np.maximum(x_mag, CLAMP) / np.maximum(y_mag, CLAMP)))
        total += _mean_abs(x_mag - y_mag)
    return total


def _mrstft_distance(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for fft_length, hop_length, window_length in MRSTFT_SIZES:
        x_mag, y_mag = (
            np.sqrt(np.maximum(_power(stft(a, window_length, hop_length, fft_length)), 1e-8)) for a in (x, y)
        )
        convergence = np.linalg.norm(x_mag - y_mag) / np.linalg.norm(x_mag)
        total += convergence + _mean_abs(np.log(x_mag / y_mag))
    return total / len(MRSTFT_SIZES)


def _lsd_db(x: np.ndarray, y: np.ndarray) -> float:
    x_db, y_db = (spectrogram_dbfs(a, LSD_WINDOW, LSD_WINDOW // 4) for a in (x, y))
    return np.sqrt(np.mean((x_db - y_db) ** 2, axis=-1)).mean(dtype=np.float64)


def _power(spectrum: np.ndarray) -> np.ndarray:
    return np.square(spectrum.real) + np.square(spectrum.imag)


def _mean_abs(difference: np.ndarray) -> float:
    return np.abs(difference).mean(dtype=np.float64)


def _frozen(table: np.ndarray) -> np.ndarray:
    """Round to float32 and refuse writes, since the cache hands the same array to everyone."""
    table = table.astype(np.float32)
    table.flags.writeable = False
    return table
