"""Make a bundle of a run: python -m meanflow_audio_codec.tools.export --workdir W --data_dir D -o BUNDLE.npz

The bundle holds the averaged weights in 16 bits and entropy tables, fitted to the codes of up to an hour of the
training files in D (all but those to validate, see datasets/run_files.py), taken evenly. What the tables save is
measured on the validation files, by the coder itself.
"""

import argparse
import io
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from meanflow_audio_codec import bitstream
from meanflow_audio_codec.datasets.audio import AudioFile, load_crop, scan_folder
from meanflow_audio_codec.datasets.run_files import split_files
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools import files

FIT_SECONDS = 3600
MEASURED_SECONDS = 600
MAX_CONTEXTS = 16  # of a code: beyond, an hour is too little for tables of its square
_CROP_SECONDS = 10
_SEQUENCE = 32  # frames
_GROUPS = 8


def main(argv: list[str] | None = None) -> None:
    """Export what the command line names."""
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workdir", metavar="W", required=True, help="of a run that trained a codec of audio")
    parser.add_argument("--data_dir", metavar="D", required=True, help="folder of the audio that it was trained on")
    parser.add_argument("-o", "--output", metavar="BUNDLE.npz", required=True, help="its name is that of the codec")
    parser.add_argument("--force", action="store_true", help="overwrite")
    arguments = parser.parse_args(argv)
    with files.errors_as_lines("export"):
        print("\n".join(_run(Path(arguments.workdir), arguments.data_dir, Path(arguments.output), arguments.force)))


def _run(workdir: Path, data_dir: str, output: Path, force: bool) -> list[str]:
    if output.suffix != ".npz":
        raise InputError(f"-o {output}: give the bundle the suffix .npz")
    if output.exists() and not force:
        raise InputError(f"{output} exists already; --force overwrites")
    from meanflow_audio_codec.codec import Codec  # seconds

    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder, output.name)  # the codes should be those of the 16-bit weights
        Codec.load(workdir).export(rounded)
        codec = Codec.load(rounded)
    train, valid = split_files(scan_folder(data_dir, bad_files="skip"))
    fitted = _sequences(codec, train, FIT_SECONDS, "fit")
    tables = bitstream.fit_tables(fitted, codec.cardinality, codec.cardinality <= MAX_CONTEXTS)
    held_out = _sequences(codec, valid, MEASURED_SECONDS, "measure")
    codec.export(output, tables)
    codec = Codec.load(output)
    seconds = [sequences.shape[0] * sequences.shape[2] / codec.frame_rate for sequences in (fitted, held_out)]
    return [
        f"tables fitted to {seconds[0]:.0f} s of {len(train)} files, measured on {seconds[1]:.0f} s of {len(valid)}:",
        *_savings(codec, tables, held_out),
        f"{output}: {os.path.getsize(output):,} bytes, fingerprint {codec.fingerprint}",
    ]


def _sequences(codec: Any, audio_files: list[AudioFile], seconds: int, name: str) -> Int32[np.ndarray, "n k l"]:
    """Code up to `seconds` of the files, mono as in training, and cut the codes to sequences of one length."""
    crops = list(_crops(audio_files))
    chosen = np.unique(np.linspace(0, len(crops) - 1, min(len(crops), seconds // _CROP_SECONDS)).astype(int))
    sequences = [np.zeros((0, codec.num_codebooks, _SEQUENCE), np.int32)]
    for file, start, frames in tqdm([crops[i] for i in chosen], name, unit="crop", disable=None):
        samples = math.ceil(frames * codec.sample_rate / file.sample_rate)
        audio = load_crop(file, start, sample_rate=codec.sample_rate, segment_samples=samples, channels=1)
        codes = codec.encode(audio[:, 0], codec.sample_rate)
        whole = codes.shape[1] // _SEQUENCE
        cut = codes[:, : whole * _SEQUENCE].reshape(codec.num_codebooks, whole, _SEQUENCE)
        sequences.append(cut.swapaxes(0, 1))
    joined = np.concatenate(sequences)
    if not len(joined):
        raise InputError(f"--data_dir: no file to {name} lasts {_SEQUENCE} code frames; give longer ones")
    return joined


def _crops(audio_files: list[AudioFile]) -> Iterator[tuple[AudioFile, int, int]]:
    """Yield (file, first frame, frames) of all crops."""
    for file in audio_files:
        length = _CROP_SECONDS * file.sample_rate
        for start in range(0, file.frames, length):
            yield file, start, min(length, file.frames - start)


def _savings(codec: Any, tables: np.ndarray, sequences: Int32[np.ndarray, "n k l"]) -> list[str]:
    """Lines that say what the tables save, by group of codebooks and of all up to there."""
    count, width = codec.num_codebooks, math.log2(codec.cardinality)
    codes = sequences.swapaxes(0, 1).reshape(1, count, -1)
    lines, done, spent = [], 0, 0.0
    for kept in sorted({-(-count * group // _GROUPS) for group in range(1, _GROUPS + 1)}):
        bits = _coded_bits(codec, tables, codes[:, :kept]) / codes.shape[2]  # a frame
        before, after = (codec.frame_rate * value / 1000 for value in (kept * width, bits))
        lines.append(
            f"  codebooks {done + 1} to {kept}: {width:.3f} -> {(bits - spent) / (kept - done):.3f} bits a code; "
            f"all {kept}: {before:.3f} -> {after:.3f} kbps ({100 * (after / before - 1):+.1f} %)"
        )
        done, spent = kept, bits
    return lines


def _coded_bits(codec: Any, tables: np.ndarray, codes: Int32[np.ndarray, "1 k l"]) -> int:
    file = io.BytesIO()
    fields = {"codec": "export", "fingerprint": codec.fingerprint, "sample_rate": codec.sample_rate, "channels": 1}
    header = bitstream.Header(**fields, num_codebooks=codes.shape[1], cardinality=codec.cardinality, entropy="range")
    writer = bitstream.Writer(file, header, tables)
    writer.write(codes)
    writer.close(0)
    file.seek(0)
    return 8 * bitstream.info(file)["payload_bytes"]


if __name__ == "__main__":
    main()
