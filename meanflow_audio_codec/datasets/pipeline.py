"""The Grain chain from audio files or synthetic music to batches, and the fixed evaluation clips.

    file numbers ▶ shuffle ▶ repeat ▶ mix folders ▶ random crop ▶ gain, polarity ▶ shard ▶ batch ▶ threads, processes

An epoch visits a file once for every whole segment in it, at random positions, so that files count
by their length. Each crop's randomness is a function of (seed, place in the stream): the iterator's
state is one number, and batches come back bit for bit from it with any number of threads. Worker
processes give the same batches, but their state fits that number of processes only. No TensorFlow.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags
from jaxtyping import Float

from meanflow_audio_codec.datasets.audio import AudioFile, check_channels, load_crop, scan_folder, source_frames
from meanflow_audio_codec.datasets.decoded_cache import DecodedCache
from meanflow_audio_codec.datasets.synthetic import SyntheticMusic
from meanflow_audio_codec.errors import InputError

log = logging.getLogger(__name__)

_SILENCE_TRIES = 5
_BAD_FILE_TRIES = 10
# Beyond the 32 bits of a training seed, so that no training clip is ever an evaluation clip.
_EVAL_SEED = 2**32
_EVAL_SILENCE_DB = -60.0

Folder = str | os.PathLike | list[AudioFile]


def build_audio_pipeline(
    *,
    data_dir: str | os.PathLike | Sequence[Folder] | None,
    sample_rate: int,
    segment_samples: int,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
    channels: int = 1,
    gain_db: tuple[float, float] = (0.0, 0.0),
    polarity: bool = True,
    silence_db: float = -60.0,
    min_seconds: float = 0.0,
    min_bandwidth: float = 0.0,
    short_files: str = "error",
    bad_files: str = "error",
    cache_dir: str | os.PathLike = "",
    read_threads: int = 2,
    read_processes: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.IterDataset:
    """Build the endless training stream of {"audio": float32 [b, s, c]}.

    No sample exceeds 1 in magnitude: a crop whose peak would is scaled down to it.

    Args:
        data_dir: A folder of audio, or several; each may also be given as its scanned files. None
            is synthetic music.
        sample_rate: Hz.
        segment_samples: Samples of a crop.
        batch_size: Crops of a batch, of this shard.
        seed: From 0 to 2**32 - 1; decides order, crops and augmentation.
        weights: Share of each folder in the crops, up to a common factor; none: by their duration.
        channels: 1 or 2; see `audio.load_crop`.
        gain_db: Range in dB of the random gain, uniform.
        polarity: Flip the sign of half of the crops.
        silence_db: A crop with less RMS, dB re full scale, is drawn again up to four times.
        min_seconds: Leave out shorter files.
        min_bandwidth: Leave out files that hold nothing above so many Hz, see `measure.bandwidth`.
        short_files: What to do with files below one segment: "error", "pad" (zeros) or "skip".
        bad_files: What to do with files that do not decode, at the scan or at a crop, or that are
            gone or changed by then: "error", or "skip" to name them in the log and draw others.
        cache_dir: Folder of a `DecodedCache`; empty: every crop is decoded from its file.
        read_threads: Threads that read ahead, one batch each; 0 reads in the caller's thread.
        read_processes: Processes that read ahead, each with `read_threads`; 0 for none.
        shard_index: This process, from 0.
        shard_count: Processes that share the stream: batch k of shard i holds the crops of the
            unsharded stream whose place is i modulo `shard_count`.

    Raises:
        InputError: A wrong field, or a file too short or with too many channels.
    """
    _check_fields(batch_size, seed, gain_db, read_threads, read_processes, shard_index, shard_count)
    _check_segment(sample_rate, segment_samples, channels)
    if data_dir is None:
        music = SyntheticMusic(sample_rate, segment_samples, channels, seed)
        stream = grain.MapDataset.source(music).seed(seed).repeat()
    else:
        scan = lambda folder: scan_folder(folder, bad_files=bad_files, measure_bandwidth=min_bandwidth > 0)
        select = lambda files: select_files(
            files,
            sample_rate=sample_rate,
            segment_samples=segment_samples,
            channels=channels,
            min_seconds=min_seconds,
            min_bandwidth=min_bandwidth,
            short_files=short_files,
        )
        given = [data_dir] if isinstance(data_dir, str | os.PathLike) else data_dir
        folders = [select(folder if isinstance(folder, list) else scan(folder)) for folder in given]
        files = [file for folder in folders for file in folder]
        cache = _make_cache(cache_dir, files, sample_rate, channels)
        crops = _Crops(sample_rate, segment_samples, channels, silence_db, cache)
        stream = _mix(folders, weights, sample_rate, segment_samples, seed).random_map(_Draw(files, crops, bad_files))

    # Sharding comes after the random maps: they count places in the whole stream, so that no two
    # shards draw the same numbers.
    stream = stream.random_map(_Augment(gain_db, polarity)).slice(slice(shard_index, None, shard_count))
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
    batches = stream.batch(batch_size, drop_remainder=True).to_iter_dataset(options)
    if read_processes:
        if not flags.FLAGS.is_parsed():  # Grain asks absl for a flag before it starts its processes
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=read_processes))
    return batches


def eval_clips(
    *,
    files: list[AudioFile] | None,
    sample_rate: int,
    segment_samples: int,
    num_clips: int,
    channels: int,
    seed: int,
) -> tuple[Float[np.ndarray, "{num_clips} {segment_samples} {channels}"], list[str]]:
    """Cut the fixed clips on which reconstructions are judged, from as many files as there are.

    A function of its arguments alone. Nothing is augmented; peaks above 1 are scaled down to 1,
    short files are padded with zeros, and silence is avoided as in training.

    Returns:
        The clips, and for each the file's name and its position there in seconds.

    Raises:
        InputError: A wrong field, or a file with too many channels.
    """
    _check_segment(sample_rate, segment_samples, channels)
    if num_clips < 1:
        raise InputError(f"evals num_clips={num_clips}: choose 1 or more")
    if files is None:
        music = SyntheticMusic(sample_rate, segment_samples, channels, _EVAL_SEED + seed)
        clips = [music[i] for i in range(num_clips)]
        return np.stack(clips), [f"synthetic {i}" for i in range(num_clips)]
    files = select_files(
        files, sample_rate=sample_rate, segment_samples=segment_samples, channels=channels, short_files="pad"
    )
    crops = _Crops(sample_rate, segment_samples, channels, _EVAL_SILENCE_DB, None)
    order = np.random.default_rng(seed).permutation(len(files))
    clips, names = [], []
    for i in range(num_clips):
        file = files[order[i % len(files)]]
        audio, seconds = crops.draw(file, np.random.default_rng([seed, i]))
        clips.append(_limit_peak(audio))
        names.append(f"{file.name}@{seconds:.2f}s")
    return np.stack(clips), names


def select_files(
    files: list[AudioFile],
    *,
    sample_rate: int,
    segment_samples: int,
    channels: int,
    min_seconds: float = 0.0,
    min_bandwidth: float = 0.0,
    short_files: str = "error",
) -> list[AudioFile]:
    """Return the files to draw from, in order of their names, logging how many are left out and why.

    The arguments are those of `build_audio_pipeline`.

    Raises:
        InputError: A file too short or with too many channels, none left, or a bandwidth that the scan did not measure.
    """
    if min_bandwidth > 0 and any(file.bandwidth is None for file in files):
        raise InputError(f"input.min_bandwidth={min_bandwidth:g}: scan the files with measure_bandwidth=True")
    if short_files not in ("error", "pad", "skip"):
        raise InputError(f"input.short_files={short_files!r}: choose 'error', 'pad' or 'skip'")
    needed = segment_samples / sample_rate
    files = _leave_out(files, lambda file: file.duration < min_seconds, f"shorter than {min_seconds:g} s")
    files = _leave_out(
        files,
        lambda file: min_bandwidth > 0 and file.bandwidth < min_bandwidth,
        f"without anything above {min_bandwidth:g} Hz",
    )
    is_short = lambda file: file.frames < source_frames(file, sample_rate, segment_samples)
    if short_files == "skip":
        files = _leave_out(files, is_short, f"shorter than a segment of {needed:.3f} s")
    for file in files:
        check_channels(file, channels)
        if short_files == "error" and is_short(file):
            raise InputError(
                f"{file.path} lasts {file.duration:.3f} s, a segment {needed:.3f} s "
                f"({sum(map(is_short, files))} such files): set --config.input.short_files=pad or skip"
            )
    if not files:
        raise InputError(
            f"input.data_dir: no file is left of those given; a segment has {needed:.3f} s: add longer files, set "
            "--config.input.short_files=pad, or lower input.min_seconds or input.min_bandwidth"
        )
    return sorted(files, key=lambda file: file.name)


def segments_per_epoch(folders: list[list[AudioFile]], sample_rate: int, segment_samples: int) -> int:
    """Return the number of crops after which the stream has visited every file as often as its length asks."""
    return sum(len(_Segments(files, sample_rate, segment_samples)) for files in folders)


class _Segments:
    """The files' numbers, from `first` on, each as often as whole segments fit into the file, at least once."""

    def __init__(self, files: list[AudioFile], sample_rate: int, segment_samples: int, first: int = 0):
        counts = [file.duration * sample_rate / segment_samples for file in files]
        self._ends = np.cumsum([max(1, math.floor(count)) for count in counts])
        self._first = first

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> int:
        return self._first + int(np.searchsorted(self._ends, index, side="right"))


