"""The codec network: encoder, quantizer, upsampler, and a flow decoder that sees the code in every frame.

    x [b, l, f] -> encode -> codes [b, l / downsample, q] -> upsample -> cond [b, l, d]      once per clip
    z, t, r, cond -> flow -> u [b, l, f]                                                      once per evaluation

The quantizer "gain_shape" is a code of another kind (gain_shape.py): the levels of the bands, then in which cell each
coefficient lies. It needs no network, and a latent is what it says of its tokens. The flow is that of what the code
leaves open, divided by the deviation that it has: the noise that decoding starts from has the right level in every
coefficient before anything is learned.

In place of the code the decoder may be given a class label, or nothing: `conditioning` "label" and "none" make it the
generator by which the objectives are compared on images.

The decoder predicts, by `output`,
    "u"   the average velocity itself (MeanFlow, arXiv 2505.13447), or
    "x"   the clean tokens x_hat, from which u = (z - x_hat) / max(t, 0.05) (pixel MeanFlow, arXiv 2601.22158).
With "x" a coefficient that is nearly always zero, as most high MDCT bins are, is easy: the net need not synthesise the
noise that u contains.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models import layers, quantizers
from meanflow_audio_codec.models.conv_flow import ConvFlow
from meanflow_audio_codec.models.gain_shape import CELLS, STEPS, GainShape
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


class FrameNet(nn.Module):
    """What frames know, seen with their neighbours: the upsampler of gain and shape."""

    width: int
    depth: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: Float[Array, "b l n"]) -> Float[Array, "b l d"]:
        y = nn.Dense(self.width)(x)
        for _ in range(self.depth):
            y = layers.Block(dtype=self.dtype)(y)
        return nn.LayerNorm(epsilon=1e-5)(y)


class CodecModel(nn.Module):
    """Encoder, quantizer, upsampler and flow decoder. The fields are the schema of `config.model`.

    With the quantizer "gain_shape" the flow's data are `to_flow(x, cond)`: x but for what the code says of it. A
    latent, and the end of `cond`, are then what is known of the coefficients over their gain, the deviation that this
    leaves, and the levels. Its codes are the step of the cells' width, those of the levels, and each coefficient's
    cell, of 256 values each; to be entropy coded.

    How much of a code is kept, `kept` below, is a number of codebooks, the first ones, or with "gain_shape" how many
    bits its latents take on the mean. One number for all clips, or one for each; None: all.
    """

    features: int
    bands: tuple[int, ...] = ()  # of each feature, as the tokenizer says; gain_shape needs them
    variant: str = "Ti"
    backbone: str = "conv"
    output: str = "x"
    conditioning: str = "latent"
    quantizer: str = "fsq"
    fsq_levels: int = 4
    num_quantizers: int = 8
    codebook_size: int = 1024
    quantizer_dropout: float = 0.0
    latent_dim: int = 64
    downsample: int = 2
    level_stages: int = 12  # of gain_shape, of 8 bits a latent each
    max_bits: int = 1024  # of gain_shape, a latent, the levels' included
    window: int = 32  # frames that a block of the mixer mixes; to each side, that one of the transformer attends to
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
            ("quantizer", self.quantizer, ("fsq", "rvq", "gain_shape", "none")),
            ("dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise InputError(f"model.{field} is {value!r}; choose one of {', '.join(known)}")
        least = {"fsq_levels": 2, "num_quantizers": 1, "codebook_size": 2}
        least |= {"latent_dim": 1, "downsample": 1, "level_stages": 1, "window": 2}
        for field, bound in least.items():
            if getattr(self, field) < bound:
                raise InputError(f"model.{field} is {getattr(self, field)}; choose {bound} or more")
        if not 0 <= self.quantizer_dropout <= 1:
            raise InputError(f"model.quantizer_dropout is {self.quantizer_dropout}; choose a share from 0 to 1")
        if self.quantizer == "none" and self.quantizer_dropout:
            raise InputError("model.quantizer_dropout: quantizer 'none' has no codebooks to drop; choose fsq or rvq")
        if self.has_levels:
            self._check_levels()
            dim = self.downsample * self.gain_shape.num_bands
            self.level_quantizer = quantizers.LevelQuantizer(self.level_stages, dim)
        size, dtype = VARIANTS[self.variant], jnp.dtype(self.dtype)
        width, side = size["width"], size["side_depth"]
        if self.has_levels:
            self.upsampler = FrameNet(width, side, dtype)
        else:
            self.upsampler = Upsampler(width, side, self.downsample, dtype)
        if self.conditioning == "latent":
            if not self.has_levels:
                self.encoder = Encoder(width, side, self.downsample, self.latent_dim, dtype)
            if self.quantizer == "rvq":
                self.rvq = quantizers.ResidualQuantizer(self.num_quantizers, self.codebook_size, self.latent_dim)
        elif self.conditioning == "label":
            self.label_embedding = nn.Embed(NUM_CLASSES, self.latent_dim)
        backbone = BACKBONES[self.backbone]
        self.decoder = backbone(width, size["depth"], self.window, self.times, self.time_scale, dtype)

    @property
    def has_levels(self) -> bool:
        """Whether the code is that of gain and shape."""
        return self.quantizer == "gain_shape"

    @property
    def num_codebooks(self) -> int:
        """Integers in the code of a latent: one for each dimension (fsq), quantizer (rvq), or all of gain and shape."""
        shape = 1 + self.level_stages + self.downsample * self.features
        return {"fsq": self.latent_dim, "rvq": self.num_quantizers, "gain_shape": shape, "none": 0}[self.quantizer]

    @property
    def cardinality(self) -> int:
        """Values that each of them may have: 0 to cardinality - 1."""
        return {"fsq": self.fsq_levels, "rvq": self.codebook_size, "gain_shape": STEPS, "none": 1}[self.quantizer]

    @property
    def level_bits(self) -> int:
        """Bits that the levels of gain and shape take: the least that a latent can do with."""
        return 8 * self.level_stages

    @property
    def kept_range(self) -> tuple[int, int]:
        """Bounds of `kept`."""
        return (self.level_bits, self.max_bits) if self.has_levels else (1, self.num_codebooks)

    @property
    def bits(self) -> float:
        """Bits that a latent takes at most, before entropy coding where its codebooks are of one size."""
        return float(self.max_bits) if self.has_levels else self.num_codebooks * math.log2(self.cardinality)

    @property
    def gain_shape(self) -> GainShape:
        """What the code of gain and shape says of the coefficients."""
        return GainShape(self.bands, self.downsample)

    def _check_levels(self) -> None:
        if self.conditioning != "latent":
            raise InputError("model.quantizer: gain_shape is a code; choose conditioning latent")
        if self.max_bits <= self.level_bits:
            raise InputError(
                f"model.max_bits is {self.max_bits}, which {self.level_stages} level_stages take; choose more than"
                f" {self.level_bits}"
            )

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """How much quantizer dropout keeps: up to 8 even steps, of rvq each codebook, of gain_shape also the levels."""
        least, most = self.kept_range if self.has_levels else (0, self.num_codebooks)
        steps = most if self.quantizer == "rvq" else min(8, most)
        return tuple(least - (-i * (most - least) // steps) for i in range(0 if self.has_levels else 1, steps + 1))

    @property
    def _side_context(self) -> int:
        """Tokens to each side that the blocks of the upsampler see, and those of an encoder."""
        side = VARIANTS[self.variant]["side_depth"]
        before, after = (side, 0) if self.has_levels else (side // 2, side - side // 2)
        return layers.Block.kernel_size // 2 * (before + self.downsample * after)

    @property
    def encoder_context(self) -> int:
        """Tokens to each side that a code depends on."""
        return self.downsample - 1 + (0 if self.has_levels else self._side_context)

    def decoder_context(self, nfe: int) -> int:
        """Tokens to each side whose codes and noise a token depends on, decoded by `nfe` evaluations."""
        size = VARIANTS[self.variant]
        decoder = BACKBONES[self.backbone](size["width"], size["depth"], self.window, parent=None)
        return self.downsample - 1 + self._side_context + nfe * decoder.context

    def encode(
        self, x: Float[Array, "b l f"], kept: quantizers.Kept = None
    ) -> tuple[Float[Array, "b m k"], Int[Array, "b m q"], dict[str, Any]]:
        """Return quantized latents, their codes and the quantizer's metrics; m = l / downsample.

        Of fsq and rvq the codes are of all codebooks, also where the latents know `kept` of them.
        """
        self._check_kept(kept)
        if not self.has_levels:
            return self._encode_latents(x, kept)
        level_codes = self.level_codes(x)
        levels = self.level_quantizer.dequantize(level_codes)
        bits = jnp.broadcast_to(jnp.asarray(self.max_bits if kept is None else kept), (len(x),))
        step = self.gain_shape.step_for(levels, bits - self.level_bits)
        q = self.gain_shape.quantize(x, levels, step)
        metrics = quantizers.code_metrics(level_codes, quantizers.LEVEL_ENTRIES)
        bits = self.level_stages * metrics["bits"] + jnp.mean(self.gain_shape.bits(levels, step))
        metrics["bits"] = bits / self.num_codebooks
        return self._shape_latents(q, levels, step), self.join_codes(step, level_codes, q), metrics

    def _encode_latents(self, x: Float[Array, "b l f"], kept: quantizers.Kept) -> quantizers.Quantized:
        latents = self.encoder(x)
        if self.quantizer == "none":
            return latents, jnp.zeros((*latents.shape[:2], 0), jnp.int32), {}
        if self.quantizer == "rvq":
            return self.rvq(latents, kept)
        return quantizers.fsq(latents, self.fsq_levels, kept)

    def level_codes(self, x: Float[Array, "b l f"]) -> Int[Array, "b m s"]:
        """Return the codes of the levels of gain and shape."""
        return self.level_quantizer(self.gain_shape.levels(x))

    def dequantize_levels(self, level_codes: Int[Array, "b m s"]) -> Float[Array, "b m n"]:
        """Return the levels that the codes stand for."""
        return self.level_quantizer.dequantize(level_codes)

    def join_codes(
        self, step: Int[Array, "b m"], level_codes: Int[Array, "b m s"], q: Int[Array, "b l f"]
    ) -> Int[Array, "b m q"]:
        """Return the step, the levels' codes and the cells as one code."""
        return jnp.concatenate([step[..., None], level_codes, q.reshape(*step.shape, -1) + CELLS - 1], axis=-1)

    def dequantize(self, codes: Int[Array, "b m q"]) -> Float[Array, "b m k"]:
        """Return the quantized latents of `codes`; of fsq and rvq the first codebooks will do."""
        if self.quantizer == "none":
            raise InputError("model.quantizer is 'none': there are no codes to decode; train with another")
        if self.has_levels:
            step, level_codes, q = jnp.split(codes, [1, 1 + self.level_stages], axis=-1)
            q = q.reshape(len(codes), -1, self.features) - (CELLS - 1)
            return self._shape_latents(q, self.level_quantizer.dequantize(level_codes), step[..., 0])
        if self.quantizer == "rvq":
            return self.rvq.dequantize(codes)
        unsent = self.latent_dim - codes.shape[-1]
        return jnp.pad(quantizers.fsq_dequantize(codes, self.fsq_levels), ((0, 0), (0, 0), (0, unsent)))

    def _shape_latents(
        self, q: Int[Array, "b l f"], levels: Float[Array, "b m n"], step: Int[Array, "b m"]
    ) -> Float[Array, "b m k"]:
        parts = (*self.gain_shape.known(q, levels, step), levels)
        return jnp.concatenate([a.reshape(*levels.shape[:2], -1) for a in parts], axis=-1)

    def condition_on(self, latents: Float[Array, "b m k"]) -> Float[Array, "b l d"]:
        """Return what quantized latents tell the decoder; l = m * downsample."""
        if not self.has_levels:
            return self.upsampler(latents)
        b, m, _ = latents.shape
        size = self.downsample * self.features
        said = jnp.split(latents, [size, 2 * size], axis=-1)
        said = jnp.concatenate([a.reshape(b, m * self.downsample, -1) for a in said], axis=-1)
        return jnp.concatenate([self.upsampler(said), said], axis=-1)

    def to_flow(self, x: Float[Array, "b l f"], cond: Float[Array, "b l d"]) -> Float[Array, "b l f"]:
        """Return the flow's data w: x itself, or with gain_shape what the code leaves open, over its deviation."""
        if not self.has_levels:
            return x
        known, deviation, gain = self._said(cond)
        return (x / gain - known) / deviation

    def from_flow(self, w: Float[Array, "b l f"], cond: Float[Array, "b l d"]) -> Float[Array, "b l f"]:
        """Return x, the inverse of `to_flow`."""
        if not self.has_levels:
            return w
        known, deviation, gain = self._said(cond)
        return gain * (known + deviation * w)

    def _said(self, cond: Float[Array, "b l d"]) -> list[Float[Array, "b l f"]]:
        """Return what the end of `cond` says of each feature: what of x / gain is known, the deviation, the gain."""
        ends = [-self.gain_shape.num_bands - i * self.features for i in (2, 1, 0)]
        _, known, deviation, levels = jnp.split(cond, [cond.shape[-1] + end for end in ends], axis=-1)
        return [known, deviation, self.gain_shape.gain(levels)]

    def condition(
        self, x: Float[Array, "b l f"], label: Int[Array, "b"] | None = None, kept: quantizers.Kept = None
    ) -> tuple[Float[Array, "b l d"], dict[str, Any]]:
        """Return what the decoder may know: the upsampled code of x, or its label, with the quantizer's metrics."""
        metrics = {}
        if self.conditioning == "latent":
            latents, _, metrics = self.encode(x, kept)
        elif self.conditioning == "label":
            if label is None:
                raise InputError("model.conditioning is 'label', but this data has no labels; choose latent or none")
            latents = self.label_embedding(label)[:, None]
        else:
            latents = jnp.zeros((len(x), 1, self.latent_dim))
        # One vector serves all latents of a clip; what tells its frames apart is the upsampler.
        latents = jnp.broadcast_to(latents, (len(x), x.shape[1] // self.downsample, latents.shape[-1]))
        return self.condition_on(latents), metrics

    def _check_kept(self, kept: quantizers.Kept) -> None:
        """Refuse a number that the model does not have, where it is known before the program runs."""
        least, most = self.kept_range
        if isinstance(kept, int) and not least <= kept <= most:
            what = "bits a latent" if self.has_levels else "codebooks"
            raise InputError(f"kept={kept}: this model has {least} to {most} {what}; choose a number in between")

    def flow(
        self,
        z: Float[Array, "b l f"],
        t: Float[Array, "b"],
        r: Float[Array, "b"],
        cond: Float[Array, "b l d"],
    ) -> Float[Array, "b l f"]:
        """Return the average velocity u(z_t, t, r | cond) over [r, t], t = 1 being noise and t = 0 data."""
        return self._as_velocity(z, t, t - r, cond)

    def velocity(
        self, z: Float[Array, "b l f"], t: Float[Array, "b"], cond: Float[Array, "b l d"]
    ) -> Float[Array, "b l f"]:
        """Return the velocity v(z_t, t | cond) of the auxiliary head, which `velocity_head` adds for training."""
        return self._as_velocity(z, t, jnp.zeros_like(t), cond, velocity=True)

    def _as_velocity(self, z: Array, t: Array, h: Array, cond: Array, velocity: bool = False) -> Array:
        raw = self.decoder(z, t, h, cond, velocity)
        if self.output == "u":
            return raw
        # Not clip(t, 0.05, 1), whose derivative at its bound, where one-step rows lie, is half the right one.
        return (z - raw) / jnp.maximum(t[:, None, None], 0.05)

    def __call__(self, x: Float[Array, "b l f"], label: Int[Array, "b"] | None = None) -> Float[Array, "b l f"]:
        """Touch every parameter once, for initialisation."""
        cond, _ = self.condition(x, label)
        ones = jnp.ones(x.shape[0])
        if self.velocity_head:
            self.velocity(x, ones, cond)
        return self.flow(jnp.zeros_like(x), ones, jnp.zeros_like(ones), cond)
