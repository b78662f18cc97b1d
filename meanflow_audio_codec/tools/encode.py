"""Compress audio: python -m meanflow_audio_codec.tools.encode IN... -o OUT [--kbps K] [--model M]

IN are audio files, folders of them with their subfolders, or - for standard input; OUT is a .mfac file, a folder, or -
for standard output. A file that fails costs a line and the exit status 1; the others are done.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from meanflow_audio_codec import bitstream
from meanflow_audio_codec.datasets.audio import FORMATS
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools import files

DEFAULT_MODEL = "music_44k"


def main(argv: list[str] | None = None) -> None:
    """Compress what the command line names."""
    parser = argparse.ArgumentParser(
        prog="encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("inputs", nargs="+", metavar="IN", help=f"audio, a folder with {', '.join(FORMATS)}, or -")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help=".mfac file, folder, or -")
    parser.add_argument(
        "--kbps",
        type=float,
        metavar="K",
        help="of all channels, at most; default: the model's most",
    )
    parser.add_argument(
        "--model",
        metavar="M",
        default=DEFAULT_MODEL,
        help="name of a codec that comes with the package (default: %(default)s), bundle or workdir",
    )
    parser.add_argument("--force", action="store_true", help="overwrite")
    arguments = parser.parse_args(argv)
    with files.errors_as_lines("encode"):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.kbps is not None and not 0 < arguments.kbps < float("inf"):
        raise InputError(f"--kbps {arguments.kbps}: must be above 0")
    jobs = files.plan(arguments.inputs, arguments.output, FORMATS, ".mfac", arguments.force)
    for _, target in jobs:
        if not files.is_stream(target) and not target.endswith(".mfac"):
            raise InputError(f"-o {target}: give the file the suffix .mfac")
    from meanflow_audio_codec.codec import Codec  # seconds

    codec = Codec.load(arguments.model)
    work = lambda source, target: _encode(codec, source, target, arguments.kbps)
    files.process("encode", jobs, work)


def _encode(codec: Any, source: str, target: str, kbps: float | None) -> str:
    from meanflow_audio_codec.codec import open_audio, read_blocks

    start = time.perf_counter()
    with _as_file(source) as path, open_audio(path) as audio, files.open_output(target) as output:
        counted = _Counted(output)
        blocks = read_blocks(audio, path)
        blocks = files.show_progress(blocks, source, audio.samplerate, audio.frames / audio.samplerate)
        codec.compress_stream(blocks, audio.samplerate, audio.channels, counted, kbps)
        seconds = audio.tell() / audio.samplerate
    took = time.perf_counter() - start
    measured = None
    if not files.is_stream(target):
        with open(target, "rb") as file:
            measured = bitstream.info(file)
    return files.summary(target, "", seconds, counted.size, measured, took)


@contextlib.contextmanager
def _as_file(source: str) -> Iterator[str]:
    """The path of a source; standard input is copied to a file first, for libsndfile must seek."""
    if source != files.STREAM:
        yield source
        return
    with tempfile.NamedTemporaryFile() as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        try:
            yield file.name
        except InputError as error:
            raise InputError(str(error).replace(file.name, files.name_of(source))) from error


class _Counted:
    """A file that counts the bytes written to it."""

    def __init__(self, file: bitstream.Writable):
        self._file, self.size = file, 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)


if __name__ == "__main__":
    main()
