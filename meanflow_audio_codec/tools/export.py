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
from jaxtyping import Float32, Int32
from tqdm import tqdm

from meanflow_audio_codec import bitstream
from meanflow_audio_codec.datasets.audio import AudioFile, load_crop, scan_folder
from meanflow_audio_codec.datasets.run_files import split_files
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools import files

FIT_SECONDS = 3600
MEASURED_SECONDS = 600
_CROP_SECONDS = 10
_BITRATES = 4  # at which is measured what the tables save

Crop = tuple[AudioFile, int, int]  # first frame, frames


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
    fit, measure = _crops(train, FIT_SECONDS), _crops(valid, MEASURED_SECONDS)
    codec.export(output, codec.fit_tables(_clips(codec, fit, "fit")))
    fitted = Codec.load(output)
    seconds = [sum(frames / file.sample_rate for file, _, frames in crops) for crops in (fit, measure)]
    return [
        f"tables fitted to {seconds[0]:.0f} s of {len(train)} files, measured on {seconds[1]:.0f} s of {len(valid)}:",
        *_savings(codec, fitted, list(_clips(codec, measure, "measure"))),
        f"{output}: {os.path.getsize(output):,} bytes, fingerprint {fitted.fingerprint}",
    ]


def _clips(codec: Any, crops: list[Crop], name: str) -> Iterator[Float32[np.ndarray, " s"]]:
    """Yield the crops, mono as in training and at the codec's rate."""
    for file, start, frames in tqdm(crops, name, unit="crop", disable=None):
        samples = math.ceil(frames * codec.sample_rate / file.sample_rate)
        yield load_crop(file, start, sample_rate=codec.sample_rate, segment_samples=samples, channels=1)[:, 0]


def _crops(audio_files: list[AudioFile], seconds: int) -> list[Crop]:
    """Return crops of up to `seconds` of the files, taken evenly."""
    crops = []
    for file in audio_files:
        length = _CROP_SECONDS * file.sample_rate
        crops += [(file, start, min(length, file.frames - start)) for start in range(0, file.frames, length)]
    chosen = np.unique(np.linspace(0, len(crops) - 1, min(len(crops), seconds // _CROP_SECONDS)).astype(int))
    return [crops[i] for i in chosen]


def _savings(plain: Any, fitted: Any, clips: list[Float32[np.ndarray, " s"]]) -> list[str]:
    """Lines that say what the codes of the codec with fitted tables take, and would have taken without these."""
    lines = []
    for kbps in fitted.min_bitrate + (fitted.bitrate - fitted.min_bitrate) * np.arange(1, 1 + _BITRATES) / _BITRATES:
        codes = [fitted.encode(clip, fitted.sample_rate, kbps) for clip in clips]
        seconds = sum(c.shape[1] for c in codes) / fitted.frame_rate
        before, after = (sum(_coded_bits(codec, c) for c in codes) / seconds / 1000 for codec in (plain, fitted))
        lines.append(f"  at most {kbps:.3f} kbps: {before:.3f} -> {after:.3f} ({100 * (after / before - 1):+.1f} %)")
    return lines


def _coded_bits(codec: Any, codes: Int32[np.ndarray, "k l"]) -> int:
    file = io.BytesIO()
    fields = {"codec": "export", "fingerprint": codec.fingerprint, "sample_rate": codec.sample_rate, "channels": 1}
    fields |= {"num_codebooks": len(codes), "cardinality": codec.cardinality, "entropy": codec.entropy}
    writer = bitstream.Writer(file, bitstream.Header(**fields), codec.tables)
    writer.write(codes[None])
    writer.close(0)
    file.seek(0)
    return 8 * bitstream.info(file)["payload_bytes"]


if __name__ == "__main__":
    main()
