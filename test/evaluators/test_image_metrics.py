"""Image metrics against scikit-image, closed forms, plain sums, and the coverage of their intervals."""

import inspect
import math

import numpy as np
import pytest
import scipy.linalg
from skimage.metrics import structural_similarity

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import image_metrics as metrics


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(width, rank, seed=0):
    root = normal(width, rank, seed=seed)
    return root @ root.T


def kernel(x, y):
    return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3


def slow_kernel_distance(a, b):
    """The double sums of the definition."""
    within = lambda x: np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    return within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])


@pytest.mark.parametrize("shape", [(4, 28, 28, 1), (3, 17, 40, 3), (2, 11, 12, 1)])
def test_ssim_equals_scikit_image(shape):
    rng = np.random.default_rng(0)
    reference = rng.uniform(-1, 1, shape).astype(np.float32)
    reference[:, : shape[1] // 2] = -1  # flat, as the background of a digit
    noise = rng.standard_normal(shape) * np.linspace(0, 0.8, shape[0])[:, None, None, None]
    decoded = np.clip(reference + noise, -1, 1).astype(np.float32)
    expected = [
        structural_similarity(
            x.astype(np.float64),
            y.astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=2,
            channel_axis=-1,
        )
        for x, y in zip(reference, decoded, strict=True)
    ]
    found = metrics.ssim(reference, decoded)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[0] == 1 and found.shape == (shape[0],) and found.dtype == np.float64


def test_psnr_of_a_known_error():
    reference = np.zeros((3, 5, 4, 2), np.float32)
    decoded = reference.copy()
    decoded[1] = 0.2  # 2 / 0.2 is 20 dB
    decoded[2, 0, 0, 0] = 2  # 4 over 40 values: 10 log10 40
    np.testing.assert_allclose(metrics.psnr_db(reference, decoded), [100, 20, 10 * np.log10(40)], rtol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 40])
def test_frechet_distance_equals_the_published_formula(width):
    a, b = normal(90, width), 1.5 * normal(70, width, seed=1) @ normal(width, width, seed=2) + 0.3
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_that_share_their_axes():
    axes, _ = np.linalg.qr(normal(6, 6))
    a, b = np.array([0, 1, 4, 9, 0.25, 0]), np.array([0, 4, 4, 0, 1, 16])  # variances, some 0
    mean_a, mean_b = np.zeros(6), np.array([3, 0, 0, 4.0, 0, 0])
    found = metrics.frechet_distance_of_gaussians(mean_a, axes * a @ axes.T, mean_b, axes * b @ axes.T)
    assert found == pytest.approx(25 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-7)


def test_singular_covariances_of_equal_laws_are_at_distance_0():
    cov, mean = covariance(64, 10), np.ones(64)
    assert metrics.frechet_distance_of_gaussians(mean, cov, mean, cov) < 1e-10 * np.trace(cov)
    few = normal(20, 64).astype(np.float32)  # fewer rows than features
    few[:, 5] = 0  # a dead unit
    assert metrics.frechet_distance(few, few[::-1].copy()) < 1e-8
    assert metrics.frechet_distance(np.zeros((3, 2)), np.zeros((4, 2))) == 0


def test_frechet_distance_falls_with_n_by_its_known_bias():
    def mean_distance(n):
        draws = (normal(n, 6, seed=seed) for seed in range(200))
        return np.mean([metrics.frechet_distance_of_gaussians(x.mean(0), np.cov(x.T), *exact) for x in draws])

    exact = np.zeros(6), np.eye(6)
    for n in (200, 800):
        # 5 %: the next order in d / n, and 200 draws
        assert mean_distance(n) == pytest.approx(6 * (6 + 5) / (4 * n), rel=0.05)


def test_kernel_distance_equals_the_double_sums():
    a, b = normal(9, 5), normal(7, 5, seed=1) + 0.5
    assert metrics.kernel_distance(a, b) == pytest.approx(slow_kernel_distance(a, b), rel=1e-10)


def test_kernel_distance_of_many_rows_equals_the_full_matrices():
    a, b = normal(metrics.KERNEL_CHUNK + 40, 3), normal(2 * metrics.KERNEL_CHUNK + 1, 3, seed=1) + 0.5
    matrix = lambda x, y: (x @ y.T / 3 + 1) ** 3
    within = lambda x: (matrix(x, x).sum() - np.trace(matrix(x, x))) / (len(x) * (len(x) - 1))
    expected = within(a) + within(b) - 2 * matrix(a, b).mean()
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_has_no_bias():
    draws = np.array(
        [metrics.kernel_distance(normal(20, 4, seed=2 * i), normal(30, 4, seed=2 * i + 1)) for i in range(300)]
    )
    assert abs(draws.mean()) < 3 * draws.std() / np.sqrt(300)
    assert (draws < 0).any()
    assert metrics.kernel_distance(normal(200, 4), normal(200, 4, seed=1) + 1) > 5 * draws.std()


def test_fid_and_kid_agree_with_their_functions():
    a, b = normal(60, 8).astype(np.float32), 1.1 * normal(300, 8, seed=1) + 0.1
    real = metrics.real_statistics(b)
    found = metrics.fid_and_kid(a, real)
    assert found["fid"] == metrics.frechet_distance(a, b)
    assert found["kid"] == pytest.approx(metrics.kernel_distance(a, b), rel=1e-9)
    assert 0 <= found["fid_low"] < found["fid"] < found["fid_high"]
    assert found["kid_low"] < found["kid"] < found["kid_high"]
    assert found == metrics.fid_and_kid(a, real)
    assert all(type(value) is float for value in found.values())


