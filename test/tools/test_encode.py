"""encode, decode, info and export as a user has them: files, folders, pipes, damage, interruptions.

The codec has random weights.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from meanflow_audio_codec import bitstream
from meanflow_audio_codec import codec as codec_module
from meanflow_audio_codec.codec import Codec
from meanflow_audio_codec.tools import decode, encode, export, files, info

ROOT = Path(__file__).parents[2]
RATE = 8000  # of the codec


@pytest.fixture(scope="module")
def bundle(random_codec, tmp_path_factory):
    """A bundle with entropy tables."""
    path, codec = tmp_path_factory.mktemp("bundle") / "small.npz", random_codec()
    codec.export(path, codec.fit_tables([music(20_000)[0]]))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def load_once():
    """A codec compiles its programs when it is first used: keep it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Codec, "load", functools.cache(Codec.load))
        yield


@pytest.fixture
def run(bundle, monkeypatch, capsys, tmp_path):
    """`run(tool, *arguments)` returns what the tool says: status, lines of stdout, lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def run(tool, *arguments, model=bundle):
        status, capsys_before = 0, capsys.readouterr()
        assert not capsys_before.err
        model = [f"--model={model}"] if model else []
        try:
            tool.main([*map(str, arguments), *model])
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr()
        if isinstance(status, str):  # which Python prints and ends with 1
            return 1, said.out.splitlines(), [*said.err.splitlines(), status]
        return status, said.out.splitlines(), said.err.splitlines()

    return run


def music(samples, channels=1, rate=RATE, seed=0):
    t = np.arange(samples) / rate
    tones = np.sin(2 * np.pi * np.linspace(200, 900, channels)[:, None] * t) * np.cos(3 * t)
    noise = np.random.default_rng(seed).standard_normal((channels, samples))
    return (0.3 * tones + 0.02 * noise).astype(np.float32)


def write(path, samples=3000, channels=1, rate=RATE, seed=0, **settings):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, music(samples, channels, rate, seed).T, rate, **settings)
    return path


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


# --- round trips


@pytest.mark.parametrize(
    ("before", "after", "rate", "channels", "samples"),
    [
        ("a.wav", "b.wav", 8000, 1, 0),
        ("a.wav", "b.wav", 44100, 2, 1),
        ("a.flac", "b.ogg", 48000, 6, 9001),
        ("a.flac", "b.flac", 96000, 1, 30_011),
        ("a.ogg", "b.mp3", 22050, 2, 22_000),
        ("a.mp3", "b.FLAC", 16000, 1, 1),
    ],
)
def test_round_trip(run, before, after, rate, channels, samples):
    write(before, samples, channels, rate)
    status, (line,), _ = run(encode, before, "-o", "a.mfac")
    assert status == 0 and line.startswith(f"a.mfac: {samples / rate:.2f} s, ")
    assert f"{os.path.getsize('a.mfac'):,} bytes" in line and ("kbps (" in line) == (samples > 0)
    status, (line,), _ = run(decode, "a.mfac", "-o", after)
    assert status == 0 and line.startswith(f"{after}: {samples / rate:.2f} s, {channels} x {rate} Hz, ")
    with soundfile.SoundFile(after) as audio:
        assert (audio.frames, audio.samplerate, audio.channels) == (samples, rate, channels)
        assert audio.format == after.split(".")[1].upper() and audio.subtype in (
            "PCM_16",
            "VORBIS",
            "MPEG_LAYER_III",
        )
    assert tree(".") == sorted([before, "a.mfac", after])


def test_what_is_decoded_is_the_codecs(run, bundle):
    write("a.wav", 44_100, 2, 44_100)
    run(encode, "a.wav", "-o", "a.mfac")
    run(decode, "a.mfac", "-o", "a.flac", "--nfe", 2)
    data = Path("a.mfac").read_bytes()
    assert data == Codec.load(bundle).compress("a.wav")
    expected, _ = Codec.load(bundle).decompress(data, nfe=2)
    decoded, _ = soundfile.read("a.flac", always_2d=True)
    np.testing.assert_allclose(decoded.T, np.clip(expected, -1, 1), atol=2**-15)


def test_bitrates(run, random_codec):
    """K is kept to; by codebooks of one size with what tables save below it."""
    write("a.wav", 40_000, 2)
    _, lines, _ = run(info, run_encode(run, "--kbps", 3), "--json", model=None)
    measured = json.loads(lines[0])
    assert (measured["num_codebooks"], measured["entropy"]) == (6, "range")  # of 0.25 kbps, for two channels
    assert measured["payload_kbps"] < 0.8 * 3.0
    random_codec(quantizer="gain_shape", level_stages=1, max_bits=48).export("free.npz")
    assert run(encode, "a.wav", "-o", "b.mfac", "--kbps", 8, model="free.npz")[0] == 0
    _, lines, _ = run(info, "b.mfac", "--json", model=None)
    assert json.loads(lines[0])["payload_kbps"] == pytest.approx(8.0, rel=0.02)  # the last frame reaches beyond the end
    assert run(decode, "b.mfac", "-o", "b.wav", model="free.npz")[0] == 0
    assert soundfile.info("b.wav").frames == 40_000


def run_encode(run, *arguments):
    assert run(encode, "a.wav", "-o", "a.mfac", "--force", *arguments)[0] == 0
    return "a.mfac"


def test_long_silence(run):
    with soundfile.SoundFile("a.wav", "w", RATE, 1) as audio:
        for _ in range(60):
            audio.write(np.zeros(RATE, np.int16))
    run(encode, "a.wav", "-o", "a.mfac")
    assert run(decode, "a.mfac", "-o", "b.wav")[0] == 0
    assert soundfile.info("b.wav").frames == 60 * RATE
    with open("a.mfac", "rb") as file:
        assert bitstream.info(file)["payload_kbps"] < 1.5  # of 2: no voice, and the tables were made for one


# --- folders


def test_folders_are_mirrored(run):
    names = ["one.wav", "b/two.flac", "b/c d/three.OGG", "b/é.mp3"]
    for seed, name in enumerate(names):
        write(Path("in", name), 1000 + seed, seed=seed)
    Path("in/b/notes.txt").write_text("no audio")
    status, lines, _ = run(encode, "in", "-o", "coded")
    assert status == 0 and len(lines) == 4
    assert tree("coded") == ["b/c d/three.mfac", "b/two.mfac", "b/é.mfac", "one.mfac"]
    assert run(decode, "coded", "-o", "out", "--format", "flac")[0] == 0
    assert tree("out") == ["b/c d/three.flac", "b/two.flac", "b/é.flac", "one.flac"]
    for seed, name in enumerate(names):
        assert soundfile.info(Path("out", name).with_suffix(".flac")).frames == 1000 + seed
    write("in/one.flac")
    assert run(encode, "in", "in/one.wav", "-o", "again")[0] == 0  # a file that is named twice is coded once
    assert tree("again") == ["b/c d/three.mfac", "b/two.mfac", "b/é.mfac", "one.flac.mfac", "one.wav.mfac"]
    assert run(decode, "coded/one.mfac", "coded/b/two.mfac", "-o", "out/")[0] == 0
    assert tree("out")[-3:] == ["one.flac", "one.wav", "two.wav"]


def test_a_bad_file_stops_no_other(run):
    for name in ("a.wav", "z.wav"):
        write(f"in/{name}")
    Path("in/m.wav").write_bytes(np.random.default_rng(0).bytes(3000))
    soundfile.write("in/n.wav", np.full(3000, np.nan), RATE, subtype="FLOAT")
    short = write("in/o.mp3", 40_000)
    short.write_bytes(short.read_bytes()[:4000])
    status, lines, errors = run(encode, "in", "gone.wav", "-o", "out")
    assert status == 1 and tree("out") == ["a.mfac", "z.mfac"] and len(lines) == 2
    assert [error.split(":")[:2] for error in errors] == [
        ["encode", " in/m.wav"],
        ["encode", " in/n.wav"],
        ["encode", " in/o.mp3"],
        ["encode", " gone.wav"],
    ]
    assert "NaN" in errors[1] and "of 5.0" in errors[2] and "no such file" in errors[3]


# --- what is refused, before anything is coded


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (encode, ["a.wav", "-o", "there.mfac"], "there.mfac exist"),
        (encode, ["a.wav", "b.wav", "-o", "."], "b.mfac exist"),
        (encode, ["a.wav", "b.wav", "-o", "b.mfac"], "several inputs need a folder"),
        (encode, ["a", "c", "-o", "new"], "a/a.flac and c/a.flac would both become new/a.flac.mfac"),
        (encode, ["b.mfac", "-o", "b.mfac", "--force"], "overwritten by its own output"),
        (encode, ["a.wav", "-o", "new.wav"], "suffix .mfac"),
        (encode, ["a.wav", "b.wav", "-o", "-"], "takes one file"),
        (encode, ["-", "-o", "a"], "takes one file"),
        (encode, ["-", "a.wav", "-o", "new"], "standard input comes alone"),
        (encode, ["empty", "-o", "new"], "empty holds no .wav, .flac"),
        (encode, ["a.wav", "-o", "folder.mfac/x.mfac", "--kbps", "nan"], "--kbps nan"),
        (decode, ["b.mfac", "-o", "new.aac"], "end it in .wav, .flac, .ogg, .mp3"),
        (decode, ["b.mfac", "-o", "new.wav", "--format", "flac"], "not flac"),
        (decode, ["b.mfac", "-o", "new.wav", "--nfe", "0"], "--nfe 0"),
        (decode, ["b.mfac", "-o", "a.wav"], "a.wav exist"),
    ],
)
def test_refused(run, tool, arguments, message):
    for name in ("a.wav", "b.wav", "a/a.flac", "c/a.flac"):
        write(name)
    Path("empty").mkdir()
    for name in ("b.mfac", "there.mfac"):
        Path(name).write_bytes(b"mine")
    before = tree(".")
    status, lines, errors = run(tool, *arguments)
    assert status == 1 and lines == [] and len(errors) == 1 and message in errors[0]
    assert tree(".") == before and Path("b.mfac").read_bytes() == b"mine"


def test_no_such_model(run):
    write("a.wav")
    status, _, errors = run(encode, "a.wav", "-o", "a.mfac", model="nowhere")
    assert status == 1 and "nowhere: no such bundle or workdir" in errors[0]


def test_force_overwrites(run):
    write("a.wav", 500)
    Path("a.mfac").write_bytes(b"mine")
    Path("link.mfac").symlink_to("a.mfac")
    assert run(encode, "a.wav", "-o", "link.mfac")[0] == 1
    assert run(encode, "a.wav", "-o", "link.mfac", "--force")[0] == 0
    assert Path("link.mfac").is_symlink() and Path("a.mfac").read_bytes()[:4] == b"MFAC"


# --- interruptions


@pytest.mark.parametrize("tool", [encode, decode])
def test_an_interruption_leaves_nothing(run, tool, monkeypatch):
    write("in/a.wav", 100_000)
    run(encode, "in/a.wav", "-o", "in/a.mfac")
    write_blocks = bitstream.Writer.write, soundfile.SoundFile.write
    old = b"from before"
    source, target = ("in/a.wav", Path("out/a.mfac")) if tool is encode else ("in/a.mfac", Path("out/a.wav"))
    target.parent.mkdir()
    target.write_bytes(old)

    def interrupted(number):
        def write(self, *arguments):
            write_blocks[number](self, *arguments)
            assert len(list(target.parent.iterdir())) == 2  # the old one and a beginning
            signal.raise_signal(signal.SIGINT)

        return write

    monkeypatch.setattr(bitstream.Writer, "write", interrupted(0))
    monkeypatch.setattr(soundfile.SoundFile, "write", interrupted(1))
    # A shell's background jobs ignore SIGINT, and so would the tests of one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, _, errors = run(tool, source, "-o", target, "--force")
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 1 and errors == [f"{tool.__name__.split('.')[-1]}: interrupted"]
    assert tree("out") == [target.name] and target.read_bytes() == old


def test_a_full_disk_leaves_nothing(run, monkeypatch):
    resource = pytest.importorskip("resource")
    write("a.wav", 300_000)
    run(encode, "a.wav", "-o", "a.mfac")
    run(decode, "a.mfac", "-o", "a.wav", "--force")  # what is compiled must be cached before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        results = [run(encode, "a.wav", "-o", "b.mfac"), run(decode, "a.mfac", "-o", "b.flac")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for status, lines, errors in results:
        assert status == 1 and lines == [] and len(errors) == 1
    assert tree(".") == ["a.mfac", "a.wav"]


# --- pipes


def test_pipes(run, bundle):
    """Three processes, none of which can seek."""
    write("x.wav", 20_000, 2, 44_100)
    command = f"""cat x.wav | {sys.executable} -m meanflow_audio_codec.tools.encode - -o - --model {bundle} |
        {sys.executable} -m meanflow_audio_codec.tools.decode - -o - --model {bundle} > y.wav"""
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 0 and len(lines) == 2, lines  # without a terminal there is no bar
    assert all(line.startswith("standard output: 0.45 s, ") for line in lines)
    run(encode, "x.wav", "-o", "x.mfac")
    run(decode, "x.mfac", "-o", "z.wav")
    y, z = (soundfile.read(name, dtype="int16")[0] for name in ("y.wav", "z.wav"))
    assert y.shape == z.shape == (20_000, 2)
    np.testing.assert_allclose(y.astype(int), z.astype(int), atol=1)  # 1e-5 may fall on either side of a step


class Pipe:
    """Standard input that cannot seek, in small pieces."""

    def __init__(self, path):
        self._file = open(path, "rb")
        self.buffer = self

    def read(self, size=-1):
        return self._file.read(min(size, 100) if size > 0 else size)


def test_decode_reads_a_pipe_as_it_comes(run, monkeypatch):
    write("a.wav", 20_000)
    run(encode, "a.wav", "-o", "a.mfac")
    monkeypatch.setattr(sys, "stdin", Pipe("a.mfac"))
    assert run(decode, "-", "-o", "b.wav")[0] == 0
    assert soundfile.info("b.wav").frames == 20_000
    monkeypatch.setattr(sys, "stdin", Pipe("a.mfac"))
    status, lines, _ = run(info, "-", "--json", model=None)
    assert status == 0 and json.loads(lines[0])["samples"] == 20_000


def test_what_comes_from_stdin_may_be_no_audio(run, monkeypatch):
    Path("a.txt").write_text("no audio " * 1000)
    monkeypatch.setattr(sys, "stdin", Pipe("a.txt"))
    status, _, errors = run(encode, "-", "-o", "a.mfac")
    assert status == 1 and errors[0].startswith("encode: standard input: ") and tree(".") == ["a.txt"]
    monkeypatch.setattr(sys, "stdin", Pipe("a.txt"))
    status, _, errors = run(decode, "-", "-o", "a.wav")
    assert status == 1 and errors == ["decode: standard input: not an .mfac file: it does not start with MFAC"]


def test_devices_are_written_to(run):
    write("a.wav", 500)
    assert run(encode, "a.wav", "-o", os.devnull)[0] == 0
    assert not os.path.isfile(os.devnull)


# --- damage


@pytest.fixture
def damaged(run):
    """Files of one recording: truncated, with a damaged block, without its header."""
    write("in/a.wav", 60_000)
    run(encode, "in/a.wav", "-o", "in/a.mfac")
    data = bytearray(Path("in/a.mfac").read_bytes())
    Path("cut.mfac").write_bytes(data[: len(data) * 3 // 4])
    data[len(data) // 2] ^= 1
    Path("hole.mfac").write_bytes(data)
    data[20] ^= 1
    Path("head.mfac").write_bytes(data)


def test_damaged_files(run, damaged):
    status, lines, errors = run(decode, "in/a.mfac", "cut.mfac", "hole.mfac", "head.mfac", "-o", "out")
    assert status == 1 and tree("out") == ["a.wav"] and len(lines) == 1
    for name, error in zip(("cut", "hole", "head"), errors, strict=True):
        assert error.startswith(f"decode: {name}.mfac: ")
    assert "--salvage" in errors[0] and "block" in errors[1]

    status, lines, errors = run(decode, "cut.mfac", "hole.mfac", "head.mfac", "-o", "out", "--salvage")
    assert status == 1 and tree("out") == ["a.wav", "cut.wav", "hole.wav"] and len(lines) == 2
    assert list(dict.fromkeys(error.split(":")[1] for error in errors)) == [" cut.mfac", " hole.mfac", " head.mfac"]
    whole, cut, hole = (soundfile.read(f"out/{name}.wav", dtype="int16")[0] for name in ("a", "cut", "hole"))
    assert len(hole) == len(whole) == 60_000 and 30_000 < len(cut) < 60_000
    np.testing.assert_array_equal(hole[:15_000], whole[:15_000])
    np.testing.assert_array_equal(cut[:15_000], whole[:15_000])


def test_info_verifies(run, damaged):
    status, lines, errors = run(info, "in/a.mfac", "hole.mfac", "head.mfac", "gone.mfac", model=None)
    assert status == 1 and len(errors) == 3
    assert "hole.mfac: damaged: block" in errors[0] and "gone.mfac: No such file" in errors[2]
    fields = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    header = {"codec": "small", "sample_rate": "8000", "channels": "1", "num_codebooks": "8", "samples": "60000"}
    assert fields | header == fields
    sizes = [int(fields[f"{part}_bytes"]) for part in ("header", "payload", "framing", "total")]
    assert sum(sizes[:3]) == sizes[3] == os.path.getsize("in/a.mfac")
    assert float(fields["total_kbps"]) == pytest.approx(8 * sizes[3] / 7500, abs=0.001)


# --- which codec


def test_the_codec_is_found_by_name_and_fingerprint(run, random_codec, monkeypatch):
    Path("box").mkdir()
    for seed, name in enumerate(("first", "second")):
        random_codec(seed).export(f"box/{name}.npz")
    monkeypatch.setattr(codec_module, "PRETRAINED", Path("box"))
    write("a.wav", 500)
    for name in ("first", "second"):
        assert run(encode, "a.wav", "-o", f"{name}.mfac", model=name)[0] == 0
    # Folders and files of these names are no codecs, and a codec may be renamed.
    Path("second").mkdir()
    Path("box/second.npz").rename("box/third.npz")
    status, lines, _ = run(decode, "first.mfac", "second.mfac", "-o", "out", model=None)
    assert status == 0 and len(lines) == 2
    Path("box/third.npz").unlink()
    status, _, errors = run(decode, "second.mfac", "-o", "new.wav", model=None)
    assert status == 1 and "made by second" in errors[0] and "--model" in errors[0]
    status, _, errors = run(decode, "second.mfac", "-o", "new.wav", model="first")
    assert status == 1 and "not by --model first" in errors[0] and not Path("new.wav").exists()


# --- export


def test_export(run, random_codec, monkeypatch):
    """From a run, which here is a bundle: tables fit the training files, what they save is measured on the others."""
    Path("runs").mkdir()
    random_codec().export("runs/w.npz")
    for seed in range(3):
        write(f"music/{seed}.wav", 50_000, 2, 11_025, seed=seed)
    write("music/valid/v.wav", 50_000, seed=9)
    status, lines, errors = run(export, "--workdir", "runs/w.npz", "--data_dir", "music", "-o", "new.npz", model=None)
    assert status == 0 and errors == [], errors
    assert lines[0] == "tables fitted to 14 s of 3 files, measured on 6 s of 1:"
    before, after = (float(word) for word in lines[-2].split(":")[-1].split()[:3:2])
    codec = Codec.load("new.npz")
    assert lines[-1] == f"new.npz: {os.path.getsize('new.npz'):,} bytes, fingerprint {codec.fingerprint}"
    with open(run_encode_of("music/valid/v.wav", run), "rb") as file:
        measured = bitstream.info(file)
    assert before == codec.bitrate == 2.0
    coded_kbps = 8 * measured["payload_bytes"] * codec.frame_rate / measured["frames"] / 1000
    assert coded_kbps == pytest.approx(after, rel=1e-3) and after < 0.9 * before
    assert run(export, "--workdir", "runs/w.npz", "--data_dir", "music", "-o", "new.npz", model=None)[0] == 1


def run_encode_of(path, run):
    assert run(encode, path, "-o", "v.mfac", model="new.npz")[0] == 0
    return "v.mfac"


def test_messages_are_printable():
    assert files.printable("a\nb\x1b[31m\udcff é") == "a\\nb\\x1b[31m\\udcff é"