def _mix(
    folders: list[list[AudioFile]], weights: Sequence[float], sample_rate: int, segment_samples: int, seed: int
) -> grain.MapDataset:
    """The endless stream of file numbers."""
    if weights and (len(weights) != len(folders) or min(weights) <= 0):
        raise InputError(f"input.weights={tuple(weights)}: give {len(folders)} numbers above 0, one for each folder")
    firsts = np.cumsum([0] + [len(files) for files in folders])
    sources = [
        _Segments(files, sample_rate, segment_samples, first)
        for files, first in zip(folders, firsts.tolist(), strict=False)
    ]
    streams = [grain.MapDataset.source(source).seed(seed).shuffle().repeat() for source in sources]
    return grain.MapDataset.mix(streams, weights or [len(source) for source in sources])


@dataclasses.dataclass(frozen=True)
class _Crops:
    """Random segments in one format, of any file."""

    sample_rate: int
    segment_samples: int
    channels: int
    silence_db: float
    cache: DecodedCache | None

    def draw(self, file: AudioFile, rng: np.random.Generator) -> tuple[Float[np.ndarray, "s c"], float]:
        """Return a segment from anywhere in the file, and its place in seconds; the fifth try may be silent."""
        if self.cache is None:
            rate = file.sample_rate
            last = file.frames - source_frames(file, self.sample_rate, self.segment_samples)
        else:
            rate = self.sample_rate
            last = self.cache.num_samples(file) - self.segment_samples
        for _ in range(_SILENCE_TRIES if last > 0 else 1):
            start = int(rng.integers(max(0, last) + 1))
            audio = self._load(file, start)
            if np.einsum("sc,sc->", audio, audio) >= audio.size * 10.0 ** (self.silence_db / 10.0):
                break
        return audio, start / rate

    def _load(self, file: AudioFile, start: int) -> Float[np.ndarray, "s c"]:
        if self.cache is not None:
            return self.cache.read(file, start, self.segment_samples)
        return load_crop(
            file,
            start,
            sample_rate=self.sample_rate,
            segment_samples=self.segment_samples,
            channels=self.channels,
        )


