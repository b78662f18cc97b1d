"""The evaluation with coders and a codec that are known, so that what it must say is known too."""

import csv
import io
import json
import os
import sys
import types

import numpy as np
import pytest
import scipy.stats
import soundfile

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import baselines, metrics, perceptual
from meanflow_audio_codec.evaluators.baselines import Coded, Coder
from meanflow_audio_codec.tools import evaluate, evaluate_report

RATE = 16000
pytest.importorskip("pyloudnorm", reason="the extra eval is not installed")


def noise(samples, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


def sine(hz, seconds, rate=RATE, level=0.1):
    return (level * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips of music, one of speech, one of narrow speech, one of anything, and two to be left out."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "music").mkdir()
    soundfile.write(folder / "music" / "a.wav", noise(RATE, 1), RATE)
    soundfile.write(folder / "music_b.flac", np.stack([noise(44100, 2), noise(44100, 3)], 1), 44100)
    soundfile.write(folder / "music_c.wav", np.concatenate([sine(f, 1) for f in (500, 1000, 2000)]), RATE)
    soundfile.write(folder / "speech_d.wav", noise(RATE, 4), RATE)
    soundfile.write(folder / "speech_e.wav", noise(8000, 5), 8000)
    soundfile.write(folder / "whatever_f.wav", noise(RATE, 6), RATE)
    soundfile.write(folder / "music_low.wav", noise(8000, 7), 8000)
    soundfile.write(folder / "music_silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "music_short.wav", noise(RATE // 4, 8), RATE)
    return folder


################################################ Clips


def test_clips_and_groups(folder):
    said = []
    clips = {clip.name: clip for clip in evaluate.load_clips(folder, RATE, 1.0, 1, said.append)}
    groups = {"music/a.wav": "music", "music_b.flac": "music", "music_c.wav": "music", "speech_d.wav": "speech"}
    groups |= {"speech_e.wav": "speechnb", "whatever_f.wav": "all"}
    assert {name: clip.group for name, clip in clips.items()} == groups
    assert [line.split()[0] for line in said] == ["music_low.wav", "music_short.wav", "music_silent.wav"]
    for clip in clips.values():
        assert len(clip.audio) == RATE and clip.audio.dtype == np.float32
        assert (np.round(clip.audio * 32768) == clip.audio * 32768).all()


def test_a_clip_is_the_files_middle(folder):
    clips = evaluate.load_clips(folder, RATE, 1.0, 1, str)
    audio = next(clip for clip in clips if clip.name == "music_c.wav").audio
    assert np.abs(np.fft.rfft(audio)).argmax() == 1000
    clips = evaluate.load_clips(folder, RATE, 0.9, 3, str)
    names = {f"music_c.wav#{i + 1}": hz for i, hz in enumerate((500, 1000, 2000))}
    for clip in clips:
        if clip.name in names:
            assert np.abs(np.fft.rfft(clip.audio)).argmax() == pytest.approx(0.9 * names[clip.name], abs=1)


def test_clips_are_at_minus_16_lufs_by_bs_1770(tmp_path):
    # BS.1770: a sine of 997 Hz at 0 dBFS reads -3.01 LUFS in one channel.
    soundfile.write(tmp_path / "x.wav", sine(997, 2, 48000, level=0.02), 48000, subtype="FLOAT")
    (clip,) = evaluate.load_clips(tmp_path, 48000, 2.0, 1, str)
    assert 20 * np.log10(np.abs(clip.audio).max()) == pytest.approx(-16 + 3.01, abs=0.05)


def test_peaks_stay_below_full_scale(tmp_path):
    clicks = np.zeros(RATE, np.float32)
    clicks[::800] = 0.01
    soundfile.write(tmp_path / "x.wav", clicks, RATE, subtype="FLOAT")
    (clip,) = evaluate.load_clips(tmp_path, RATE, 2.0, 1, str)
    assert np.abs(clip.audio).max() == pytest.approx(0.99, abs=1e-4)


@pytest.mark.parametrize("lag", [-50, -1, 0, 1, 50])
def test_align_undoes_a_shift(lag):
    whole = noise(5000)
    reference, decoded = whole[1000:3000], -0.5 * whole[1000 - lag : 3200 - lag]
    shifted, found = evaluate.align(reference, -decoded, 50)
    assert found == lag and shifted.shape == reference.shape
    inside = slice(50, -50)
    np.testing.assert_allclose(shifted[inside], 0.5 * reference[inside], rtol=1e-6)


def test_align_pads_what_is_short_and_takes_silence():
    reference = noise(1000)
    shifted, lag = evaluate.align(reference, reference[:700], 50)
    assert lag == 0 and (shifted[:700] == reference[:700]).all() and not shifted[700:].any()
    shifted, lag = evaluate.align(reference, np.zeros(1000, np.float32), 50)
    assert lag == 0 and not shifted.any()


def test_lags_beyond_the_limit_are_not_sought():
    reference = noise(4000)
    _, lag = evaluate.align(reference, np.roll(reference, 200), 50)
    assert abs(lag) <= 50


def test_16_bits_are_rounded_and_clipped():
    audio = np.array([0.0, 0.4 / 32768, 0.6 / 32768, -1.2, 1.2], np.float32)
    np.testing.assert_array_equal(evaluate.to_16_bits(audio) * 32768, [0, 0, 1, -32768, 32767])


################################################ Statistics


def test_bootstrap_is_scipys_percentile_interval():
    values = np.random.default_rng(3).exponential(1, 18)
    found = evaluate_report.bootstrap(values)
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=100_000, method="percentile", rng=0)
    assert found.mean == values.mean() and found.count == 18
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.02)
    assert found == evaluate_report.bootstrap(values)
    assert evaluate_report.bootstrap(values[:1]) == (values[0], None, None, 1)


def row(coder, clip, kbps, group="music", seconds=1.0, **scores):
    family = coder.split()[0]
    names = {"version": "1", "asked_kbps": kbps, "file": clip, "checksum": 0, "file_kbps": None, "lag_samples": 0}
    times = {"encode_seconds": 0.1, "decode_seconds": 0.05}
    return {"coder": coder, "family": family, "clip": clip, "group": group, "seconds": seconds, "kbps": kbps, **names,
            **times, "scores": scores}  # fmt: skip


def test_kbps_are_all_bits_over_all_seconds():
    rows = [row("mp3 8", "a", 8.0, seconds=1.0, si_sdr_db=1.0), row("mp3 8", "b", 12.0, seconds=3.0, si_sdr_db=4.0)]
    (point,) = evaluate_report.summarize(rows)
    assert point.kbps == 11 and point.means["si_sdr_db"].mean == 2.5
    assert point.encode_speed == pytest.approx(20) and point.decode_speed == pytest.approx(40)


def test_differences_are_paired_at_the_nearest_kbps():
    rows = []
    for i in range(6):  # clips differ far more than coders do
        rows.append(row("ours 6", f"c{i}", 6.0, mel_distance=10.0 * i, pesq_wb_16k=1.0 * i, si_sdr_db=(-1.0) ** i))
        rows.append(row("opus_auto 5", f"c{i}", 5.0, mel_distance=0.0, pesq_wb_16k=0.0, si_sdr_db=0.0))
        pesq = None if i == 5 else i + 0.1
        rows.append(row("opus_auto 7", f"c{i}", 6.9, mel_distance=10.0 * i + 0.5, pesq_wb_16k=pesq, si_sdr_db=0.0))
        rows.append(row("opus_music 6", f"c{i}", 6.0, mel_distance=10.0 * i + 0.3, pesq_wb_16k=9.0, si_sdr_db=0.0))
    points = evaluate_report.summarize(rows)
    auto, music = evaluate_report.compare(rows, points, ["ours"])
    assert auto.theirs == "opus_auto 7" and auto.kbps == pytest.approx((6.0, 6.9))
    assert auto.means["mel_distance"] == pytest.approx((-0.5, -0.5, -0.5, 6))
    assert auto.means["pesq_wb_16k"] == pytest.approx((-0.1, -0.1, -0.1, 5))  # one clip has none
    assert auto.better == {"mel_distance": 1, "pesq_wb_16k": -1, "si_sdr_db": 0}
    best = evaluate_report.best_opus([auto, music], "music", "ours 6")
    assert best["mel_distance"] is music and best["pesq_wb_16k"] is music
    far = music._replace(kbps=(6.0, 8.0))  # spends more, so is no match
    assert evaluate_report.best_opus([auto._replace(kbps=(6.0, 6.5)), far], "music", "ours 6")["pesq_wb_16k"] is not far
    assert evaluate_report.best_opus([far], "music", "ours 6")["pesq_wb_16k"] is far


def test_bars_take_our_best_setting_within_their_bitrate():
    rows = [row(f"ours {k:g}", c, k, mel_distance=m, mel16_distance=1.0) for c in "ab" for k, m in ((5.9, 1.8), (8, 1))]
    points = evaluate_report.summarize(rows)
    bars = {(b.kbps, b.measure): b for b in evaluate_report.judge(points, ["ours"], 44100)}
    assert (bars[6, "mel_distance"].ours, bars[6, "mel_distance"].met) == ("ours 5.9", True)
    assert (bars[12, "mel_distance"].ours, bars[12, "mel_distance"].met) == ("ours 8", True)
    assert bars[24, "mel16_distance"].met is False
    # At another rate only what sees 8 kHz and no more compares.
    assert {bar.measure for bar in evaluate_report.judge(points, ["ours"], 24000)} == {"mel16_distance"}
    assert all(bar.met is None for bar in evaluate_report.judge(points[1:], ["ours"], 44100) if bar.kbps == 6)


def test_our_settings_are_the_bitrates_that_we_have():
    codec = types.SimpleNamespace(name="net", bitrate=12.0, min_bitrate=1.5, fingerprint="f")
    coders = evaluate.own_coders(codec, [1.0, 3.0, 5.9, 12.0, 24.0], [1, 2])
    names = [f"net {kbps} nfe {n}" for n in (1, 2) for kbps in ("3", "5.9", "12")]
    assert [coder.name for coder in coders] == names
    assert {coder.family for coder in coders} == {"net nfe 1", "net nfe 2"}


################################################ The program


def rounding_coder(family, kbps, calls, name=None):
    """A coder that rounds, the more coarsely the fewer the kbps, 3 samples late."""

    def code(audio, sample_rate):
        calls.append((family, kbps))
        step = 2.0 ** -(kbps / 3)
        late = np.concatenate([np.zeros(3, np.float32), np.round(audio / step) * step]).astype(np.float32)
        return Coded(late, round(kbps * 1000 / 8 * len(audio) / sample_rate), 0.01, 0.01)

    return Coder(name or f"{family} {kbps:g}", family, kbps, "1", code)


class FakeCodec:
    """Rounds as `rounding_coder` does; what it takes is what is asked for."""

    name, fingerprint, sample_rate, min_bitrate, bitrate = "net", "0123456789abcdef", RATE, 6.0, 24.0

    def __init__(self):
        self.audio = {}

    @classmethod
    def load(cls, source):
        assert source == "net"
        return cls()

    def compress(self, audio, sample_rate, kbps=None):
        assert audio.ndim == 1 and sample_rate == RATE
        kept = (kbps or self.bitrate) / 6
        data = np.float64([len(self.audio), kept]).tobytes() + bytes(round(6000 / 8 * kept * len(audio) / RATE))
        step = 2.0 ** -(2 * kept + 1)
        self.audio[data] = (np.round(audio / step) * step).astype(np.float32)
        return data

    def decompress(self, data, nfe=1):
        return self.audio[data][None], RATE


@pytest.fixture
def calls(monkeypatch):
    """Two baselines and nothing that needs a package; the calls of their coders."""
    calls = []

    def find_baselines(kbps, families):
        families = [family for family in families if family in ("opus_auto", "mp3")]
        return [rounding_coder(f, k, calls) for f in families for k in kbps], ["aac is left out: no reason"]

    monkeypatch.setattr(baselines, "find_baselines", find_baselines)
    monkeypatch.setattr(perceptual, "find_metrics", lambda: ({}, []))
    for module, name in ((evaluate, "_write_listening"), (evaluate_report, "_draw")):  # seconds each; tested below
        monkeypatch.setattr(module, name, lambda *arguments: None)
    return calls


@pytest.fixture
def quick(monkeypatch):
    """Measures that take no time, where it does not matter what they say."""
    error = lambda reference, decoded, sample_rate: np.abs(reference - decoded).mean()
    monkeypatch.setattr(evaluate, "_DEFAULT", {"si_sdr_db": error, "mel_distance": error, "mel16_distance": error})


@pytest.fixture
def codec(monkeypatch):
    from meanflow_audio_codec import bitstream

    monkeypatch.setitem(sys.modules, "meanflow_audio_codec.codec", types.SimpleNamespace(Codec=FakeCodec))
    info = lambda file: {"payload_bytes": len(file.read()) - 16}
    monkeypatch.setattr(bitstream, "info", info)
    monkeypatch.setattr(evaluate, "_on_one_core", lambda function, *arguments: function(*arguments))


def run(folder, output, *arguments):
    command = ["--data_dir", folder, "-o", output, "--seconds", "1", "--baselines-only", "--sample_rate", RATE]
    evaluate.main([str(argument) for argument in [*command, *arguments]])


def read_csv(output):
    return list(csv.DictReader(io.StringIO((output / "results.csv").read_text())))


def test_scores_are_those_of_the_metrics(folder, calls, tmp_path, capsys):
    run(folder, tmp_path / "out", "--kbps", 12)
    rows = {(row["clip"], row["coder"]): row for row in read_csv(tmp_path / "out")}
    assert len(rows) == 5 * 2  # without a measure of speech, narrow speech has none
    clip = next(c for c in evaluate.load_clips(folder, RATE, 1.0, 1, str) if c.name == "music_b.flac")
    decoded = np.round(clip.audio * 16) / 16
    decoded[-3:] = np.round(clip.audio * 16)[-3:] / 16
    found = rows["music_b.flac", "mp3 12"]
    assert found["lag_samples"] == "3" and float(found["kbps"]) == pytest.approx(12, rel=1e-3)
    assert float(found["mel_distance"]) == metrics.mel_distance(clip.audio, decoded, RATE)
    assert float(found["mel16_distance"]) == pytest.approx(float(found["mel_distance"]))
    assert float(found["si_sdr_db"]) == metrics.si_sdr_db(clip.audio, decoded)
    error = capsys.readouterr().err
    assert "evaluate: aac is left out: no reason" in error and "music_low.wav is left out" in error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    mean = np.mean([float(row["mel_distance"]) for row in rows.values()
                    if row["group"] == "music" and row["coder"] == "mp3 12"])  # fmt: skip
    (point,) = [p for p in results["points"] if (p["group"], p["coder"]) == ("music", "mp3 12")]
    assert point["means"]["mel_distance"]["mean"] == pytest.approx(mean) and point["clips"] == 3
    table = (tmp_path / "out" / "table.md").read_text()
    assert "## music: 3 clips of 3 files" in table and f"| mp3 12 | {point['kbps']:.2f} |" in table


def test_a_measure_of_speech_is_taken_of_speech_alone(folder, calls, quick, tmp_path, monkeypatch):
    seen = []
    measure = lambda name: lambda reference, decoded, rate: seen.append(name) or 2.0
    found = {name: measure(name) for name in ("pesq_wb_16k", "zimtohrli_mos_48k")}
    monkeypatch.setattr(perceptual, "find_metrics", lambda: (found, []))
    run(folder, tmp_path / "out", "--kbps", 12, "--baselines", "mp3")
    rows = {row["clip"]: row for row in read_csv(tmp_path / "out")}
    assert {name for name in rows if rows[name]["pesq_wb_16k"]} == {"speech_d.wav", "speech_e.wav"}
    assert {name for name in rows if not rows[name]["mel_distance"]} == {"speech_e.wav"}
    assert {name for name in rows if not rows[name]["zimtohrli_mos_48k"]} == {"speech_e.wav"}
    assert (seen.count("pesq_wb_16k"), seen.count("zimtohrli_mos_48k")) == (2, 5)


def test_silence_is_not_handed_to_other_peoples_measures(calls):
    def fails(reference, decoded, sample_rate):
        raise AssertionError

    silent = Coder("mp3 8", "mp3", 8.0, "1", lambda audio, rate: Coded(0 * audio, 10, 0.1, 0.1))
    clip = evaluate.Clip("a", "a", "music", noise(RATE), RATE, 0)
    found = evaluate.score(clip, silent, {"zimtohrli_mos_48k": fails, "si_sdr_db": None})
    assert found["scores"] == {"zimtohrli_mos_48k": None, "si_sdr_db": -100.0}


def test_it_continues_where_it_was_killed(folder, calls, quick, tmp_path):
    output = tmp_path / "out"
    run(folder, output, "--kbps", 6, 12)
    whole, table = len(calls), (output / "table.md").read_text()
    assert whole == 5 * 4
    record = output / "rows.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:-3]) + lines[-3][:40])
    for path in ("table.md", "results.csv"):
        (output / path).unlink()
    calls.clear()
    run(folder, output, "--kbps", 6, 12)
    assert len(calls) == 3 and (output / "table.md").read_text() == table
    calls.clear()
    run(folder, output, "--kbps", 6, 12, 24)
    assert {kbps for _, kbps in calls} == {24.0} and len(calls) == 10


def test_new_measures_are_added_to_known_rows(folder, calls, quick, tmp_path, monkeypatch):
    run(folder, tmp_path / "out", "--kbps", 12, "--baselines", "mp3")
    calls.clear()
    monkeypatch.setattr(perceptual, "find_metrics", lambda: ({"zimtohrli_mos_48k": lambda *_: 3.0}, []))
    run(folder, tmp_path / "out", "--kbps", 12, "--baselines", "mp3")
    assert len(calls) == 5
    assert all(row["zimtohrli_mos_48k"] == "3.0" for row in read_csv(tmp_path / "out"))


def test_scores_of_baselines_serve_another_evaluation(folder, calls, quick, codec, tmp_path, capsys):
    run(folder, tmp_path / "before", "--kbps", 12)
    capsys.readouterr()
    calls.clear()
    arguments = ["--model", "net", "--data_dir", folder, "-o", tmp_path / "out", "--seconds", 1, "--kbps", 6, 12]
    arguments += ["--nfe", 1, 2, "--reuse", tmp_path / "before"]
    evaluate.main([str(argument) for argument in arguments])
    assert {kbps for _, kbps in calls} == {6.0}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    own = [point for point in results["points"] if point["family"].startswith("net")]
    assert {point["coder"] for point in own} == {f"net {k} nfe {n}" for k in (6, 12) for n in (1, 2)}
    for point in own:
        nominal = float(point["coder"].split()[1])
        assert point["kbps"] == pytest.approx(nominal, rel=1e-3)
        assert point["file_kbps"] == pytest.approx(nominal + 16 * 8 / 1000, rel=1e-3)  # the header of each second
    compared = {(d["ours"], d["theirs"]) for d in results["differences"] if d["group"] == "music"}
    assert ("net 6 nfe 2", "mp3 6") in compared and ("net 12 nfe 1", "opus_auto 12") in compared
    table = capsys.readouterr().out
    assert table.startswith("# net (0123456789ab), at 16000 Hz")
    assert "| 6 kbps music mel16 < 1.8 | net 6 nfe 1 | 6.00 |" in table
    assert "music mel < " not in table  # which is a bar for 44.1 kHz
    speed = results["speed"]
    assert set(speed) == {"load_seconds", "encode_cold", "encode_warm"} | {
        f"decode_nfe{n}_{kind}" for n in (1, 2) for kind in ("cold", "warm")
    }


def test_another_evaluation_is_not_overwritten(folder, calls, quick, tmp_path, capsys):
    run(folder, tmp_path / "out", "--kbps", 12)
    for arguments, reason in [
        (["--kbps", 12, "--seconds", 0.9], "holds another evaluation, which differs in clips"),
        (["--kbps", 12, "--sample_rate", 22050], "differs in sample_rate, clips"),
    ]:
        with pytest.raises(SystemExit) as stop:
            run(folder, tmp_path / "out", *arguments)
        assert reason in str(stop.value) and "\n" not in str(stop.value)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(SystemExit, match="letters is not empty and no evaluation"):
        run(folder, tmp_path / "letters")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "net"], "give either --model M or --baselines-only"),
        (["--seconds", "0.1"], "--seconds 0.1 must be at least 0.5"),
        (["--kbps", "0"], "--kbps 0.0: must be above 0"),
        (["--nfe", "-1"], "--nfe -1: must be above 0"),
        (["--data_dir", "/nowhere"], "--data_dir /nowhere is no folder with .wav"),
        (["--reuse", "/nowhere"], "--reuse /nowhere: it holds no rows.jsonl"),
        (["--baselines", "vorbis"], "no coder is left"),
    ],
)
def test_mistakes_end_in_one_line(folder, calls, tmp_path, arguments, reason):
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out", *arguments)
    assert str(stop.value).startswith("evaluate: ") and reason in str(stop.value) and "\n" not in str(stop.value)


