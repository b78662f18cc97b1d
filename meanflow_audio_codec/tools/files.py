"""What the tools that code files do with paths: which input becomes which output, outputs that are whole or not
there, and a line for each file, good or bad. `-` is standard input or output.
"""

import collections
import contextlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from meanflow_audio_codec.datasets.audio import find_audio
from meanflow_audio_codec.errors import InputError

STREAM = "-"
_SHOW_SECONDS = 3  # of work, before a bar


def plan(inputs: list[str], output: str, formats: tuple[str, ...], suffix: str, force: bool) -> list[tuple[str, str]]:
    """Return each source with its target, after checking them all.

    Args:
        inputs: Files, folders (searched with their subfolders for `formats`), or `STREAM` alone.
        output: A file, `STREAM`, or a folder, in which the tree below each input folder is repeated. It is a folder if
            it exists as one, if it ends in a slash, or if there are several inputs or a folder. `x.flac` becomes
            `x.mfac`, or `x.flac.mfac` where `x.ogg` is there too.
        formats: Suffixes of the files to look for in folders.
        suffix: Of targets in a folder.
        force: Whether targets may exist.

    Raises:
        InputError: Nothing to do, a target exists, two sources have one target, or a source is its own target.
    """
    if STREAM in inputs and len(inputs) > 1:
        raise InputError("-: standard input comes alone, without other inputs")
    several = len(inputs) > 1 or os.path.isdir(inputs[0])
    into_folder = several or os.path.isdir(output) or output.endswith(("/", os.sep))
    if into_folder and (output == STREAM or inputs == [STREAM]):
        raise InputError(f"-o {output}: standard input or output takes one file; name one")
    if into_folder and os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"-o {output}: this is a file; several inputs need a folder")
    if not into_folder:
        pairs = [(inputs[0], output)]
    else:
        found = [(Path(source), name) for source in inputs for name in _names(source, formats)]
        places = {str(path / name): Path(output, name or path.name) for path, name in found}
        count = collections.Counter(place.with_suffix(suffix) for place in places.values())
        alone = lambda place: count[place.with_suffix(suffix)] == 1
        pairs = [
            (source, str(place.with_suffix(suffix)) if alone(place) else f"{place}{suffix}")
            for source, place in places.items()
        ]
    _check_targets(pairs, force)
    return pairs


def _names(source: str, formats: tuple[str, ...]) -> list[str]:
    """The names of the files below a folder; of a file the empty one."""
    if not os.path.isdir(source):
        return [""]
    names = find_audio(Path(source), formats)
    if not names:
        raise InputError(f"{source} holds no {', '.join(formats)} files")
    return names


def _check_targets(pairs: list[tuple[str, str]], force: bool) -> None:
    known: dict[str, str] = {}
    for source, target in pairs:
        other = known.setdefault(os.path.realpath(target), source)
        if other != source:
            raise InputError(f"{other} and {source} would both become {target}; choose different outputs")
        if os.path.isdir(target):
            raise InputError(f"{target} is a folder; remove it or choose another output")
        if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
            raise InputError(f"{source} would be overwritten by its own output; choose another one")
    existing = [target for _, target in pairs if os.path.isfile(target)]
    if existing and not force:
        more = f" and {len(existing) - 1} more outputs" if len(existing) > 1 else ""
        raise InputError(f"{existing[0]}{more} exist already; --force overwrites")


def is_stream(target: str) -> bool:
    """Return whether a target is standard output, a device or a pipe, which cannot be replaced or read again."""
    return target == STREAM or (os.path.exists(target) and not os.path.isfile(target))


@contextlib.contextmanager
def open_output(target: str, seekable: bool = False) -> Iterator[BinaryIO]:
    """Open a target that appears, with its folders, when it is whole; after an exception nothing of it is left.

    Standard output, devices and pipes are written to as the bytes come; if `seekable`, when they are whole.
    """
    if is_stream(target):
        if target == STREAM and sys.stdout.isatty():
            raise InputError("-o -: standard output is a terminal; name a file or a pipe")
        with open(1 if target == STREAM else target, "wb", closefd=target != STREAM) as stream:
            if not seekable:
                yield stream
                return
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                shutil.copyfileobj(file, stream)
        return
    path = Path(os.path.realpath(target))  # what a link points to is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.part")
    try:
        with temporary.open("x+b") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def errors_as_lines(tool: str) -> Iterator[None]:
    """End the program with a line on stderr and the exit status 1 where something is wrong that the user can mend."""
    try:
        yield
    except InputError as error:
        sys.exit(printable(f"{tool}: {error}"))
    except OSError as error:
        sys.exit(printable(f"{tool}: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"))
    except KeyboardInterrupt:
        sys.exit(f"{tool}: interrupted")


def process(tool: str, sources: Iterable[tuple[str, ...]], work: Callable[..., str | None]) -> None:
    """Call `work` on each and print the line that it returns; one that fails costs a line on stderr.

    Raises:
        SystemExit: Some failed; the status is 1.
    """
    failed = False
    for source, *rest in sources:
        try:
            line = work(source, *rest)
        except InputError as error:
            name, message = name_of(source), str(error)
            say(tool, message if message.startswith(name) else f"{name}: {message}")
            failed = True
        except OSError as error:
            say(tool, f"{error.filename or name_of(source)}: {error.strerror or error}")
            failed = True
        else:
            if line is not None:
                print(printable(line), file=sys.stderr if rest[-1:] == [STREAM] else sys.stdout, flush=True)
    if failed:
        sys.exit(1)


def say(tool: str, message: str) -> None:
    """Print a line to stderr."""
    print(printable(f"{tool}: {message}"), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return the text with what does not print, such as newlines, terminal codes and stray bytes, as repr writes it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def name_of(source: str) -> str:
    """Return what messages call a source."""
    return "standard input" if source == STREAM else source


def show_progress(
    blocks: Iterable[Float32[np.ndarray, "c n"]], source: str, sample_rate: int, seconds: float | None
) -> Iterator[Float32[np.ndarray, "c n"]]:
    """Pass blocks of audio on; on a terminal, if they take their time, with a bar of `seconds`."""
    total, samples = None if seconds is None else round(seconds), 0
    name = printable(os.path.basename(name_of(source)))
    with tqdm(total=total, desc=name, unit="s", delay=_SHOW_SECONDS, leave=False, disable=None) as bar:
        for block in blocks:
            yield block
            samples += block.shape[1]
            bar.update(samples // sample_rate - bar.n)


def summary(target: str, form: str, seconds: float, size: int, measured: dict | None, took: float) -> str:
    """Return the line of a file that is done.

    Args:
        target: What was written.
        form: Of its audio, or nothing.
        seconds: Its duration.
        size: Bytes written.
        measured: `bitstream.info` of the .mfac file, or None of a stream, which cannot be read twice.
        took: Seconds that the work took.
    """
    parts = [f"{seconds:.2f} s", form]
    if measured and measured["seconds"]:
        parts.append(f"{measured['payload_kbps']:.2f} kbps ({measured['total_kbps']:.2f} with header)")
    parts.append(f"{size:,} bytes")
    if seconds:
        parts.append(f"{seconds / took:.3g} x real time")
    name = "standard output" if target == STREAM else target
    return f"{name}: {', '.join(filter(None, parts))}"
