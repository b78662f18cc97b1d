"""The baselines against ffmpeg's wrapper, containers made by hand and closed forms; neural ones against stand-ins."""

import importlib.util
import sys
import types

import numpy as np
import pytest

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import baselines, metrics

RATE = 44100
needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="the extra eval is not installed")


def tune(seconds=2.0, rate=RATE):
    """Chords with overtones and a hiss, so that there is something in every band."""
    n = np.arange(int(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * f * k * n) / k for f in (220, 277.2, 329.6) for k in range(1, 25))
    hiss = np.random.default_rng(0).standard_normal(len(n))
    return (0.05 * tones * (1.2 + np.sin(2 * np.pi * 3 * n)) + 0.01 * hiss).astype(np.float32)


def kbps(coded, audio):
    return coded.payload_bytes * 8 / 1000 / (len(audio) / RATE)


def coder(name, asked=(6.0, 8.0, 12.0, 16.0, 24.0)):
    coders, _ = baselines.find_baselines(asked, [name.split()[0]])
    return next(coder for coder in coders if coder.name == name)


@needs_av
@pytest.mark.parametrize("frame_ms", [20, 60])
def test_opus_packets_are_those_of_ffmpegs_wrapper(frame_ms):
    import av

    audio = tune(rate=48000)
    _, packets, *_ = baselines.opus(audio, 48000, 12.0, frame_ms=frame_ms)
    writer = av.CodecContext.create("libopus", "w")
    writer.sample_rate, writer.layout, writer.format, writer.bit_rate = 48000, "mono", "flt", 12000
    writer.options = {"application": "audio", "vbr": "on", "frame_duration": str(frame_ms), "compression_level": "10"}
    frame = av.AudioFrame.from_ndarray(audio[None], format="flt", layout="mono")
    frame.sample_rate = 48000
    theirs = [bytes(packet) for packet in (*writer.encode(frame), *writer.encode(None))]
    whole = len(audio) // (48 * frame_ms)  # how the last frame is filled up differs
    assert whole > 30 and packets[:whole] == theirs[:whole]


@needs_av
def test_opus_comes_back_in_place_and_as_long():
    audio = tune(1.234)
    coded = coder("opus_auto 24").code(audio, RATE)
    assert len(coded.audio) == len(audio) and coded.audio.dtype == np.float32
    assert metrics.si_sdr_db(audio, coded.audio) > 10  # one sample late would cost it all above 10 kHz
    assert 18 < kbps(coded, audio) < 30
    assert coded.encode_seconds > 0 and coded.decode_seconds > 0


@needs_av
def test_hint_and_bandwidth_reach_the_encoder():
    edges = {}
    for name, options in {"auto": {}, "music": {"signal": 3002}, "fullband": {"bandwidth": 1105}}.items():
        _, packets, *_ = baselines.opus(tune(), RATE, 12.5, **options)
        edges[name] = np.median([baselines._EDGES[packet[0] >> 3] for packet in packets])
    assert edges["fullband"] == 20000
    assert edges["auto"] <= 12000 < edges["music"]


@needs_av
def test_noise_costs_its_side_information():
    audio = tune()
    plain, filled = (coder(f"{family} 6").code(audio, RATE) for family in ("opus_auto", "opus_noise"))
    extra = (filled.payload_bytes - plain.payload_bytes) * 8 / 2 / 1000
    assert extra == pytest.approx(7 * 5 / 0.08 / 1000, rel=0.05)  # kbps; the last block may be cut short
    assert metrics.mel_distance(audio, filled.audio, RATE) < 0.7 * metrics.mel_distance(audio, plain.audio, RATE)


def test_noise_has_the_level_of_the_reference_and_leaves_the_band_alone():
    rng = np.random.default_rng(1)
    reference = 0.1 * rng.standard_normal(48000 * 2)
    low = np.sin(2 * np.pi * 500 * np.arange(len(reference)) / 48000)
    filled, size = baselines.fill_band(reference, low, np.full(100, 8000.0))
    power = lambda audio, a, b: (np.abs(np.fft.rfft(audio)[2 * a : 2 * b]) ** 2).mean()
    for a, b in [(8200, 9000), (12000, 13000), (18000, 19800)]:
        assert abs(10 * np.log10(power(filled, a, b) / power(reference, a, b))) < 2  # half a step, and chance
    for a, b in [(1000, 7500), (20500, 23900)]:
        assert power(filled - low, a, b) < 1e-3 * power(filled, 12000, 13000)
    assert size == np.ceil(26 * 7 * 5 / 8)  # 201 frames of 10 ms in blocks of 8


def test_nothing_is_filled_above_20_khz():
    audio = 0.1 * np.random.default_rng(1).standard_normal(48000)
    filled, size = baselines.fill_band(audio, audio, np.full(50, 20000.0))
    assert size == 0 and (filled == audio).all()


