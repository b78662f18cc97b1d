"""ConvNeXt decoder: every block sees `kernel_size` frames, so the decoder chooses phases that fit their neighbours.

Liu et al., A ConvNet for the 2020s (arXiv 2201.03545), in one dimension; conditioning by adaLN-zero (arXiv 2212.09748).
"""

from jaxtyping import Array, Float

from meanflow_audio_codec.models import layers


class ConvFlow(layers.Backbone):
    """Each output sees `depth * (kernel_size - 1) + 1` frames."""

    kernel_size: int = 7

    @property
    def context(self) -> int:
        return self.depth * (self.kernel_size // 2)

    def block(self, i: int, y: Float[Array, "b l d"], film: Float[Array, "b l w"]) -> Float[Array, "b l d"]:
        return layers.Block(self.kernel_size, self.dtype)(y, film)
