"""A run keeps to the files that it began with."""

import logging
import os
import types

import numpy as np
import pytest
import soundfile
from etils import epath

from meanflow_audio_codec.datasets.audio import scan_folder
from meanflow_audio_codec.datasets.run_files import find_files, recall_files, split_files, write_record
from meanflow_audio_codec.errors import InputError

RATE, SAMPLES = 8000, 1000


def write(path, seconds=0.5):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * RATE)), RATE)
    return path


def spec(data_dir, **fields):
    defaults = dict(valid_dir="", bad_files="error", short_files="error", min_seconds=0.0, min_bandwidth=0.0)
    return types.SimpleNamespace(**defaults | dict(data_dir=str(data_dir), sample_rate=RATE, channels=1) | fields)


def names(folders):
    return [[file.name for file in folder] for folder in folders]


@pytest.fixture
def record(tmp_path):
    return epath.Path(tmp_path) / "run" / "files.jsonl"


@pytest.fixture
def begun(tmp_path, record):
    """A folder of 40 files, and the files of a run that began with it."""
    for i in range(40):
        write(tmp_path / "music" / f"{i:02}.wav")
    files = find_files(spec(tmp_path / "music"), SAMPLES, record)
    record.parent.mkdir()
    write_record(record, files)
    return files


def test_split_depends_on_names_only_and_fills_both_sides(begun, tmp_path, caplog):
    files = scan_folder(tmp_path / "music")
    train, valid = split_files(files)
    assert (names([train, valid])) == names(begun.train + begun.valid)
    assert len(valid) == 2 and sorted(train + valid, key=lambda file: file.name) == files
    assert [set(side) for side in split_files(files[::-1])] == [set(train), set(valid)]
    assert [len(side) for side in split_files(files[:2])] == [1, 1]
    with caplog.at_level(logging.WARNING):
        assert split_files(files[:1]) == (files[:1], files[:1])
    assert "only file" in caplog.text


def test_subfolder_valid_is_the_validation_set(tmp_path, record):
    for name in ("train/a.wav", "train/b.wav", "valid/c.wav", "d.wav"):
        write(tmp_path / "music" / name)
    files = find_files(spec(tmp_path / "music"), SAMPLES, record)
    assert names(files.train) == [["d.wav", "train/a.wav", "train/b.wav"]] and names(files.valid) == [["valid/c.wav"]]


def test_several_folders_and_filters(tmp_path, record):
    for name in ("music/a.wav", "music/b.wav", "speech/a.wav", "speech/c.wav", "held/v.wav"):
        write(tmp_path / name)
    write(tmp_path / "speech" / "brief.wav", seconds=0.2)
    data_dir = os.pathsep.join([str(tmp_path / "music"), str(tmp_path / "speech")])
    fields = spec(data_dir, valid_dir=str(tmp_path / "held"), min_seconds=0.3)
    files = find_files(fields, SAMPLES, record)
    assert names(files.train) == [["a.wav", "b.wav"], ["a.wav", "c.wav"]] and names(files.valid) == [["v.wav"]]
    record.parent.mkdir()
    write_record(record, files)
    assert recall_files(fields, record) == files


def test_files_added_later_do_not_change_a_run(begun, tmp_path, record):
    write(tmp_path / "music" / "00a.wav")
    assert recall_files(spec(tmp_path / "music"), record) == begun
    assert len(find_files(spec(tmp_path / "music"), SAMPLES, record).train[0]) == 39  # another run's


def test_moved_folder_is_recalled(begun, tmp_path, record):
    (tmp_path / "music").rename(tmp_path / "moved")
    files = recall_files(spec(tmp_path / "moved"), record)
    assert names(files.train) == names(begun.train)
    assert files.train[0][0].path == str(tmp_path / "moved" / files.train[0][0].name)


def test_files_gone_or_changed_are_named_and_counted_by_the_policy(begun, tmp_path, record, caplog):
    gone, changed = begun.train[0][3], begun.valid[0][1]
    os.unlink(gone.path)
    write(tmp_path / "music" / changed.name, seconds=0.6)
    line = rf"2 of the run's 40 files: {gone.name} is gone, {changed.name} has changed"
    with pytest.raises(InputError, match=rf"^{line}; put them back, or set input\.bad_files=skip"):
        recall_files(spec(tmp_path / "music"), record)
    with caplog.at_level(logging.WARNING):
        assert recall_files(spec(tmp_path / "music", bad_files="skip"), record) == begun
    assert line in caplog.text


def test_missing_and_broken_records_are_named(begun, tmp_path, record):
    record.write_text(record.read_text() + '{"part": "train", "folder": 1}\n')
    with pytest.raises(InputError, match=r"files\.jsonl does not list files of these folders"):
        recall_files(spec(tmp_path / "music"), record)
    record.unlink()
    with pytest.raises(InputError, match=r"files\.jsonl is missing"):
        recall_files(spec(tmp_path / "music"), record)
