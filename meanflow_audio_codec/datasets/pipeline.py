"""The stream of training batches from audio files or synthetic music, and the fixed evaluation clips.

    place in the stream ▶ file ▶ random crop ▶ gain, polarity ▶ batch                      a function of (seed, place)
    number of a batch ▶ Grain's read threads or processes ▶ iterator with a state

An epoch visits a file once for every whole segment in it, at random positions, so that files count
by their length. What stands at a place of the stream depends on the seed and the place alone: the
iterator's state is one number, and batches come back bit for bit from it with any number of threads.
Worker processes give the same batches, but their state fits that number of processes only.

Grain could also shuffle, map and batch; but crop by crop through its chain costs more than reading
a crop that is decoded already. No TensorFlow.
"""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int

from meanflow_audio_codec.datasets.audio import AudioFile, check_channels, load_crop, scan_folder, source_frames
from meanflow_audio_codec.datasets.decoded_cache import DecodedCache
from meanflow_audio_codec.datasets.synthetic import SyntheticMusic
from meanflow_audio_codec.errors import InputError

log = logging.getLogger(__name__)

_SILENCE_TRIES = 5
_BAD_FILE_TRIES = 10
_MIX_CYCLE = 10_000  # places, after which weighted folders have had their exact shares
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
        draw = _DrawSynthetic(SyntheticMusic(sample_rate, segment_samples, channels, seed))
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
        order = _Order([_segment_counts(folder, sample_rate, segment_samples) for folder in folders], weights, seed)
        cache = _make_cache(cache_dir, files, sample_rate, channels)
        draw = _DrawCrop(files, order, _Crops(sample_rate, channels, silence_db, cache), bad_files)
    batches = _Batches(draw, (batch_size, segment_samples, channels), seed, gain_db, polarity, shard_index, shard_count)
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
    stream = grain.MapDataset.source(batches).to_iter_dataset(options)
    if read_processes:
        if not flags.FLAGS.is_parsed():  # Grain asks absl for a flag before it starts its processes
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=read_processes))
    return stream


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
    crops = _Crops(sample_rate, channels, _EVAL_SILENCE_DB, None)
    order = np.random.default_rng(seed).permutation(len(files))
    clips, names = np.empty((num_clips, segment_samples, channels), np.float32), []
    for i, clip in enumerate(clips):
        file = files[order[i % len(files)]]
        seconds = crops.draw(file, np.random.default_rng([seed, i]), clip)
        _scale(clip, 1.0)
        names.append(f"{file.name}@{seconds:.2f}s")
    return clips, names


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
    return sum(_segment_counts(files, sample_rate, segment_samples).sum().item() for files in folders)


def _segment_counts(files: list[AudioFile], sample_rate: int, segment_samples: int) -> Int[np.ndarray, "files"]:
    """How many whole segments fit into each file, at least one."""
    return np.array([max(1, math.floor(file.duration * sample_rate / segment_samples)) for file in files])


class _Order:
    """Which file stands at which place of the stream: shuffled anew in each epoch, of a folder or of all.

    Args:
        counts: How often each file of each folder comes in an epoch.
        weights: Shares of the folders; none: by their counts.
        seed: Of the shuffles.
    """

    def __init__(self, counts: list[Int[np.ndarray, "files"]], weights: Sequence[float], seed: int):
        if weights and (len(weights) != len(counts) or min(weights) <= 0):
            raise InputError(f"input.weights={tuple(weights)}: give {len(counts)} numbers above 0, one for each folder")
        self._seed = seed
        if not weights:
            counts, weights = [np.concatenate(counts)], (1.0,)
        self._ends = np.cumsum(np.concatenate(counts))  # of the files' segments, all folders in a row
        self._sizes = [count.sum().item() for count in counts]
        self._firsts = np.cumsum([0, *self._sizes])
        # One cycle of the mix: folder i stands at quotas[i] places of it, evenly spread.
        quotas = np.maximum(1, np.rint(_MIX_CYCLE * np.array(weights) / sum(weights))).astype(int)
        ranks = np.concatenate([np.arange(quota) for quota in quotas])
        folders = np.repeat(np.arange(len(quotas)), quotas)
        spread = np.argsort((ranks + 0.5) / quotas[folders], kind="stable")
        self._quotas, self._ranks, self._folders = quotas, ranks[spread], folders[spread]

    def __getitem__(self, place: int) -> int:
        """The file's number."""
        cycle, place = divmod(place, len(self._folders))
        folder = self._folders[place]
        epoch, index = divmod(int(cycle * self._quotas[folder] + self._ranks[place]), self._sizes[folder])
        segment = self._firsts[folder] + _shuffled(self._sizes[folder], self._seed, folder.item(), epoch)[index]
        return int(np.searchsorted(self._ends, segment, side="right"))


