"""Transformer decoder: every block attends to the frames within `reach`, by what they hold and how far they are.

Peebles and Xie, DiT (arXiv 2212.09748): adaLN-zero. Rotary positions (Su et al., arXiv 2104.09864) tell distances
alone, so that no frame is special; norms of queries and keys (Dehghani et al., arXiv 2302.05442) keep scores bounded.
An MLP of twice the width leaves a block with the 8 d^2 weights of a ConvNeXt block.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from meanflow_audio_codec.models import layers

HEAD_WIDTH = 32


class BandAttention(nn.Module):
    """Norm, modulation, attention to the frames at most `reach` away, gated residual.

    Frames are cut into blocks of `reach`, whose band lies within the block and its two neighbours: memory grows with
    the length, not with its square, and positions stay small and exact anywhere in a file. Written out in plain
    operations, for fused attention has no forward-mode derivative. Scores are float32.
    """

    reach: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, y: Float[Array, "b l d"], film: Float[Array, "b l w"]) -> Float[Array, "b l d"]:
        b, l, d = y.shape
        heads = max(1, d // HEAD_WIDTH)
        scale, shift, gate = layers.modulation(film, d, 3)
        qkv = nn.Dense(3 * d, dtype=self.dtype)(layers.modulated_norm(y, scale, shift))
        qkv = jnp.pad(qkv, ((0, 0), (0, -l % self.reach), (0, 0)))
        q, k, v = jnp.moveaxis(qkv.reshape(b, -1, self.reach, 3, heads, d // heads), 3, 0)
        q = nn.RMSNorm(epsilon=1e-5)(q.astype(jnp.float32))
        k = nn.RMSNorm(epsilon=1e-5)(k.astype(jnp.float32))
        queries, keys = jnp.arange(self.reach), jnp.arange(-self.reach, 2 * self.reach)  # frames from the block's first
        q = _rotate(q, queries, self.reach)
        k = _rotate(_beside(k), keys, self.reach)
        scores = jnp.einsum("bnqhe,bnkhe->bnhqk", q, k) * (d // heads) ** -0.5
        frames = self.reach * jnp.arange(q.shape[1])[:, None] + keys
        in_band = jnp.abs(queries[:, None] - keys) <= self.reach
        seen = in_band & ((frames >= 0) & (frames < l))[:, None]
        # Not -inf: the queries that only fill the last block may see no frame, and NaN would reach the gradient.
        scores = jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bnhqk,bnkhe->bnqhe", weights, _beside(v)).reshape(b, -1, d)[:, :l]
        return y + gate * nn.Dense(d, dtype=self.dtype)(mixed).astype(jnp.float32)


def _rotate(y: Float[Array, "b n p h e"], positions: Array, reach: int) -> Float[Array, "b n p h e"]:
    """Rotate the pairs (i, i + e/2) of each head by 1 to 1 / reach radians a frame.

    Slower ones, as language models use, would not tell apart the frames within reach.
    """
    angles = positions[:, None, None] * jnp.geomspace(1.0, 1.0 / reach, y.shape[-1] // 2)
    first, second = jnp.split(y, 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _beside(blocks: Float[Array, "b n p h e"]) -> Float[Array, "b n 3*p h e"]:
    """Each block between its neighbours; zeros beyond the ends."""
    padded = jnp.pad(blocks, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([padded[:, :-2], blocks, padded[:, 2:]], axis=2)


class TransformerFlow(layers.Backbone):
    """Each output sees `2 * depth * window + 1` frames."""

    @property
    def context(self) -> int:
        return self.depth * self.window

    def block(self, i: int, y: Float[Array, "b l d"], film: Float[Array, "b l w"]) -> Float[Array, "b l d"]:
        y = BandAttention(self.window, self.dtype)(y, film)
        return layers.Block(kernel_size=1, dtype=self.dtype, mlp_ratio=2)(y, film)
