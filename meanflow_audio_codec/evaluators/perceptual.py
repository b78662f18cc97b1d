"""Measures of heard quality by other people's packages, which come with the extra `eval`.

Each takes mono reference and decoded audio and resamples both to the rate in its name. Higher is better in all.

    visqol_audio_48k    ViSQOL 3 in audio mode (support vector regression), MOS-LQO 1 to 4.73. Below 16 kbps it rewards
                        bandwidth more than anything else: never show it alone
    visqol_speech_16k   ViSQOL 3 in speech mode (deep lattice), MOS-LQO 1 to 5; for speech. Without the lattice runtime
                        the package falls back on a polynomial that reads 1 to 2 points higher: another measure, so left
                        out here
    zimtohrli_mos_48k   Zimtohrli's distance as a mean opinion score; a full-scale sine is 80 dB SPL
    pesq_wb_16k         PESQ wide band (ITU-T P.862.2), 1.04 to 4.64; for speech
    stoi_16k, estoi_16k short-time objective intelligibility and its extended form, 0 to 1; for speech

Sources: Chinen et al., "ViSQOL v3" (arXiv 2004.09584), here visqol-python; Alakuijala et al., "Zimtohrli" (arXiv
2509.26133); Taal et al., "An algorithm for intelligibility prediction of time-frequency weighted noisy speech" (IEEE
TASL 19, 2011); Jensen and Taal, the extended form (IEEE TASLP 24, 2016).
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable

import numpy as np
import soxr
from jaxtyping import Float

EXTRA = 'pip install "meanflow_audio_codec[eval]"'
SPEECH_METRICS = ("pesq_wb_16k", "stoi_16k", "estoi_16k", "visqol_speech_16k")
AUDIO_METRICS = ("visqol_audio_48k", "zimtohrli_mos_48k")

Metric = Callable[[Float[np.ndarray, " s"], Float[np.ndarray, " s"], int], float | None]

_VISQOL_SECONDS = 1.0  # a patch of its spectrogram must fit in
_STOI_TOO_SHORT = 1e-5  # what pystoi returns, with a warning, for less than 0.4 s of sound


def find_metrics() -> tuple[dict[str, Metric], list[str]]:
    """Return the measures whose packages are installed, by name.

    Returns:
        `metric(reference, decoded, sample_rate)`, which takes no silence and gives None for a clip that is too short
        for it; and a line for each that is left out.
    """
    metrics, missing = {}, []
    for name, (package, metric) in _METRICS.items():
        if all(_is_installed(part) for part in package.split()):
            metrics[name] = metric
        else:
            missing.append(f"{name} is left out: {package.replace(' ', ' with ')} is not installed ({EXTRA})")
    return metrics, missing


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _pair(reference: np.ndarray, decoded: np.ndarray, sample_rate: int, rate: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(soxr.resample(a.astype(np.float64), sample_rate, rate, "HQ") for a in (reference, decoded))


def _visqol(
    reference: Float[np.ndarray, " s"], decoded: Float[np.ndarray, " s"], sample_rate: int, mode: str, rate: int
) -> float | None:
    if len(reference) < _VISQOL_SECONDS * sample_rate:
        return None
    return float(_visqol_api(mode).measure_from_arrays(*_pair(reference, decoded, sample_rate, rate), rate).moslqo)


@functools.cache
def _visqol_api(mode: str):
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode=mode, use_lattice_model=mode == "speech")
    return api


def _zimtohrli(reference: Float[np.ndarray, " s"], decoded: Float[np.ndarray, " s"], sample_rate: int) -> float:
    import zimtohrli

    pair = _pair(reference, decoded, sample_rate, 48000)
    return float(zimtohrli.mos_from_zimtohrli(zimtohrli.Pyohrli().distance(*pair)))


def _pesq(reference: Float[np.ndarray, " s"], decoded: Float[np.ndarray, " s"], sample_rate: int) -> float | None:
    import pesq

    try:
        return float(pesq.pesq(16000, *_pair(reference, decoded, sample_rate, 16000), "wb"))
    except (pesq.NoUtterancesError, pesq.BufferTooShortError):
        return None


def _stoi(
    reference: Float[np.ndarray, " s"], decoded: Float[np.ndarray, " s"], sample_rate: int, extended: bool
) -> float | None:
    import pystoi

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Not enough STFT frames", RuntimeWarning)
        value = float(pystoi.stoi(*_pair(reference, decoded, sample_rate, 16000), 16000, extended))
    return None if value == _STOI_TOO_SHORT else value


_METRICS: dict[str, tuple[str, Metric]] = {
    "visqol_audio_48k": ("visqol", functools.partial(_visqol, mode="audio", rate=48000)),
    "visqol_speech_16k": ("visqol ai_edge_litert", functools.partial(_visqol, mode="speech", rate=16000)),
    "zimtohrli_mos_48k": ("zimtohrli", _zimtohrli),
    "pesq_wb_16k": ("pesq", _pesq),
    "stoi_16k": ("pystoi", functools.partial(_stoi, extended=False)),
    "estoi_16k": ("pystoi", functools.partial(_stoi, extended=True)),
}
