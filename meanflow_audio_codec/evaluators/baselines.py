r"""Other people's coders at chosen bitrates, as far as they are installed.

A coder is a function of mono audio that returns what comes back and what it cost: `code(audio, sample_rate) -> Coded`.
The payload is the sum of the coder's packets, so no container, no stream header, no Xing frame.

    opus_auto        application audio, VBR, complexity 10, frames of 20 ms: what people call Opus at x kbps
    opus_60ms        the same in frames of 60 ms, up to 12 kbps
    opus_music       with the hint OPUS_SIGNAL_MUSIC, which goes full band near 12 kbps where auto codes 8 kHz
    opus_fullband    with the bandwidth forced to 20 kHz
    opus_noise       opus_auto plus noise above its band, see `fill_band`: what bandwidth alone is worth to a metric
    mp3              LAME, CBR, at the sample rates LAME itself chooses for mono
    aac              ffmpeg's own AAC-LC encoder
    vorbis           libsndfile's; the quality is found by bisection, as its VBR knows no bitrate
    encodec_24k      24 kHz, 10 bits a code, without its entropy coder
    dac_44k          44.1 kHz, 10 bits a code

Opus, MP3 and AAC need PyAV (`av`). libopus is called by ctypes, in the library that PyAV carries, for ffmpeg's wrapper
lacks the hint and the bandwidth; it has no neural post-filter, which 1.5 and newer can be built with. EnCodec and DAC
need their packages, and weights that are on disk already: nothing is downloaded.

Times are of encoder and decoder alone, without resampling, on one thread.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
from jaxtyping import Complex, Float, Float32

from meanflow_audio_codec.errors import InputError

OPUS_RATE = 48000
OPUS_MODES = ("opus_auto", "opus_60ms", "opus_music", "opus_fullband", "opus_noise")
FAMILIES = (*OPUS_MODES, "mp3", "aac", "vorbis", "encodec_24k", "dac_44k")

# opus_defines.h
_APPLICATION_AUDIO, _SIGNAL_MUSIC, _BANDWIDTH_FULLBAND = 2049, 3002, 1105
_SET_BITRATE, _SET_BANDWIDTH, _SET_VBR, _SET_COMPLEXITY, _SET_SIGNAL = 4002, 4008, 4006, 4010, 4024
_GET_LOOKAHEAD = 4027
_MAX_PACKET = 4000
# Upper edge in Hz of what a packet codes, by its configuration number (RFC 6716, table 2).
_EDGES = 4 * (4000,) + 4 * (6000,) + 4 * (8000,) + 2 * (12000,) + 2 * (20000,)
_EDGES += 4 * (4000,) + 4 * (8000,) + 4 * (12000,) + 4 * (20000,)

NOISE_BANDS = 7
NOISE_BITS = 5
NOISE_STEP_DB = 3.0
NOISE_HOP = 480  # 10 ms
NOISE_BLOCK = 8  # frames of one set of levels: 7 * 5 bits every 80 ms are 0.44 kbps
NOISE_TOP_HZ = 20000

# kbps: sample rate. LAME 3.100's choice for mono: its lowpass at that bitrate, and the lowest rate that holds it.
_MP3_RATES = {8: 8000, 16: 16000, 24: 16000, 32: 22050, 40: 24000, 48: 32000, 56: 32000, 64: 44100}
_AAC_RATES = ((12, 12000), (16, 16000), (20, 22050), (28, 32000), (48, 44100))  # from kbps on
_VORBIS_RATES = (44100, 32000, 24000, 22050, 16000, 11025, 8000)
_VORBIS_LOWEST_KBPS = 12
_VORBIS_STEPS = 6
_ENCODEC_KBPS = (1.5, 3, 6, 12, 24)
_ENCODEC_WEIGHTS = "encodec_24khz-d7cc33bc.th"
_DAC_WEIGHTS = "weights_44khz_8kbps_0.0.1.pth"
_DAC_CODEBOOKS = 9
_DAC_KBPS = 44100 / 512 * 10 / 1000  # of one codebook


class Coded(NamedTuple):
    """Audio at the rate it came in, its cost in bytes and seconds; `file_bytes` counts a file's header in."""

    audio: Float[np.ndarray, " s"]
    payload_bytes: int
    encode_seconds: float
    decode_seconds: float
    file_bytes: int | None = None


class Coder(NamedTuple):
    """A coder at one setting.

    Attributes:
        name: Of family and setting, "opus_auto 12".
        family: The coder whose settings make one curve.
        kbps: What was asked for; what it takes is measured.
        version: Of the library or weights: the same version codes the same.
        code: See the module's docstring.
    """

    name: str
    family: str
    kbps: float
    version: str
    code: Callable[[Float[np.ndarray, " s"], int], Coded]


