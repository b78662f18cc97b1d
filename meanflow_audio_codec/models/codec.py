"""The codec network: encoder, quantizer, upsampler, and a flow decoder that sees the code in every frame.

    x [b, l, f] -> encode -> codes [b, l / downsample, k] -> upsample -> cond [b, l, d]      once per clip
    z, t, r, cond -> flow -> u [b, l, f]                                                      once per evaluation

In place of the code the decoder may be given a class label, or nothing: `conditioning` "label" and "none" make it the
generator by which the objectives are compared on images.

The decoder predicts, by `output`,
    "u"   the average velocity itself (MeanFlow, arXiv 2505.13447), or
    "x"   the clean tokens x_hat, from which u = (z - x_hat) / max(t, 0.05) (pixel MeanFlow, arXiv 2601.22158).
With "x" a coefficient that is nearly always zero, as most high MDCT bins are, is easy: the net need not synthesise the
noise that u contains.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models import layers, quantizers
from meanflow_audio_codec.models.conv_flow import ConvFlow
from meanflow_audio_codec.models.mixer_flow import MixerFlow
from meanflow_audio_codec.models.mlp_flow import MlpFlow
from meanflow_audio_codec.models.transformer_flow import TransformerFlow

BACKBONES = {"conv": ConvFlow, "mlp": MlpFlow, "mixer": MixerFlow, "transformer": TransformerFlow}

# Width, blocks of the decoder, blocks of encoder and upsampler each. Beside them millions of parameters with 256
# features and 64 latents, by backbone: the decoder's / the whole model's.
VARIANTS = {  #                                      conv          mlp           mixer         transformer
    "mu": dict(width=32, depth=1, side_depth=1),  # for tests
    "N": dict(width=64, depth=4, side_depth=2),  #    0.26 / 0.59   0.26 / 0.59   0.33 / 0.65   0.31 / 0.64
    "Ti": dict(width=128, depth=4, side_depth=2),  #  0.77 / 1.58   0.76 / 1.58   0.88 / 1.69   0.86 / 1.68
    "S": dict(width=256, depth=6, side_depth=3),  #   3.74 / 7.47   3.73 / 7.46   4.05 / 7.78   4.03 / 7.76
    "B": dict(width=512, depth=12, side_depth=4),  #  27.1 / 45.4   27.0 / 45.4   28.3 / 46.6   28.3 / 46.6
}


NUM_CLASSES = 10  # of labels: MNIST's digits


class Encoder(nn.Module):
    """Tokens to latents: half of the blocks before, half after joining `downsample` frames to one."""

    width: int
    depth: int
    downsample: int
    latent_dim: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: Float[Array, "b l f"]) -> Float[Array, "b m k"]:
        # Not linear, so that a width below the features still sees the level of every bin.
        y = nn.Dense(self.width)(nn.gelu(nn.Dense(2 * x.shape[-1], dtype=self.dtype)(x)))
        for _ in range(self.depth // 2):
            y = layers.Block(dtype=self.dtype)(y)
        b, l, d = y.shape
        y = nn.Dense(self.width)(y.reshape(b, l // self.downsample, self.downsample * d))
        for _ in range(self.depth - self.depth // 2):
            y = layers.Block(dtype=self.dtype)(y)
        return nn.Dense(self.latent_dim)(nn.LayerNorm(epsilon=1e-5)(y))


class Upsampler(nn.Module):
    """Quantized latents to a conditioning vector for every frame; the encoder's mirror image."""

    width: int
    depth: int
    upsample: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, latents: Float[Array, "b m k"]) -> Float[Array, "b l d"]:
        y = nn.Dense(self.width)(latents)
        for _ in range(self.depth - self.depth // 2):
            y = layers.Block(dtype=self.dtype)(y)
        b, m, _ = y.shape
        y = nn.Dense(self.upsample * self.width)(y).reshape(b, m * self.upsample, self.width)
        for _ in range(self.depth // 2):
            y = layers.Block(dtype=self.dtype)(y)
        return nn.LayerNorm(epsilon=1e-5)(y)


class CodecModel(nn.Module):
    """Encoder, quantizer, upsampler and flow decoder. The fields are the schema of `config.model`."""

    features: int
    variant: str = "Ti"
    backbone: str = "conv"
    output: str = "x"
    conditioning: str = "latent"
    quantizer: str = "fsq"
    fsq_levels: int = 4
    latent_dim: int = 64
    downsample: int = 2
    times: str = "t_h"
    time_scale: float = 1.0
    velocity_head: bool = False
    dtype: str = "float32"

    def setup(self):
        for field, value, known in (
            ("variant", self.variant, VARIANTS),
            ("backbone", self.backbone, BACKBONES),
            ("output", self.output, ("x", "u")),
            ("conditioning", self.conditioning, ("latent", "label", "none")),
            ("times", self.times, ("t_h", "h")),
            ("quantizer", self.quantizer, ("fsq", "none")),
            ("dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise InputError(f"model.{field} is {value!r}; choose one of {', '.join(known)}")
        for field, least in (("fsq_levels", 2), ("latent_dim", 1), ("downsample", 1)):
            if getattr(self, field) < least:
                raise InputError(f"model.{field} is {getattr(self, field)}; choose {least} or more")
        size, dtype = VARIANTS[self.variant], jnp.dtype(self.dtype)
        width, side = size["width"], size["side_depth"]
        if self.conditioning == "latent":
            self.encoder = Encoder(width, side, self.downsample, self.latent_dim, dtype)
        elif self.conditioning == "label":
            self.label_embedding = nn.Embed(NUM_CLASSES, self.latent_dim)
        self.upsampler = Upsampler(width, side, self.downsample, dtype)
        backbone = BACKBONES[self.backbone]
        self.decoder = backbone(width, size["depth"], self.times, self.time_scale, dtype)

    def encode(self, x: Float[Array, "b l f"]) -> tuple[Float[Array, "b m k"], Int[Array, "b m k"], dict[str, Any]]:
        """Return quantized latents, their codes and the quantizer's metrics; m = l / downsample."""
        latents = self.encoder(x)
        if self.quantizer == "none":
            return latents, jnp.zeros(latents.shape, jnp.int32), {}
        return quantizers.fsq(latents, self.fsq_levels)

    def condition(
        self, x: Float[Array, "b l f"], label: Int[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b l d"], dict[str, Any]]:
        """Return what the decoder may know: the upsampled code of x, or its label, with the quantizer's metrics."""
        metrics = {}
        if self.conditioning == "latent":
            latents, _, metrics = self.encode(x)
        elif self.conditioning == "label":
            if label is None:
                raise InputError("model.conditioning is 'label', but this data has no labels; choose latent or none")
            latents = self.label_embedding(label)[:, None]
        else:
            latents = jnp.zeros((len(x), 1, self.latent_dim))
        # One vector serves all latents of a clip; what tells its frames apart is the upsampler.
        latents = jnp.broadcast_to(latents, (len(x), x.shape[1] // self.downsample, self.latent_dim))
        return self.upsampler(latents), metrics

    def flow(
        self,
        z: Float[Array, "b l f"],
        t: Float[Array, "b"],
        r: Float[Array, "b"],
        cond: Float[Array, "b l d"],
    ) -> Float[Array, "b l f"]:
        """Return the average velocity u(z_t, t, r | cond) over [r, t], t = 1 being noise and t = 0 data."""
        return self._as_velocity(self.decoder(z, t, t - r, cond), z, t)

    def velocity(
        self, z: Float[Array, "b l f"], t: Float[Array, "b"], cond: Float[Array, "b l d"]
    ) -> Float[Array, "b l f"]:
        """Return the velocity v(z_t, t | cond) of the auxiliary head, which `velocity_head` adds for training."""
        return self._as_velocity(self.decoder(z, t, jnp.zeros_like(t), cond, velocity=True), z, t)

    def _as_velocity(self, raw: Array, z: Array, t: Array) -> Array:
        if self.output == "u":
            return raw
        # Not clip(t, 0.05, 1), whose derivative at its bound, where one-step rows lie, is half the right one.
        return (z - raw) / jnp.maximum(t, 0.05)[:, None, None]

    def __call__(self, x: Float[Array, "b l f"], label: Int[Array, "b"] | None = None) -> Float[Array, "b l f"]:
        """Touch every parameter once, for initialisation."""
        cond, _ = self.condition(x, label)
        ones = jnp.ones(x.shape[0])
        if self.velocity_head:
            self.velocity(x, ones, cond)
        return self.flow(jnp.zeros_like(x), ones, jnp.zeros_like(ones), cond)
