"""ConvNeXt decoder: every block sees `kernel_size` frames, so the decoder chooses phases that fit their neighbours.

Liu et al., A ConvNet for the 2020s (arXiv 2201.03545), in one dimension; conditioning by adaLN-zero (arXiv 2212.09748).
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from meanflow_audio_codec.models import layers


class ConvFlow(nn.Module):
    """Map noised tokens, times and conditioning to tokens; each output sees `depth * (kernel_size - 1) + 1` frames."""

    width: int
    depth: int
    kernel_size: int = 7
    time_scale: float = 1.0
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b l f"],
        t: Float[Array, "b"],
        h: Float[Array, "b"],
        cond: Float[Array, "b l d"],
    ) -> Float[Array, "b l f"]:
        film = layers.FilmEmbedding(self.time_scale)(t, h, cond)
        y = nn.Dense(self.width)(z) + nn.Dense(self.width, use_bias=False)(cond)
        for _ in range(self.depth):
            y = layers.Block(self.kernel_size, self.dtype)(y, film)
        return layers.Head(z.shape[-1])(y, film, z)
