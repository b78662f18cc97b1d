"""The scan names what is wrong; crops are the file's own samples, or the resampled file's."""

import dataclasses
import logging
import math
import os
import threading
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from meanflow_audio_codec.datasets.audio import load_crop, read_crop, scan_folder
from meanflow_audio_codec.datasets.measure import bandwidth
from meanflow_audio_codec.errors import InputError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
KINDS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}


def noise(frames, channels, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (frames, channels)).astype(np.float32)


def tones(frames, channels):
    time = np.arange(frames) / 44100
    chirp = 0.3 * np.sin(2 * np.pi * 440 * time * (1 + time / 10))
    return chirp[:, None] + 0.02 * noise(frames, channels)


def write(path, audio, rate=44100):
    path.parent.mkdir(parents=True, exist_ok=True)
    container, subtype = KINDS[path.suffix.lower()]
    soundfile.write(path, audio, rate, format=container, subtype=subtype)
    return path


def scan_one(path):
    return next(file for file in scan_folder(path.parent) if file.path == str(path))


def test_scan_finds_every_format_sorted_with_its_properties(tmp_path):
    write(tmp_path / "b" / "x.flac", noise(5000, 2), 48000)
    write(tmp_path / "a.WAV", noise(4000, 1), 16000)
    write(tmp_path / "c.ogg", noise(6000, 2), 44100)
    write(tmp_path / "b" / "deep" / "y.mp3", noise(44100, 1), 22050)
    write(tmp_path / "._a.wav", noise(10, 1))
    (tmp_path / "notes.txt").write_text("no audio")
    files = scan_folder(tmp_path)
    assert [file.name for file in files] == ["a.WAV", "b/deep/y.mp3", "b/x.flac", "c.ogg"]
    assert [file.sample_rate for file in files] == [16000, 22050, 48000, 44100]
    assert [file.channels for file in files] == [1, 1, 2, 2]
    assert [files[i].frames for i in (0, 2, 3)] == [4000, 5000, 6000]
    assert files[0].duration == 0.25
    assert files[0].size == (tmp_path / "a.WAV").stat().st_size


def test_folder_linked_into_itself_is_scanned_once(tmp_path):
    write(tmp_path / "a.wav", noise(100, 1))
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert [file.name for file in scan_folder(tmp_path)] == ["a.wav"]


def test_missing_and_empty_folder_name_the_field_and_the_formats(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=r"input\.data_dir.*\.wav, \.flac, \.ogg, \.opus, \.mp3"):
            scan_folder(folder)


def damage_header(folder):
    path = write(folder / "damaged.flac", noise(5000, 1))
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])


def truncate_flac(folder):
    path = write(folder / "damaged.flac", noise(50000, 2))
    path.write_bytes(path.read_bytes()[:-3000])


def truncate_mp3(folder):
    path = write(folder / "damaged.mp3", noise(200000, 2))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_no_bytes(folder):
    (folder / "damaged.mp3").write_bytes(b"")


def write_text(folder):
    (folder / "damaged.wav").write_text("this is no audio " * 500)


def write_no_frames(folder):
    write(folder / "damaged.wav", noise(0, 1))


@pytest.mark.parametrize(
    "damage",
    [damage_header, truncate_flac, truncate_mp3, write_no_bytes, write_text, write_no_frames],
)
def test_damaged_file_fails_the_scan_by_name_or_is_counted(tmp_path, caplog, damage):
    write(tmp_path / "good.wav", noise(1000, 1))
    damage(tmp_path)
    with pytest.raises(InputError, match=r"1 of the files.*damaged\.\w+ .*input\.bad_files=skip"):
        scan_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        files = scan_folder(tmp_path, bad_files="skip")
    assert [file.name for file in files] == ["good.wav"]
    assert "1 of the files" in caplog.text and "damaged" in caplog.text


