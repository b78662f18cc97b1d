"""Audio files of a folder: scan once, then read any stretch of any of them by seek.

Positions and lengths inside a file are frames (one sample for each channel) at the file's own rate.
A crop is float32 [samples, channels], channels last, full scale 1.0; lossy files may decode above.

Decoding is libsndfile's, through `soundfile`. What a seek returns must be a function of (file,
start) alone, or training would not resume exactly, and with open handles that takes care:

- Ogg: a used handle is off by up to full scale after some seeks (libsndfile issue 885); one that
  went to frame 0 first equals a fresh one. Within the last page both may start up to one block
  off, the same every time.
- MP3: the decoder's rounding depends on how many frames the handle has decoded, so each read opens
  the file, which costs about 2 ms for each minute of it. Hour-long MP3s are better turned to FLAC.

Resampling is `soxr`, quality HQ (linear phase, 20 bits).
"""

import collections
import dataclasses
import hashlib
import json
import logging
import math
import os
import threading
from concurrent import futures
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from meanflow_audio_codec.errors import InputError

FORMATS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_TAIL_FRAMES = 64
_MAX_HANDLES = 32  # for each thread
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
    """

    path: str
    sample_rate: int
    channels: int
    frames: int
    size: int
    mtime_ns: int
    name: str

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


def scan_folder(
    data_dir: str | os.PathLike,
    manifest: str | os.PathLike | None = None,
    *,
    bad_files: str = "error",
) -> list[AudioFile]:
    """List the audio files below a folder, after decoding the head and the last frames of each.

    Args:
        data_dir: Folder, searched with its subfolders (links followed) for `FORMATS`.
            Names that begin with a dot are left out.
        manifest: JSON-lines file that remembers the scan: a file whose path, size and modification
            time agree is not opened again. It need not exist; `write_manifest` makes it.
        bad_files: "error", or "skip" to leave out, with a warning, the files that do not decode.

    Returns:
        The files, sorted by `name`.

    Raises:
        InputError: No such folder, no audio in it, files that do not decode, or a damaged manifest.
    """
    if bad_files not in ("error", "skip"):
        raise InputError(f"input.bad_files={bad_files!r}: choose 'error' or 'skip'")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise InputError(
            f"input.data_dir or input.valid_dir: {data_dir} is not a folder; name one with {', '.join(FORMATS)} files"
        )
    found = _find(root)
    known = {} if manifest is None else _read_manifest(Path(manifest), root)
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        probed = list(pool.map(lambda name: _probe(root, name, known.get(name)), found))
    files = [result for result in probed if isinstance(result, AudioFile)]
    _report_bad([result for result in probed if isinstance(result, str)], root, bad_files)
    if not files:
        raise InputError(
            f"input.data_dir or input.valid_dir: {data_dir} holds no audio; put {', '.join(FORMATS)} files in it"
        )
    return files


def write_manifest(manifest: str | os.PathLike, files: list[AudioFile]) -> None:
    """Remember a scan in `manifest`, a JSON-lines file, atomically."""
    manifest = Path(manifest)
    entries = [dataclasses.asdict(file) for file in files]
    for entry in entries:
        del entry["path"]  # the folder may move; names stay
    manifest.parent.mkdir(parents=True, exist_ok=True)
    partial = manifest.with_name(f"{manifest.name}.{os.getpid()}.tmp")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    os.replace(partial, manifest)


def read_crop(file: AudioFile, start: int, frames: int) -> Float[np.ndarray, "s c"]:
    """Read `frames` frames from frame `start`, all channels, at the file's own rate.

    Raises:
        InputError: The file cannot be read there, ends early or holds values that are not finite.
    """
    where = f"{file.path}: frames {start} to {start + frames} of {file.frames}"
    try:
        handle = _handle(file)
        handle.seek(0)  # see the module's docstring; nothing is read
        handle.seek(start)
        audio = handle.read(frames, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise InputError(f"{where} do not decode ({error}): replace or remove the file") from error
    if len(audio) < frames:
        raise InputError(f"{where}: only {len(audio)} came, so it changed or is damaged: scan again or remove it")
    if not np.isfinite(audio).all():
        raise InputError(f"{where} hold values that are not finite: replace or remove the file")
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


def split_files(files: list[AudioFile], valid_fraction: float) -> tuple[list[AudioFile], list[AudioFile]]:
    """Split into training and validation files by the SHA-256 of their names.

    Names decide, neither order nor place nor a seed, so every process and every rerun agrees. Two
    files or more give at least one to each side; a single file serves, with a warning, as both.

    Args:
        files: Scanned files.
        valid_fraction: Share of the files, in [0, 1).

    Returns:
        Training files and validation files, each in the order given.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise InputError(f"input.valid_fraction={valid_fraction}: choose a share from 0 to below 1")
    if len(files) == 1:
        logging.warning("%s is the only file: it serves training and validation", files[0].path)
        return list(files), list(files)
    count = min(max(1, round(valid_fraction * len(files))), len(files) - 1)
    ranked = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    chosen = {file.name for file in ranked[:count]}
    train = [file for file in files if file.name not in chosen]
    return train, [file for file in files if file.name in chosen]


def _find(root: Path) -> list[str]:
    """Names of the candidates below root, sorted; a folder linked into itself is visited once."""
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
            if entry.lower().endswith(FORMATS) and not entry.startswith("."):
                names.append(Path(folder, entry).relative_to(root).as_posix())
    return sorted(names)


def _probe(root: Path, name: str, known: AudioFile | None) -> AudioFile | str:
    """The file's properties, or why it does not decode; a truncated FLAC fails only at its tail."""
    path = root / name
    stat = path.stat()
    if known is not None and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return known
    try:
        with soundfile.SoundFile(path) as handle:
            frames = handle.frames
            handle.seek(max(0, frames - _TAIL_FRAMES))
            tail = handle.read(_TAIL_FRAMES, dtype="float32", always_2d=True)
            rate, channels = handle.samplerate, handle.channels
    except soundfile.SoundFileError as error:
        return f"{name} ({getattr(error, 'error_string', error)})"
    if len(tail) == 0 or len(tail) != min(frames, _TAIL_FRAMES):
        return f"{name} (no audio at its end)"
    return AudioFile(str(path), rate, channels, frames, stat.st_size, stat.st_mtime_ns, name)


def _report_bad(bad: list[str], root: Path, bad_files: str) -> None:
    if not bad:
        return
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    message = f"{len(bad)} of the files in {root} do not decode: {', '.join(bad[:5])}{more}"
    if bad_files == "error":
        raise InputError(f"{message}; remove them or set input.bad_files=skip")
    logging.warning("%s; left out", message)


def _read_manifest(manifest: Path, root: Path) -> dict[str, AudioFile]:
    if not manifest.exists():
        return {}
    try:
        entries = [json.loads(line) for line in manifest.read_text().splitlines()]
        return {entry["name"]: AudioFile(path=str(root / entry["name"]), **entry) for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{manifest} is no manifest of audio files ({error}): delete it") from error


class _Handles(threading.local):
    """Open files of one thread, least recently used first."""

    def __init__(self):
        self.opened = collections.OrderedDict()


_handles = _Handles()


def _handle(file: AudioFile) -> soundfile.SoundFile:
    opened = _handles.opened
    if file in opened:
        opened.move_to_end(file)
        return opened[file]
    handle = soundfile.SoundFile(file.path)
    if handle.format != "MP3":  # see the module's docstring; closed with its last reference
        opened[file] = handle
        if len(opened) > _MAX_HANDLES:
            opened.popitem(last=False)[1].close()
    return handle


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
