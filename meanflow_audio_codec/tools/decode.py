"""Decode .mfac files: python -m meanflow_audio_codec.tools.decode IN... -o OUT [--nfe N] [--salvage] [--model M]

IN are .mfac files, folders of them with their subfolders, or - for standard input; OUT is an audio file of the format
that its suffix names, a folder, or - for standard output. The codec is that one among those that come with the package
whose fingerprint the file names; for others give --model. A file that fails costs a line and the exit status 1; the
others are done.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from jaxtyping import Float32

from meanflow_audio_codec import bitstream
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools import files

FORMATS = ("wav", "flac", "ogg", "mp3")
_MOST_WAV_BYTES = 2**32 - 2**16  # its sizes are 32 bits


def main(argv: list[str] | None = None) -> None:
    """Decode what the command line names."""
    parser = argparse.ArgumentParser(
        prog="decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("inputs", nargs="+", metavar="IN", help=".mfac file, a folder of them, or -")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="audio file, folder, or -")
    parser.add_argument("--nfe", type=int, default=1, metavar="N", help="network evaluations; default: %(default)s")
    parser.add_argument(
        "--salvage", action="store_true", help="of a damaged file decode what is whole; the rest is silence"
    )
    parser.add_argument("--model", metavar="M", help="bundle, workdir, or name of a codec that comes with the package")
    parser.add_argument("--format", choices=FORMATS, help="of files in a folder and of standard output; default: wav")
    parser.add_argument("--force", action="store_true", help="overwrite")
    arguments = parser.parse_args(argv)
    with files.errors_as_lines("decode"):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.nfe < 1:
        raise InputError(f"--nfe {arguments.nfe}: must be at least 1")
    suffix = f".{arguments.format or 'wav'}"
    jobs = files.plan(arguments.inputs, arguments.output, (".mfac",), suffix, arguments.force)
    for _, target in jobs:
        _format_of(target, arguments.format)
    find_codec = _Packaged() if arguments.model is None else _given(arguments.model)
    work = lambda source, target: _decode(
        find_codec, source, target, _format_of(target, arguments.format), arguments.nfe, arguments.salvage
    )
    files.process("decode", jobs, work)


def _format_of(target: str, chosen: str | None) -> str:
    """What soundfile calls the format of a target."""
    if files.is_stream(target):
        return (chosen or FORMATS[0]).upper()
    suffix = os.path.splitext(target)[1].lower().removeprefix(".")
    if suffix not in FORMATS or (chosen or suffix) != suffix:
        asked = f"not {chosen}" if suffix in FORMATS else f"end it in {', '.join('.' + name for name in FORMATS)}"
        raise InputError(f"-o {target}: the suffix names the format; {asked}")
    return suffix.upper()


def _given(model: str) -> Callable[[bitstream.Header], Any]:
    """Return what finds the one codec for files of its own."""
    from meanflow_audio_codec.codec import Codec  # seconds

    codec = Codec.load(model)

    def find_codec(header: bitstream.Header) -> Any:
        if header.fingerprint != codec.fingerprint:
            raise InputError(
                f"made by {header.codec} of fingerprint {header.fingerprint}, not by --model {model} "
                f"({codec.fingerprint}); give that codec"
            )
        return codec

    return find_codec


class _Packaged:
    """Finds the codec of a file among those of the package; one that has been loaded is kept."""

    def __init__(self):
        self._loaded: dict[Path, Any] = {}

    def __call__(self, header: bitstream.Header) -> Any:
        from meanflow_audio_codec.codec import PRETRAINED, Codec  # seconds

        # The name tells where to look first and is never a path.
        for path in sorted(PRETRAINED.glob("*.npz"), key=lambda path: (path.stem != header.codec, path.stem)):
            if path not in self._loaded:
                self._loaded[path] = Codec.load(path)
            if self._loaded[path].fingerprint == header.fingerprint:
                return self._loaded[path]
        names = ", ".join(sorted(path.stem for path in self._loaded)) or "none"
        raise InputError(
            f"made by {header.codec} of fingerprint {header.fingerprint}, which does not come with the package "
            f"({names} does); give its bundle or workdir by --model"
        )


def _decode(
    find_codec: Callable[[bitstream.Header], Any], source: str, target: str, form: str, nfe: int, salvage: bool
) -> str:
    start = time.perf_counter()
    with contextlib.nullcontext(sys.stdin.buffer) if source == files.STREAM else open(source, "rb") as file:
        measured = None
        if source != files.STREAM and file.seekable():
            measured = bitstream.info(file)
            file.seek(0)
        file = _Rereadable(file, files.name_of(source))
        codec = find_codec(bitstream.read_header(file))
        file.rewind()
        reader, blocks = codec.decompress_stream(file, nfe, salvage)
        header, seconds = reader.header, measured and measured["seconds"]
        with files.open_output(target, seekable=True) as output:
            blocks = files.show_progress(blocks, source, header.sample_rate, seconds)
            samples = _write(output, header, blocks, form)
            size = os.fstat(output.fileno()).st_size
    for line in reader.lost:
        files.say("decode", f"{files.name_of(source)}: {line}")
    took = time.perf_counter() - start
    form = f"{header.channels} x {header.sample_rate} Hz"
    return files.summary(target, form, samples / header.sample_rate, size, measured, took)


def _write(output: BinaryIO, header: bitstream.Header, blocks: Iterable[Float32[np.ndarray, "c n"]], form: str) -> int:
    """Write audio by libsndfile and return its samples."""
    rate, channels, samples = header.sample_rate, header.channels, 0
    try:
        audio = soundfile.SoundFile(output.fileno(), "w", rate, channels, format=form, closefd=False)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{channels} channels at {rate} Hz do not go into {form}; choose another format") from error
    try:
        with audio:
            for block in blocks:
                audio.write(block.T)
                samples += block.shape[1]
                if form == "WAV" and 2 * samples * channels > _MOST_WAV_BYTES:
                    raise InputError("longer than a WAV file can be; choose .flac")
    except soundfile.LibsndfileError as error:
        raise InputError(f"its audio cannot be written ({error.error_string.strip()}); is there room?") from error
    if not os.fstat(output.fileno()).st_size:
        raise InputError(f"there is no {form} file of 0 samples; choose .wav")
    return samples


class _Rereadable:
    """A file that need not be seekable, whose beginning is read again after `rewind`."""

    def __init__(self, file: bitstream.Readable, name: str):
        self._file, self.name, self._kept, self._rewound = file, name, b"", False

    def read(self, size: int) -> bytes:
        if not self._rewound:
            data = self._file.read(size)
            self._kept += data
            return data
        data, self._kept = self._kept[:size], self._kept[size:]
        return data or self._file.read(size)

    def rewind(self) -> None:
        self._rewound = True


if __name__ == "__main__":
    main()
