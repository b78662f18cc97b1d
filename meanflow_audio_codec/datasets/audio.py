"""Audio files of a folder: scan once, then read any stretch of any of them by seek.

Positions and lengths inside a file are frames (one sample for each channel) at the file's own rate.
A crop is float32 [samples, channels], channels last, full scale 1.0; lossy files may decode above.

Decoding is libsndfile's, through `soundfile`. What a seek returns must be a function of (file,
start) alone, or training would not resume exactly, and with open handles that takes care:

- Ogg: a used handle is off by up to full scale after some seeks (libsndfile issue 885); one that
  went to frame 0 first equals a fresh one. Within the last page both may start up to one block
  off, the same every time.
- MP3: the decoder's rounding depends on how many frames the handle has decoded, so each read opens
  the file, which costs about 2 ms for each minute of it. The remedy is `decoded_cache`.

A file that is not what the scan found is never read: its size and modification time are compared
before every read, which costs a microsecond or two.

Resampling is `soxr`, quality HQ (linear phase, 20 bits).
"""

import collections
import dataclasses
import logging
import math
import os
import threading
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float
from tqdm import tqdm

from meanflow_audio_codec.datasets.measure import bandwidth
from meanflow_audio_codec.errors import InputError

log = logging.getLogger(__name__)

FORMATS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_TAIL_FRAMES = 64
_MAX_HANDLES = 128  # of the process; macOS allows 256 open files
# Half the length of soxr's HQ filter is about 100 samples at the lower of the two rates.
_FILTER_SAMPLES = 128


@dataclasses.dataclass(frozen=True)
class AudioFile:
    """One decodable file as the scan found it.

    Attributes:
        path: The file.
        sample_rate: Hz.
        channels: Channels in the file.
        frames: Length in frames at `sample_rate`.
        size: Bytes.
        mtime_ns: Modification time, ns.
        name: Path below the scanned folder with forward slashes: the same wherever the folder lies.
        bandwidth: Hz, as `measure.bandwidth` finds it; None where the scan was not asked for it.
    """

    path: str
    sample_rate: int
    channels: int
    frames: int
    size: int
    mtime_ns: int
    name: str
    bandwidth: float | None = None

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


def scan_folder(
    data_dir: str | os.PathLike,
    *,
    known: Mapping[str, AudioFile] | None = None,
    bad_files: str = "error",
    measure_bandwidth: bool = False,
) -> list[AudioFile]:
    """List the audio files below a folder, after decoding the head and the last frames of each.

    Args:
        data_dir: Folder, searched with its subfolders (links followed) for `FORMATS`.
            Names that begin with a dot are left out.
        known: Files of an earlier scan by name: those whose size and modification time agree are
            not opened again.
        bad_files: "error", or "skip" to leave out, with a warning, the files that do not decode.
        measure_bandwidth: Also fill in `AudioFile.bandwidth`, at about 15 ms a file.

    Returns:
        The files, sorted by `name`.

    Raises:
        InputError: No such folder, no audio in it, or files that do not decode.
    """
    if bad_files not in ("error", "skip"):
        raise InputError(f"input.bad_files={bad_files!r}: choose 'error' or 'skip'")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise InputError(
            f"input.data_dir or input.valid_dir: {data_dir} is not a folder; name one with {', '.join(FORMATS)} files"
        )
    names, known = find_audio(root), known or {}
    probe = lambda name: _probe(root, name, known.get(name), measure_bandwidth)
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        probed = list(tqdm(pool.map(probe, names), f"scan {root.name}", len(names), delay=3, leave=False, disable=None))
    files = [result for result in probed if isinstance(result, AudioFile)]
    _report_bad([result for result in probed if isinstance(result, str)], root, bad_files)
    if not files:
        raise InputError(
            f"input.data_dir or input.valid_dir: {data_dir} holds no audio; put {', '.join(FORMATS)} files in it"
        )
    return files


def difference(file: AudioFile) -> str | None:
    """Return how the file on disk differs from the scanned one ("is gone", "has changed"), None where it does not."""
    try:
        stat = os.stat(file.path)
    except OSError as error:
        return "is gone" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return None if (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns) else "has changed"


def check_unchanged(file: AudioFile) -> None:
    """Raise InputError if the file on disk is not the scanned one."""
    if changed := difference(file):
        raise InputError(f"{file.path} {changed} since it was scanned: put it back")


