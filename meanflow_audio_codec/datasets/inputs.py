"""What a run trains on and is judged by, as `config.input.name` says: audio (a folder or synthetic music), or MNIST.

Both serve batches, fixed held-out examples, and one shape of signal [s, c] to tokenize. An image is the signal of its
pixels row by row, [784, 1], so that the same tokens, codec and objectives serve both.
"""

import math
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from meanflow_audio_codec.datasets import mnist, pipeline, run_files
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.preprocessing.tokenizers import MdctTokenizer, ReshapeTokenizer

FILES = "files.jsonl"  # in the workdir
Tokenizer = MdctTokenizer | ReshapeTokenizer


class AudioInput:
    """Crops of `config.input.num_tokens` tokens from the run's files, or from synthetic music without `data_dir`.

    `continues` is the workdir of the run that this one continues, whose files stay those that it began with.
    """

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer, workdir: epath.Path, continues: epath.Path | None):
        self._spec, self._tokenizer, self._downsample = config.input, tokenizer, config.model.downsample
        spec = config.input
        if spec.num_tokens < 1 or spec.num_tokens % max(1, self._downsample):
            raise InputError(f"input.num_tokens={spec.num_tokens} is not a positive multiple of model.downsample")
        samples = tokenizer.segment_samples(spec.num_tokens)
        self.sample_rate, self.segment = spec.sample_rate, (samples, spec.channels)
        if not spec.data_dir:
            self._files = None
        elif continues is not None:
            self._files = run_files.recall_files(spec, continues / FILES)
        else:
            self._files = run_files.find_files(spec, samples, workdir / FILES)

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What a training batch looks like."""
        return {"audio": jax.ShapeDtypeStruct((self._spec.batch_size, *self.segment), np.float32)}

    def stream(self, seed: int) -> grain.IterDataset:
        """Return endless training batches of this process."""
        spec = self._spec
        return pipeline.build_audio_pipeline(
            data_dir=self._files and self._files.train,
            weights=tuple(spec.weights),
            sample_rate=spec.sample_rate,
            segment_samples=self.segment[0],
            batch_size=spec.batch_size // jax.process_count(),
            seed=seed,
            channels=spec.channels,
            gain_db=tuple(spec.gain_db),
            polarity=spec.polarity,
            silence_db=spec.silence_db,
            short_files=spec.short_files,
            bad_files=spec.bad_files,
            cache_dir=spec.cache_dir,
            read_threads=spec.read_threads,
            read_processes=spec.read_processes,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    @property
    def steps_per_epoch(self) -> int | None:
        """Return the steps of an epoch, None for synthetic music."""
        if self._files is None:
            return None
        segments = pipeline.segments_per_epoch(self._files.train, self.sample_rate, self.segment[0])
        return max(1, segments // self._spec.batch_size)

    def examples(self, num: int | None, seconds: float | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return `num` fixed validation clips of about `seconds`, of a length that fills whole latents; their names."""
        if num is None or seconds is None:
            raise InputError(
                "evals: audio is judged by a number of clips of some seconds; give both, or leave images out"
            )
        step = self._downsample
        num_tokens = step * round(seconds * self.sample_rate / self._tokenizer.samples_per_token / step)
        audio, names = pipeline.eval_clips(
            files=self._files and [file for folder in self._files.valid for file in folder],
            sample_rate=self.sample_rate,
            segment_samples=self._tokenizer.segment_samples(max(step, num_tokens)),
            num_clips=num,
            channels=self._spec.channels,
            seed=0,  # the same clips for every run
        )
        return {"audio": audio}, names

    def save(self, workdir: epath.Path) -> None:
        """Write down the run's files."""
        if self._files is not None:
            run_files.write_record(workdir / FILES, self._files)

    def describe(self) -> str:
        """Say in a line what the data is."""
        if self._files is None:
            return "built-in synthetic music; input.data_dir trains on a folder of audio"
        counts = []
        for folders in (self._files.train, self._files.valid):
            found = [file for folder in folders for file in folder]
            counts += [len(found), sum(file.duration for file in found) / 3600]
        line = "%s: %d files, %.2f h to train; %d files, %.2f h to validate"
        return line % (self._spec.data_dir, *counts)

    def rate(self, bits_per_latent: float) -> str:
        """Say what a code costs."""
        tokens_per_s = self.sample_rate / self._tokenizer.samples_per_token
        return f"{tokens_per_s:.2f} tokens/s, {tokens_per_s / self._downsample * bits_per_latent / 1000:.2f} kbps"


class MnistInput:
    """MNIST's training images; held-out examples come evenly from the test images."""

    sample_rate = 28 * 28  # samples of an image: what the tokens' bands are spread over
    segment = (28 * 28, 1)

    def __init__(
        self, config: ConfigDict, tokenizer: Tokenizer | None, workdir: epath.Path, continues: epath.Path | None
    ):
        self._spec, self._latents = config.input, 0
        if tokenizer is not None:
            tokens = tokenizer.num_tokens(self.segment[0])
            self._latents, rest = divmod(tokens, max(1, config.model.downsample))
            if rest:
                raise InputError(
                    f"model.downsample={config.model.downsample} does not divide an image's {tokens} tokens"
                )
        self._train = mnist.read_split(config.input.data_dir, "train")
        self._test = mnist.load_mnist(config.input.data_dir, "test")

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What a training batch looks like."""
        size = self._spec.batch_size
        return {
            "image": jax.ShapeDtypeStruct((size, 28, 28, 1), np.float32),
            "label": jax.ShapeDtypeStruct((size,), np.int32),
        }

    def stream(self, seed: int) -> grain.IterDataset:
        """Return endless training batches of this process."""
        return mnist.stream(
            *self._train,
            batch_size=self._spec.batch_size // jax.process_count(),
            seed=seed,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of an epoch."""
        return max(1, len(self._train[1]) // self._spec.batch_size)

    def examples(self, num: int | None, seconds: None = None) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return `num` fixed test images, None for all, with their labels; and names."""
        images, labels = self._test
        num = len(labels) if num is None else num
        if not 0 < num <= len(labels):
            raise InputError(f"evals: {num} images asked for of {len(labels)} test images; choose fewer")
        chosen = np.arange(num) * len(labels) // num
        names = [f"{labels[i]}, test image {i}" for i in chosen]
        return {"image": images[chosen], "label": labels[chosen]}, names

    def save(self, workdir: epath.Path) -> None:
        """Nothing to write down: the data set does not change."""

    def describe(self) -> str:
        """Say in a line what the data is."""
        return f"MNIST in {self._spec.data_dir}"

    def rate(self, bits_per_latent: float) -> str:
        """Say what a code costs."""
        return f"{self._latents * bits_per_latent:.0f} bits/image"


INPUTS = {"audio": AudioInput, "mnist": MnistInput}


def signals(batch: dict[str, Any]) -> Any:
    """Return a batch's signals [b, s, c]: the audio, or the images' pixels row by row."""
    if "audio" in batch:
        return batch["audio"]
    return batch["image"].reshape(len(batch["image"]), math.prod(batch["image"].shape[1:]), 1)