def find_baselines(kbps: Sequence[float], families: Sequence[str] = FAMILIES) -> tuple[list[Coder], list[str]]:
    """Return the coders that are installed, each at those of the bitrates that it has.

    Args:
        kbps: Bitrates to ask for.
        families: Of `FAMILIES`.

    Returns:
        The coders; and a line for each family that is left out, saying why.

    Raises:
        InputError: No such family.
    """
    coders, missing = [], []
    for family in families:
        if family not in FAMILIES:
            raise InputError(f"baseline {family!r}: choose of {', '.join(FAMILIES)}")
        version, reason = _version(family)
        settings = _SETTINGS.get(family, _all_rates)(kbps)
        if reason:
            missing.append(f"{family} is left out: {reason}")
        elif not settings:
            missing.append(f"{family} is left out: it has none of {', '.join(f'{k:g}' for k in kbps)} kbps")
        for rate, code in settings if not reason else []:
            coders.append(Coder(f"{family} {rate:g}", family, rate, version, code or _opus_coder(family, rate)))
    return coders, missing


################################################ Opus


def opus(
    audio: Float[np.ndarray, " s"],
    sample_rate: int,
    bitrate: float,
    signal: int | None = None,
    bandwidth: int | None = None,
    frame_ms: int = 20,
) -> tuple[Float32[np.ndarray, " n"], list[bytes], float, float]:
    """Code mono audio by libopus at 48 kHz.

    Args:
        audio: In [-1, 1].
        sample_rate: Hz.
        bitrate: kbps to ask for.
        signal: An OPUS_SIGNAL of opus_defines.h; None leaves it to the encoder.
        bandwidth: An OPUS_BANDWIDTH, likewise.
        frame_ms: 20, 40 or 60.

    Returns:
        Audio at 48 kHz, without the delay and as long as the input; the packets; seconds to encode and to decode.
    """
    library = _libopus()
    samples = _resampled(audio, sample_rate, OPUS_RATE)
    frame = OPUS_RATE * frame_ms // 1000
    error = ctypes.c_int()
    encoder = library.opus_encoder_create(OPUS_RATE, 1, _APPLICATION_AUDIO, ctypes.byref(error))
    decoder = library.opus_decoder_create(OPUS_RATE, 1, ctypes.byref(error))
    try:
        requests = {_SET_BITRATE: round(1000 * bitrate), _SET_VBR: 1, _SET_COMPLEXITY: 10}
        requests |= {_SET_SIGNAL: signal} if signal else {}
        requests |= {_SET_BANDWIDTH: bandwidth} if bandwidth else {}
        for request, value in requests.items():
            assert library.opus_encoder_ctl(encoder, request, ctypes.c_int(value)) == 0, request
        delay = ctypes.c_int()
        library.opus_encoder_ctl(encoder, _GET_LOOKAHEAD, ctypes.byref(delay))
        count = math.ceil((len(samples) + delay.value) / frame)
        padded = np.pad(samples, (0, count * frame - len(samples)))

        start, packets, buffer = time.perf_counter(), [], ctypes.create_string_buffer(_MAX_PACKET)
        for block in padded.reshape(count, frame):
            size = library.opus_encode_float(encoder, block.ctypes.data, frame, buffer, _MAX_PACKET)
            assert size > 0, size
            packets.append(buffer.raw[:size])
        encoded, decoded = time.perf_counter(), np.empty((count, frame), np.float32)
        for packet, block in zip(packets, decoded, strict=True):
            size = library.opus_decode_float(decoder, packet, len(packet), block.ctypes.data, frame, 0)
            assert size == frame, size
        done = time.perf_counter()
    finally:
        library.opus_encoder_destroy(encoder)
        library.opus_decoder_destroy(decoder)
    return decoded.ravel()[delay.value :][: len(samples)], packets, encoded - start, done - encoded


