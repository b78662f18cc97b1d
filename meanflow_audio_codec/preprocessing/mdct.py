"""Modified discrete cosine transform (MDCT): N real coefficients for every N samples, orthonormal.

Frame m covers the 2N samples [(m-1)N, (m+1)N) of the signal, N = `hop_length`, zeros outside it:

    X_m[k] = sqrt(2/N) sum_{n=0}^{2N-1} w[n] x[(m-1)N + n] cos(pi/N (n + 1/2 + N/2)(k + 1/2)).

A signal of s samples has ceil(s/N) + 1 frames, so that two frames cover every sample.

Fold (time-domain aliasing cancellation, TDAC). Cut the windowed frame into quarters (a, b, c, d),
write r for reversal: the symmetries of the cosine leave N numbers u, of which X_m is the DCT-IV,

    u = (-c_r - d, a - b_r),   X_m[k] = sqrt(2/N) sum_n u[n] cos(pi/N (n + 1/2)(k + 1/2)).

The DCT-IV is orthonormal and its own inverse. A window with w[n] = w[2N-1-n] and
w[n]^2 + w[n+N]^2 = 1 (Princen-Bradley) makes the fold orthogonal as well. Hence Parseval, sum X^2
= sum x^2, and the inverse is the transpose: DCT-IV, unfold, window, overlap-add, with gain 1.

Sources: J. Princen and A. Bradley, "Analysis/synthesis filter bank design based on time domain
aliasing cancellation", IEEE TASSP 34 (1986), and with A. Johnson, ICASSP 1987; H. Malvar, "Signal
Processing with Lapped Transforms" (1992), for the lapped orthogonal view and the DCT-IV by FFT.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Complex, Float

from meanflow_audio_codec.errors import InputError

# Up to here one matmul beats the FFT on CPU, which spends its time on shuffles for short frames.
_MATMUL_MAX_HOP_LENGTH = 128

# Kaiser-Bessel-derived windows: alpha = 4 is the value of AAC (ISO/IEC 13818-7).
_KBD_ALPHA = 4.0


@functools.partial(jax.jit, static_argnames=("hop_length", "window"))
def mdct(x: Float[Array, "*b s"], hop_length: int, window: str = "sine") -> Float[Array, "*b l n"]:
    """Transform a signal to its orthonormal MDCT coefficients.

    Args:
        x: Signal, any length. Computed in float32, or float64 for float64 input.
        hop_length: Coefficients per frame N, in samples; even.
        window: "sine" (better coding gain) or "kbd" (better far rejection).

    Returns:
        Coefficients: l = `num_frames(s, hop_length)` frames of n = `hop_length` bins. Bin k is
        centred at (k + 1/2) sample_rate / (2N) Hz.

    Raises:
        InputError: If `hop_length` is not positive and even, or the window is unknown.
    """
    samples, frames = x.shape[-1], num_frames(x.shape[-1], hop_length)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    padding = (hop_length, frames * hop_length - samples)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [padding])
    blocks = x.reshape(*x.shape[:-1], frames + 1, hop_length)
    return _dct_iv(_fold(blocks, window))


@functools.partial(jax.jit, static_argnames=("hop_length", "window", "length"))
def imdct(
    coeffs: Float[Array, "*b l n"], hop_length: int, window: str = "sine", *, length: int
) -> Float[Array, "*b s"]:
    """Invert `mdct`, exactly and with gain 1.

    Args:
        coeffs: MDCT coefficients.
        hop_length: N, as in `mdct`, in samples.
        window: As in `mdct`.
        length: Samples s to return, at most (l - 1) N: the last N samples have one frame only.

    Returns:
        The signal. For coefficients that are no MDCT of a signal, the nearest one's (a projection).

    Raises:
        InputError: If `coeffs` has not `hop_length` bins, or holds less than `length` samples.
    """
    _check_hop_length(hop_length)
    frames, bins = coeffs.shape[-2:]
    if bins != hop_length:
        raise InputError(f"coeffs has {bins} bins for hop_length {hop_length}: pass the hop_length given to mdct")
    held = (frames - 1) * hop_length
    if not 0 <= length <= held:
        raise InputError(f"length {length} is outside [0, {held}], as {frames} frames of {hop_length} hold")
    coeffs = coeffs.astype(jnp.promote_types(coeffs.dtype, jnp.float32))
    blocks = _unfold(_dct_iv(coeffs), window)
    return blocks.reshape(*blocks.shape[:-2], held)[..., :length]


def num_frames(samples: int, hop_length: int) -> int:
    """Return the number of MDCT frames of a signal of `samples` samples: ceil(samples / N) + 1."""
    _check_hop_length(hop_length)
    return -(-samples // hop_length) + 1


@functools.lru_cache(maxsize=32)
def window(hop_length: int, kind: str = "sine") -> Float[np.ndarray, "{2*hop_length}"]:
    """Return the window of 2N samples, symmetric and power complementary (Princen-Bradley).

    Args:
        hop_length: N, in samples; even.
        kind: "sine", or "kbd" (Kaiser-Bessel-derived, alpha = 4).

    Returns:
        A cached, read-only table in float64.

    Raises:
        InputError: If `hop_length` is not positive and even, or the kind is unknown.
    """
    _check_hop_length(hop_length)
    if kind == "sine":
        rise = np.sin(np.pi / (2 * hop_length) * (np.arange(hop_length) + 0.5))
    elif kind == "kbd":
        cumulative = np.cumsum(np.kaiser(hop_length + 1, np.pi * _KBD_ALPHA))
        rise = np.sqrt(cumulative[:-1] / cumulative[-1])
    else:
        raise InputError(f"window {kind!r} is unknown: use 'sine' or 'kbd'")
    return _read_only(np.concatenate([rise, rise[::-1]]))


def _fold(blocks: Float[Array, "*b l n"], kind: str) -> Float[Array, "*b l-1 n"]:
    """Window each pair of neighbouring blocks (a, b), (c, d) and fold its 2N samples to N."""
    half = blocks.shape[-1] // 2
    w_a, w_b, w_c, w_d = _window_quarters(kind, blocks)
    a, b = blocks[..., :-1, :half] * w_a, blocks[..., :-1, half:] * w_b
    c, d = blocks[..., 1:, :half] * w_c, blocks[..., 1:, half:] * w_d
    return _join(-c[..., ::-1] - d, a - b[..., ::-1])


def _unfold(folded: Float[Array, "*b l n"], kind: str) -> Float[Array, "*b l-1 n"]:
    """Transpose `_fold`, without the first and last block, which only one frame covers."""
    half = folded.shape[-1] // 2
    w_a, w_b, w_c, w_d = _window_quarters(kind, folded)
    # A block is (c, d) of the frame before it plus (a, b) of its own.
    cd, ab = folded[..., :-1, :half], folded[..., 1:, half:]
    return _join(ab * w_a - cd[..., ::-1] * w_c, -ab[..., ::-1] * w_b - cd * w_d)


def _window_quarters(kind: str, like: Float[Array, "*b l n"]) -> list[Array]:
    return [_like(quarter, like) for quarter in np.split(window(like.shape[-1], kind), 4)]


def _join(first: Float[Array, "*b h"], second: Float[Array, "*b h"]) -> Float[Array, "*b 2*h"]:
    """Concatenate along the last axis, as a stack: on CPU several times faster than a concat."""
    stacked = jnp.stack([first, second], axis=-2)
    return stacked.reshape(*first.shape[:-1], 2 * first.shape[-1])


def _dct_iv(u: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """Apply the orthonormal DCT-IV along the last axis by the faster of two algorithms."""
    if u.shape[-1] <= _MATMUL_MAX_HOP_LENGTH:
        return _dct_iv_matmul(u)
    return _dct_iv_fft(u)


def _dct_iv_matmul(u: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    # HIGHEST: TPUs and GPUs would otherwise round to bfloat16 or TF32 and lose the reconstruction.
    matrix = jnp.asarray(_dct_iv_matrix(u.shape[-1]), u.dtype)
    return jnp.dot(u, matrix, precision=lax.Precision.HIGHEST)


def _dct_iv_fft(u: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """Pair even samples with reversed odd ones; one complex FFT of N/2 between two twists."""
    complex_dtype = jnp.promote_types(u.dtype, jnp.complex64)
    twist = _like(_twist(u.shape[-1]).astype(complex_dtype), u)
    pairs = lax.complex(u[..., ::2], u[..., ::-2])
    spectrum = jnp.fft.fft(pairs * twist) * twist
    return jnp.stack([spectrum.real, -spectrum.imag[..., ::-1]], axis=-1).reshape(u.shape)


@functools.lru_cache(maxsize=32)
def _dct_iv_matrix(n: int) -> Float[np.ndarray, "{n} {n}"]:
    half_odd = np.arange(n) + 0.5
    return _read_only(np.sqrt(2 / n) * np.cos(np.pi / n * np.outer(half_odd, half_odd)))


@functools.lru_cache(maxsize=32)
def _twist(n: int) -> Complex[np.ndarray, "{n//2}"]:
    """Return exp(-i pi/N (k + 1/8)) times the root of sqrt(2/N), since it is used twice."""
    return _read_only((2 / n) ** 0.25 * np.exp(-1j * np.pi / n * (np.arange(n // 2) + 0.125)))


def _like(table: np.ndarray, x: Array) -> Array:
    """Cast a table to the precision and rank of x."""
    dtype = x.dtype if table.dtype.kind == "f" else table.dtype
    return jnp.asarray(table, dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _read_only(table: np.ndarray) -> np.ndarray:
    table.setflags(write=False)
    return table


def _check_hop_length(hop_length: int) -> None:
    if hop_length < 2 or hop_length % 2:
        raise InputError(f"hop_length {hop_length} must be even and positive: the MDCT folds half blocks")
