"""MNIST as batches of images in [-1, 1], from the folder that tools/prepare_mnist.py builds.

A split is decoded once, when it is opened, and held as bytes: 60,000 images are 47 MB and take 5 s of
one core. Decoded on demand, a batch of 256 would take 20 ms, in every epoch again.

The stream counts places: place p is example `order(p // n)[p % n]` of n, where `order(e)` is epoch e's
permutation, a function of (seed, e). Grain's own shuffle and batch, which go through each example by
itself, serve 30,000 images/s on a core; an element of the source here is a whole batch, which serves a
million. Grain's iterator gives the trainer the state, one number. TensorFlow is not imported.
"""

import functools
import io
import os
import shlex
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Float, Int32, UInt8

from meanflow_audio_codec.errors import InputError

_READ = 1000  # records at a time: one by one, ArrayRecord takes 25 times as long


def build_mnist_pipeline(
    *,
    data_dir: str | os.PathLike,
    split: str = "train",
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.IterDataset:
    """Build the endless training stream of {"image": float32 [b, 28, 28, 1], "label": int32 [b]}.

    An epoch has every example once, in an order of its own; a batch may straddle two epochs.

    Args:
        data_dir: The folder given to prepare_mnist.
        split: As TFDS writes it: "train", "test", or a part such as "train[:50000]".
        batch_size: Examples of a batch, of this shard.
        seed: From 0 to 2**32 - 1; decides the order.
        shard_index: This process, from 0.
        shard_count: Processes that share the stream: shard i holds the places i modulo `shard_count`.

    Raises:
        InputError: A wrong field, or no such data in the folder.
    """
    images, labels = read_split(data_dir, split)
    return stream(images, labels, batch_size=batch_size, seed=seed, shard_index=shard_index, shard_count=shard_count)


def stream(
    images: UInt8[np.ndarray, "n 28 28 1"],
    labels: Int32[np.ndarray, "n"],
    *,
    batch_size: int,
    seed: int,
    shard_index: int,
    shard_count: int,
) -> grain.IterDataset:
    """Build the stream of `build_mnist_pipeline` from a split in memory, as `read_split` returns it."""
    if batch_size < 1:
        raise InputError(f"input.batch_size={batch_size}: choose 1 or more")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: choose one from 0 to 4294967295")
    assert 0 <= shard_index < shard_count, (shard_index, shard_count)
    batches = _Batches(images, labels, batch_size, seed, shard_index, shard_count)
    # No threads to read ahead: a batch costs less than handing it over.
    return grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def load_mnist(
    data_dir: str | os.PathLike, split: str
) -> tuple[Float[np.ndarray, "n 28 28 1"], Int32[np.ndarray, "n"]]:
    """Return all images of a split, float32 in [-1, 1], and their labels, in the order of the files.

    The arguments and exceptions are those of `build_mnist_pipeline`.
    """
    images, labels = read_split(data_dir, split)
    return _scale(images), labels


def open_mnist(data_dir: str | os.PathLike):
    """Return the TFDS builder that reads the prepared data, without TensorFlow.

    Raises:
        InputError: There is none in the folder, or it is damaged or in another format than ArrayRecord.
    """
    import tensorflow_datasets as tfds  # a second
    from google.protobuf.json_format import ParseError

    versions = sorted(Path(data_dir).expanduser().glob("mnist/*/dataset_info.json"))
    if not versions:
        raise InputError(f"{data_dir} holds no MNIST: {_remedy(data_dir)}")
    folder = versions[-1].parent
    try:
        builder = tfds.builder_from_directory(folder)
    except (ValueError, ParseError) as error:
        raise InputError(_damaged(data_dir, folder, error)) from error
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(
            f"{folder} is in the format {builder.info.file_format.value}, of array_record needed: "
            "remove it or choose another folder, then " + _remedy(data_dir)
        )
    return builder


class _Batches:
    """The batches of one shard by their number."""

    def __init__(self, images, labels, batch_size: int, seed: int, shard_index: int, shard_count: int):
        self._images, self._labels = images, labels
        self._places = np.arange(batch_size) * shard_count + shard_index
        self._stride = batch_size * shard_count
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(labels))
        )

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epochs, rows = np.divmod(index * self._stride + self._places, len(self._labels))
        examples = np.empty_like(rows)
        for epoch in np.unique(epochs).tolist():
            examples[epochs == epoch] = self._order(epoch)[rows[epochs == epoch]]
        return {"image": _scale(self._images[examples]), "label": self._labels[examples]}


def _scale(images: UInt8[np.ndarray, "n 28 28 1"]) -> Float[np.ndarray, "n 28 28 1"]:
    """0 to -1 and 255 to 1, both exactly."""
    return images / np.float32(127.5) - np.float32(1.0)


def read_split(
    data_dir: str | os.PathLike, split: str
) -> tuple[UInt8[np.ndarray, "n 28 28 1"], Int32[np.ndarray, "n"]]:
    """Return all images of a split as bytes, and their labels, in the order of the files."""
    import tensorflow_datasets as tfds
    from PIL import Image

    builder = open_mnist(data_dir)
    try:
        # PIL always, where TFDS' own decoder takes OpenCV if that is installed and advises it if not.
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except ValueError as error:
        raise InputError(f"input.split={split!r}: {_first_line(error)}") from error
    images = np.empty((len(source), 28, 28, 1), np.uint8)
    labels = np.empty(len(source), np.int32)
    try:
        for start in range(0, len(source), _READ):
            numbers = list(range(start, min(start + _READ, len(source))))
            for i, example in zip(numbers, source.__getitems__(numbers), strict=True):
                with Image.open(io.BytesIO(example["image"]), formats=("PNG",)) as image:
                    images[i, ..., 0] = image
                labels[i] = example["label"]
    except RuntimeError as error:  # ArrayRecord checks all that it reads by hashes of its own
        raise InputError(_damaged(data_dir, builder.data_path, error)) from error
    return images, labels


def _damaged(data_dir, folder, error) -> str:
    return f"{folder} is damaged ({_first_line(error)}): remove it, then {_remedy(data_dir)}"


def _remedy(data_dir) -> str:
    return f"run python -m meanflow_audio_codec.tools.prepare_mnist --output-dir {shlex.quote(os.fspath(data_dir))}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
