r"""Distances between images, and between sets of features of images, in numpy.

Images are float [n, h, w, c] in [-1, 1], a range of 2; values beyond it are not clipped here. Features are any float
[n, d], a row an image: FID and KID compare with published values only where their features are the same.

    PSNR    10 log10 2^2 / mean (x - y)^2, at most 100 dB
    SSIM    mean over windows of (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sxx + syy + C2)), with moments
            under an 11 x 11 Gaussian of sigma 1.5, C1 = (0.01 * 2)^2, C2 = (0.03 * 2)^2; only windows that lie wholly
            inside the image count; the mean over channels
    FID     |ma - mb|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 of means m and covariances A, B (divisor n - 1)
    KID     mean of k(x, x') over pairs in a + the same in b - 2 mean of k(x, y), k(x, y) = (x.y / d + 1)^3, over all
            pairs of two different rows: unbiased, so that it may be negative

Sources: SSIM, Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (IEEE TIP 2004).
FID, Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500). KID, Binkowski et al.,
"Demystifying MMD GANs" (arXiv 1801.01401).

Traps: FID from n rows is too large by about a constant / n, and near a good generator that excess is most of the value:
against the exact moments of its own law, n rows of d independent normal features of variance 1 have FID d (d + 5) / 4n.
So FID compares only at one n. KID has no such bias.
"""

from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Float64, Integer

from meanflow_audio_codec.errors import InputError

RANGE = 2.0  # of images in [-1, 1]
PSNR_LIMIT_DB = 100.0
SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
SSIM_C1, SSIM_C2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
KERNEL_CHUNK = 256  # rows of a kernel matrix at a time: 20 MB against 10,000 columns
NORMAL_95 = 1.959964
NUM_PAIRS = 5_000  # sampled for the second-order term of FID's error


class RealStatistics(NamedTuple):
    """What `fid_and_kid` needs of the real set; `real_statistics` makes it once for many generated sets."""

    features: Float64[np.ndarray, "m d"]
    mean: Float64[np.ndarray, " d"]
    cov: Float64[np.ndarray, "d d"]
    kernel_mean: float  # over all pairs of two different rows


def psnr_db(
    reference: Float[np.ndarray, "n h w c"], decoded: Float[np.ndarray, "n h w c"]
) -> Float64[np.ndarray, " n"]:
    """Compute the peak signal-to-noise ratio of each image in dB, at most 100, which identical images get.

    Raises:
        InputError: The two differ in shape, are empty, not floating point or not finite.
    """
    x, y = _checked_images(reference, decoded)
    mse = np.square(x - y).mean((1, 2, 3))
    return 10 * np.log10(RANGE**2 / np.maximum(mse, RANGE**2 * 10 ** (-PSNR_LIMIT_DB / 10)))


def ssim(reference: Float[np.ndarray, "n h w c"], decoded: Float[np.ndarray, "n h w c"]) -> Float64[np.ndarray, " n"]:
    """Compute the structural similarity of each image, within [-1, 1], 1 for identical images.

    Raises:
        InputError: As `psnr_db`, or the images are smaller than the window of 11 x 11.
    """
    x, y = _checked_images(reference, decoded)
    if min(x.shape[1:3]) <= 2 * SSIM_RADIUS:
        raise InputError(f"images of {x.shape[1]} x {x.shape[2]}: SSIM needs at least 11 x 11")
    mx, my = _local_mean(x), _local_mean(y)
    sxx, syy, sxy = _local_mean(x * x) - mx * mx, _local_mean(y * y) - my * my, _local_mean(x * y) - mx * my
    above = (2 * mx * my + SSIM_C1) * (2 * sxy + SSIM_C2)
    below = (mx * mx + my * my + SSIM_C1) * (sxx + syy + SSIM_C2)
    return (above / below).mean((1, 2, 3))