@needs_av
@pytest.mark.parametrize("name", ["mp3 8", "mp3 16", "mp3 24", "aac 12", "aac 16", "aac 24"])
def test_ffmpegs_coders_keep_rate_place_and_length(name):
    audio = tune(4.0)
    coded = coder(name).code(audio, RATE)
    assert abs(len(coded.audio) - len(audio)) <= 1
    assert kbps(coded, audio) == pytest.approx(coder(name).kbps, rel=0.08)  # the last frames are 2 to 5 % of 4 s
    n = min(len(audio), len(coded.audio))
    at = [metrics.si_sdr_db(audio[20 : n - 20], coded.audio[20 + lag : n - 20 + lag]) for lag in (-20, 0, 20)]
    assert at[1] == max(at) > 5


@pytest.mark.parametrize("asked", [16, 24])
def test_vorbis_stays_within_what_was_asked(asked):
    audio = tune(4.0)
    coded = coder(f"vorbis {asked}").code(audio, RATE)
    assert 0.7 * asked < kbps(coded, audio) <= asked
    assert metrics.si_sdr_db(audio, coded.audio[: len(audio)]) > 5


def test_ogg_packets_are_counted_across_pages():
    def page(lacing):
        return b"OggS" + bytes(22) + bytes([len(lacing)]) + bytes(lacing) + bytes(sum(lacing))

    data = page([30]) + page([255, 10, 0, 255, 255]) + page([255, 5, 7]) + page([])
    assert baselines.ogg_packet_sizes(data) == [30, 265, 0, 770, 7]


def test_bitrates_that_a_coder_lacks_are_left_out():
    coders, lines = baselines.find_baselines([3.0, 12.0], ["vorbis", "mp3"])
    assert [coder.name for coder in coders] == ["vorbis 12"]
    assert len(lines) == 1 and lines[0].startswith("mp3 is left out")
    with pytest.raises(InputError, match="'lyra': choose of opus_auto"):
        baselines.find_baselines([6.0], ["lyra"])


def test_without_pyav_a_line_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else found(name))
    coders, lines = baselines.find_baselines([12.0], ["opus_auto", "vorbis"])
    assert [coder.family for coder in coders] == ["vorbis"]
    assert lines == ['opus_auto is left out: av is not installed (pip install "meanflow_audio_codec[eval]")']


class Neural:
    """What EnCodec and DAC share: here they code by taking every 320th or 512th sample."""

    def __init__(self, hop):
        self.hop = hop

    def set_target_bandwidth(self, kbps):
        self.num_codebooks = round(kbps / 0.75)

    def encode(self, audio, num_codebooks=None):
        codes = audio[..., :: self.hop].repeat(1, num_codebooks or self.num_codebooks, 1)
        return (audio, codes, None, None, None) if num_codebooks else [(codes, audio)]

    def decode(self, frames):
        return frames[0][1] if isinstance(frames, list) else frames

    def preprocess(self, audio, rate):
        assert rate == 44100
        return audio

    def eval(self):
        return self


@pytest.fixture
def neural(monkeypatch, tmp_path):
    """Packages whose weights are on disk, which read nothing else."""
    pytest.importorskip("torch")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name in ("encodec", "dac") else found(name))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(baselines, "_dac_weights", lambda: tmp_path / "weights.pth")
    model = types.SimpleNamespace(encodec_model_24khz=lambda repository: Neural(320))
    monkeypatch.setitem(sys.modules, "encodec", types.SimpleNamespace(EncodecModel=model))
    dac = types.SimpleNamespace(DAC=types.SimpleNamespace(load=lambda path: Neural(512)))
    monkeypatch.setitem(sys.modules, "dac", dac)
    for cached in (baselines._encodec_model, baselines._dac_model):
        cached.cache_clear()
    yield tmp_path
    for cached in (baselines._encodec_model, baselines._dac_model):
        cached.cache_clear()


def test_neural_codecs_without_weights_are_left_out(neural):
    coders, lines = baselines.find_baselines([6.0], ["encodec_24k", "dac_44k"])
    assert not coders and all("its weights are not at" in line for line in lines)


def test_neural_codecs_pay_10_bits_a_code(neural):
    weights = baselines._encodec_weights()
    weights.parent.mkdir(parents=True)
    weights.touch()
    (neural / "weights.pth").touch()
    coders, lines = baselines.find_baselines([3.0, 6.0, 8.0, 24.0], ["encodec_24k", "dac_44k"])
    assert not lines
    names = ["encodec_24k 3", "encodec_24k 6", "encodec_24k 24", "dac_44k 2.6", "dac_44k 5.2", "dac_44k 7.8"]
    assert [coder.name for coder in coders] == names
    audio = tune()
    for found in coders:
        coded = found.code(audio, RATE)
        assert kbps(coded, audio) == pytest.approx(found.kbps, rel=0.01)
        assert metrics.si_sdr_db(audio, coded.audio[: len(audio)]) > 10