@dataclasses.dataclass(frozen=True)
class _Crops:
    """Random segments in one format, of any file."""

    sample_rate: int
    channels: int
    silence_db: float
    cache: DecodedCache | None

    def draw(self, file: AudioFile, rng: np.random.Generator, out: Float[np.ndarray, "s c"]) -> float:
        """Fill `out` from anywhere in the file and return the place in seconds; the fifth try may be silent."""
        if self.cache is None:
            rate = file.sample_rate
            last = file.frames - source_frames(file, self.sample_rate, len(out))
        else:
            rate = self.sample_rate
            last = self.cache.num_samples(file) - len(out)
        for _ in range(_SILENCE_TRIES if last > 0 else 1):
            start = int(rng.integers(max(0, last) + 1))
            if self.cache is None:
                out[:] = load_crop(
                    file, start, sample_rate=self.sample_rate, segment_samples=len(out), channels=self.channels
                )
            else:
                self.cache.read(file, start, out)
            if np.einsum("sc,sc->", out, out) >= out.size * 10.0 ** (self.silence_db / 10.0):
                break
        return start / rate


@dataclasses.dataclass(frozen=True)
class _DrawSynthetic:
    """The crop at a place of the stream of synthetic music."""

    music: SyntheticMusic

    def __call__(self, place: int, rng: np.random.Generator, out: Float[np.ndarray, "s c"]) -> None:
        out[:] = self.music[place]


@dataclasses.dataclass(frozen=True)
class _DrawCrop:
    """The crop at a place of the stream, of another file where that one has gone bad and may be skipped."""

    files: list[AudioFile]
    order: _Order
    crops: _Crops
    bad_files: str
    lost: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, place: int, rng: np.random.Generator, out: Float[np.ndarray, "s c"]) -> None:
        number = self.order[place]
        for _ in range(_BAD_FILE_TRIES):
            file = self.files[number]
            try:
                self.crops.draw(file, rng, out)
                return
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
class _Batches:
    """The batches of one shard by their number: the source that Grain reads."""

    draw: _DrawCrop | _DrawSynthetic
    shape: tuple[int, int, int]
    seed: int
    gain_db: tuple[float, float]
    polarity: bool
    shard_index: int
    shard_count: int

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, number: int) -> dict[str, Float[np.ndarray, "b s c"]]:
        audio = np.empty(self.shape, np.float32)
        for i, crop in enumerate(audio, start=number * len(audio)):
            place = i * self.shard_count + self.shard_index
            rng = np.random.Generator(np.random.Philox(key=[self.seed, place]))
            self.draw(place, rng, crop)
            gain = 10.0 ** (rng.uniform(*self.gain_db) / 20.0)
            _scale(crop, -gain if self.polarity and rng.random() < 0.5 else gain)
        return {"audio": audio}


@functools.lru_cache(maxsize=8)
def _shuffled(size: int, *seeds: int) -> Int[np.ndarray, "{size}"]:
    return np.random.default_rng(seeds).permutation(size)


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


def _scale(audio: Float[np.ndarray, "s c"], gain: float) -> None:
    """Multiply by the gain, in place, or by as much of it as leaves no peak above 1; lossy files decode up to 1.5."""
    gain /= max(1.0, abs(gain) * max(audio.max(), -audio.min()).item())
    if gain != 1.0:
        audio *= np.float32(gain)


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
