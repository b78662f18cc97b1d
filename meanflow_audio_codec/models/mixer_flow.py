"""MLP-Mixer decoder: one dense map from frames to frames, shared by all channels, in windows of `window` frames.

Tolstikhin et al., MLP-Mixer (arXiv 2105.01601), whose token mixing fixes the number of tokens. Here it is confined to
windows on a grid from frame 0 that is shifted by half a window in every other block, as in Swin (arXiv 2103.14030): any
length will do, and what a frame sees is bounded. Conditioning by adaLN-zero (arXiv 2212.09748).
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from meanflow_audio_codec.models import layers


class TokenMixing(nn.Module):
    """Norm, modulation, MLP over the frames of each window, gated residual; zeros stand for frames beyond the ends.

    The zeros come after norm and modulation: they add nothing to the MLP's sums, whatever the conditioning. The grid
    begins `offset` frames before frame 0.
    """

    window: int
    offset: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, y: Float[Array, "b l d"], film: Float[Array, "b l w"]) -> Float[Array, "b l d"]:
        b, l, d = y.shape
        scale, shift, gate = layers.modulation(film, d, 3)
        mixed = layers.modulated_norm(y, scale, shift)
        missing = -(l + self.offset) % self.window
        mixed = jnp.pad(mixed, ((0, 0), (self.offset, missing), (0, 0)))
        mixed = mixed.reshape(b, -1, self.window, d).swapaxes(2, 3)
        mixed = nn.gelu(nn.Dense(2 * self.window, dtype=self.dtype)(mixed))
        mixed = nn.Dense(self.window, dtype=self.dtype)(mixed)
        mixed = mixed.swapaxes(2, 3).reshape(b, -1, d)[:, self.offset : self.offset + l]
        return y + gate * mixed.astype(jnp.float32)


class MixerFlow(layers.Backbone):
    """Each output sees at most `depth * window` frames.

    A frame's place in its window matters: a chunk equals the whole only if it begins at a multiple of `window`.
    """

    @property
    def context(self) -> int:
        return self.depth * self.window

    def block(self, i: int, y: Float[Array, "b l d"], film: Float[Array, "b l w"]) -> Float[Array, "b l d"]:
        y = TokenMixing(self.window, i % 2 * (self.window // 2), self.dtype)(y, film)
        return layers.Block(kernel_size=1, dtype=self.dtype)(y, film)
