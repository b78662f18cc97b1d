"""The report states what the generated files are known to hold; broken files are listed and stop nothing."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from meanflow_audio_codec.tools import inspect_data

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "two\nlines \x1b[31mred\x1b[0m \u202egnp.wav"


def noise(frames, edge=None, rate=44100, seed=0):
    audio = 0.1 * np.random.default_rng(seed).standard_normal(frames)
    if edge is None:
        return audio
    return scipy.signal.fftconvolve(audio, scipy.signal.firwin(1001, edge, fs=rate, window=("kaiser", 10)), "same")


def write(path, audio, rate=44100, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, **settings)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight files that decode, of 72 s in all, and three that do not."""
    folder = tmp_path_factory.mktemp("music $x^2$")
    write(folder / "a" / "long.flac", np.stack([noise(44100 * 36)] * 2, axis=1))
    write(folder / "a" / "speech.ogg", noise(48000 * 9, 8000, 48000), 48000)
    loud = noise(44100 * 9, 11000)
    loud[1000] = 1.75
    write(folder / "loud.wav", loud, subtype="FLOAT")
    write(folder / "silent.wav", np.zeros((16000 * 9, 2)), 16000)
    write(folder / HOSTILE, np.concatenate([noise(22050), np.zeros(22050)]))
    write(folder / "b.wav", noise(44100 * 2, seed=1))
    (folder / "copy of b.wav").write_bytes((folder / "b.wav").read_bytes())
    broken = 0.25 * np.ones(44100 * 4)
    broken[7:10] = np.nan
    write(folder / "nan.wav", broken, subtype="FLOAT")
    cut = write(folder / "cut.flac", noise(44100 * 5))
    cut.write_bytes(cut.read_bytes()[:-30000])
    (folder / "text.wav").write_text("this is no audio " * 100)
    (folder / "gone.mp3").symlink_to(folder / "nowhere")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "._b.wav").write_text("a dot file")
    return folder


@pytest.fixture(scope="module")
def report(folder, tmp_path_factory):
    picture = tmp_path_factory.mktemp("out") / "picture.png"
    code = "import sys; from meanflow_audio_codec.tools.inspect_data import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), "-o", str(picture)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode(), picture


def row(text, label):
    """The numbers of the one line with this label."""
    (line,) = re.findall(rf"^ *{re.escape(label)}  +(-inf.*|-?\d.*)$", text, re.MULTILINE)
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,.]*(?=[\s%]|$)|-inf", line)]


def test_headline_and_kinds(report, folder):
    text, _ = report
    megabytes = sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".wav", ".flac", ".ogg")) / 1e6
    megabytes -= (folder / "._b.wav").stat().st_size / 1e6
    assert text.startswith(f"{folder}: 11 files, 0.020 h, {megabytes:.1f} MB; 3 do not decode\n")
    assert row(text, "44,100 Hz")[:2] == [6, 75.0]
    assert row(text, "48,000 Hz")[:3] == row(text, "16,000 Hz")[:3] == [1, 12.5, 0.003]
    assert row(text, "mono")[0] == 6
    assert row(text, "stereo")[0] == 2
    assert row(text, "WAV PCM_16")[0] == 4
    assert row(text, "WAV FLOAT")[0] == 2
    assert row(text, "FLAC PCM_16")[2] == 0.010  # 36 s in hours
    assert row(text, "OGG VORBIS")[0] == 1


def test_distributions_and_histograms(report):
    text, _ = report
    assert row(text, "duration, s") == [1.0, 1.0, 4.0, 36.0, 36.0]
    least, _, _, _, most = row(text, "peak")[:5]
    assert (least, most) == (0.0, 1.75)
    assert row(text, "level, dBFS")[0] == -np.inf
    assert row(text, "level, dBFS")[-1] == pytest.approx(20 * np.log10(0.25), abs=0.06)
    assert row(text, "silence, %")[-1] == 100.0
    assert row(text, "1.5 to 2") == [1, 0.003]
    assert row(text, "8 to 9") == [1, 0.003]
    assert row(text, "11 to 12") == [1, 0.003]
    assert row(text, "22 to 23")[0] == 4
    peaks, _, bandwidths = text[text.index("peak                      files") :].partition("bandwidth, kHz")
    assert row(peaks, "0") == [1, 0.003]  # silent.wav
    assert row(bandwidths, "0") == [2, 0.004]  # and nan.wav, a constant


def test_remarks_name_files_and_hostile_names_stay_on_their_line(report):
    text, _ = report
    lines = text.splitlines()
    escaped = r"two\nlines \x1b[31mred\x1b[0m \u202egnp.wav"
    assert any(line.startswith("shortest") and line.endswith(f"1.00 s: {escaped}") for line in lines)
    assert any(line.startswith("longest") and line.endswith("36.00 s: a/long.flac") for line in lines)
    assert any(line.startswith("largest peak") and line.endswith("1.750: loud.wav") for line in lines)
    assert row(text, "silence")[0] == pytest.approx(9.5 / 60, abs=0.06)
    following = {line.split("  ")[0]: after for line, after in zip(lines, lines[1:], strict=False)}
    assert following["silent throughout"] == "  silent.wav"
    assert following["not finite"] == "  nan.wav: 3 samples"
    assert following["copies"] == "  b.wav = copy of b.wav"
    assert all(character.isprintable() for line in lines for character in line)


def test_files_that_do_not_decode_are_listed_with_the_reason(report):
    text, _ = report
    tail = text[text.index("3 do not decode:\n") :]
    assert re.search(r"^  cut\.flac: (ends early, after|does not decode)", tail, re.MULTILINE)
    assert re.search(r"^  text\.wav: does not decode \(.*\)$", tail, re.MULTILINE)
    assert re.search(r"^  gone\.mp3: No such file or directory$", tail, re.MULTILINE)


def test_picture_opens(report):
    from matplotlib.image import imread

    text, picture = report
    assert f"picture: {picture}" in text
    pixels = imread(io.BytesIO(picture.read_bytes()))
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    assert pixels.std() > 0.05  # it is not blank


def test_default_picture_lies_in_the_current_folder_and_never_in_the_data(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data" / "a.wav", noise(1000))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    inspect_data.main([str(tmp_path / "data")])
    assert (tmp_path / "work" / "inspect_data.png").stat().st_size > 10000
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(SystemExit, match=r"^inspect_data: the current folder lies in the data.*-o FILE\.png$"):
        inspect_data.main(["."])
    assert os.listdir(tmp_path / "data") == ["a.wav"]
    capsys.readouterr()


def test_only_broken_files_are_a_report_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.wav").write_text("this is no audio " * 100)
    monkeypatch.chdir(tmp_path)
    inspect_data.main(["data"])
    assert capsys.readouterr().out.startswith("data: 1 file, 0.000 h, 0.0 MB; 1 does not decode\n")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere\n"], r"inspect_data: nowhere\\n is not a folder; name one with \.wav, .* files"),
        (["empty"], r"inspect_data: empty holds no audio; put \.wav, .* files in it"),
        (["data", "-o", "a.pdf"], r"inspect_data: -o a\.pdf: the picture is a PNG, so name a \.png file"),
        (["data", "-o", "no/a.png"], r"inspect_data: -o no/a\.png: no is no folder that can be written to"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "data" / "a.wav", noise(1000))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        inspect_data.main(arguments)
    assert re.fullmatch(message, stopped.value.code)