def fill_band(
    reference: Float[np.ndarray, " s"], decoded: Float[np.ndarray, " s"], edges: Float[np.ndarray, " l"]
) -> tuple[Float[np.ndarray, " s"], int]:
    """Add noise above the band of `decoded`, shaped as the reference is there; both at 48 kHz.

    Seven bands of equal ratio from the edge to 20 kHz, their powers in steps of 3 dB (5 bits each) every 80 ms; a fixed
    seed. A straw coder: it says how much of a metric is bandwidth.

    Args:
        reference: What the encoder sees.
        decoded: What the decoder has without it.
        edges: Upper edge in Hz of the decoded band, of each frame of 10 ms or of longer equal frames.

    Returns:
        The filled audio, and the bytes of the side information.
    """
    window = np.sin(np.pi * (np.arange(2 * NOISE_HOP) + 0.5) / (2 * NOISE_HOP))
    power = np.abs(_frames(reference, window)) ** 2 / (window @ window)
    noise = _frames(np.random.default_rng(0).standard_normal(len(reference)), window)
    hz = np.fft.rfftfreq(len(window), 1 / OPUS_RATE)
    blocks = math.ceil(len(power) / NOISE_BLOCK)
    gains, filled = np.zeros_like(power), 0
    for block in range(blocks):
        frames = slice(block * NOISE_BLOCK, (block + 1) * NOISE_BLOCK)
        here = slice(*(math.floor(at * len(edges) / blocks) for at in (block, block + 1)))
        edge = edges[here].max(initial=edges[min(here.start, len(edges) - 1)])
        if edge >= NOISE_TOP_HZ:
            continue
        filled += 1
        bounds = np.geomspace(edge, NOISE_TOP_HZ, NOISE_BANDS + 1)
        for low, high in zip(bounds, bounds[1:], strict=False):
            band = (hz >= low) & (hz < high)
            level = round(10 * math.log10(power[frames, band].mean() + 1e-12) / NOISE_STEP_DB)
            gains[frames, band] = 10 ** (max(level, 1 - 2**NOISE_BITS) * NOISE_STEP_DB / 20)  # at most full scale
    audio = decoded + _overlap_add(noise * gains, window, len(decoded))
    return audio, math.ceil(filled * NOISE_BANDS * NOISE_BITS / 8)


def _opus_coder(family: str, bitrate: float) -> Callable[[Float[np.ndarray, " s"], int], Coded]:
    options: dict[str, Any] = {
        "opus_60ms": {"frame_ms": 60},
        "opus_music": {"signal": _SIGNAL_MUSIC},
        "opus_fullband": {"bandwidth": _BANDWIDTH_FULLBAND},
    }.get(family, {})

    def code(audio: Float[np.ndarray, " s"], sample_rate: int) -> Coded:
        decoded, packets, encode_seconds, decode_seconds = opus(audio, sample_rate, bitrate, **options)
        size = sum(map(len, packets))
        if family == "opus_noise":
            edges = np.array([_EDGES[packet[0] >> 3] for packet in packets], np.float64)
            reference = _resampled(audio, sample_rate, OPUS_RATE)
            decoded, side = fill_band(reference, decoded, edges)
            size += side
        return Coded(_resampled(decoded, OPUS_RATE, sample_rate), size, encode_seconds, decode_seconds)

    return code


def _frames(audio: np.ndarray, window: np.ndarray) -> Complex[np.ndarray, "l f"]:
    """Half-overlapping frames, of which the first and the last reach half beyond the audio."""
    count = math.ceil(len(audio) / NOISE_HOP) + 1
    padded = np.pad(audio, (NOISE_HOP, (count + 1) * NOISE_HOP - len(audio) - NOISE_HOP))
    return np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, len(window))[::NOISE_HOP] * window)


def _overlap_add(spectra: np.ndarray, window: np.ndarray, samples: int) -> np.ndarray:
    frames = np.fft.irfft(spectra, len(window)) * window
    audio = np.zeros((len(frames) + 1) * NOISE_HOP)
    audio[:-NOISE_HOP] += frames[:, :NOISE_HOP].ravel()
    audio[NOISE_HOP:] += frames[:, NOISE_HOP:].ravel()
    return audio[NOISE_HOP:][:samples]


@functools.cache
def _libopus() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_libopus_path()))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.opus_encoder_create.restype = library.opus_decoder_create.restype = pointer
    library.opus_encoder_create.argtypes = [ctypes.c_int32, integer, integer, pointer]
    library.opus_decoder_create.argtypes = [ctypes.c_int32, integer, pointer]
    library.opus_encoder_destroy.argtypes = library.opus_decoder_destroy.argtypes = [pointer]
    library.opus_encoder_ctl.argtypes = [pointer, integer]  # the third is variadic, so not to be declared
    library.opus_encode_float.argtypes = [pointer, pointer, integer, pointer, ctypes.c_int32]
    library.opus_decode_float.argtypes = [pointer, ctypes.c_char_p, ctypes.c_int32, pointer, integer, integer]
    library.opus_get_version_string.restype = ctypes.c_char_p
    return library