def check_interval(found, name, target):
    """The mean over draws is the target, and the interval's width is that of the draws' spread."""
    value, low, high = (np.array([f[key] for f in found]) for key in (name, f"{name}_low", f"{name}_high"))
    spread = value.std(ddof=1)
    assert value.mean() == pytest.approx(target, abs=3 * spread / np.sqrt(len(found)))
    # The spread of 100 draws is known to 7 %; without the second-order term the width is 1.3 times it at no shift.
    assert np.mean(high - value) / 1.96 == pytest.approx(spread, rel=0.15)
    assert np.mean((low <= target) & (target <= high)) > 0.89  # 0.95 with a standard error of 0.02


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_fid_intervals_cover_the_known_distance(shift):
    width, n = 16, 400
    real = metrics.real_statistics(normal(50, width))._replace(mean=np.zeros(width), cov=np.eye(width))
    # The mean is shifted and nothing else, so that the bias is that of equal laws.
    target = width * shift**2 + width * (width + 5) / (4 * n)
    check_interval([metrics.fid_and_kid(normal(n, width, seed=i) + shift, real) for i in range(100)], "fid", target)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kid_intervals_cover_the_known_distance(shift):
    rng, real = np.random.default_rng(1), metrics.real_statistics(normal(60, 20))
    atoms, matrix = real.features + shift, lambda x, y: (x @ y.T / 20 + 1) ** 3
    # Rows drawn from 60 atoms: the mean over draws is a finite sum.
    target = matrix(atoms, atoms).mean() + real.kernel_mean - 2 * matrix(atoms, real.features).mean()
    found = [metrics.fid_and_kid(atoms[rng.integers(60, size=150)], real) for _ in range(100)]
    check_interval(found, "kid", target)


@pytest.mark.parametrize("law", ["collapsed", "constant", "few"])
def test_degenerate_sets_have_finite_intervals(law):
    real = metrics.real_statistics(np.maximum(normal(200, 12, seed=1), 0) * (np.arange(12) > 2))  # three dead units
    generated = {
        "collapsed": np.maximum(normal(100, 1), 0) * np.ones(12),
        "constant": np.full((50, 12), 0.5),
        "few": normal(2, 12),
    }[law]
    found = metrics.fid_and_kid(generated, real)
    assert all(np.isfinite(value) for value in found.values())
    if law == "constant":  # nothing varies between draws
        assert found["fid_high"] == pytest.approx(found["fid_low"], rel=1e-6)
        assert found["kid_high"] == pytest.approx(found["kid_low"], rel=1e-6)


def test_mode_entropy():
    assert metrics.mode_entropy_bits(np.tile(np.arange(10), 3), 10) == pytest.approx(math.log2(10), rel=1e-12)
    assert metrics.mode_entropy_bits(np.array([4, 4, 4], np.int32), 10) == 0
    assert metrics.mode_entropy_bits(np.array([0, 0, 7, 9], np.uint8), 10) == 1.5


def test_bad_input_names_the_remedy():
    # where annotations are checked they refuse first
    psnr, ssim, frechet, kid, entropy, moments = (
        inspect.unwrap(f)
        for f in (
            metrics.psnr_db,
            metrics.ssim,
            metrics.frechet_distance,
            metrics.kernel_distance,
            metrics.mode_entropy_bits,
            metrics.frechet_distance_of_gaussians,
        )
    )
    image, features = np.zeros((2, 12, 12, 1), np.float32), normal(5, 3)
    broken = image.copy()
    broken[1, 2, 3] = np.nan
    with pytest.raises(InputError, match="one shape"):
        psnr(image, image[:1])
    with pytest.raises(InputError, match="one shape"):
        psnr(image[0], image[0])
    with pytest.raises(InputError, match="decoded holds uint8: convert it to float"):
        psnr(image, image.astype(np.uint8))
    with pytest.raises(InputError, match="decoded holds values that are not finite: 1 of 288"):
        ssim(image, broken)
    with pytest.raises(InputError, match="at least 11 x 11"):
        ssim(image[:, :10], image[:, :10])
    with pytest.raises(InputError, match="two rows"):
        frechet(features, features[:1])
    with pytest.raises(InputError, match="one width"):
        kid(features, features[:, :2])
    with pytest.raises(InputError, match="not finite"):
        kid(features, features * np.inf)
    with pytest.raises(InputError, match="widths differ"):
        moments(np.zeros(2), np.eye(2), np.zeros(2), np.eye(3))
    with pytest.raises(InputError, match="two rows"):
        inspect.unwrap(metrics.real_statistics)(features[:1])
    with pytest.raises(InputError, match="one width"):
        inspect.unwrap(metrics.fid_and_kid)(features[:, :2], metrics.real_statistics(features))
    with pytest.raises(InputError, match="within 0 to 9"):
        entropy(np.array([3, 10]), 10)
    with pytest.raises(InputError, match="at least one integer"):
        entropy(np.array([]), 10)