def test_all_damaged_files_are_counted_in_one_message(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.wav").write_text("no audio")
    with pytest.raises(InputError, match=r"8 of the files.*0\.wav.*4\.wav.*and 3 more"):
        scan_folder(tmp_path)
    with pytest.raises(InputError, match="holds no audio"):
        scan_folder(tmp_path, bad_files="skip")
    with pytest.raises(InputError, match="bad_files='ignore'"):
        scan_folder(tmp_path, bad_files="ignore")


def test_known_files_are_not_opened_again_unless_they_changed(tmp_path):
    kept, changed = write(tmp_path / "a.wav", noise(1000, 1)), write(tmp_path / "b.wav", noise(1000, 1))
    files = scan_folder(tmp_path)
    known = {file.name: file for file in files}
    assert scan_folder(tmp_path, known=known) == files
    stat = kept.stat()
    kept.write_bytes(b"x" * stat.st_size)
    os.utime(kept, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write(changed, noise(500, 2))
    again = scan_folder(tmp_path, known=known)
    assert again[0] == files[0]  # not opened: it would no longer decode
    assert (again[1].frames, again[1].channels) == (500, 2)
    tmp_path.rename(tmp_path.with_name("moved"))
    moved = scan_folder(tmp_path.with_name("moved"), known={"b.wav": again[1]}, bad_files="skip")[0]
    assert moved.path == str(tmp_path.with_name("moved") / "b.wav") and len(read_crop(moved, 10, 20)) == 20


def test_bandwidth_is_measured_on_request(tmp_path):
    write(tmp_path / "a.wav", noise(50000, 1))
    assert scan_folder(tmp_path)[0].bandwidth is None
    file = scan_folder(tmp_path, measure_bandwidth=True)[0]
    assert file.bandwidth == bandwidth(file.path) > 20000


def test_mp3_whose_length_is_guessed_too_long_has_its_true_length(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, tones(441000, 1), 44100, bitrate_mode="CONSTANT", compression_level=0.5)
    frames = path.read_bytes()
    second = frames.index(frames[:2], 4)  # the first frame is a Xing header, which holds the length
    path.write_bytes(frames[second:])
    with soundfile.SoundFile(path) as handle:
        announced, decoded = handle.frames, len(handle.read())
    file = scan_one(path)
    assert file.frames == decoded < announced
    assert len(read_crop(file, decoded - 1000, 1000)) == 1000


def test_name_that_is_not_utf8_is_named(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.wav", "wb"):
        pass
    with pytest.raises(InputError, match=r"udcff\.wav' \(its name is not UTF-8\)"):
        scan_folder(tmp_path)


def test_dangling_link_is_named(tmp_path):
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    with pytest.raises(InputError, match=r"gone\.wav \(No such file"):
        scan_folder(tmp_path)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [48000, 24000])
def test_crops_do_not_depend_on_what_was_read_before(tmp_path, suffix, channels, rate):
    """Used handles of Ogg and MP3 files return other samples than fresh ones, unless helped."""
    path = write(tmp_path / f"x{suffix}", tones(150000, channels), rate)
    file = scan_one(path)
    rng = np.random.default_rng(0)
    starts = (rng.integers(0, 100000, (12, 1)) + [0, 2500, 400]).ravel()

    def crops(order):
        return {
            start: load_crop(file, start, sample_rate=rate, segment_samples=3000, channels=channels)
            for start in order.tolist()
        }

    first = crops(starts)
    with futures.ThreadPoolExecutor(1) as pool:  # handles of its own
        second = pool.submit(crops, rng.permutation(starts)).result()
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0]
    for start, crop in first.items():
        np.testing.assert_array_equal(crop, second[start])
        if suffix in (".wav", ".flac", ".ogg"):  # the others' decoders round, or converge, anew
            np.testing.assert_array_equal(crop, whole[start : start + 3000])


@pytest.mark.parametrize("rates", [(44100, 24000), (16000, 24000), (22050, 44100), (48000, 8000)])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_resampled_crop_is_cut_from_the_resampled_file(tmp_path, rates, where):
    source, target = rates
    samples = 4000
    path = write(tmp_path / "x.wav", noise(3 * source, 1), source)
    file = scan_one(path)
    frames = -(-samples * source // target)
    start = {"first": 0, "middle": source, "last": 3 * source - frames}[where]
    start -= start % (source // math.gcd(source, target))  # a whole number of output samples
    crop = load_crop(file, start, sample_rate=target, segment_samples=samples, channels=1)
    # A second of silence before the file: soxr's first samples of a stream are off by up to 0.005.
    whole = np.pad(soundfile.read(path, dtype="float32")[0], (source, 0))
    whole = soxr.resample(whole, source, target, "HQ")
    begin = target + start * target // source
    expected = whole[begin : begin + samples]
    assert crop.dtype == np.float32 and crop.shape == (samples, 1)
    # soxr works in float32 blocks whose borders differ.
    np.testing.assert_allclose(crop[: len(expected), 0], expected, atol=2e-6)


def test_resampled_sine_keeps_frequency_level_and_place(tmp_path):
    source, target, samples, start = 44100, 24000, 24000, 12345
    time = np.arange(3 * source) / source
    path = write(tmp_path / "x.wav", 0.5 * np.sin(2 * np.pi * 1000 * time)[:, None], source)
    crop = load_crop(scan_one(path), start, sample_rate=target, segment_samples=samples, channels=1)
    seconds = start / source + np.arange(samples) / target
    # 16-bit quantisation of the file and soxr's 20 bits
    np.testing.assert_allclose(crop[:, 0], 0.5 * np.sin(2 * np.pi * 1000 * seconds), atol=1e-4)


def test_channels_are_averaged_doubled_or_refused(tmp_path):
    stereo = scan_one(write(tmp_path / "2.wav", noise(100, 2)))
    samples = read_crop(stereo, 0, 100)
    crop = dict(sample_rate=44100, segment_samples=100)
    np.testing.assert_array_equal(load_crop(stereo, 0, channels=1, **crop)[:, 0], samples.mean(axis=1))
    mono = scan_one(write(tmp_path / "1.wav", noise(100, 1)))
    doubled = load_crop(mono, 0, channels=2, **crop)
    np.testing.assert_array_equal(doubled, np.repeat(read_crop(mono, 0, 100), 2, axis=1))
    surround = scan_one(write(tmp_path / "6.wav", noise(100, 6)))
    assert load_crop(surround, 0, channels=1, **crop).shape == (100, 1)
    with pytest.raises(InputError, match=r"6\.wav has 6 channels.*input\.channels=1"):
        load_crop(surround, 0, channels=2, **crop)
    with pytest.raises(InputError, match="input.channels=3"):
        load_crop(surround, 0, channels=3, **crop)


def test_crop_past_the_end_is_zeros(tmp_path):
    file = scan_one(write(tmp_path / "x.wav", noise(100, 1)))
    crop = load_crop(file, 60, sample_rate=44100, segment_samples=90, channels=1)
    np.testing.assert_array_equal(crop[:40], read_crop(file, 60, 40))
    assert not crop[40:].any()


def test_file_that_shrank_or_holds_nan_is_named_with_its_position(tmp_path):
    file = scan_one(write(tmp_path / "x.wav", noise(1000, 1)))
    with pytest.raises(InputError, match=r"x\.wav: frames 900 to 1100 of 2000: only 100 came"):
        read_crop(dataclasses.replace(file, frames=2000), 900, 200)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 44100, subtype="FLOAT")
    with pytest.raises(InputError, match=r"nan\.wav.*not finite"):
        read_crop(scan_one(tmp_path / "nan.wav"), 0, 100)


def test_file_that_is_gone_or_changed_since_the_scan_is_not_read(tmp_path):
    gone, changed = (
        scan_one(write(tmp_path / "gone.wav", noise(9, 1))),
        scan_one(write(tmp_path / "x.wav", noise(9, 1))),
    )
    for file in (gone, changed):
        read_crop(file, 0, 9)  # their handles stay open
    (tmp_path / "gone.wav").unlink()
    write(tmp_path / "x.wav", noise(10, 1))
    with pytest.raises(InputError, match=r"gone\.wav is gone since.*put it back"):
        read_crop(gone, 0, 9)
    with pytest.raises(InputError, match=r"x\.wav has changed since"):
        read_crop(changed, 0, 9)


def test_more_files_than_handles_read_correctly_from_two_threads(tmp_path):
    audio = {}
    for i in range(140):
        path = write(tmp_path / f"{i:03}.wav", noise(300, 1, seed=i))
        audio[str(path)] = soundfile.read(path, dtype="float32", always_2d=True)[0]
    files, failures = scan_folder(tmp_path), []

    def read_all():
        for file in files * 2:
            if not np.array_equal(read_crop(file, 100, 50), audio[file.path][100:150]):
                failures.append(file.path)

    threads = [threading.Thread(target=read_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.skipif(not SHARED.exists(), reason="shared data not in this checkout")
def test_real_recordings_scan_and_decode_anywhere():
    files = scan_folder(SHARED / "audio" / "valid")
    assert len(files) == 14
    assert {file.sample_rate for file in files} == {16000, 22050, 44100, 48000}
    for file in files:
        for start in (0, file.frames // 2, file.frames - 1000):
            crop = load_crop(file, start, sample_rate=24000, segment_samples=400, channels=1)
            assert np.isfinite(crop).all() and np.abs(crop).max() < 2.0
