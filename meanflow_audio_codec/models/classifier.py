"""A small convolutional classifier of 28 x 28 images: its features score the samples of MNIST's generative models."""

from flax import linen as nn
from jaxtyping import Array, Float

from meanflow_audio_codec.models.codec import NUM_CLASSES


class Classifier(nn.Module):
    """Two convolutions with pooling and two dense layers. The fields are the schema of `config.model`.

    Returns the logits and the penultimate features, whose distribution FID and KID compare.
    """

    width: int = 32
    num_features: int = 64

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 1"]) -> tuple[Float[Array, "b n"], Float[Array, "b f"]]:
        y = image
        for width in (self.width, 2 * self.width):
            y = nn.relu(nn.LayerNorm()(nn.Conv(width, (5, 5))(y)))
            y = nn.max_pool(y, (2, 2), strides=(2, 2))
        features = nn.relu(nn.Dense(self.num_features)(y.reshape(len(y), -1)))
        return nn.Dense(NUM_CLASSES)(features), features
