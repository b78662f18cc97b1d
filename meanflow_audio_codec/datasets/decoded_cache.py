"""Audio decoded once: 16-bit samples on disk, at the rate and channel count of training.

Reading a crop from here costs a tenth of a millisecond, where decoding and resampling cost two to
fifteen. A block is 4 s of one file (0.19 MB at 24 kHz mono), decoded when a crop first needs it:

    CACHE_DIR/24000hz_1ch/<hash of path, size, mtime>/<block>.i16 = float32 scale, int16 [s, c]

The scale is a power of two just above the block's peak, so that 16-bit sources keep every bit and
peaks above 1 their shape; the rounding error is below 2**-16 of the scale. What a block holds
depends on file and format alone, and it appears whole, by a rename: threads, processes and runs may
share a folder and be killed in it, and find the same samples. It may be deleted at any time.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16

from meanflow_audio_codec.datasets.audio import AudioFile, check_unchanged, load_crop
from meanflow_audio_codec.errors import InputError

_BLOCK_SECONDS = 4  # whole seconds: blocks begin at whole frames of any rate
_SPARE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class DecodedCache:
    """Decoded audio of any number of files in one format.

    Attributes:
        cache_dir: Folder, made when needed.
        sample_rate: Hz.
        channels: 1 or 2, see `audio.load_crop`.
    """

    cache_dir: str
    sample_rate: int
    channels: int

    def num_samples(self, file: AudioFile) -> int:
        """Length of the file in samples at the cache's rate."""
        return -(-file.frames * self.sample_rate // file.sample_rate)

    def read(self, file: AudioFile, start: int, out: Float[np.ndarray, "s c"]) -> None:
        """Fill `out` with the samples from `start` on, counted at the cache's rate; past the file's end with zeros.

        Raises:
            InputError: See `audio.read_crop`.
        """
        check_unchanged(file)
        folder, block_samples = self._folder(file), _BLOCK_SECONDS * self.sample_rate
        stop = min(start + len(out), self.num_samples(file))
        for block in range(start // block_samples, -(-stop // block_samples)):
            offset = block * block_samples
            length = min(block_samples, self.num_samples(file) - offset)
            first, last = max(start, offset), min(stop, offset + length)
            path, stretch = f"{folder}/{block}.i16", out[first - start : last - start]
            if not self._load(path, length, first - offset, stretch):
                ints, scale = self._decode(file, block, length, path)
                np.multiply(ints[first - offset : last - offset], scale, out=stretch)
        out[stop - start :] = 0.0

    def check_room(self, files: Iterable[AudioFile]) -> None:
        """Raise InputError unless the disk has room for what is not decoded yet, and 1 GB to spare."""
        needed = sum(
            2 * self.channels * self.num_samples(file) for file in files if not os.path.exists(self._folder(file))
        )
        existing = Path(self.cache_dir)
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        if needed + _SPARE_BYTES > free:
            raise InputError(
                f"input.cache_dir={self.cache_dir}: the decoded audio takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                "are free there: choose another disk, or leave it empty to decode every crop"
            )

    def _folder(self, file: AudioFile) -> str:
        return f"{self.cache_dir}/{self.sample_rate}hz_{self.channels}ch/{_key(file)}"

    def _load(self, path: str, length: int, first: int, out: Float[np.ndarray, "s c"]) -> bool:
        """Fill `out` from sample `first` of a block on; False where the block is not there yet."""
        frame = 2 * self.channels
        try:
            with open(path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != 4 + frame * length:
                    return False  # cut short when the machine lost power
                scale = np.frombuffer(file.read(4), np.float32)
                file.seek(4 + frame * first)
                ints = np.frombuffer(file.read(frame * len(out)), np.int16)
        except FileNotFoundError:
            return False
        np.multiply(ints.reshape(out.shape), scale, out=out)
        return True

    def _decode(
        self, file: AudioFile, block: int, length: int, path: str
    ) -> tuple[Int16[np.ndarray, "s c"], np.float32]:
        """Decode a block and keep it; its samples and their scale."""
        audio = load_crop(
            file,
            block * _BLOCK_SECONDS * file.sample_rate,
            sample_rate=self.sample_rate,
            segment_samples=length,
            channels=self.channels,
        )
        peak = max(audio.max(), -audio.min() * (1 - 2**-15))  # int16 reaches to -32768
        scale = np.float32(2.0 ** (np.frexp(peak)[1] - 15))
        ints = np.clip(np.rint(audio / scale), -(2**15), 2**15 - 1).astype(np.int16)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{os.getpid()}.{threading.get_ident()}"
        try:
            with open(partial, "wb") as out:
                out.write(scale.tobytes())
                out.write(ints.tobytes())
            os.replace(partial, path)
        except OSError:
            Path(partial).unlink(missing_ok=True)
            raise
        return ints, scale


@functools.lru_cache(maxsize=1024)
def _key(file: AudioFile) -> str:
    identity = f"{os.path.abspath(file.path)}|{file.size}|{file.mtime_ns}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]