def _libopus_path() -> Path | None:
    """The library in PyAV's wheel; None without PyAV, or with one that was built against the system's."""
    try:
        files = importlib.metadata.files("av") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(file.locate()) for file in files if "libopus" in file.name]
    return paths[0] if paths else None


################################################ ffmpeg and libsndfile


def _ffmpeg_coder(encoder: str, decoder: str, rate: int, bitrate: float, delay: int) -> Callable:
    """Code by packets of ffmpeg's libraries at `rate` Hz; `delay` samples of the decoder's output precede the audio."""

    def code(audio: Float[np.ndarray, " s"], sample_rate: int) -> Coded:
        import av

        samples = _resampled(audio, sample_rate, rate)
        writer = av.CodecContext.create(encoder, "w")
        writer.sample_rate, writer.layout, writer.format = rate, "mono", "fltp"
        writer.bit_rate, writer.thread_count = round(1000 * bitrate), 1
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        start = time.perf_counter()
        packets = [bytes(packet) for packet in (*writer.encode(frame), *writer.encode(None))]
        encoded = time.perf_counter()
        reader = av.CodecContext.create(decoder, "r")
        reader.extradata, reader.thread_count = writer.extradata, 1
        frames = [decoded for packet in packets for decoded in reader.decode(av.Packet(packet))]
        frames += reader.decode(None)
        done = time.perf_counter()
        decoded = np.concatenate([frame.to_ndarray()[0] for frame in frames])[delay:][: len(samples)]
        size = sum(map(len, packets))
        return Coded(_resampled(decoded, rate, sample_rate), size, encoded - start, done - encoded)

    return code


def _mp3_settings(kbps: Sequence[float]) -> list[tuple[float, Callable]]:
    delay = 576 + 529  # LAME's, and the decoder's
    return [(k, _ffmpeg_coder("libmp3lame", "mp3float", _MP3_RATES[k], k, delay)) for k in kbps if k in _MP3_RATES]


def _aac_settings(kbps: Sequence[float]) -> list[tuple[float, Callable]]:
    settings = []
    for k in kbps:
        rates = [rate for lowest, rate in _AAC_RATES if lowest <= k]
        settings += [(k, _ffmpeg_coder("aac", "aac", rates[-1], k, 1024))] if rates else []
    return settings


def _vorbis_settings(kbps: Sequence[float]) -> list[tuple[float, Callable]]:
    return [(k, functools.partial(_vorbis, k)) for k in kbps if k >= _VORBIS_LOWEST_KBPS]


def _vorbis(bitrate: float, audio: Float[np.ndarray, " s"], sample_rate: int) -> Coded:
    """At the highest sample rate that `bitrate` allows, the best quality of at most that; above it where none does."""
    limit = bitrate * 1000 / 8 * len(audio) / sample_rate
    for rate in _VORBIS_RATES:
        samples = _resampled(audio, sample_rate, rate)
        best = _write_vorbis(samples, rate, 0.0)
        if best[1] <= limit:
            break
    low, high = 0.0, 1.0
    for _ in range(_VORBIS_STEPS if best[1] <= limit else 0):
        middle = (low + high) / 2
        candidate = _write_vorbis(samples, rate, middle)
        if candidate[1] <= limit:
            low, best = middle, candidate
        else:
            high = middle
    file, size, seconds = best
    start = time.perf_counter()
    decoded, _ = soundfile.read(io.BytesIO(file), dtype="float32")
    return Coded(_resampled(decoded, rate, sample_rate), size, seconds, time.perf_counter() - start)


def _write_vorbis(samples: np.ndarray, rate: int, quality: float) -> tuple[bytes, int, float]:
    """An Ogg file, the bytes of its audio packets, and the seconds it took."""
    file, start = io.BytesIO(), time.perf_counter()
    soundfile.write(file, samples, rate, format="OGG", subtype="VORBIS", compression_level=1 - quality)
    seconds = time.perf_counter() - start
    sizes = ogg_packet_sizes(file.getvalue())
    return file.getvalue(), sum(sizes[3:]), seconds  # after identification, comments and codebooks


def ogg_packet_sizes(data: bytes) -> list[int]:
    """Return the sizes in bytes of the packets of an Ogg file with one stream (RFC 3533)."""
    sizes, at, open_size = [], 0, 0
    while at < len(data):
        assert data[at : at + 4] == b"OggS", at
        table = data[at + 27 : at + 27 + data[at + 26]]
        for lacing in table:
            open_size += lacing
            if lacing < 255:
                sizes.append(open_size)
                open_size = 0
        at += 27 + len(table) + sum(table)
    return sizes