def test_without_pyloudnorm_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    with pytest.raises(InputError, match=r'pyloudnorm is not installed.*pip install "meanflow_audio_codec\[eval\]"'):
        evaluate.load_clips(folder, RATE, 1.0, 1, str)


def test_the_page_holds_the_coded_clips(folder, tmp_path):
    clips = evaluate.load_clips(folder, RATE, 1.0, 1, str)
    coders = [rounding_coder(f, k, []) for f in ("opus_auto", "mp3") for k in (6.0, 8.0, 12.0)]
    assert [coder.name for coder in evaluate.listened_coders(coders)] == ["opus_auto 6", "opus_auto 12"]
    own = rounding_coder("net nfe 1", 11.0, [], "net 11 nfe 1")
    assert evaluate.listened_coders([own, *coders])[0] is own
    assert len(evaluate.listened_coders(coders[3:])) == 2
    evaluate._write_listening(tmp_path / "page.html", [own, *coders], clips)
    page = (tmp_path / "page.html").read_text()
    assert "opus_auto 6" in page and "net 11 nfe 1" in page and "music/a.wav" in page


def test_the_figure_has_a_panel_for_each_measure_of_each_group(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    titles, curves = [], []
    layout = Figure.legend

    def legend(figure, handles, labels, **settings):
        titles.extend(panel.get_title() for panel in figure.axes if panel.axison)
        curves.extend(labels)
        return layout(figure, handles, labels, **settings)

    monkeypatch.setattr(Figure, "legend", legend)
    rows = [row(f"{f} {k:g}", "a", k, mel_distance=1 / k) for f in ("opus_auto", "ours") for k in (6.0, 12.0)]
    rows += [row("ours 6", "b", 6.0, group="speechnb", pesq_wb_16k=3.0, stoi_16k=0.9)]
    evaluate_report._draw(tmp_path / "x.png", evaluate_report.summarize(rows), ["ours"])
    assert titles == ["music: mel (lower is better)", "speechnb: PESQ-wb 16k", "speechnb: STOI 16k"]
    assert curves == ["ours", "opus_auto"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system binds no process to a core")
def test_speed_is_measured_on_one_core():
    assert len(evaluate._on_one_core(os.sched_getaffinity, 0)) == 1
    assert evaluate._on_one_core(os.getenv, "JAX_PLATFORMS") == "cpu"