@dataclasses.dataclass(frozen=True)
class _Draw:
    """From a file's number to a crop of it, or of another file where that one has gone bad and may be skipped."""

    files: list[AudioFile]
    crops: _Crops
    bad_files: str
    lost: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, number: int, rng: np.random.Generator) -> Float[np.ndarray, "s c"]:
        for _ in range(_BAD_FILE_TRIES):
            file = self.files[number]
            try:
                return self.crops.draw(file, rng)[0]
            except InputError as error:
                if self.bad_files == "error":
                    raise InputError(f"{error}, or set input.bad_files=skip") from error
                if file.path not in self.lost:
                    self.lost.add(file.path)
                    log.warning("%s; drawing from other files (%d lost so far)", error, len(self.lost))
                last_error = error
            number = int(rng.integers(len(self.files)))
        raise InputError(f"{_BAD_FILE_TRIES} files drawn in a row cannot be read, the last: {last_error}")


@dataclasses.dataclass(frozen=True)
class _Augment:
    """Random gain and sign."""

    gain_db: tuple[float, float]
    polarity: bool

    def __call__(self, audio: Float[np.ndarray, "s c"], rng: np.random.Generator) -> dict[str, np.ndarray]:
        gain = 10.0 ** (rng.uniform(*self.gain_db) / 20.0)
        sign = -1.0 if self.polarity and rng.random() < 0.5 else 1.0
        audio *= np.float32(sign * gain)
        return {"audio": _limit_peak(audio)}


def _make_cache(cache_dir, files: list[AudioFile], sample_rate: int, channels: int) -> DecodedCache | None:
    if not os.fspath(cache_dir):
        return None
    cache = DecodedCache(str(Path(cache_dir).expanduser().absolute()), sample_rate, channels)
    cache.check_room(files)
    return cache


def _leave_out(files: list[AudioFile], is_unfit, reason: str) -> list[AudioFile]:
    fit = [file for file in files if not is_unfit(file)]
    if len(fit) < len(files):
        log.warning("%d of %d files left out: %s", len(files) - len(fit), len(files), reason)
    return fit


def _limit_peak(audio: Float[np.ndarray, "s c"]) -> Float[np.ndarray, "s c"]:
    """Scale down to a peak of 1 what exceeds it: files that were lossy decode up to 1.5."""
    peak = max(audio.max(), -audio.min())
    return audio / peak if peak > 1.0 else audio


def _check_segment(sample_rate: int, segment_samples: int, channels: int) -> None:
    if sample_rate < 1:
        raise InputError(f"input.sample_rate={sample_rate}: choose a rate in Hz, such as 24000")
    if segment_samples < 1:
        raise InputError(f"input.segment_samples={segment_samples}: choose 1 or more")
    if channels not in (1, 2):
        raise InputError(f"input.channels={channels}: choose 1 or 2")


def _check_fields(batch_size, seed, gain_db, read_threads, read_processes, shard_index, shard_count) -> None:
    if batch_size < 1:
        raise InputError(f"input.batch_size={batch_size}: choose 1 or more")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: choose one from 0 to 4294967295")
    if len(gain_db) != 2 or gain_db[0] > gain_db[1]:
        raise InputError(f"input.gain_db={gain_db}: give (lowest, highest) in dB")
    if read_threads < 0:
        raise InputError(f"input.read_threads={read_threads}: choose 0 or more")
    if read_processes < 0:
        raise InputError(f"input.read_processes={read_processes}: choose 0 or more")
    assert 0 <= shard_index < shard_count, (shard_index, shard_count)
