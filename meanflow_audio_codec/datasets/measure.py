"""What a file of audio holds, as opposed to what its header says.

Levels are in dB of full scale: a power of 1.0 is 0 dBFS, so a sine of full scale is -3.01 dBFS and
16-bit rounding with triangular dither is noise of -96.3 dBFS. Means run over samples and channels.

Bandwidth. Sixteen stretches of three half-overlapping windows of about 45 ms, spread evenly over the
file, give power spectra (4-term Blackman-Harris, side lobes at -92 dB). Of each bin we keep the
level that an eighth of the windows that sound exceed, at least two of them: a cymbal heard now and
then counts, a click does not. Let P(f) be the mean of that over the 400 Hz that begin at f. The
bandwidth is the lowest f above which P stays everywhere

- below white noise of -88 dBFS in all, or
- 38 dB below the largest P in the octave under f: a cliff, as low-pass filters leave and music does
  not. What codecs, shaped dither and poor resamplers put above it is then no content.

38 dB is from 132 real files: above 40 dB the faint bands that Opus leaves over wideband speech count
as content, below 37 dB some chiptunes, drums and bass lines lose their upper octaves. Where treble is
rare, other stretches would give a result some 1 to 2 kHz away. Filters gentler than about 38 dB an
octave are not seen, nor is upsampling by linear interpolation, whose images are strong.
"""

import contextlib
import dataclasses
import math
import os

import numpy as np
import soundfile
from jaxtyping import Float

from meanflow_audio_codec.errors import InputError

_STRETCHES = 16
_WINDOWS = 3  # a stretch, each half over the next
_SOUNDING_SHARE = 1 / 8
_NOISE_DBFS = -88.0
_CLIFF_DB = 38.0
_BAND_HZ = 400.0
_BLACKMAN_HARRIS = (0.35875, -0.48829, 0.14128, -0.01168)

_SILENCE_DBFS = -60.0
_SILENCE_SECONDS = 0.1
_BLOCK_STRETCHES = 10  # decoded at a time
_FULL_SCALE_16_BIT = 32767 / 32768


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the whole of a file decodes to.

    Attributes:
        sample_rate: Hz.
        channels: Channels in the file.
        format: Container, as libsndfile names it: "FLAC".
        subtype: Coding, as libsndfile names it: "PCM_16".
        frames: Decoded length in frames, equal to the announced one.
        peak: Largest magnitude; lossy and float files may exceed 1.0.
        rms_db: Level in dBFS, -inf where every sample is zero.
        silent_seconds: Sum of the stretches of 0.1 s, counted from the start, below -60 dBFS.
        clipped_share: Share of the samples at or beyond the largest 16-bit value, in [0, 1].
        not_finite: Samples that are NaN or infinite; the other figures take them for zero.
        bandwidth_hz: See `bandwidth`.
    """

    sample_rate: int
    channels: int
    format: str
    subtype: str
    frames: int
    peak: float
    rms_db: float
    silent_seconds: float
    clipped_share: float
    not_finite: int
    bandwidth_hz: float

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


def bandwidth(path: str | os.PathLike) -> float:
    """Return the highest frequency in Hz that the audio holds, 0.0 for silence.

    Reads about 1.5 s of the file, so takes 10 to 20 ms, and gives the same every time. See the
    module's docstring for the definition; at a sharp edge it is about 70 Hz too high.

    Raises:
        InputError: The file does not decode there or ends early.
    """
    with _open(path) as handle:
        return _bandwidth(handle)


def measure_file(path: str | os.PathLike) -> Measurement:
    """Decode a whole file, a second at a time, and measure it.

    Raises:
        InputError: The file does not decode, holds no audio or ends early.
    """
    with _open(path) as handle:
        if handle.frames == 0:
            raise InputError(f"{path} holds no audio: replace or remove the file")
        rate, channels = handle.samplerate, handle.channels
        stretch = max(1, round(_SILENCE_SECONDS * rate))
        silence = 10 ** (_SILENCE_DBFS / 10)
        peak = energy = 0.0
        frames = silent = clipped = not_finite = 0
        while frames < handle.frames:
            block = _read(handle, min(_BLOCK_STRETCHES * stretch, handle.frames - frames))
            powers, lengths = _stretch_powers(block, stretch)
            if not math.isfinite(powers.sum()):
                finite = np.isfinite(block)
                not_finite += block.size - int(np.count_nonzero(finite))
                block = np.where(finite, block, 0)
                powers, lengths = _stretch_powers(block, stretch)
            peak = max(peak, float(block.max()), -float(block.min()))
            if peak >= _FULL_SCALE_16_BIT:
                clipped += int(np.count_nonzero(np.abs(block) >= _FULL_SCALE_16_BIT))
            energy += float(powers @ lengths)
            silent += int(lengths[powers < silence].sum())
            frames += len(block)
        return Measurement(
            sample_rate=rate,
            channels=channels,
            format=handle.format,
            subtype=handle.subtype,
            frames=frames,
            peak=peak,
            rms_db=10 * math.log10(energy / frames) if energy > 0 else -math.inf,
            silent_seconds=silent / rate,
            clipped_share=clipped / (frames * channels),
            not_finite=not_finite,
            bandwidth_hz=_bandwidth(handle),
        )


@contextlib.contextmanager
def _open(path: str | os.PathLike):
    """Open a file; what libsndfile refuses, here or while it is read, is an InputError."""
    try:
        with soundfile.SoundFile(path) as handle:
            yield handle
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error))
        if "does not exist" in reason and os.path.exists(path):  # libsndfile's words for an MP3 without one frame
            reason = "Format not recognised."
        raise InputError(f"{path} does not decode ({reason}): replace or remove the file") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{os.fsencode(path)} is no name that libsndfile can open: rename the file") from error


def _read(handle: soundfile.SoundFile, frames: int) -> Float[np.ndarray, "s c"]:
    audio = handle.read(frames, dtype="float32", always_2d=True)
    if len(audio) == frames:
        return audio
    came, announced = handle.tell() / handle.samplerate, handle.frames / handle.samplerate
    remedy = "replace or remove the file"
    if handle.format == "MP3":  # without a Xing or Info header libsndfile guesses the length
        remedy += ", or if it plays to its end write its length: ffmpeg -i IN.mp3 -c copy OUT.mp3"
    raise InputError(f"{handle.name} ends early, after {came:.2f} of {announced:.2f} s: {remedy}")


def _stretch_powers(
    block: Float[np.ndarray, "s c"], stretch: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean power and length in frames of each stretch; the last may be shorter."""
    starts = np.arange(0, len(block), stretch)
    lengths = np.diff(np.append(starts, len(block))).astype(np.float64)
    energies = np.add.reduceat(np.einsum("sc,sc->s", block, block, dtype=np.float64), starts)
    return energies / (lengths * block.shape[1]), lengths


