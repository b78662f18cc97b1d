"""Tokenizers: exact round trips, token counts, layout, and bands that follow the ear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.preprocessing.mdct import mdct
from meanflow_audio_codec.preprocessing.tokenizers import (
    TOKENIZERS,
    MdctTokenizer,
    ReshapeTokenizer,
)

ALL = (
    MdctTokenizer(),
    MdctTokenizer(hop_length=32, group=1, window="kbd"),
    MdctTokenizer(hop_length=256, group=3),
    ReshapeTokenizer(),
    ReshapeTokenizer(hop_length=5),
)


def noise(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("tokenizer", ALL, ids=repr)
def test_round_trip_and_energy(tokenizer, channels):
    for samples in (1, 256, 1003):
        audio = noise(2, samples, channels)
        tokens = tokenizer.tokenize(audio)
        assert tokens.shape == (
            2,
            tokenizer.num_tokens(samples),
            tokenizer.num_features(channels),
        )
        decoded = tokenizer.detokenize(tokens, samples, channels)
        np.testing.assert_allclose(decoded, audio, atol=5e-6)
        assert float(jnp.sum(tokens**2)) == pytest.approx(float(jnp.sum(audio**2)), rel=1e-5)


@pytest.mark.parametrize("tokenizer", ALL, ids=repr)
def test_segment_fills_its_tokens(tokenizer):
    for num_tokens in (1, 2, 37):
        samples = tokenizer.segment_samples(num_tokens)
        # One token of one frame holds no sample: a sample needs two frames.
        assert tokenizer.num_tokens(samples) == num_tokens
        assert tokenizer.num_tokens(samples + 1) == num_tokens + 1
    more = tokenizer.segment_samples(8) - tokenizer.segment_samples(7)
    assert more == tokenizer.samples_per_token


def test_documented_rates():
    assert 24_000 / MdctTokenizer(128, 2).samples_per_token == 93.75
    assert MdctTokenizer(128, 2).num_features(1) == 256
    assert 44_100 / MdctTokenizer(128, 4).samples_per_token == pytest.approx(86.13, abs=0.01)


def test_layout_is_group_then_bin_then_channel():
    tokenizer = MdctTokenizer(hop_length=16, group=2)
    audio = noise(1, tokenizer.segment_samples(3), 2)
    tokens = tokenizer.tokenize(audio).reshape(3, 2, 16, 2)
    left, right = mdct(audio[0, :, 0], 16), mdct(audio[0, :, 1], 16)
    np.testing.assert_allclose(tokens[..., 0].reshape(6, 16), left, atol=1e-6)
    np.testing.assert_allclose(tokens[..., 1].reshape(6, 16), right, atol=1e-6)
    samples = ReshapeTokenizer(4).tokenize(audio)[0, 0]
    np.testing.assert_array_equal(samples, audio[0, :4].reshape(-1))


@pytest.mark.parametrize("tokenizer", ALL[::2], ids=repr)
def test_gradients_pass_through_a_jitted_round_trip(tokenizer):
    audio = noise(1, 700, 2)

    @jax.jit
    @jax.grad
    def gradient(audio):
        decoded = tokenizer.detokenize(tokenizer.tokenize(audio), 700, 2)
        return 0.5 * jnp.sum(decoded**2)

    np.testing.assert_allclose(gradient(audio), audio, atol=1e-5)


@pytest.mark.parametrize("sample_rate", [16_000, 24_000, 48_000])
@pytest.mark.parametrize("hop_length", [2, 16, 40, 128, 1024])
def test_bands_partition_the_bins_and_widen_with_frequency(hop_length, sample_rate):
    tokenizer = MdctTokenizer(hop_length, group=2)
    bands = tokenizer.bands(1, sample_rate).reshape(2, hop_length)
    np.testing.assert_array_equal(bands[0], bands[1])
    counts = np.bincount(bands[0])
    assert len(counts) == min(32, hop_length) and counts.min() >= 1
    assert np.all(np.diff(bands[0]) >= 0)
    if hop_length >= 128:
        assert counts[0] <= counts[len(counts) // 2] <= counts[-1] and counts[-1] > counts[0]


def test_channels_have_their_own_bands():
    tokenizer = MdctTokenizer(hop_length=128, group=2)
    bands = tokenizer.bands(2, 24_000)
    assert bands.shape == (tokenizer.num_features(2),)
    left, right = np.moveaxis(bands.reshape(2, 128, 2), -1, 0)
    np.testing.assert_array_equal(left.reshape(-1), tokenizer.bands(1, 24_000))
    np.testing.assert_array_equal(right, left + 32)


def test_samples_have_one_band():
    np.testing.assert_array_equal(ReshapeTokenizer(8).bands(2, 24_000), np.zeros(16))


def test_names_are_the_config_values():
    assert TOKENIZERS == {"mdct": MdctTokenizer, "reshape": ReshapeTokenizer}


def test_wrong_input_names_the_field():
    with pytest.raises(InputError, match="hop_length 7"):
        MdctTokenizer(hop_length=7)
    with pytest.raises(InputError, match="group 0"):
        MdctTokenizer(group=0)
    with pytest.raises(InputError, match="hop_length 0"):
        ReshapeTokenizer(hop_length=0)
    for tokenizer in (MdctTokenizer(16, 2), ReshapeTokenizer(32)):
        with pytest.raises(InputError, match="num_tokens 0"):
            tokenizer.segment_samples(0)
        with pytest.raises(InputError, match="channels"):
            tokenizer.detokenize(jnp.zeros((1, 3, 32)), 10, 2)
        with pytest.raises(InputError, match="length 97"):
            tokenizer.detokenize(jnp.zeros((1, 3, 32)), 97, 1)
