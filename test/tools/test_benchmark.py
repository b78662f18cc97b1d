"""The loader suite runs through on a handful of small files and writes both reports."""

import json
import re

import numpy as np
import pytest
import soundfile

from meanflow_audio_codec.tools import benchmark

OURS = ["ours", "ours, cache cold", "ours, cache warm"]


def run(output, *flags):
    benchmark.main(["--suite", "loader", "-o", str(output), "--seconds", "0.2", "--pairs", "1", *flags])
    return json.loads((output / "loader.json").read_text())


def write(path, seconds, rate, channels):
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (int(seconds * rate), channels))
    soundfile.write(path, audio, rate)


def test_generated_files_are_measured_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "_PIECE_SECONDS", (2, 3))
    monkeypatch.setattr(benchmark, "_FILES", 4)
    monkeypatch.setattr(benchmark, "_ENCODINGS", {"ogg": "VORBIS"})
    monkeypatch.setattr(benchmark, "_CROP_SECONDS", (0.5, 1.5))
    report = run(tmp_path)
    files = sorted((tmp_path / "data").iterdir())
    assert [path.name for path in files] == ["0_00.ogg", "0_01.ogg", "1_00.ogg", "1_01.ogg"]
    assert [soundfile.info(path).duration for path in files] == [2, 2, 3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "loader.json", "loader.md"]  # no cache is left

    full, resampled = report["tables"]
    assert [row["loader"] for row in full["rows"]] == OURS
    assert [row["loader"] for row in resampled["rows"]] == ["ours", "ours, cache warm"]
    assert full["title"] == "OGG, 4 files: crops of 0.5, 1.5 s at 44100 Hz stereo"
    for table in (full, resampled):
        ours = table["rows"][0]
        for row in table["rows"]:
            runs = [measured for measured in table["runs"] if measured["loader"] == row["loader"]]
            assert all(measured["crops"] % 16 == 0 and measured["seconds"] >= 0.2 for measured in runs)
            seconds = sum(measured["seconds"] for measured in runs)
            crops = sum(measured["crops"] for measured in runs)
            audio = sum(measured["crops"] * measured["crop_seconds"] for measured in runs)
            assert row["crops_per_s"] == pytest.approx(crops / seconds)
            assert row["audio_s_per_s"] == pytest.approx(audio / seconds)
            assert row["ours_over_it"] == pytest.approx(ours["crops_per_s"] / row["crops_per_s"])
            assert row["first_batch_s"] > 0 and row["peak_memory_mb"] != 0
    assert [measured["crop_seconds"] for measured in full["runs"]] == 3 * [0.5, 1.5]
    assert [measured["crop_seconds"] for measured in resampled["runs"]] == [1.36, 1.36]
    assert report["machine"]["versions"]["soundfile"] == soundfile.__version__

    markdown = (tmp_path / "loader.md").read_text()
    assert capsys.readouterr().out == markdown
    assert len(re.findall(r"^\| ours.*( \|.*){5}$", markdown, re.MULTILINE)) == 5
    assert str(tmp_path) not in markdown + json.dumps(report)


def test_the_users_folder_is_measured_by_its_commonest_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_CROP_SECONDS", (0.5,))
    monkeypatch.setattr(benchmark, "_OURS", benchmark._OURS[:1])  # a process less for each run
    folder = tmp_path / "music"
    folder.mkdir()
    for name, kind in {"a": (2, 8000, 1), "b": (0.1, 8000, 1), "c": (2, 16000, 2), "d": (2, 8000, 6)}.items():
        write(folder / f"{name}.wav", *kind)
    (folder / "broken.wav").write_text("no audio")
    report = run(tmp_path / "out", "--data-dir", str(folder))
    full, resampled = report["tables"]
    assert full["title"] == "WAV, 2 files: crops of 0.5 s at 8000 Hz mono"
    assert resampled["title"] == "WAV, 2 files: crops of 1.36 s, resampled to 24000 Hz mono"
    assert report["command"].endswith("--suite loader --data-dir FOLDER -o DIR --seconds 0.2 --pairs 1")
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize("flags", [["--seconds", "0"], ["--pairs", "0"], ["--data-dir", "nowhere"]])
def test_mistakes_end_in_one_line(tmp_path, flags):
    with pytest.raises(SystemExit, match=r"^benchmark: .*(--seconds=|--pairs=|nowhere)[^\n]*$"):
        benchmark.main(["--suite", "loader", "-o", str(tmp_path), *flags])
