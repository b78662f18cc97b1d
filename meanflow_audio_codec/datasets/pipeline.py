"""The Grain chain from audio files or synthetic music to batches, and the fixed evaluation clips.

    file numbers ▶ shuffle ▶ repeat ▶ random crop ▶ gain, polarity ▶ shard ▶ batch ▶ read threads

An epoch visits a file once for every whole segment in it, at random positions, so that files count
by their length. Each crop's randomness is a function of (seed, place in the stream): the iterator's
state is one number, and batches come back bit for bit from it with any number of threads. No worker
processes, no TensorFlow.
"""

import logging
import math

import grain
import numpy as np
from jaxtyping import Float

from meanflow_audio_codec.datasets.audio import (
    AudioFile,
    check_channels,
    load_crop,
    source_frames,
)
from meanflow_audio_codec.datasets.synthetic import SyntheticMusic
from meanflow_audio_codec.errors import InputError

_SILENCE_TRIES = 5
# Beyond the 32 bits of a training seed, so that no training clip is ever an evaluation clip.
_EVAL_SEED = 2**32
_EVAL_SILENCE_DB = -60.0


def build_audio_pipeline(
    *,
    files: list[AudioFile] | None,
    sample_rate: int,
    segment_samples: int,
    batch_size: int,
    seed: int,
    channels: int = 1,
    gain_db: tuple[float, float] = (0.0, 0.0),
    polarity: bool = True,
    silence_db: float = -60.0,
    short_files: str = "error",
    read_threads: int = 2,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.IterDataset:
    """Build the endless training stream of {"audio": float32 [b, s, c]}.

    No sample exceeds 1 in magnitude: a crop whose peak would is scaled down to it.

    Args:
        files: Scanned training files; None means synthetic music.
        sample_rate: Hz.
        segment_samples: Samples of a crop.
        batch_size: Crops of a batch, of this shard.
        seed: From 0 to 2**32 - 1; decides order, crops and augmentation.
        channels: 1 or 2; see `audio.load_crop`.
        gain_db: Range in dB of the random gain, uniform.
        polarity: Flip the sign of half of the crops.
        silence_db: A crop with less RMS, dB re full scale, is drawn again up to four times.
        short_files: What to do with files below one segment: "error", "pad" (zeros) or "skip".
        read_threads: Threads that read ahead, one batch each; 0 reads in the caller's thread.
        shard_index: This process, from 0.
        shard_count: Processes that share the stream: batch k of shard i holds the crops of the
            unsharded stream whose place is i modulo `shard_count`.

    Raises:
        InputError: A wrong field, or a file too short or with too many channels.
    """
    _check_fields(batch_size, seed, gain_db, read_threads, shard_index, shard_count)
    _check_segment(sample_rate, segment_samples, channels)
    if files is None:
        music = SyntheticMusic(sample_rate, segment_samples, channels, seed)
        stream = grain.MapDataset.source(music).seed(seed).repeat()
    else:
        usable = _usable_files(files, sample_rate, segment_samples, channels, short_files)

        def crop(index, rng):
            return _random_crop(usable[index], rng, sample_rate, segment_samples, channels, silence_db)[0]

        segments = _Segments(usable, sample_rate, segment_samples)
        stream = grain.MapDataset.source(segments).seed(seed).shuffle().repeat().random_map(crop)

    def augment(audio, rng):
        gain = 10.0 ** (rng.uniform(*gain_db) / 20.0)
        sign = -1.0 if polarity and rng.random() < 0.5 else 1.0
        return {"audio": _limit_peak(audio * np.float32(sign * gain))}

    # Sharding comes after the random maps: they count places in the whole stream, so that no two
    # shards draw the same numbers.
    stream = stream.random_map(augment).slice(slice(shard_index, None, shard_count))
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
    return stream.batch(batch_size, drop_remainder=True).to_iter_dataset(options)


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
    usable = _usable_files(files, sample_rate, segment_samples, channels, "pad")
    order = np.random.default_rng(seed).permutation(len(usable))
    clips, names = [], []
    for i in range(num_clips):
        file = usable[order[i % len(usable)]]
        rng = np.random.default_rng([seed, i])
        audio, start = _random_crop(file, rng, sample_rate, segment_samples, channels, _EVAL_SILENCE_DB)
        clips.append(_limit_peak(audio))
        names.append(f"{file.name}@{start / file.sample_rate:.2f}s")
    return np.stack(clips), names


def segments_per_epoch(files: list[AudioFile], sample_rate: int, segment_samples: int, short_files: str) -> int:
    """Return the number of crops after which the stream has visited every file as often as its length asks."""
    usable = _usable_files(files, sample_rate, segment_samples, 1, short_files)
    return len(_Segments(usable, sample_rate, segment_samples))


class _Segments:
    """The files' numbers, each as often as whole segments fit into the file, at least once."""

    def __init__(self, files: list[AudioFile], sample_rate: int, segment_samples: int):
        counts = [file.duration * sample_rate / segment_samples for file in files]
        self._ends = np.cumsum([max(1, math.floor(count)) for count in counts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))


def _random_crop(
    file: AudioFile,
    rng: np.random.Generator,
    sample_rate: int,
    segment_samples: int,
    channels: int,
    silence_db: float,
) -> tuple[Float[np.ndarray, "{segment_samples} {channels}"], int]:
    """A segment from anywhere in the file, with its first frame; the fifth draw may be silent."""
    starts = max(1, file.frames - source_frames(file, sample_rate, segment_samples) + 1)
    for _ in range(_SILENCE_TRIES if starts > 1 else 1):
        start = int(rng.integers(starts))
        audio = load_crop(
            file,
            start,
            sample_rate=sample_rate,
            segment_samples=segment_samples,
            channels=channels,
        )
        if np.mean(np.square(audio)) >= 10.0 ** (silence_db / 10.0):
            break
    return audio, start


def _limit_peak(audio: Float[np.ndarray, "s c"]) -> Float[np.ndarray, "s c"]:
    """Scale down to a peak of 1 what exceeds it: files that were lossy decode up to 1.5."""
    peak = np.abs(audio).max()
    return audio / peak if peak > 1.0 else audio


def _usable_files(
    files: list[AudioFile],
    sample_rate: int,
    segment_samples: int,
    channels: int,
    short_files: str,
) -> list[AudioFile]:
    """The files to draw from, in order of their names."""
    if short_files not in ("error", "pad", "skip"):
        raise InputError(f"input.short_files={short_files!r}: choose 'error', 'pad' or 'skip'")
    for file in files:
        check_channels(file, channels)
    short = [file for file in files if file.frames < source_frames(file, sample_rate, segment_samples)]
    needed = segment_samples / sample_rate
    if short and short_files == "error":
        raise InputError(
            f"{short[0].path} lasts {short[0].duration:.3f} s, a segment {needed:.3f} s "
            f"({len(short)} such files): set --config.input.short_files=pad or skip"
        )
    if short and short_files == "skip":
        logging.warning("%d files shorter than %.3f s left out", len(short), needed)
        files = [file for file in files if file not in short]
    if not files:
        raise InputError(
            f"input.data_dir has no file of {needed:.3f} s or more: add longer files, or set "
            "--config.input.short_files=pad"
        )
    return sorted(files, key=lambda file: file.name)


def _check_segment(sample_rate: int, segment_samples: int, channels: int) -> None:
    if sample_rate < 1:
        raise InputError(f"input.sample_rate={sample_rate}: choose a rate in Hz, such as 24000")
    if segment_samples < 1:
        raise InputError(f"input.segment_samples={segment_samples}: choose 1 or more")
    if channels not in (1, 2):
        raise InputError(f"input.channels={channels}: choose 1 or 2")


def _check_fields(batch_size, seed, gain_db, read_threads, shard_index, shard_count) -> None:
    if batch_size < 1:
        raise InputError(f"input.batch_size={batch_size}: choose 1 or more")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: choose one from 0 to 4294967295")
    if len(gain_db) != 2 or gain_db[0] > gain_db[1]:
        raise InputError(f"input.gain_db={gain_db}: give (lowest, highest) in dB")
    if read_threads < 0:
        raise InputError(f"input.read_threads={read_threads}: choose 0 or more")
    assert 0 <= shard_index < shard_count, (shard_index, shard_count)
