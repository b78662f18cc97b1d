"""Tokenizers: audio [b, s, c] to tokens [b, l, f] and back, exactly, without anything learned.

A token is one step of the model's sequence. `MdctTokenizer` joins `group` MDCT frames of N bins:
pre-echo stays as short as a frame, the token rate low. `ReshapeTokenizer` cuts the waveform.

    MDCT:     f = (group, bin, channel) flattened,  token m = frames [m group, (m + 1) group)
    reshape:  f = (sample, channel) flattened,      token m = samples [m hop, (m + 1) hop)

with the last axis of each the fastest. The token rate is sample_rate / samples_per_token. All
methods are pure; sizes are static under jit.

Bands are equal steps of the ERB-rate scale E(f) = 21.4 log10(1 + 0.00437 f / Hz) (B. Glasberg and
B. Moore, "Derivation of auditory filter shapes from notched-noise data", Hearing Research 47,
1990), each widened to at least one bin.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.preprocessing.mdct import imdct, mdct, num_frames, window

_NUM_BANDS = 32


@dataclasses.dataclass(frozen=True)
class MdctTokenizer:
    """Tokens of `group` successive MDCT frames.

    Attributes:
        hop_length: MDCT bins N, in samples; even.
        group: Frames per token.
        window: MDCT window, "sine" or "kbd".
    """

    hop_length: int = 128
    group: int = 2
    window: str = "sine"

    def __post_init__(self):
        window(self.hop_length, self.window)  # raises for a wrong hop_length or window
        if self.group < 1:
            raise InputError(f"tokens.group {self.group} must be at least 1")

    @property
    def samples_per_token(self) -> int:
        """Samples from one token to the next."""
        return self.hop_length * self.group

    def num_tokens(self, samples: int) -> int:
        """Return the number of tokens l of a signal; the last one may hold zero frames."""
        return -(-num_frames(samples, self.hop_length) // self.group)

    def num_features(self, channels: int) -> int:
        """Return the number of features f of a token."""
        return self.group * self.hop_length * channels

    def segment_samples(self, num_tokens: int) -> int:
        """Return the longest signal of `num_tokens` tokens, in samples; it fills them all."""
        _check_num_tokens(num_tokens)
        return (num_tokens * self.group - 1) * self.hop_length

    def tokenize(self, audio: Float[Array, "b s c"]) -> Float[Array, "b l f"]:
        """Transform audio to tokens.

        Args:
            audio: Any length s and number of channels c.

        Returns:
            l = `num_tokens(s)` tokens of f = `num_features(c)` orthonormal MDCT coefficients, so
            that their energy is that of the audio.
        """
        batch, samples, channels = audio.shape
        tokens = self.num_tokens(samples)
        coeffs = mdct(jnp.swapaxes(audio, 1, 2), self.hop_length, self.window)  # [b, c, frames, n]
        missing = tokens * self.group - coeffs.shape[2]
        coeffs = jnp.pad(coeffs, ((0, 0), (0, 0), (0, missing), (0, 0)))
        return jnp.moveaxis(coeffs, 1, 3).reshape(batch, tokens, self.num_features(channels))

    def detokenize(self, tokens: Float[Array, "b l f"], length: int, channels: int) -> Float[Array, "b s c"]:
        """Invert `tokenize`.

        Args:
            tokens: Tokens of `channels` channels.
            length: Samples s to return.
            channels: Channels c of the audio.

        Returns:
            The audio.

        Raises:
            InputError: If the tokens are of another width, or hold less than `length` samples.
        """
        _check_num_features(tokens, self.num_features(channels), channels)
        batch, num_tokens, _ = tokens.shape
        coeffs = tokens.reshape(batch, num_tokens * self.group, self.hop_length, channels)
        coeffs = jnp.moveaxis(coeffs, 3, 1)  # [b, c, frames, n]
        return jnp.swapaxes(imdct(coeffs, self.hop_length, self.window, length=length), 1, 2)

    def bands(self, channels: int, sample_rate: int) -> Int[np.ndarray, "f"]:
        """Return the band of each feature, for scales and statistics.

        Args:
            channels: Channels; each has its own bands.
            sample_rate: In Hz.

        Returns:
            Indices from 0 without gaps: channel * B + band, with B = min(32, hop_length) ERB-like
            bands from low to high, the same for every frame of the group.
        """
        band_of_bin = _erb_bands(self.hop_length, sample_rate)
        num_bands = band_of_bin[-1] + 1
        band = band_of_bin[:, None] + num_bands * np.arange(channels)[None, :]
        return np.tile(band.reshape(-1), self.group)


@dataclasses.dataclass(frozen=True)
class ReshapeTokenizer:
    """Tokens of `hop_length` successive samples: the waveform itself.

    Attributes:
        hop_length: Samples per token and channel.
    """

    hop_length: int = 256

    def __post_init__(self):
        if self.hop_length < 1:
            raise InputError(f"tokens.hop_length {self.hop_length} must be at least 1")

    @property
    def samples_per_token(self) -> int:
        """Samples from one token to the next."""
        return self.hop_length

    def num_tokens(self, samples: int) -> int:
        """Return the number of tokens l of a signal; the last one is filled with zeros."""
        return -(-samples // self.hop_length)

    def num_features(self, channels: int) -> int:
        """Return the number of features f of a token."""
        return self.hop_length * channels

    def segment_samples(self, num_tokens: int) -> int:
        """Return the longest signal of `num_tokens` tokens, in samples; it fills them all."""
        _check_num_tokens(num_tokens)
        return num_tokens * self.hop_length

    def tokenize(self, audio: Float[Array, "b s c"]) -> Float[Array, "b l f"]:
        """Cut audio into tokens.

        Args:
            audio: Any length s and number of channels c.

        Returns:
            l = `num_tokens(s)` tokens of f = `num_features(c)` samples.
        """
        batch, samples, channels = audio.shape
        tokens = self.num_tokens(samples)
        audio = jnp.pad(audio, ((0, 0), (0, tokens * self.hop_length - samples), (0, 0)))
        return audio.reshape(batch, tokens, self.num_features(channels))

    def detokenize(self, tokens: Float[Array, "b l f"], length: int, channels: int) -> Float[Array, "b s c"]:
        """Invert `tokenize`.

        Args:
            tokens: Tokens of `channels` channels.
            length: Samples s to return.
            channels: Channels c of the audio.

        Returns:
            The audio.

        Raises:
            InputError: If the tokens are of another width, or hold less than `length` samples.
        """
        _check_num_features(tokens, self.num_features(channels), channels)
        held = tokens.shape[1] * self.hop_length
        if not 0 <= length <= held:
            raise InputError(f"length {length} is outside [0, {held}], what {tokens.shape[1]} tokens hold")
        return tokens.reshape(tokens.shape[0], held, channels)[:, :length]

    def bands(self, channels: int, sample_rate: int) -> Int[np.ndarray, "f"]:
        """Return the band of each feature: all 0, for samples have no frequency.

        Args:
            channels: Channels.
            sample_rate: In Hz; unused, for one interface.

        Returns:
            Zeros.
        """
        del sample_rate
        return np.zeros(self.num_features(channels), np.int64)


TOKENIZERS = {"mdct": MdctTokenizer, "reshape": ReshapeTokenizer}


def build_tokenizer(spec: Any) -> MdctTokenizer | ReshapeTokenizer:
    """Build the tokenizer that `spec["name"]` names from the fields of `spec`, as config.tokens or a dict, that it has.

    Raises:
        InputError: There is no such tokenizer, or a field is out of range.
    """
    if spec["name"] not in TOKENIZERS:
        raise InputError(f"tokens.name is {spec['name']!r}; choose one of {', '.join(TOKENIZERS)}")
    cls = TOKENIZERS[spec["name"]]
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in spec.items() if name in fields})


def _erb_bands(hop_length: int, sample_rate: int) -> Int[np.ndarray, "n"]:
    """Return the band of each bin: min(32, N) bands, none empty."""
    num_bands = min(_NUM_BANDS, hop_length)
    per_decade, per_hz = 21.4, 0.00437
    top = per_decade * np.log10(1 + per_hz * sample_rate / 2)
    edges_hz = (10 ** (np.linspace(0, top, num_bands + 1) / per_decade) - 1) / per_hz
    edges = np.floor(edges_hz / (sample_rate / 2) * hop_length).astype(np.int64)
    # Low bands are narrower than a bin: push edges up until they differ. The edges are convex in
    # their index, so the push ends before the last one.
    steps = np.arange(num_bands + 1)
    edges = np.maximum.accumulate(edges - steps) + steps
    return np.searchsorted(edges[1:-1], np.arange(hop_length), side="right")


def _check_num_tokens(num_tokens: int) -> None:
    if num_tokens < 1:
        raise InputError(f"num_tokens {num_tokens} must be at least 1")


def _check_num_features(tokens: Array, expected: int, channels: int) -> None:
    if tokens.shape[-1] != expected:
        raise InputError(f"tokens have {tokens.shape[-1]} features, channels={channels} needs {expected}")