def _bandwidth(handle: soundfile.SoundFile) -> float:
    window_frames = min(2 ** round(math.log2(handle.samplerate / 22)), handle.frames)
    if window_frames < 16:  # a third of a millisecond holds no pitch
        return 0.0
    spectra = _spectra(handle, window_frames)
    noise = 10 ** (_NOISE_DBFS / 10)
    sounding = np.count_nonzero(spectra.sum(axis=1) > noise)
    exceeded_by = max(int(sounding * _SOUNDING_SHARE), min(2, len(spectra) // 4))
    rank = len(spectra) - 1 - exceeded_by
    spectrum = np.partition(spectra, rank, axis=0)[rank]

    bins = len(spectrum)
    bin_hz = handle.samplerate / window_frames
    first = np.arange(bins)
    stop = np.minimum(first + max(1, round(_BAND_HZ / bin_hz)), bins)
    sums = np.concatenate([[0.0], np.cumsum(spectrum)])
    bands = (sums[stop] - sums[first]) / (stop - first)
    above = np.append(np.maximum.accumulate(bands[::-1])[-2::-1], 0.0)
    octaves = np.stack([first // 2, first + 1], axis=1).ravel()
    octave_below = np.maximum.reduceat(np.append(bands, 0.0), octaves)[::2]
    floor = np.maximum(noise / (window_frames / 2), octave_below * 10 ** (-_CLIFF_DB / 10))
    return float(np.argmax(above < floor) * bin_hz) if bands.max() * window_frames / 2 > noise else 0.0


def _spectra(handle: soundfile.SoundFile, window_frames: int) -> Float[np.ndarray, "n f"]:
    """Power spectra of windows all over the file, the bins of one sum to its mean power."""
    hop = window_frames // 2
    windows = min(_WINDOWS, 1 + (handle.frames - window_frames) // hop)
    length = window_frames + (windows - 1) * hop
    stretches = min(_STRETCHES, handle.frames // length)
    phase = 2 * np.pi * np.arange(window_frames) / window_frames
    shape = sum(a * np.cos(k * phase) for k, a in enumerate(_BLACKMAN_HARRIS)).astype(np.float32)
    spectra = []
    for start in ((2 * i + 1) * handle.frames // (2 * stretches) - length // 2 for i in range(stretches)):
        if handle.format == "OGG":
            handle.seek(0)  # see the docstring of datasets.audio
        handle.seek(start)
        audio = _read(handle, length)
        audio = np.where(np.isfinite(audio), audio, 0)
        for offset in range(0, windows * hop, hop):
            window = audio[offset : offset + window_frames]
            transform = np.fft.rfft((window - window.mean(axis=0)) * shape[:, None], axis=0)
            spectra.append(np.square(np.abs(transform), dtype=np.float64).mean(axis=1))
    return np.stack(spectra) * 2 / (window_frames * float(shape @ shape))
