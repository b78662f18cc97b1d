"""The codec: exact lengths, one computation however the audio is cut, the same everywhere, equal to the bare network.

The network has random weights; what is tested holds for any.
"""

import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import soundfile

from meanflow_audio_codec import bitstream
from meanflow_audio_codec.codec import BLOCK, FILE_BLOCK, Codec, build_model
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.preprocessing import scaling
from meanflow_audio_codec.preprocessing.tokenizers import build_tokenizer
from meanflow_audio_codec.trainers import flow

ROOT = Path(__file__).parents[1]
RATE, HOP = 8000, 64  # of the codec
BLOCK_FRAMES, FILE_BLOCK_FRAMES = BLOCK // 2, FILE_BLOCK // 2  # a code frame of this codec is two tokens
CHUNKS = (1, 63, 64, 1000, 2047, 2048, 2049, 10_000)  # samples, or 64ths of a code frame; a block has 2048
RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000)
# Decodes in a process with one thread, on one core; prints nothing unless it fails.
ELSEWHERE = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
import numpy as np
from meanflow_audio_codec import Codec
bundle, given, taken = sys.argv[1:]
codec, arrays = Codec.load(bundle), np.load(given)
np.savez(taken, codes=codec.encode(arrays["audio"], 44100), audio=codec.decompress(arrays["mfac"].tobytes())[0],
         mfac=np.frombuffer(codec.compress(arrays["audio"], 44100), np.uint8))
"""


@pytest.fixture(scope="module")
def codec(random_codec):
    """Of gain and shape, 1 to 6 kbps, one of which is the levels'."""
    return random_codec(quantizer="gain_shape", level_stages=1, max_bits=48)


@pytest.fixture(scope="module")
def fsq(random_codec):
    """8 codebooks of 0.25 kbps."""
    return random_codec()


@pytest.fixture(scope="module")
def bundle(codec, tmp_path_factory):
    return export(codec, tmp_path_factory.mktemp("bundle") / "small.npz")


def export(codec, path):
    """The codec as a file, with entropy tables."""
    codec.export(path, codec.fit_tables([music(40_000)]))
    return path


