"""The training stream: exact, endless, resumable; the evaluation clips: always the same."""

import contextlib
import itertools
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from meanflow_audio_codec.datasets.audio import scan_folder
from meanflow_audio_codec.datasets.pipeline import build_audio_pipeline, eval_clips
from meanflow_audio_codec.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
RATE, SAMPLES = 16000, 1000
SETTINGS = dict(sample_rate=RATE, segment_samples=SAMPLES, batch_size=4, seed=0)


def ramp(frames, first):
    """Samples that tell their place, in steps of 1 / 32768, which 16 bits hold exactly."""
    return (first + np.arange(frames)) / 32768


@pytest.fixture
def files(tmp_path):
    """Mixed formats, rates and channel counts."""
    rng = np.random.default_rng(0)
    for name, rate, channels in [
        ("a.wav", 16000, 1),
        ("b.flac", 44100, 2),
        ("c.ogg", 22050, 1),
        ("d.mp3", 22050, 1),
    ]:
        soundfile.write(tmp_path / name, rng.uniform(-0.3, 0.3, (rate, channels)), rate)
    return scan_folder(tmp_path)


@pytest.fixture
def ramps(tmp_path):
    """Two files at the pipeline's rate, 3 and 1.5 segments long, all samples distinct."""
    soundfile.write(tmp_path / "a.wav", ramp(3 * SAMPLES, 1), RATE)
    soundfile.write(tmp_path / "b.wav", ramp(3 * SAMPLES // 2, 10001), RATE)
    return scan_folder(tmp_path)


def take(pipeline, count):
    return [batch["audio"] for batch in itertools.islice(iter(pipeline), count)]


def first_frames(batches):
    """Of crops of `ramps`: the number at which each begins."""
    starts = np.concatenate(batches)[:, 0, 0] * 32768
    assert np.array_equal(starts, starts.round())
    return starts.astype(int)


def test_batches_are_float32_of_the_shape_asked(files):
    for channels in (1, 2):
        for source in (files, None):
            batch = take(build_audio_pipeline(data_dir=source and [source], channels=channels, **SETTINGS), 1)[0]
            assert isinstance(batch, np.ndarray) and batch.dtype == np.float32
            assert batch.shape == (4, SAMPLES, channels) and batch.any(axis=(1, 2)).all()


def test_crops_are_stretches_of_the_files(ramps):
    batches = take(build_audio_pipeline(data_dir=[ramps], polarity=False, **SETTINGS), 20)
    crops = np.concatenate(batches)[:, :, 0]
    steps = np.diff(crops * 32768, axis=1)
    np.testing.assert_array_equal(steps, 1.0)


def test_an_epoch_visits_files_by_length_and_the_next_one_elsewhere(ramps):
    settings = dict(SETTINGS, batch_size=4)  # 3 + 1 segments: one batch is one epoch
    starts = first_frames(take(build_audio_pipeline(data_dir=[ramps], polarity=False, **settings), 30)).reshape(30, 4)
    assert ((starts < 10000).sum(axis=1) == 3).all()
    assert len(np.unique(starts)) > 100
    assert starts[starts < 10000].max() > 1.9 * SAMPLES  # anywhere, not on a grid from 0


def test_the_seed_decides_everything(files):
    def stream(seed, threads):
        settings = dict(SETTINGS, seed=seed)
        return np.stack(
            take(
                build_audio_pipeline(data_dir=[files], gain_db=(-9.0, 0.0), read_threads=threads, **settings),
                6,
            )
        )

    np.testing.assert_array_equal(stream(5, 0), stream(5, 2))
    assert not np.array_equal(stream(5, 0), stream(6, 0))


@pytest.mark.parametrize("threads", [0, 2, 16])
@pytest.mark.parametrize("source", ["files", "cache", "synthetic"])
def test_resumes_bit_for_bit(files, tmp_path, threads, source):
    def build():
        return build_audio_pipeline(
            data_dir=None if source == "synthetic" else [files],
            cache_dir=tmp_path / "cache" if source == "cache" else "",
            gain_db=(-6.0, 3.0),
            read_threads=threads,
            **SETTINGS,
        )

    iterator = iter(build())
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator)["audio"] for _ in range(6)]
    iterator.set_state(state)
    fresh = iter(build())
    next(fresh)
    fresh.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(iterator)["audio"], batch)
        np.testing.assert_array_equal(next(fresh)["audio"], batch)


