"""The report of a fabricated workdir, read back by an HTML parser, and the spectrogram's pixels."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators.report import draw_spectrograms, write_report

VOID = {"meta", "img", "br", "link"}
HOSTILE = "<script>alert('x & $title')</script>"


class Page(HTMLParser):
    """Collect text, tags with attributes, and complain about a wrong end tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self._open[-1] in ("th", "td", "tr", "tbody", "thead") and self._open[-1] != tag:
            self._open.pop()  # their end tags are optional
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_report(workdir):
    write_report(workdir)
    return (workdir / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"total_steps": 500, "seed": 3, "model": {"variant": "Ti", "note": HOSTILE}})
    )
    rows = [{"step": s, "time": 1.0, "train/loss": 100.0 / s} for s in range(10, 310, 10)]
    rows.append({"step": 300, "val/raw_u": 0.123456, f"val/{HOSTILE}": 1.0})
    rows.append({"step": 300, "reconstruction/lsd_db_nfe1": 7.5, "reconstruction/lsd_db_nfe04": 6.25})
    write_lines(tmp_path / "metrics.jsonl", rows)
    speed = {"steps_per_s": 2.0, "examples_per_s": 16.0}
    write_lines(
        tmp_path / "timings.jsonl",
        [{"step": 1, "time": 50.0, **speed}, {"step": 300, "time": 3775.0, **speed}],
    )
    for step in ("100", "300"):
        folder = tmp_path / "samples" / step
        folder.mkdir(parents=True)
        clips = []
        for i, name in enumerate(("reference", "nfe01", "nfe04")):
            audio = 0.1 * np.random.default_rng(i).standard_normal(2000).astype(np.float32)
            soundfile.write(folder / f"00_{name}.wav", audio, 8000)
            clips.append((name, audio))
        draw_spectrograms(folder / "00.png", "clip 0", clips, 8000)
    return tmp_path


def test_report_holds_players_pictures_and_values(workdir):
    page = Page(read_report(workdir))
    newest = workdir / "samples" / "300"
    wavs = [newest / f"00_{name}.wav" for name in ("reference", "nfe01", "nfe04")]
    played = [base64.b64decode(a["src"].split("base64,")[1]) for a in page.named("audio")]
    assert played == [path.read_bytes() for path in wavs]
    (image,) = page.named("img")
    assert base64.b64decode(image["src"].split("base64,")[1]) == (newest / "00.png").read_bytes()
    for text in ("step 300 of 500", "0.1235", "7.5", "6.25", "model.variant", "1 h 02 min 05 s"):
        assert text in page.text, text
    assert "none yet" not in page.text


def test_one_chart_a_metric_and_one_curve_an_nfe(workdir):
    page = Page(read_report(workdir))
    labels = [svg["aria-label"] for svg in page.named("svg") if "aria-label" in svg]
    assert labels == [f"{n} over steps" for n in ("loss", "raw_u", HOSTILE, "lsd_db")]
    assert "nfe 1 7.5" in page.text and "nfe 4 6.25" in page.text
    numbers = " ".join(line["points"] for line in page.named("polyline")).replace(",", " ").split()
    assert np.isfinite(np.array(numbers, float)).all()


def test_curve_falls_where_the_metric_falls(workdir):
    smoothed = Page(read_report(workdir)).named("polyline")[1]
    points = np.array([p.split(",") for p in smoothed["points"].split()], float)
    assert (np.diff(points[:, 0]) > 0).all()
    assert (np.diff(points[:, 1]) >= 0).all()  # y grows downwards in SVG


def test_report_needs_nothing_from_outside(workdir):
    text = read_report(workdir)
    assert not re.search(r"https?://|url\(|@import|<link|<script", text)
    for _, attributes in Page(text).tags:
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes


def test_hostile_names_are_escaped(tmp_path):
    workdir = tmp_path / "<img onerror=1> & $config"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"name": HOSTILE, HOSTILE: {"seed": HOSTILE}}))
    write_lines(workdir / "metrics.jsonl", [{"step": 1, f"{HOSTILE[:7]}/{HOSTILE[:8]}": 1.0}])
    page = Page(read_report(workdir))
    assert not page.named("script") and not page.named("img")
    assert HOSTILE in page.text
    assert workdir.name in page.text


def test_empty_workdir_says_none_yet(tmp_path):
    page = Page(read_report(tmp_path))
    assert page.text.count("none yet") == 5  # run, listening, results, curves, wall clock
    (tmp_path / "samples" / "100").mkdir(parents=True)  # an evaluation that has just begun
    assert "none yet" in Page(read_report(tmp_path)).text
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "samples"}


def test_values_that_cannot_be_drawn_are_left_out(tmp_path):
    rows = [{"step": 5, "a/nan": float("nan"), "a/text": "x", "a/flat": 0, "note": 3}] * 2
    write_lines(tmp_path / "metrics.jsonl", rows)
    page = Page(read_report(tmp_path))
    assert [svg["aria-label"] for svg in page.named("svg") if "aria-label" in svg] == ["flat over steps"]


def test_half_a_last_line_is_ignored_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "tra')
    assert "2.5" in Page(read_report(tmp_path)).text
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2 "):
        write_report(tmp_path)


def test_long_curves_stay_small(tmp_path):
    loss = np.random.default_rng(0).standard_normal(20000)
    rows = [{"step": step, "train/loss": float(value)} for step, value in enumerate(loss)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert len(read_report(tmp_path)) < 30_000


def test_spectrogram_shows_the_tone_where_it_is(tmp_path):
    tone = np.sin(2 * np.pi * 3000 * np.arange(24000) / 24000)
    clips = [("reference $x$", np.zeros(24000)), ("nfe 1", tone)]
    draw_spectrograms(tmp_path / "a.png", "tone.wav$", clips, 24000)
    picture = imread(tmp_path / "a.png")
    height, width, channels = picture.shape
    assert width > height > 100 and channels == 4
    # The panel spans about y 10 % to 85 % of the picture, and 3 of 12 kHz is a quarter from below.
    column = picture[:, int(0.66 * width), :3].sum(-1) * picture[:, int(0.66 * width), 3]
    assert 0.6 < column.argmax() / height < 0.75


def test_import_leaves_matplotlib_alone():
    code = "import sys, meanflow_audio_codec.evaluators.report; print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