def read_crop(file: AudioFile, start: int, frames: int) -> Float[np.ndarray, "s c"]:
    """Read `frames` frames from frame `start`, all channels, at the file's own rate.

    Raises:
        InputError: The file cannot be read there, ends early or holds values that are not finite.
    """
    check_unchanged(file)
    where = f"{file.path}: frames {start} to {start + frames} of {file.frames}"
    try:
        handle = _handles.take(file)
        if handle.format == "OGG":
            handle.seek(0)  # see the module's docstring; nothing is read
        handle.seek(start)
        audio = handle.read(frames, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise InputError(f"{where} do not decode ({error}): replace the file") from error
    if len(audio) < frames:
        raise InputError(f"{where}: only {len(audio)} came, so it is damaged: replace the file")
    if not math.isfinite(np.einsum("sc,sc->", audio, audio)):
        raise InputError(f"{where} hold values that are not finite: replace the file")
    if handle.format != "MP3":
        _handles.give_back(file, handle)
    return audio


def load_crop(
    file: AudioFile, start: int, *, sample_rate: int, segment_samples: int, channels: int
) -> Float[np.ndarray, "{segment_samples} {channels}"]:
    """Read a segment at another rate and channel count; past the file's end it is zeros.

    At the file's own rate and channel count the samples are the file's, bit for bit. Otherwise
    sample k is at start / file.sample_rate + k / sample_rate seconds, as in the resampled file.

    Args:
        file: A scanned file.
        start: First frame, counted at the file's own rate.
        sample_rate: Hz wanted.
        segment_samples: Samples wanted.
        channels: 1 takes the mean of the file's channels, 2 doubles a mono file.

    Raises:
        InputError: See `read_crop` and `check_channels`.
    """
    check_channels(file, channels)
    if file.sample_rate == sample_rate:
        return _set_channels(_read_padded(file, start, start + segment_samples), channels)
    divisor = math.gcd(file.sample_rate, sample_rate)
    step = file.sample_rate // divisor  # so many frames are a whole number of output samples
    blocks = math.ceil(_FILTER_SAMPLES * max(1.0, file.sample_rate / sample_rate) / step)
    stop = start + source_frames(file, sample_rate, segment_samples)
    audio = _set_channels(_read_padded(file, start - blocks * step, stop + blocks * step), channels)
    skip = blocks * sample_rate // divisor
    return soxr.resample(audio, file.sample_rate, sample_rate, "HQ")[skip : skip + segment_samples]


def source_frames(file: AudioFile, sample_rate: int, segment_samples: int) -> int:
    """Frames of the file that `segment_samples` samples at `sample_rate` span."""
    return -(-segment_samples * file.sample_rate // sample_rate)


def check_channels(file: AudioFile, channels: int) -> None:
    """Raise InputError unless the file can be given `channels` channels."""
    if channels not in (1, 2):
        raise InputError(f"input.channels={channels}: choose 1 (mean of the channels) or 2")
    if channels < file.channels and channels != 1:
        raise InputError(
            f"{file.path} has {file.channels} channels: set input.channels=1 (their mean) or remove the file"
        )


def find_audio(root: Path, formats: tuple[str, ...] = FORMATS) -> list[str]:
    """Return the names below root with a suffix of `formats`, sorted; a folder linked into itself is visited once."""
    names, visited = [], set()
    for folder, subfolders, entries in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for entry in entries:
            # Dot files: macOS leaves a ._song.mp3, which is no audio, beside song.mp3.
            if entry.lower().endswith(formats) and not entry.startswith("."):
                names.append(Path(folder, entry).relative_to(root).as_posix())
    return sorted(names)


def _probe(root: Path, name: str, known: AudioFile | None, measure_bandwidth: bool) -> AudioFile | str:
    """The file's properties, or why it does not decode; a truncated FLAC fails only at its tail."""
    file = known and dataclasses.replace(known, path=str(root / name))
    if file is None or difference(file):
        file = _open(root / name, name)
    if measure_bandwidth and isinstance(file, AudioFile) and file.bandwidth is None:
        file = dataclasses.replace(file, bandwidth=bandwidth(file.path))
    return file


def _open(path: Path, name: str) -> AudioFile | str:
    try:
        stat = path.stat()
        with soundfile.SoundFile(path) as handle:
            rate, channels, frames = handle.samplerate, handle.channels, handle.frames
            # An MP3 without a Xing header has its length guessed from its size, up to 0.1 s too long.
            spare = rate // 5 if handle.format == "MP3" else 0
            start = max(0, frames - spare - _TAIL_FRAMES)
            handle.seek(start)
            decoded = start + len(handle.read(spare + _TAIL_FRAMES, dtype="float32", always_2d=True))
    except soundfile.SoundFileError as error:
        return f"{name} ({getattr(error, 'error_string', error)})"
    except OSError as error:  # a dangling link, no permission
        return f"{name} ({error.strerror})"
    except UnicodeEncodeError:
        return f"{name!a} (its name is not UTF-8)"
    if decoded == start or decoded < frames - spare:
        return f"{name} (no audio at its end)"
    return AudioFile(str(path), rate, channels, decoded, stat.st_size, stat.st_mtime_ns, name)


def _report_bad(bad: list[str], root: Path, bad_files: str) -> None:
    if not bad:
        return
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    message = f"{len(bad)} of the files in {root} do not decode: {', '.join(bad[:5])}{more}"
    if bad_files == "error":
        raise InputError(f"{message}; remove them or set input.bad_files=skip")
    log.warning("%s; left out", message)


class _Handles:
    """Idle open files, least recently used first. A thread takes one out while it reads from it."""

    def __init__(self):
        self._idle = collections.OrderedDict()
        self._lock = threading.Lock()

    def take(self, file: AudioFile) -> soundfile.SoundFile:
        with self._lock:
            handle = self._idle.pop(file, None)
        return soundfile.SoundFile(file.path) if handle is None else handle

    def give_back(self, file: AudioFile, handle: soundfile.SoundFile) -> None:
        with self._lock:
            self._idle[file] = handle
            if len(self._idle) > _MAX_HANDLES:
                self._idle.popitem(last=False)  # closed with its last reference


_handles = _Handles()


def _read_padded(file: AudioFile, start: int, stop: int) -> Float[np.ndarray, "s c"]:
    """Frames start to stop, with zeros where they lie outside the file."""
    first, last = max(0, start), min(stop, file.frames)
    audio = read_crop(file, first, last - first)
    if (first, last) == (start, stop):
        return audio
    return np.pad(audio, ((first - start, stop - last), (0, 0)))


def _set_channels(audio: Float[np.ndarray, "s any"], channels: int) -> Float[np.ndarray, "s c"]:
    if audio.shape[1] == channels:
        return audio
    if channels == 1:
        return audio.mean(axis=1, keepdims=True)
    return np.repeat(audio, channels, axis=1)
