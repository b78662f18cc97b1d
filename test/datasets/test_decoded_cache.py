"""Decoded blocks hold the file's samples, the same whoever wrote them."""

import contextlib
import types
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import soundfile

from meanflow_audio_codec.datasets import decoded_cache
from meanflow_audio_codec.datasets.audio import load_crop, scan_folder
from meanflow_audio_codec.datasets.decoded_cache import DecodedCache
from meanflow_audio_codec.errors import InputError


def write_noise(path, seconds, rate, channels=1, peak=0.5, subtype=None):
    rng = np.random.default_rng(0)
    soundfile.write(path, rng.uniform(-peak, peak, (int(seconds * rate), channels)), rate, subtype=subtype)
    return scan_folder(path.parent)[0]


def read(cache, file, start, samples):
    out = np.full((samples, cache.channels), np.nan, np.float32)
    cache.read(file, start, out)
    return out


def blocks(cache_dir):
    return sorted(Path(cache_dir).rglob("*.i16"))


@pytest.mark.parametrize("start, samples", [(0, 100), (63_950, 100), (127_000, 3_000), (100_000, 80_000)])
def test_16_bit_audio_comes_back_bit_for_bit(tmp_path, start, samples):
    """At the file's rate, across the borders of blocks and past the file's end, full scale included."""
    audio = np.random.default_rng(0).integers(-(2**15), 2**15, (130_000, 2)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", audio, 8000)
    file = scan_folder(tmp_path)[0]
    crop = read(DecodedCache(str(tmp_path / "cache"), 8000, 2), file, start, samples)
    expected = np.zeros((samples, 2), np.float32)
    inside = audio[start : start + samples] / np.float32(2**15)
    expected[: len(inside)] = inside
    np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize("peak", [1e-3, 0.5])
def test_resampled_audio_is_that_of_the_file_within_16_bits(tmp_path, name, peak):
    rate, target = 44100, 24000
    file = write_noise(tmp_path / name, 10, rate, channels=2, peak=peak)
    cache = DecodedCache(str(tmp_path / "cache"), target, 1)
    assert cache.num_samples(file) == -(-file.frames * target // rate)
    # 7.84 s is a whole number of samples at either rate; the crop crosses the border at 8 s.
    crop = read(cache, file, int(7.84 * target), 2 * target // 10)
    direct = load_crop(file, int(7.84 * rate), sample_rate=target, segment_samples=2 * target // 10, channels=1)
    # Half a step of 16 bits, whose scale is at most twice the block's peak, and what an MP3 decoder
    # that starts elsewhere rounds otherwise.
    limit = 2 * np.abs(direct).max() * 2**-15 + (2e-4 * peak if name == "a.mp3" else 0.0)
    np.testing.assert_allclose(crop, direct, atol=limit)


def test_peaks_above_one_keep_their_shape(tmp_path):
    file = write_noise(tmp_path / "a.wav", 1, 8000, peak=1.5, subtype="FLOAT")
    crop = read(DecodedCache(str(tmp_path / "cache"), 8000, 1), file, 0, 8000)
    expected = load_crop(file, 0, sample_rate=8000, segment_samples=8000, channels=1)
    np.testing.assert_allclose(crop, expected, atol=2**-15)
    assert np.abs(crop).max() > 1.4


def test_blocks_are_the_same_whoever_wrote_them_and_decoded_once(tmp_path, monkeypatch):
    file = write_noise(tmp_path / "a.mp3", 20, 22050, channels=2)
    one, many = (DecodedCache(str(tmp_path / name), 16000, 1) for name in ("one", "many"))
    starts = np.random.default_rng(0).integers(0, 20 * 16000 - 5000, 40).tolist()
    expected = [read(one, file, start, 5000) for start in starts]
    with futures.ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda start: read(many, file, start, 5000), starts[::-1]))[::-1]
    np.testing.assert_array_equal(threaded, expected)
    assert [path.name for path in blocks(tmp_path / "one")] == [f"{block}.i16" for block in range(5)]
    for path, other in zip(blocks(tmp_path / "one"), blocks(tmp_path / "many"), strict=True):
        assert path.read_bytes() == other.read_bytes()
    monkeypatch.setattr(decoded_cache, "load_crop", None)
    np.testing.assert_array_equal([read(one, file, start, 5000) for start in starts], expected)


def test_block_cut_short_is_decoded_again(tmp_path):
    file = write_noise(tmp_path / "a.wav", 9, 8000)
    cache = DecodedCache(str(tmp_path / "cache"), 8000, 1)
    expected = read(cache, file, 60_000, 10_000)
    first, second = blocks(tmp_path / "cache")
    first.write_bytes(first.read_bytes()[:1000])
    second.write_bytes(b"")
    np.testing.assert_array_equal(read(cache, file, 60_000, 10_000), expected)


def test_changed_file_is_refused_and_has_blocks_of_its_own(tmp_path):
    file = write_noise(tmp_path / "a.wav", 1, 8000)
    cache = DecodedCache(str(tmp_path / "cache"), 8000, 1)
    read(cache, file, 0, 100)
    changed = write_noise(tmp_path / "a.wav", 1, 8000, peak=0.1)
    with pytest.raises(InputError, match="has changed"):
        read(cache, file, 0, 100)
    assert np.abs(read(cache, changed, 0, 8000)).max() < 0.11


def test_room_is_asked_for_before_training(tmp_path, monkeypatch):
    file = write_noise(tmp_path / "a.wav", 10, 8000)
    cache = DecodedCache(str(tmp_path / "not" / "yet"), 8000, 1)
    for free, fits in ((2**30 + 159_999, False), (2**30 + 160_000, True)):
        monkeypatch.setattr(
            decoded_cache.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free)
        )
        with contextlib.nullcontext() if fits else pytest.raises(InputError, match=r"cache_dir=.*1\.1 GB are free"):
            cache.check_room([file])