def frechet_distance(features_a: Float[np.ndarray, "n d"], features_b: Float[np.ndarray, "m d"]) -> float:
    """Compute FID between two sets of features: 0 for identical sets, biased upwards otherwise (see the module).

    Raises:
        InputError: Fewer than two rows, different widths, not floating point or not finite.
    """
    a, b = _checked_features(features_a, features_b)
    return frechet_distance_of_gaussians(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def frechet_distance_of_gaussians(
    mean_a: Float[np.ndarray, " d"],
    cov_a: Float[np.ndarray, "d d"],
    mean_b: Float[np.ndarray, " d"],
    cov_b: Float[np.ndarray, "d d"],
) -> float:
    """Compute the squared Wasserstein-2 distance of two normal laws; covariances may be singular.

    Raises:
        InputError: Different widths, not floating point or not finite.
    """
    width = mean_a.shape[-1:]
    if not (mean_a.shape == mean_b.shape == width and cov_a.shape == cov_b.shape == 2 * width):
        raise InputError(
            f"means {mean_a.shape}, {mean_b.shape}, covariances {cov_a.shape}, {cov_b.shape}: widths differ"
        )
    mean_a, mean_b = _checked_floats("mean_a", mean_a), _checked_floats("mean_b", mean_b)
    cov_a, cov_b = _checked_floats("cov_a", cov_a), _checked_floats("cov_b", cov_b)
    # tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of A^1/2 B^1/2 for any roots. Taken so, a zero eigenvalue
    # keeps its rounding of 1e-16, where the square root of the product would make it 1e-8.
    fidelity = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
    squared = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * fidelity
    return max(float(squared), 0.0)


def kernel_distance(features_a: Float[np.ndarray, "n d"], features_b: Float[np.ndarray, "m d"]) -> float:
    """Compute KID between two sets of features from all pairs; 0 on average, not exactly, for two sets of one law.

    Published tables often print it times 1000, and estimate it from subsets.

    Raises:
        InputError: As `frechet_distance`.
    """
    a, b = _checked_features(features_a, features_b)
    return _mean_of_pairs(a) + _mean_of_pairs(b) - 2 * _kernel_means(a, b)[0].mean()


def real_statistics(features: Float[np.ndarray, "m d"]) -> RealStatistics:
    """Prepare the real set for `fid_and_kid`: 10,000 rows of 128 features take a second of one core.

    Raises:
        InputError: Fewer than two rows, not floating point or not finite.
    """
    (features,) = _checked_features(features)
    return RealStatistics(features, features.mean(0), _covariance(features), _mean_of_pairs(features))


def fid_and_kid(features: Float[np.ndarray, "n d"], real: RealStatistics) -> dict[str, float]:
    r"""Compute FID and KID of generated features against real ones, with 95 % intervals.

    The intervals speak of another draw of n rows by the same generator against this same real set, the common yardstick
    of all generators: they cover the mean of such draws. FID's is about FID at this n, bias included, so that it
    contains the value and two generators compare at equal n. Rows must be drawn independently.

    No bootstrap: a resampled set holds duplicates, which moves FID up once more. Instead, both distances are expanded
    around the generator's law as constant + mean_i g(x_i) + mean_ij k(x_i, x_j) with k of mean zero in either argument,
    whose variance is var g / n + 2 E k^2 / n^2 (Hoeffding 1948). The second term matters near a perfect generator,
    where g vanishes. Since g is estimated on the rows themselves, its sample variance contains that term twice, and one
    of them is subtracted. Measured over laws from equal to far, normal and not, with 2,000 rows of 64 or 128 features:
    91 to 97 % of FID's intervals and 89 to 97 % of KID's hold the mean, the least of KID's where a few directions of
    equal laws dominate, since draws are then skewed.

    Args:
        features: Of the generated images, from the network that gave the real ones.
        real: From `real_statistics`.

    Returns:
        `fid`, `fid_low`, `fid_high` (not negative), `kid`, `kid_low`, `kid_high`. The same values at each call.

    Raises:
        InputError: Fewer than two rows, another width than the real features, not floating point or not finite.
    """
    a, _ = _checked_features(features, real.features)
    fid = frechet_distance_of_gaussians(a.mean(0), _covariance(a), real.mean, real.cov)
    fid_error = _fid_error(a, real)
    kid, kid_error = _kid_and_error(a, real)
    return {
        "fid": fid,
        "fid_low": max(fid - NORMAL_95 * fid_error, 0.0),
        "fid_high": fid + NORMAL_95 * fid_error,
        "kid": kid,
        "kid_low": kid - NORMAL_95 * kid_error,
        "kid_high": kid + NORMAL_95 * kid_error,
    }


def mode_entropy_bits(labels: Integer[np.ndarray, " n"], num_classes: int) -> float:
    """Compute the entropy of the histogram of predicted classes, in bits: log2 num_classes if all are equally frequent.

    Raises:
        InputError: No labels, labels that are not integers, or one outside 0 .. num_classes - 1.
    """
    if labels.ndim != 1 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels {labels.shape} of {labels.dtype} must be a list of at least one integer")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(f"labels from {labels.min()} to {labels.max()} must lie within 0 to {num_classes - 1}")
    share = np.bincount(labels, minlength=num_classes) / labels.size
    share = share[share > 0]
    return float(np.sum(share * np.log2(1 / share)))


def _local_mean(image: np.ndarray) -> np.ndarray:
    """Average under the Gaussian window, at the windows that lie inside the image."""
    r = SSIM_RADIUS
    return scipy.ndimage.gaussian_filter(image, SSIM_SIGMA, radius=r, axes=(1, 2))[:, r:-r, r:-r]


def _covariance(features: np.ndarray) -> np.ndarray:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _root(cov: np.ndarray) -> np.ndarray:
    """Return R with R R^T = cov; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base


def _kernel_means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean over y of k(x, y) for each row of x, and the mean of k(x, y)^2 over all pairs."""
    means, squares = np.empty(len(x)), 0.0
    for start in range(0, len(x), KERNEL_CHUNK):
        chunk = slice(start, start + KERNEL_CHUNK)
        kernel = _kernel(x[chunk], y)
        means[chunk] = kernel.mean(1)
        squares += np.vdot(kernel, kernel)
    return means, squares / (len(x) * len(y))


def _self_kernel(x: np.ndarray) -> np.ndarray:
    return (np.einsum("nd,nd->n", x, x) / x.shape[1] + 1) ** 3


def _mean_of_pairs(x: np.ndarray) -> float:
    """Average k over the pairs of two different rows."""
    total = -_self_kernel(x).sum()
    for start in range(
        0, len(x), KERNEL_CHUNK
    ):  # the kernel is symmetric: what lies right of the diagonal counts twice
        kernel = _kernel(x[start : start + KERNEL_CHUNK], x[start:])
        total += 2 * kernel.sum() - kernel[:, : len(kernel)].sum()
    return float(total / (len(x) * (len(x) - 1)))


def _kid_and_error(a: np.ndarray, real: RealStatistics) -> tuple[float, float]:
    n = len(a)
    own = _self_kernel(a)
    with_own, squares = _kernel_means(a, a)
    within = (with_own * n - own) / (n - 1)
    to_real = _kernel_means(a, real.features)[0]
    kid = float(within.mean() + real.kernel_mean - 2 * to_real.mean())
    # KID = mean_ij h(x_i, x_j) with h(x, x') = k(x, x') - to_real(x) - to_real(x') + constant. Its first-order part is
    # twice the mean of h over the other rows; the rest is the centred k, whose mean square follows from three means.
    first = 2 * (within - to_real)
    pair_square = (squares * n * n - np.sum(own**2)) / (n * (n - 1))
    second = pair_square - 2 * np.mean(within**2) + within.mean() ** 2
    return kid, _standard_error(first, second)


def _fid_error(a: np.ndarray, real: RealStatistics) -> float:
    """Estimate the standard deviation of FID over draws of the rows of a, from its two first derivatives."""
    n = len(a)
    x = a - a.mean(0)
    # With R R^T = B, x R = U S V^T gives the eigenvalues s^2 / n of R^T A R and the coordinates sqrt(n) u s of each row
    # in its eigenvectors: sums of u^2 s are derivatives of tr (.)^1/2 without a division by a vanishing s.
    u, s, _ = np.linalg.svd(x @ _root(real.cov), full_matrices=False)
    u, s = u * np.sqrt(n), s / np.sqrt(n)
    first = 2 * x @ (a.mean(0) - real.mean) + np.square(x).sum(1) - np.square(u) @ s
    both = s[:, None] + s
    weight = np.divide(np.outer(s, s), both, out=np.zeros_like(both), where=both > 0)
    # E k^2 from pairs drawn at random; all n^2 of them would cost n^2 d^2.
    rng = np.random.default_rng(0)
    i = rng.integers(n, size=NUM_PAIRS)
    j = (i + rng.integers(1, n, size=NUM_PAIRS)) % n
    both_rows = u[i] * u[j]
    of_row = np.square(u) @ weight.diagonal()
    of_covariance = np.einsum("pd,pd->p", both_rows @ weight, both_rows) - of_row[i] - of_row[j] + weight.trace()
    k = np.einsum("pd,pd->p", x[i], x[j]) + of_covariance / 2
    return _standard_error(first, np.mean(k**2))


def _standard_error(first: np.ndarray, second: float) -> float:
    """Combine g of each row and E k^2 into the error of their sum (see `fid_and_kid`)."""
    n = len(first)
    variance = first.var(ddof=1) / n
    # The second term can be at most half of it; sampling may say more.
    return float(np.sqrt(max(variance - 2 * second / n**2, variance / 2)))


def _checked_images(reference: np.ndarray, decoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if reference.shape != decoded.shape or reference.ndim != 4 or reference.size == 0:
        raise InputError(f"reference {reference.shape} and decoded {decoded.shape} must have one shape [n, h, w, c]")
    return _checked_floats("reference", reference), _checked_floats("decoded", decoded)


def _checked_features(*sets: np.ndarray) -> list[np.ndarray]:
    if any(f.ndim != 2 or len(f) < 2 or f.shape[1] == 0 or f.shape[1] != sets[0].shape[1] for f in sets):
        shapes = " and ".join(str(f.shape) for f in sets)
        raise InputError(f"features {shapes} must be [rows, width] of one width with two rows or more")
    return [_checked_floats("features", f) for f in sets]


def _checked_floats(name: str, array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name} holds {array.dtype}: convert it to float")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite: {np.sum(~np.isfinite(array))} of {array.size}")
    return array.astype(np.float64)