def test_shards_partition_the_stream(ramps):
    whole = np.concatenate(take(build_audio_pipeline(data_dir=[ramps], **SETTINGS), 6))
    settings = dict(SETTINGS, batch_size=2)
    for shard in range(2):
        part = np.concatenate(
            take(build_audio_pipeline(data_dir=[ramps], shard_index=shard, shard_count=2, **settings), 6)
        )
        np.testing.assert_array_equal(part, whole[shard::2])


def test_gain_and_polarity_cover_their_ranges(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.full(2 * SAMPLES, 0.25), RATE)
    levels = np.concatenate(take(build_audio_pipeline(data_dir=tmp_path, gain_db=(-6.0, 6.0), **SETTINGS), 30))[:, 0, 0]
    gains = 20 * np.log10(np.abs(levels) / 0.25)
    assert -6.0 <= gains.min() < -5.0 and 5.0 < gains.max() <= 6.0
    assert abs(np.mean(gains)) < 1.0
    assert 0.35 < np.mean(levels > 0) < 0.65


def test_peaks_never_pass_one(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.linspace(-1.5, 1.5, 3000), RATE, subtype="FLOAT")
    loud = scan_folder(tmp_path)
    crops = np.concatenate(take(build_audio_pipeline(data_dir=[loud], gain_db=(0.0, 12.0), **SETTINGS), 20))
    assert np.abs(crops).max() == 1.0
    assert np.ptp(np.diff(crops[:, :, 0]), axis=1).max() < 1e-6  # scaled, not clipped
    clips, _ = eval_clips(files=loud, sample_rate=RATE, segment_samples=2900, num_clips=2, channels=1, seed=0)
    assert np.abs(clips).max() == 1.0


def test_silence_is_avoided_where_there_is_sound(tmp_path):
    audio = np.zeros(20 * SAMPLES)
    audio[10 * SAMPLES :] = 0.1
    soundfile.write(tmp_path / "half.wav", audio, RATE)
    half = scan_folder(tmp_path)
    batches = take(build_audio_pipeline(data_dir=[half], **SETTINGS), 50)
    silent = ~np.concatenate(batches).any(axis=(1, 2))
    assert silent.mean() < 0.1  # a half to the fifth is 0.03
    soundfile.write(tmp_path / "half.wav", np.zeros(20 * SAMPLES), RATE)
    assert not take(build_audio_pipeline(data_dir=tmp_path, **SETTINGS), 1)[0].any()