def music(samples, channels=None, rate=RATE, seed=0):
    """Fading tones in noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / rate
    shape = (channels or 1, 1)
    audio = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 3000, shape) * t) * np.cos(rng.uniform(1, 5, shape) * t)
    audio = (audio + 0.02 * rng.standard_normal((shape[0], samples))).astype(np.float32)
    return audio if channels else audio[0]


def stream_encode(codec, audio, size, kbps=None):
    state, parts = codec.encode_start(len(audio), kbps), []
    for start in range(0, audio.shape[1], size):
        state, codes = codec.encode_step(state, audio[:, start : start + size])
        parts.append(codes)
    return np.concatenate([*parts, codec.encode_step(state, audio[:, :0], last=True)[1]], axis=2)


def stream_decode(codec, codes, size, nfe=1):
    state, parts = codec.decode_start(len(codes), nfe), []
    for start in range(0, codes.shape[2], size):
        state, audio = codec.decode_step(state, codes[:, :, start : start + size])
        parts.append(audio)
    return np.concatenate([*parts, codec.decode_step(state, codes[:, :, :0], last=True)[1]], axis=1)


def cut(audio, size):
    return (audio[:, start : start + size] for start in range(0, audio.shape[1], size))


# --- lengths


def assert_length_is_kept(codec, rate, channels, samples):
    decoded, decoded_rate = codec.decompress(codec.compress(music(samples, channels, rate), rate))
    assert (decoded.shape, decoded.dtype, decoded_rate) == ((channels, samples), np.float32, rate)
    assert np.isfinite(decoded).all()


def test_every_length_up_to_three_frames(codec):
    for samples in range(3 * HOP + 2):
        assert_length_is_kept(codec, RATE, 1, samples)


@pytest.mark.parametrize("rate", RATES)
def test_lengths_at_other_rates_and_channels(codec, rate):
    """The edges of each frame, and a sample of the lengths between them and up to some blocks."""
    rng = np.random.default_rng(rate)
    frame = HOP * rate / RATE
    edges = {0, 1, 2} | {int(number * frame) + offset for number in (1, 2, 3) for offset in (-1, 0, 1)}
    between = rng.integers(0, int(3 * frame), 6).tolist() + [int(rng.uniform(30, 70) * frame)]
    for i, samples in enumerate(sorted(edges) + between):
        assert_length_is_kept(codec, rate, 1 + i % 6, samples)


def test_axes_and_frame_counts(codec):
    for shape in ((500,), (2, 500), (3, 2, 500), (0, 500), (2, 0)):
        codes = codec.encode(np.zeros(shape, np.float32), RATE)
        frames = -(-(shape[-1] + HOP // 2) // HOP) if shape[-1] else 0  # the MDCT needs half a frame more
        assert codes.shape == (*shape[:-1], codec.num_codebooks, frames) and codes.dtype == np.int32
        assert codec.decode(codes).shape == (*shape[:-1], frames * HOP)
        assert codec.decode(codes, length=shape[-1]).shape == shape


# --- one computation


@pytest.mark.parametrize("size", CHUNKS)
def test_streamed_equals_whole(codec, size):
    audio = music(3 * BLOCK_FRAMES * HOP + 777, channels=2)
    codes = stream_encode(codec, audio, 10**6)
    np.testing.assert_array_equal(stream_encode(codec, audio, size), codes)
    whole = stream_decode(codec, codes, 10**6)
    np.testing.assert_allclose(stream_decode(codec, codes, -(-size // HOP)), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(codec.decode(codes[0]), whole[0], rtol=0, atol=1e-5)  # channel 0 has its noise
    assert np.abs(whole).std() > 0.01


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 1), (44100, 2), (22050, 3)])
def test_chunks_make_the_same_file(codec, rate, channels):
    audio = music(5 * rate, channels, rate)
    expected = codec.compress(audio, rate)
    for size in (999, 65_536):
        file = io.BytesIO()
        codec.compress_stream(cut(audio, size), rate, channels, file)
        assert file.getvalue() == expected


def test_a_batch_is_its_rows(codec):
    audio = music(3000, channels=6).reshape(2, 3, -1)
    codes = codec.encode(audio, 16000)
    decoded = codec.decode(codes, nfe=2, seed=3)
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(codec.encode(audio[place], 16000), codes[place])
        alone = codec.decode(codes[place][None], nfe=2, seed=3)[0]
        np.testing.assert_allclose(alone, decoded[place], rtol=0, atol=1e-5)


def test_fewer_codebooks_are_the_first_ones(fsq):
    audio = music(3000)
    np.testing.assert_array_equal(fsq.encode(audio, RATE, kbps=0.99), fsq.encode(audio, RATE)[:3])


def test_windows_equal_the_network_applied_once(codec):
    """Blocks with their halos see all that the network sees; beyond the ends silence; noise by absolute frame."""
    audio, before, after = music(70 * HOP), 40, 60  # silent frames, more than any receptive field
    config, arrays = codec._config, codec._arrays
    tokenizer, model = build_tokenizer(config["tokens"]), build_model(config)
    compand = (jnp.asarray(arrays["scale"]), config["tokens"]["exponent"], config["tokens"]["eps"])
    network = functools.partial(model.apply, {"params": codec._params})

    def encode(audio, steps):
        tokens = tokenizer.tokenize(audio[None, :, None])
        x = scaling.normalize(tokens[:, : tokens.shape[1] // 2 * 2], *compand)
        level_codes = network(x, method="level_codes")
        q = model.gain_shape.quantize(x, network(level_codes, method="dequantize_levels"), steps)
        return network(steps, level_codes, q, method="join_codes")

    def decode(codes):
        cond = network(network(codes, method="dequantize"), method="condition_on")
        places = jnp.arange(cond.shape[1], dtype=jnp.uint32) - jnp.uint32(2 * before)
        z = flow.frame_noise(jax.random.fold_in(jax.random.key(5), 0), places, 32)[None]
        x = model.from_flow(flow.flow_map_sample(functools.partial(network, method="flow"), z, cond, 2), cond)
        return tokenizer.detokenize(scaling.denormalize(x, *compand), tokenizer.segment_samples(x.shape[1]), channels=1)

    own = codec.encode(audio, RATE)
    ours = slice(before, before + own.shape[1])
    steps = np.zeros((1, before + 70 + after), np.int32)
    steps[0, ours] = own[0]
    codes = np.array(jax.jit(encode)(jnp.pad(audio, (before * HOP, after * HOP)), steps))
    np.testing.assert_array_equal(own, codes[0, ours].T)
    beyond = np.repeat(codes[:, 10:11], codes.shape[1], axis=1)
    beyond[:, ours] = codes[:, ours]
    decoded, expected = codec.decode(own, nfe=2, seed=5), jax.jit(decode)(jnp.asarray(beyond))[0, before * HOP :, 0]
    np.testing.assert_allclose(decoded, expected[: len(decoded)], rtol=0, atol=1e-4)  # sums have other orders


def test_another_network(random_codec):
    """Two of three residual codebooks, windows of 32 tokens, plain samples, a downsampling that divides nothing."""
    fields = {"quantizer": "rvq", "num_quantizers": 3, "codebook_size": 37, "backbone": "mixer", "downsample": 3}
    codec = random_codec(tokens={"name": "reshape"}, **fields)
    audio = music(9000, channels=2)
    codes = codec.encode(audio, RATE)
    np.testing.assert_array_equal(stream_encode(codec, audio, 1001), codes)
    decoded = stream_decode(codec, codes[:, :2], 10**6)
    np.testing.assert_array_equal(stream_decode(codec, codes[:, :2], 7), decoded)
    for samples in (0, 1, codec.hop_length, 3 * codec.hop_length + 1):
        part = music(samples, channels=1)
        file = codec.compress(part, 11_025, kbps=0.7 * codec.bitrate)
        assert codec.decompress(file)[0].shape == part.shape


def test_streaming_waits_for_the_latency(codec):
    audio = music(3 * BLOCK_FRAMES * HOP, channels=1)
    encoder, decoder = codec.encode_start(), codec.decode_start()
    given, most = 0, 0
    for taken, sample in enumerate(audio.T, start=1):
        encoder, codes = codec.encode_step(encoder, sample[None])
        if codes.shape[2]:
            decoder, decoded = codec.decode_step(decoder, codes)
            given += decoded.shape[1]
        most = max(most, taken - given)
    assert most == codec.latency - 1


# --- the same everywhere


def test_another_process_with_one_thread(bundle, tmp_path):
    codec, audio = Codec.load(bundle), music(44100 * 2, channels=2, rate=44100)
    file = codec.compress(audio, 44100)
    np.savez(tmp_path / "given.npz", audio=audio, mfac=np.frombuffer(file, np.uint8))
    arguments = [bundle, tmp_path / "given.npz", tmp_path / "taken.npz"]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "none"),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, arguments)], check=True, cwd=ROOT, env=environment)
    taken = np.load(tmp_path / "taken.npz")
    np.testing.assert_array_equal(taken["codes"], codec.encode(audio, 44100))
    assert taken["mfac"].tobytes() == file
    np.testing.assert_allclose(taken["audio"], codec.decompress(file)[0], rtol=0, atol=1e-5)


def test_noise_is_of_seed_and_channel(codec):
    codes = codec.encode(music(3000), RATE)
    both = stream_decode(codec, np.stack([codes, codes]), 10)
    assert np.abs(both[0] - both[1]).max() > 0.01
    np.testing.assert_array_equal(codec.decode(codes), codec.decode(codes, seed=0))
    assert np.abs(codec.decode(codes, seed=1) - codec.decode(codes)).max() > 0.01
    of_file = lambda seed: codec.decompress(codec.compress(music(3000), RATE, seed=seed))[0]
    assert np.abs(of_file(1) - of_file(2)).max() > 0.01


# --- files


def test_stereo_is_mid_and_side(codec):
    left, right = music(3000, channels=2)
    rows = np.stack([left + right, left - right]) / 2
    mid, side = stream_decode(codec, stream_encode(codec, rows, 10**6), 10**6)[:, :3000]
    decoded, _ = codec.decompress(codec.compress(np.stack([left, right]), RATE))
    np.testing.assert_allclose(decoded, [mid + side, mid - side], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("suffix", "rate", "channels"), [(".wav", 44100, 6), (".flac", 8000, 1), (".ogg", 22050, 2)])
def test_a_path_is_its_samples(codec, tmp_path, suffix, rate, channels):
    path = tmp_path / f"x{suffix}"
    soundfile.write(path, music(rate // 2, channels, rate).T, rate)
    audio, _ = soundfile.read(path, dtype="float32", always_2d=True)
    assert codec.compress(path) == codec.compress(np.ascontiguousarray(audio.T), rate)


def test_size_is_the_advertised_bitrate(codec, bundle):
    """Within 1 %, header and framing apart, with tables of a law and with fitted ones; silence needs no more."""
    frames = 4 * FILE_BLOCK_FRAMES
    audio = music(frames * HOP - HOP // 2, channels=2)
    for coder, kbps in ((codec, 4.0), (codec, 12.0), (Codec.load(bundle), 7.0)):
        measured = bitstream.info(io.BytesIO(coder.compress(audio, RATE, kbps=kbps)))
        assert measured["frames"] == frames
        assert measured["payload_kbps"] == pytest.approx(kbps, rel=0.01)
    silence = bitstream.info(io.BytesIO(codec.compress(np.zeros_like(audio), RATE)))
    assert silence["payload_kbps"] < 2.5  # levels, and steps


def test_size_of_codebooks_of_one_size(fsq):
    frames = 2 * FILE_BLOCK_FRAMES
    audio = music(frames * HOP - HOP // 2, channels=2)
    for kept in (1, 5, 8):
        measured = bitstream.info(io.BytesIO(fsq.compress(audio, RATE, kbps=0.5 * kept)))
        assert measured["header"].num_codebooks == kept
        assert measured["payload_kbps"] == pytest.approx(0.5 * kept, rel=0.01)


def test_bits_go_where_there_is_most_to_say(codec):
    """A loud stretch of a block has more cells than a quiet one, and a silent channel leaves its bits to the others."""
    audio = music(BLOCK_FRAMES * HOP)
    audio[: len(audio) // 2] *= 0.02
    cells = codec.encode(audio, RATE, kbps=3.0)[2:] != 127
    half = cells.shape[1] // 2
    assert cells[:, half:].sum() > 2 * cells[:, : half - 1].sum()
    alone = stream_encode(codec, audio[None], 10**6, kbps=3.0)
    shared = stream_encode(codec, np.stack([audio, 0 * audio]), 10**6, kbps=6.0)
    assert shared[0, 0].mean() > alone[0, 0].mean() + 3  # a finer step


def test_tables_of_a_bundle_save(fsq, tmp_path):
    fitted, audio = Codec.load(export(fsq, tmp_path / "small.npz")), music(20_000)
    assert len(fitted.compress(audio, RATE)) < 0.8 * len(fsq.compress(audio, RATE))
    np.testing.assert_array_equal(fitted.encode(audio, RATE), fsq.encode(audio, RATE))
    with pytest.raises(InputError, match="32 code frames"):
        fsq.fit_tables([music(HOP)])


def test_tables_of_gain_and_shape_make_the_step_finer(codec, bundle):
    audio = music(20_000, seed=1)
    own, fitted = (coder.encode(audio, RATE, kbps=3.0) for coder in (codec, Codec.load(bundle)))
    assert fitted[0].mean() > own[0].mean() + 1


def test_bundle(codec, bundle):
    loaded, again, audio = Codec.load(bundle), Codec.load(str(bundle)), music(20_000)
    assert loaded.name == "small" and loaded.fingerprint == again.fingerprint != codec.fingerprint
    codes, coded = loaded.encode(audio, RATE), loaded.compress(audio, RATE)
    np.testing.assert_array_equal(loaded.decode(codes), codec.decode(codes))
    np.testing.assert_array_equal(again.decompress(coded)[0], loaded.decompress(coded)[0])
    with pytest.raises(InputError, match="fingerprint|load that codec"):
        codec.decompress(coded)


def test_salvage_keeps_the_place_of_what_is_whole(codec):
    audio = music(3 * FILE_BLOCK_FRAMES * HOP)
    file = codec.compress(audio, RATE)
    whole, _ = codec.decompress(file)
    damaged = bytearray(file)
    damaged[len(file) // 2] ^= 255  # in the second block of three
    with pytest.raises(InputError, match="block 1"):
        codec.decompress(bytes(damaged))
    reader, blocks = codec.decompress_stream(io.BytesIO(damaged), salvage=True)
    salvaged = np.concatenate(list(blocks), axis=1)
    halo = 16 * HOP
    assert salvaged.shape == whole.shape and len(reader.lost) == 1
    for part in (slice(0, FILE_BLOCK_FRAMES * HOP - halo), slice(2 * FILE_BLOCK_FRAMES * HOP + halo, None)):
        np.testing.assert_array_equal(salvaged[:, part], whole[:, part])


# --- numbers and mistakes


@pytest.fixture
def unchecked():
    """Without the types that only tests check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_bitrates_that_it_has_not_are_refused(codec):
    for kbps, channels in ((0.99, 1), (6.1, 1), (5.9, 6), (36.1, 6)):
        with pytest.raises(InputError, match="choose a rate in between"):
            codec.encode_start(channels, kbps)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda codec: codec.encode(np.zeros(9, np.int16), RATE), "int16"),
        (lambda codec: codec.encode(np.float32(0), RATE), "give floats"),
        (lambda codec: codec.encode(np.full(9, np.nan, np.float32), RATE), "NaN"),
        (lambda codec: codec.encode(np.zeros(9, np.float32), RATE, kbps=9.0), "1 channels at 1 to 6 kbps"),
        (lambda codec: codec.decode(np.zeros((66, 3), np.float32)), "float32"),
        (lambda codec: codec.decode(np.full((66, 3), 256)), r"\[0, 256\)"),
        (lambda codec: codec.decode(np.zeros((65, 3), int)), "65 codebooks; random_0 has 66, of which 66"),
        (lambda codec: codec.decode(np.zeros((66, 3), int), nfe=0), "nfe=0"),
        (lambda codec: codec.decode(np.zeros((66, 3), int), length=3 * HOP + 1), "length=193"),
        (lambda codec: codec.compress(np.zeros(9, np.float32)), "sample_rate"),
        (lambda codec: codec.compress("nowhere.wav"), "nowhere.wav: no such file"),
        (lambda codec: codec.compress(__file__), "test_codec.py: .*WAV, FLAC"),
        (lambda codec: codec.decompress(b"RIFF"), "not an .mfac file"),
        (lambda codec: Codec.load("nowhere"), "nowhere: no such bundle"),
        (lambda codec: Codec.load(Path(__file__).parent), "neither a bundle nor"),
        (lambda codec: Codec.load(__file__), "test_codec.py: not a bundle"),
    ],
)
def test_mistakes_are_one_line(codec, mistake, message, unchecked):
    with pytest.raises(InputError, match=message) as error:
        mistake(codec)
    assert "\n" not in str(error.value)
