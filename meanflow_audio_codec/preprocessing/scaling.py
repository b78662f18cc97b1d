"""Scaling of tokens to the unit range that a flow can learn: companding, then RMS per band.

    y = sign(x) ((|x| + eps)^a - eps^a),      x = sign(y) ((|y| + eps^a)^(1/a) - eps),

with exponent 0 < a <= 1. Raw MDCT coefficients are peaked at zero and spread over 100 dB; a = 0.5
halves the spread in dB, and eps, the magnitude below which the map is linear, bounds its slope at 0
by a eps^(a-1). Companded tokens are then divided by their RMS per band, measured on training data.

The power law is evaluated as eps^a expm1(a log1p(|x| / eps)), since the difference above cancels in
float32 where |x| << eps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from meanflow_audio_codec.errors import InputError

# A band 60 dB below the loudest one (after companding) counts as silent: its scale stops there.
_SILENCE = 1e-3


def compand(x: Float[Array, "*b"], exponent: float, eps: float) -> Float[Array, "*b"]:
    """Compress magnitudes by a power law that is linear around zero.

    Args:
        x: Values, any sign.
        exponent: Power a in (0, 1]; 1 is the identity.
        eps: Magnitude at which the linear part ends, in units of x; positive.

    Returns:
        Values of the same sign.

    Raises:
        InputError: If `exponent` is outside (0, 1] or `eps` is not positive.
    """
    _check(exponent, eps)
    if exponent == 1:
        return x
    return _odd(lambda m: eps**exponent * jnp.expm1(exponent * jnp.log1p(m / eps)), x)


def expand(y: Float[Array, "*b"], exponent: float, eps: float) -> Float[Array, "*b"]:
    """Invert `compand`.

    Args:
        y: Companded values.
        exponent: As in `compand`.
        eps: As in `compand`.

    Returns:
        The values before companding.

    Raises:
        InputError: If `exponent` is outside (0, 1] or `eps` is not positive.
    """
    _check(exponent, eps)
    if exponent == 1:
        return y
    return _odd(lambda m: eps * jnp.expm1(jnp.log1p(m / eps**exponent) / exponent), y)


def band_scale(
    tokens_companded: Float[Array, "b l f"], bands: Int[Array, "f"] | Int[np.ndarray, "f"]
) -> Float[Array, "f"]:
    """Measure the RMS of every band, given to each of its features.

    Args:
        tokens_companded: Tokens after `compand`, from training data.
        bands: Band index of each feature, in [0, f), as a tokenizer's `bands` gives.

    Returns:
        Positive scale of each feature: the RMS of its band over batch, frames and features, at
        least 1e-3 of the loudest band's, and 1 if all is silent.
    """
    power = jnp.mean(jnp.square(tokens_companded), axis=(0, 1))
    features = power.shape[0]
    bands = jnp.asarray(bands)
    total = jax.ops.segment_sum(power, bands, features)[bands]
    count = jax.ops.segment_sum(jnp.ones_like(power), bands, features)[bands]
    rms = jnp.sqrt(total / count)
    loudest = jnp.max(rms)
    return jnp.where(loudest > 0, jnp.maximum(rms, _SILENCE * loudest), jnp.ones_like(rms))


def band_weight(bands: Int[np.ndarray, "f"]) -> Float[np.ndarray, "f"]:
    """Weigh features so that every band counts alike, however many features it has; the mean weight is 1.

    Bands are as wide as the ear's: of the bins of an MDCT most lie in the highest few, of which one hears little.
    """
    share = 1 / np.bincount(bands)[bands]
    return (share / share.mean()).astype(np.float32)


def normalize(
    tokens: Float[Array, "*b f"], scale: Float[Array, "f"], exponent: float, eps: float
) -> Float[Array, "*b f"]:
    """Compand tokens and divide them by their scale: the data x of the flow.

    Args:
        tokens: Tokens of a tokenizer.
        scale: From `band_scale`.
        exponent: As in `compand`.
        eps: As in `compand`.

    Returns:
        Data of about unit RMS per band.
    """
    return compand(tokens, exponent, eps) / _as_rank(scale, tokens.ndim)


def denormalize(x: Float[Array, "*b f"], scale: Float[Array, "f"], exponent: float, eps: float) -> Float[Array, "*b f"]:
    """Invert `normalize`.

    Args:
        x: Data, or a sample of the flow.
        scale: As in `normalize`.
        exponent: As in `compand`.
        eps: As in `compand`.

    Returns:
        Tokens, to be given to the tokenizer's `detokenize`.
    """
    return expand(x * _as_rank(scale, x.ndim), exponent, eps)


def _odd(f: Callable[[Array], Array], x: Array) -> Array:
    """Extend f from magnitudes to an odd function."""
    # By select, since JAX differentiates sign(x) f(|x|) to 0 at x = 0.
    f_magnitude = f(jnp.where(x < 0, -x, x))
    return jnp.where(x < 0, -f_magnitude, f_magnitude)


def _as_rank(scale: Float[Array, "f"], ndim: int) -> Array:
    return scale.reshape((1,) * (ndim - 1) + (-1,))


def _check(exponent: float, eps: float) -> None:
    if not 0 < exponent <= 1:
        raise InputError(f"exponent {exponent} is outside (0, 1]: use 0.5, or 1.0 for no companding")
    if not eps > 0:
        raise InputError(f"eps {eps} must be positive, for a finite slope at zero: use 1e-4")
