"""Quantizers: `latents [b, m, k] -> (quantized [b, m, k], codes [b, m, k] int32, metrics)`, gradients straight through.

FSQ: Mentzer et al., Finite Scalar Quantization (arXiv 2309.15505). Each of k dimensions is squashed to (-1, 1) and
rounded to one of `levels` equidistant values, ends included: m latents a second cost `m * k * log2(levels)` bits a
second, and there is no codebook whose entries could go unused.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def fsq(
    latents: Float[Array, "b m k"], levels: int
) -> tuple[Float[Array, "b m k"], Int[Array, "b m k"], dict[str, Float[Array, ""]]]:
    """Round every dimension to `levels` values in [-1, 1].

    Returns the quantized latents, their indices 0..levels-1, and metrics: `perplexity` (mean over dimensions of
    2^entropy of its indices in this batch; at most `levels`) and `bits`, the mean entropy of an index in bits.
    """
    unit = (jnp.tanh(latents) + 1) / 2 * (levels - 1)
    codes = jnp.round(unit)
    straight_through = unit + jax.lax.stop_gradient(codes - unit)
    codes = codes.astype(jnp.int32)
    usage = jax.nn.one_hot(codes, levels).mean(axis=(0, 1))
    entropy = -jnp.sum(jax.scipy.special.xlogy(usage, usage), axis=-1) / jnp.log(2.0)
    metrics = {"perplexity": jnp.mean(2**entropy), "bits": jnp.mean(entropy)}
    return straight_through * 2 / (levels - 1) - 1, codes, metrics


def fsq_dequantize(codes: Int[Array, "b m k"], levels: int) -> Float[Array, "b m k"]:
    """Return the values in [-1, 1] that `codes` stand for."""
    return codes.astype(jnp.float32) * 2 / (levels - 1) - 1
