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
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

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

    def read(self, file: AudioFile, start: int, samples: int) -> Float[np.ndarray, "{samples} {self.channels}"]:
        """Return the samples from `start` on, counted at the cache's rate; past the file's end they are zeros.

        Raises:
            InputError: See `audio.read_crop`.
        """
        check_unchanged(file)
        audio = np.zeros((samples, self.channels), np.float32)
        folder, block_samples = self._folder(file), _BLOCK_SECONDS * self.sample_rate
        stop = min(start + samples, self.num_samples(file))
        for block in range(start // block_samples, -(-stop // block_samples)):
            offset = block * block_samples
            length = min(block_samples, self.num_samples(file) - offset)
            first, last = max(start, offset), min(stop, offset + length)
            path = f"{folder}/{block}.i16"
            stretch = self._load(path, length, first - offset, last - offset)
            if stretch is None:
                self._decode(file, block, length, path)
                stretch = self._load(path, length, first - offset, last - offset)
            audio[first - start : last - start] = stretch
        return audio

    def check_room(self, files: Iterable[AudioFile]) -> None:
        """Raise InputError unless the disk has room for what is not decoded yet, and 1 GB to spare."""
        needed = sum(2 * self.channels * self.num_samples(file) for file in files if not self._folder(file).exists())
        existing = Path(self.cache_dir)
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        if needed + _SPARE_BYTES > free:
            raise InputError(
                f"input.cache_dir={self.cache_dir}: the decoded audio takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                "are free there: choose another disk, or leave it empty to decode every crop"
            )

    def _folder(self, file: AudioFile) -> Path:
        identity = f"{os.path.abspath(file.path)}|{file.size}|{file.mtime_ns}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:24]
        return Path(self.cache_dir, f"{self.sample_rate}hz_{self.channels}ch", name)

    def _load(self, path: str, length: int, first: int, last: int) -> Float[np.ndarray, "s c"] | None:
        """Samples first to last of a block, None where it is not there yet."""
        frame = 2 * self.channels
        try:
            with open(path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != 4 + frame * length:
                    return None  # cut short when the machine lost power
                scale = np.frombuffer(file.read(4), np.float32)
                file.seek(4 + frame * first)
                stretch = np.frombuffer(file.read(frame * (last - first)), np.int16)
        except FileNotFoundError:
            return None
        return stretch.reshape(-1, self.channels) * scale

    def _decode(self, file: AudioFile, block: int, length: int, path: str) -> None:
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
