"""Quantizers: `latents [b, m, k] -> (quantized [b, m, k], codes [b, m, q] int32, metrics)`, gradients straight through.

FSQ: Mentzer et al., Finite Scalar Quantization (arXiv 2309.15505). Each of k dimensions is squashed to (-1, 1) and
rounded to one of `levels` equidistant values, ends included: m latents a second cost `m * k * log2(levels)` bits a
second, and there is no codebook whose entries could go unused. Each dimension counts as a codebook, q = k.

RVQ: residual vector quantization with low-dimensional codebooks as in DAC (Kumar et al., arXiv 2306.06546): each of q
codebooks names what those before it have left over, in a space of 8 dimensions with projections of its own. Unlike in
DAC vectors and entries have length 1 (Yu et al., arXiv 2110.04627), and the commitment and codebook losses are means
over the codebooks, not sums. At first the decoder is deaf to the code, for its gates are zero, and its loss, divided by
itself, has small gradients: a stronger pull collapses all vectors onto one entry before the decoder listens.

Several bitrates from one model: both take `num_codebooks`, how many are kept, the first ones; one number for all
clips, or one for each. The codes are always those of all codebooks; of the kept ones they do not depend on how many are
kept. Without the others a dimension of FSQ is 0, which says "not sent" (an even number of levels has no 0), and RVQ
sums fewer terms. Training on a random number of them (`draw_kept`) is quantizer dropout.

Levels, the RMS of each band in dB or nepers, are worth a quantizer of their own (`LevelQuantizer`), as in codecs since
CELT (RFC 6716): noise of the right level in every band and frame is half of the way to the sound, and a network that
has to find that out needs thousands of steps for it. Theirs is an RVQ by plain distance, whose entries are fitted to
training data before the first step and stay. The nearest entry of each stage rarely makes the nearest sum: the best
`LEVEL_PATHS` sums are followed from stage to stage. The entries are multiples of `LEVEL_STEP`, so that their sums are
exact in any order.

Metrics are scalars over the batch and all codebooks: `bits` and `perplexity`, the mean over codebooks of the entropy H
of an index and of 2^H; `usage`, the share of the entries that occur; of RVQ also `loss`, to be added to the training
loss.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Kept = int | Int[Array, "b"] | Int[Array, ""] | None
Quantized = tuple[Float[Array, "b m k"], Int[Array, "b m q"], dict[str, Float[Array, ""]]]

LEVEL_ENTRIES, LEVEL_STEP, LEVEL_PATHS = 256, 2.0**-8, 4
COMMITMENT_WEIGHT, CODEBOOK_WEIGHT = 0.25, 1.0  # DAC's


def fsq(latents: Float[Array, "b m k"], levels: int, num_codebooks: Kept = None) -> Quantized:
    """Round every dimension to `levels` values in [-1, 1], and those that are not kept to 0."""
    unit = (jnp.tanh(latents) + 1) / 2 * (levels - 1)
    codes = jnp.round(unit).astype(jnp.int32)
    quantized = _straight_through(fsq_dequantize(codes, levels), unit * 2 / (levels - 1) - 1)
    if num_codebooks is not None:
        quantized = jnp.where(first_kept(num_codebooks, latents.shape[-1])[:, None], quantized, 0.0)
    return quantized, codes, code_metrics(codes, levels)


def fsq_dequantize(codes: Int[Array, "b m k"], levels: int) -> Float[Array, "b m k"]:
    """Return the values in [-1, 1] that `codes` stand for, the same to the bit in every program."""
    # Looked up, for a compiler rounds c * 2 / (levels - 1) - 1 as it likes. These are XLA's values on a CPU: the
    # reciprocal and the result are rounded to float32, what is between them is not.
    reciprocal = np.float64(np.float32(1) / np.float32(levels - 1))
    return jnp.asarray(np.arange(levels) * 2 * reciprocal - 1, jnp.float32)[codes]


class VectorQuantizer(nn.Module):
    """One codebook: project to `codebook_dim`, take the entry at the smallest angle, project back."""

    num_entries: int
    latent_dim: int
    codebook_dim: int = 8

    def setup(self):
        shape = (self.latent_dim, self.codebook_dim)
        self.project_in = self.param("project_in", nn.initializers.orthogonal(), shape)
        self.bias_in = self.param("bias_in", nn.initializers.zeros, shape[1:])
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (self.num_entries, self.codebook_dim))
        # At first the way back from the subspace that project_in cuts out, for latents of variance 1: from a random one
        # the sum would drift away from the latents with each codebook.
        self.project_out = self.param("project_out", lambda _: self.codebook_dim**0.5 * self.project_in.T)
        self.bias_out = self.param("bias_out", nn.initializers.zeros, shape[:1])

    def __call__(
        self, residual: Float[Array, "b m k"]
    ) -> tuple[Float[Array, "b m k"], Int[Array, "b m"], Float[Array, "b"]]:
        """Return the residual's approximation, its codes, and each clip's commitment and codebook loss."""
        y, codebook = _unit(residual @ self.project_in + self.bias_in), _unit(self.codebook)
        codes = jnp.argmax(y @ codebook.T, axis=-1).astype(jnp.int32)
        entries = codebook[codes]
        to_entries = jnp.mean((y - jax.lax.stop_gradient(entries)) ** 2, axis=(1, 2))
        to_vectors = jnp.mean((entries - jax.lax.stop_gradient(y)) ** 2, axis=(1, 2))
        loss = COMMITMENT_WEIGHT * to_entries + CODEBOOK_WEIGHT * to_vectors
        return _straight_through(entries, y) @ self.project_out + self.bias_out, codes, loss

    def dequantize(self, codes: Int[Array, "b m"]) -> Float[Array, "b m k"]:
        """Return the approximation that `codes` stand for."""
        return _unit(self.codebook)[codes] @ self.project_out + self.bias_out


class ResidualQuantizer(nn.Module):
    """RVQ: each codebook approximates what the sum of those before it leaves over."""

    num_codebooks: int
    num_entries: int
    latent_dim: int

    def setup(self):
        self.quantizers = [VectorQuantizer(self.num_entries, self.latent_dim) for _ in range(self.num_codebooks)]

    def __call__(self, latents: Float[Array, "b m k"], num_codebooks: Kept = None) -> Quantized:
        """Return the sum of the kept approximations, the codes of all, and the metrics."""
        kept = first_kept(self.num_codebooks if num_codebooks is None else num_codebooks, self.num_codebooks)
        residual, quantized, codes, loss = latents, jnp.zeros_like(latents), [], 0.0
        for i, quantizer in enumerate(self.quantizers):
            approximation, indices, losses = quantizer(residual)
            residual = residual - approximation
            quantized = quantized + jnp.where(kept[:, i, None, None], approximation, 0.0)
            loss += jnp.mean(jnp.where(kept[:, i], losses, 0.0)) / self.num_codebooks
            codes.append(indices)
        codes = jnp.stack(codes, axis=-1)
        return quantized, codes, code_metrics(codes, self.num_entries) | {"loss": loss}

    def dequantize(self, codes: Int[Array, "b m q"]) -> Float[Array, "b m k"]:
        """Return the sum of as many approximations as there are codes."""
        latents = jnp.zeros((*codes.shape[:2], self.latent_dim))
        for i, quantizer in enumerate(self.quantizers[: codes.shape[-1]]):
            latents = latents + quantizer.dequantize(codes[..., i])
        return latents


class LevelQuantizer(nn.Module):
    """RVQ of levels: a sum of one in 256 entries of each of `num_stages`, which `fit_levels` made."""

    num_stages: int
    dim: int

    def setup(self):
        shape = (self.num_stages, LEVEL_ENTRIES, self.dim)
        self.codebook = jax.lax.stop_gradient(self.param("codebook", nn.initializers.normal(1.0), shape))

    def __call__(self, levels: Float[Array, "b m k"]) -> Int[Array, "b m q"]:
        """Return the codes of the nearest of the sums that were followed."""
        left_over, codes = levels[:, :, None], jnp.zeros((*levels.shape[:2], 1, 0), jnp.int32)  # of each path
        for entries in self.codebook:
            errors = jnp.sum(left_over**2, axis=-1, keepdims=True) + _distances(left_over, entries)
            _, best = jax.lax.top_k(-errors.reshape(*levels.shape[:2], -1), LEVEL_PATHS)
            path, entry = (a[..., None] for a in jnp.divmod(best, LEVEL_ENTRIES))
            left_over = jnp.take_along_axis(left_over, path, axis=2) - entries[entry[..., 0]]
            codes = jnp.concatenate([jnp.take_along_axis(codes, path, axis=2), entry], axis=-1)
        return codes[:, :, 0]

    def dequantize(self, codes: Int[Array, "b m q"]) -> Float[Array, "b m k"]:
        """Return the sum of the entries."""
        return jnp.sum(self.codebook[np.arange(self.num_stages), codes], axis=2)


@functools.partial(jax.jit, static_argnames="num_stages")
def fit_levels(levels: Float[Array, "n k"], num_stages: int) -> Float[Array, "s e k"]:
    """Return the entries of a `LevelQuantizer`: k-means (Lloyd, 20 iterations) of what the stages before leave over."""
    codebook = []
    for stage in range(num_stages):

        def move(entries: Array, _: None, vectors: Array = levels) -> tuple[Array, None]:
            members = jax.nn.one_hot(_nearest(vectors, entries), LEVEL_ENTRIES)
            count = members.sum(0)[:, None]
            return jnp.where(count > 0, _exact(members.T, vectors) / jnp.maximum(count, 1), entries), None

        start = jax.random.choice(jax.random.key(stage), levels, (LEVEL_ENTRIES,), replace=False)
        entries, _ = jax.lax.scan(move, start, length=20)
        entries = jnp.round(entries / LEVEL_STEP) * LEVEL_STEP
        entries = entries[jnp.argsort(entries.mean(axis=1))]  # by loudness
        levels = levels - entries[_nearest(levels, entries)]
        codebook.append(entries)
    return jnp.stack(codebook)


def _nearest(vectors: Float[Array, "*b k"], entries: Float[Array, "e k"]) -> Int[Array, "*b"]:
    """Return the number of the entry at the least distance."""
    return jnp.argmin(_distances(vectors, entries), axis=-1).astype(jnp.int32)


def _distances(vectors: Float[Array, "*b k"], entries: Float[Array, "e k"]) -> Float[Array, "*b e"]:
    """Return the squared distance to each entry, less the vector's square."""
    return jnp.sum(entries**2, axis=-1) - 2 * _exact(vectors, entries.T)


_exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # not TF32, which GPUs take


def _unit(v: Float[Array, "... d"]) -> Float[Array, "... d"]:
    return v * jax.lax.rsqrt(jnp.sum(v**2, axis=-1, keepdims=True) + 1e-12)


def draw_kept(rng: PRNGKeyArray, rows: int, choices: tuple[int, ...], dropout: float) -> Int[Array, "rows"]:
    """Draw how much of its code each clip keeps: with probability `dropout` any of `choices`, else the last of them."""
    rng_drop, rng_choice = jax.random.split(rng)
    drawn = jax.random.choice(rng_choice, jnp.array(choices), (rows,))
    return jnp.where(jax.random.uniform(rng_drop, (rows,)) < dropout, drawn, choices[-1])


def first_kept(num_codebooks: Kept, total: int) -> Bool[Array, "_ q"]:
    """Which codebooks are kept, by clip, or in one row for all clips."""
    return jnp.arange(total) < jnp.reshape(jnp.asarray(num_codebooks), (-1, 1))


@jax.custom_jvp
def _straight_through(value: Array, surrogate: Array) -> Array:
    """Return `value`, exactly, with the derivative of `surrogate`.

    In surrogate + stop_gradient(value - surrogate), the usual form, the sum is rounded.
    """
    return value


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[0], tangents[1]


def code_metrics(codes: Int[Array, "b m q"], cardinality: int) -> dict[str, Float[Array, ""]]:
    """Return bits, perplexity and usage, see above."""
    share = jax.nn.one_hot(codes, cardinality).mean(axis=(0, 1))
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1) / jnp.log(2.0)
    return {"perplexity": jnp.mean(2**entropy), "bits": jnp.mean(entropy), "usage": jnp.mean(share > 0)}