################################################ Neural codecs


def _encodec_settings(kbps: Sequence[float]) -> list[tuple[float, Callable]]:
    return [(k, functools.partial(_encodec, k)) for k in kbps if k in _ENCODEC_KBPS]


def _encodec(bitrate: float, audio: Float[np.ndarray, " s"], sample_rate: int) -> Coded:
    import torch

    model = _encodec_model()
    model.set_target_bandwidth(bitrate)
    with torch.inference_mode():
        samples = torch.from_numpy(_resampled(audio, sample_rate, 24000))
        start = time.perf_counter()
        frames = model.encode(samples[None, None])
        encoded = time.perf_counter()
        decoded = model.decode(frames)[0, 0, : len(samples)].numpy()
        done = time.perf_counter()
    bits = 10 * sum(codes.numel() for codes, _ in frames)
    return Coded(_resampled(decoded, 24000, sample_rate), math.ceil(bits / 8), encoded - start, done - encoded)


@functools.cache
def _encodec_model() -> Any:
    import torch
    from encodec import EncodecModel

    torch.set_num_threads(1)
    return EncodecModel.encodec_model_24khz(repository=_encodec_weights().parent)


def _encodec_weights() -> Path:
    """Where PyTorch's hub, by which the package downloads, keeps the weights."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser() / "hub" / "checkpoints" / _ENCODEC_WEIGHTS


def _dac_settings(kbps: Sequence[float]) -> list[tuple[float, Callable]]:
    """The most codebooks within each bitrate, each number once."""
    kept = {min(_DAC_CODEBOOKS, int(k / _DAC_KBPS)) for k in kbps} - {0}
    return [(round(k * _DAC_KBPS, 1), functools.partial(_dac, k)) for k in sorted(kept)]


def _dac(num_codebooks: int, audio: Float[np.ndarray, " s"], sample_rate: int) -> Coded:
    import torch

    model = _dac_model()
    with torch.inference_mode():
        samples = _resampled(audio, sample_rate, 44100)
        padded = model.preprocess(torch.from_numpy(samples)[None, None], 44100)
        start = time.perf_counter()
        latents, codes, *_ = model.encode(padded, num_codebooks)
        encoded = time.perf_counter()
        decoded = model.decode(latents)[0, 0, : len(samples)].numpy()
        done = time.perf_counter()
    size = math.ceil(10 * codes.numel() / 8)
    return Coded(_resampled(decoded, 44100, sample_rate), size, encoded - start, done - encoded)


@functools.cache
def _dac_model() -> Any:
    import dac
    import torch

    torch.set_num_threads(1)
    return dac.DAC.load(_dac_weights()).eval()


def _dac_weights() -> Path:
    return Path.home() / ".cache" / "descript" / "dac" / _DAC_WEIGHTS


################################################ What is there


def _all_rates(kbps: Sequence[float]) -> list[tuple[float, None]]:
    return [(k, None) for k in kbps]


_SETTINGS: dict[str, Callable[[Sequence[float]], list]] = {
    "opus_60ms": lambda kbps: _all_rates([k for k in kbps if k <= 12]),
    "mp3": _mp3_settings,
    "aac": _aac_settings,
    "vorbis": _vorbis_settings,
    "encodec_24k": _encodec_settings,
    "dac_44k": _dac_settings,
}


def _resampled(audio: np.ndarray, rate: int, sample_rate: int) -> Float32[np.ndarray, " s"]:
    return soxr.resample(audio.astype(np.float32), rate, sample_rate, "HQ")


def _version(family: str) -> tuple[str, str]:
    """The version of what does the work, or else why it cannot be done."""
    if family == "vorbis":
        return f"libsndfile {soundfile.__libsndfile_version__}", ""
    package, weights = {"encodec_24k": ("encodec", _encodec_weights()), "dac_44k": ("dac", _dac_weights())}.get(
        family, ("av", None)
    )
    if importlib.util.find_spec(package) is None:
        extra = ' (pip install "meanflow_audio_codec[eval]")' if package == "av" else ""
        return "", f"{package} is not installed{extra}"
    if weights is not None:
        return weights.name, "" if weights.is_file() else f"its weights are not at {weights}"
    if family in OPUS_MODES:
        if _libopus_path() is None:
            return "", "this PyAV carries no libopus; its wheels do"
        return _libopus().opus_get_version_string().decode(), ""
    return f"PyAV {importlib.metadata.version('av')}", ""
