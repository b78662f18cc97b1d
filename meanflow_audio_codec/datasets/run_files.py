"""The audio files of one run: found, split and filtered when it begins, and the same ever after.

The list lies in the workdir as `files.jsonl`, a file a line. A resumed run draws from that list and not from what its
folders hold by then, so that every crop keeps its place in the stream.
"""

import dataclasses
import hashlib
import json
import logging
import os
from typing import Any

from etils import epath

from meanflow_audio_codec.datasets.audio import AudioFile, difference, scan_folder
from meanflow_audio_codec.datasets.pipeline import select_files
from meanflow_audio_codec.errors import InputError

log = logging.getLogger(__name__)

_VALID_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a run trains on and is judged by.

    Attributes:
        train: The files of each folder of `input.data_dir`.
        valid: The validation files, of each folder that they come from.
    """

    train: list[list[AudioFile]]
    valid: list[list[AudioFile]]


def find_files(spec: Any, segment_samples: int, record: epath.Path) -> RunFiles:
    """Find the files that `config.input` names, at the beginning of a run.

    Validation files are those of `valid_dir`; without it, in each folder of `data_dir`, those of its subfolder
    "valid"; where there is none, 5 % of the files, at least one. `data_dir` and `valid_dir` are each a folder, or
    several joined by os.pathsep as in PATH.

    Args:
        spec: `config.input`.
        segment_samples: Samples of a training crop.
        record: `files.jsonl` of an earlier start of the same run, which spares opening unchanged files; it need not
            exist.

    Raises:
        InputError: No such folder, or no usable file in one.
    """
    roots = _roots(spec)
    earlier = _read(record, roots) if record.exists() else RunFiles([], [])
    known = {file.name: file for folder in earlier.train + earlier.valid for file in folder}
    scan = lambda folder: scan_folder(
        folder, known=known, bad_files=spec.bad_files, measure_bandwidth=spec.min_bandwidth > 0
    )
    train = [scan(folder) for folder in roots["train"]]
    if spec.valid_dir:
        valid = [scan(folder) for folder in roots["valid"]]
    else:
        train, valid = zip(*map(split_files, train), strict=True)
    select = lambda files, short_files: select_files(
        files,
        sample_rate=spec.sample_rate,
        segment_samples=segment_samples,
        channels=spec.channels,
        min_seconds=spec.min_seconds,
        min_bandwidth=spec.min_bandwidth,
        short_files=short_files,
    )
    return RunFiles([select(files, spec.short_files) for files in train], [select(files, "pad") for files in valid])


def recall_files(spec: Any, record: epath.Path) -> RunFiles:
    """Return the files that a run began with, to continue it.

    Files that are gone or have changed keep their places in the list. With `bad_files` "skip" they are named and
    counted here, and crops that would come from them come from others.

    Raises:
        InputError: With `bad_files` "error", files that are gone or have changed; no record, or another run's.
    """
    if not record.exists():
        raise InputError(f"{record} is missing, which lists the files of the run: start anew in another workdir")
    files = _read(record, _roots(spec))
    found = [(file, difference(file)) for folder in files.train + files.valid for file in folder]
    changed = [f"{file.name} {how}" for file, how in found if how]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        message = f"{len(changed)} of the run's {len(found)} files: {', '.join(changed[:5])}{more}"
        if spec.bad_files == "error":
            raise InputError(f"{message}; put them back, or set input.bad_files=skip to draw from others")
        log.warning("%s; drawing from others", message)
    return files


def write_record(record: epath.Path, files: RunFiles) -> None:
    """Write `files.jsonl`, atomically."""
    lines = []
    for part, folders in dataclasses.asdict(files).items():
        for number, folder in enumerate(folders):
            for file in folder:
                del file["path"]  # the folders may move; names stay
                lines.append(json.dumps({"part": part, "folder": number, **file}) + "\n")
    partial = record.with_name(record.name + ".tmp")
    partial.write_text("".join(lines))
    partial.replace(record)


def split_files(files: list[AudioFile]) -> tuple[list[AudioFile], list[AudioFile]]:
    """Split one folder's files into training and validation files.

    Its subfolder "valid" is the validation set; without one, the SHA-256 of the names decides: neither order nor place
    nor a seed, so every process and every rerun agrees. Two files or more give at least one to each side; a single
    file serves, with a warning, as both.
    """
    if len(files) == 1:
        log.warning("%s is the only file: it serves training and validation", files[0].path)
        return files, files
    chosen = {file.name for file in files if file.name.startswith("valid/")}
    if not 0 < len(chosen) < len(files):
        count = max(1, round(_VALID_SHARE * len(files)))
        ranked = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
        chosen = {file.name for file in ranked[:count]}
    return [file for file in files if file.name not in chosen], [file for file in files if file.name in chosen]


def _roots(spec: Any) -> dict[str, list[str]]:
    split = lambda folders: [os.path.expanduser(folder) for folder in folders.split(os.pathsep)]
    return {"train": split(spec.data_dir), "valid": split(spec.valid_dir or spec.data_dir)}


def _read(record: epath.Path, roots: dict[str, list[str]]) -> RunFiles:
    files = {part: [[] for _ in folders] for part, folders in roots.items()}
    try:
        for line in record.read_text().splitlines():
            row = json.loads(line)
            part, folder = row.pop("part"), row.pop("folder")
            files[part][folder].append(AudioFile(path=os.path.join(roots[part][folder], row["name"]), **row))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{record} does not list files of these folders ({error!r}): delete it") from error
    return RunFiles(**files)
