"""The mel distance of evaluators/metrics.py for a loss: differentiable, jitted with the training step.

It asks for the right level in every band at every resolution, and not for the waveform: what cannot be coded may be
made up. Alone it must not train a flow's one-step sample: whatever is random in that makes the distance larger, so the
network learns to ignore the noise, and what should be noise becomes a buzz that repeats with every frame. The energy
distance (Gritsenko et al., A Spectral Energy Distance for Parallel Speech Synthesis, arXiv 2008.01160)

    E d(x, y) - E d(y, y') / 2,     y, y' of the same code with noise of their own,

is least where the mels of y have the law of those of x, and then E d(y, y'), the spread, is E d(x, y).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from meanflow_audio_codec.evaluators.metrics import CLAMP, MEL_SCALES, hann, mel_filterbank


def log_mels(x: Float[Array, "b s"], sample_rate: int) -> list[Float[Array, "b _l _m"]]:
    """Return log10 of DAC's mels, at least `CLAMP`, for each of its 7 windows.

    Gradients vanish below, as at a magnitude of exactly 0.
    """
    mels = [magnitudes(x, window) @ mel_filterbank(sample_rate, window, num) for window, num in MEL_SCALES]
    return [jnp.log10(jnp.maximum(mel, CLAMP)) for mel in mels]


def mel_distance(x: list[Float[Array, "b _l _m"]], y: list[Float[Array, "b _l _m"]]) -> Float[Array, "b"]:
    """Return DAC's mel distance of each clip from its `log_mels`: the sum over windows of mean |X - Y|."""
    return sum(jnp.mean(jnp.abs(a - b), axis=(1, 2)) for a, b in zip(x, y, strict=True))


def magnitudes(audio: Float[Array, "b s"], window_length: int) -> Float[Array, "b l f"]:
    """Return |STFT| with a periodic Hann window centred on multiples of a quarter of it."""
    hop = window_length // 4
    padded = jnp.pad(audio, ((0, 0), (window_length // 2, window_length // 2)), mode="reflect")
    num_frames = 1 + audio.shape[1] // hop
    quarters = padded[:, : (num_frames + 3) * hop].reshape(len(audio), num_frames + 3, hop)
    frames = jnp.concatenate([quarters[:, i : i + num_frames] for i in range(4)], axis=-1)
    spectrum = jnp.fft.rfft(frames * hann(window_length))
    power = spectrum.real**2 + spectrum.imag**2
    # The root's slope at 0 is infinite.
    return jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1.0)), 0.0)