def test_short_files_fail_are_padded_or_skipped(tmp_path, caplog):
    soundfile.write(tmp_path / "long.wav", ramp(5 * SAMPLES, 1), RATE)
    soundfile.write(tmp_path / "short.wav", ramp(SAMPLES // 2, 20001), RATE)
    mixed = scan_folder(tmp_path)
    with pytest.raises(InputError, match=r"short\.wav lasts 0\.031 s, a segment 0\.062 s.*=pad"):
        build_audio_pipeline(data_dir=[mixed], **SETTINGS)
    padded = np.concatenate(
        take(build_audio_pipeline(data_dir=[mixed], short_files="pad", polarity=False, **SETTINGS), 9)
    )[:, :, 0]
    short = padded[padded[:, 0] > 0.5]
    np.testing.assert_array_equal(short[0, : SAMPLES // 2] * 32768, 20001 + np.arange(500))
    assert len(short) == 6 and not short[:, SAMPLES // 2 :].any()
    with caplog.at_level(logging.WARNING):
        skipped = build_audio_pipeline(data_dir=[mixed], short_files="skip", polarity=False, **SETTINGS)
    assert "1 of 2 files left out: shorter than a segment of 0.062 s" in caplog.text
    assert np.concatenate(take(skipped, 9)).max() < 0.5
    with pytest.raises(InputError, match="no file is left.*0.062 s"):
        build_audio_pipeline(data_dir=[mixed[1:]], short_files="skip", **SETTINGS)


@pytest.mark.parametrize(
    "field, value",
    [
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("gain_db", (3.0, -3.0)),
        ("read_threads", -1),
        ("read_processes", -1),
        ("weights", (1.0, 2.0)),
        ("weights", (0.0,)),
        ("segment_samples", 0),
        ("sample_rate", 0),
        ("channels", 3),
        ("short_files", "repeat"),
    ],
)
def test_wrong_fields_are_named(files, field, value):
    with pytest.raises(InputError, match=f"{field}="):
        build_audio_pipeline(data_dir=[files], **dict(SETTINGS, **{field: value}))


def test_file_with_too_many_channels_fails_before_training(tmp_path):
    soundfile.write(tmp_path / "surround.wav", np.zeros((2 * SAMPLES, 6)), RATE)
    with pytest.raises(InputError, match=r"surround\.wav has 6 channels"):
        build_audio_pipeline(data_dir=tmp_path, channels=2, **SETTINGS)


def test_eval_clips_are_fixed_and_spread_over_the_files(files):
    settings = dict(sample_rate=RATE, segment_samples=SAMPLES, channels=2)
    clips, names = eval_clips(files=files, num_clips=8, seed=0, **settings)
    assert clips.shape == (8, SAMPLES, 2) and clips.dtype == np.float32
    again = eval_clips(files=files[::-1], num_clips=8, seed=0, **settings)
    np.testing.assert_array_equal(clips, again[0])
    assert names == again[1] and len(set(names)) == 8
    for half in (names[:4], names[4:]):  # round robin
        assert sorted(name.split("@")[0] for name in half) == [file.name for file in files]
    fewer = eval_clips(files=files, num_clips=3, seed=0, **settings)
    np.testing.assert_array_equal(clips[:3], fewer[0])
    assert eval_clips(files=files, num_clips=8, seed=1, **settings)[1] != names
    with pytest.raises(InputError, match="num_clips=0"):
        eval_clips(files=files, num_clips=0, seed=0, **settings)


def test_eval_clips_are_the_samples_that_their_names_say(ramps):
    clips, names = eval_clips(files=ramps, sample_rate=RATE, segment_samples=SAMPLES, num_clips=6, channels=1, seed=0)
    for clip, name in zip(clips[:, :, 0], names, strict=True):
        file, seconds = name[:-1].split("@")
        first = clip[0] * 32768 - (1 if file == "a.wav" else 10001)
        assert abs(first / RATE - float(seconds)) <= 0.0051
        np.testing.assert_array_equal(np.diff(clip * 32768), 1.0)


def test_synthetic_eval_clips_are_not_training_clips():
    settings = dict(sample_rate=RATE, segment_samples=SAMPLES)
    clips, names = eval_clips(files=None, num_clips=3, channels=1, seed=0, **settings)
    again, _ = eval_clips(files=None, num_clips=3, channels=1, seed=0, **settings)
    np.testing.assert_array_equal(clips, again)
    assert len(set(names)) == 3
    train = build_audio_pipeline(data_dir=None, polarity=False, **SETTINGS)
    assert not np.array_equal(take(train, 1)[0][0], clips[0])


def test_training_data_never_needs_tensorflow(files):
    script = (
        "import itertools, sys\n"
        "from meanflow_audio_codec.datasets.pipeline import build_audio_pipeline\n"
        "for data_dir in (None, sys.argv[1]):\n"
        "    stream = build_audio_pipeline(data_dir=data_dir, sample_rate=16000, segment_samples=100,\n"
        "                                  batch_size=2, seed=0)\n"
        "    assert len(list(itertools.islice(stream, 3))) == 3\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    folder = str(Path(files[0].path).parent)
    subprocess.run([sys.executable, "-c", script, folder], cwd=ROOT, check=True)


@pytest.mark.skipif(not SHARED.exists(), reason="shared data not in this checkout")
def test_real_recordings_make_batches_and_resume():
    files = scan_folder(SHARED / "audio" / "valid")
    settings = dict(SETTINGS, sample_rate=24000, segment_samples=32640)
    iterator = iter(build_audio_pipeline(data_dir=[files], short_files="pad", **settings))
    next(iterator)
    state = iterator.get_state()
    batch = next(iterator)["audio"]
    assert batch.shape == (4, 32640, 1) and 0.01 < np.abs(batch).max() <= 1.0
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["audio"], batch)


def test_processes_give_the_same_batches_and_resume(files, tmp_path):
    settings = dict(SETTINGS, data_dir=[files], gain_db=(-6.0, 3.0), cache_dir=tmp_path / "cache")
    expected = take(build_audio_pipeline(**settings), 7)
    with contextlib.closing(iter(build_audio_pipeline(read_processes=2, **settings))) as iterator:
        for batch in expected[:3]:
            np.testing.assert_array_equal(next(iterator)["audio"], batch)
        state = iterator.get_state()
        for _ in range(2):
            for batch in expected[3:]:
                np.testing.assert_array_equal(next(iterator)["audio"], batch)
            iterator.set_state(state)


def test_folders_mix_by_weight_or_by_length(ramps, tmp_path):
    soundfile.write(tmp_path / "long.wav", ramp(12 * SAMPLES, 20001), RATE)
    long = [file for file in scan_folder(tmp_path) if file.name == "long.wav"]

    def share(weights, batches=100):
        stream = build_audio_pipeline(data_dir=[ramps, long], weights=weights, polarity=False, **SETTINGS)
        return (first_frames(take(stream, batches)) > 20000).mean()

    assert share(()) == 0.75  # 12 of 16 segments
    assert share((3.0, 1.0)) == 0.25
    assert share((1.0, 1.0)) == 0.5


def test_files_are_left_out_by_length_and_bandwidth(tmp_path, caplog):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 40000)
    dull = np.fft.irfft(np.fft.rfft(noise) * (np.arange(20001) < 10000))
    for name, audio in (("full", noise), ("dull", dull), ("brief", noise[:4000])):
        soundfile.write(tmp_path / f"{name}.wav", audio, 32000, subtype="FLOAT")
    settings = dict(SETTINGS, min_seconds=1.0, min_bandwidth=12000.0, polarity=False, sample_rate=32000)
    with caplog.at_level(logging.WARNING):
        crops = np.concatenate(take(build_audio_pipeline(data_dir=tmp_path, **settings), 5))
    assert "1 of 3 files left out: shorter than 1 s" in caplog.text
    assert "1 of 2 files left out: without anything above 12000 Hz" in caplog.text
    assert (np.abs(np.fft.rfft(crops[:, :, 0]))[:, 400:].mean(axis=1) > 0.5).all()
    with pytest.raises(InputError, match="input.min_bandwidth=9.*measure_bandwidth=True"):
        build_audio_pipeline(data_dir=[scan_folder(tmp_path)], **dict(settings, min_bandwidth=9.0))
    with pytest.raises(InputError, match="input.min_seconds"):
        build_audio_pipeline(data_dir=tmp_path, **dict(settings, min_seconds=60.0))


def spoil(path, how):
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        soundfile.write(path, ramp(4 * SAMPLES, 25001), RATE)


@pytest.mark.parametrize(
    "how, reason", [("removed", "is gone"), ("truncated", "has changed"), ("changed", "has changed")]
)
def test_file_spoilt_under_a_running_stream_is_named_and_replaced(ramps, caplog, how, reason):
    settings = dict(SETTINGS, read_threads=0, polarity=False)
    strict = iter(build_audio_pipeline(data_dir=[ramps], **settings))
    lenient = iter(build_audio_pipeline(data_dir=[ramps], bad_files="skip", **settings))
    np.testing.assert_array_equal(next(strict)["audio"], next(lenient)["audio"])
    spoil(Path(ramps[0].path), how)
    state = lenient.get_state()
    with pytest.raises(InputError, match=rf"a\.wav {reason} since it was scanned.*input\.bad_files=skip"):
        next(strict)
    with caplog.at_level(logging.WARNING):
        batches = [next(lenient)["audio"] for _ in range(8)]
    assert (first_frames(batches) > 10000).all()  # all from b.wav
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert f"a.wav {reason}" in caplog.text and "(1 lost so far)" in caplog.text
    lenient.set_state(state)
    for batch in batches:
        np.testing.assert_array_equal(next(lenient)["audio"], batch)
    spoil(Path(ramps[1].path), "removed")
    with pytest.raises(InputError, match="10 files drawn in a row cannot be read, the last: .*since it was scanned"):
        next(lenient)


def test_spoilt_file_is_named_from_a_worker_process_too(ramps):
    stream = build_audio_pipeline(data_dir=[ramps], read_processes=1, **SETTINGS)
    for file in ramps:
        Path(file.path).unlink()
    with contextlib.closing(iter(stream)) as iterator, pytest.raises(InputError, match=r"\.wav is gone since"):
        next(iterator)
