"""The MDCT against its defining sum and scipy's DCT-IV; reconstruction and Parseval."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.signal
import soundfile

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.preprocessing.mdct import imdct, mdct, num_frames, window

SIZES = (40, 64, 128, 256, 512, 960, 1024, 2048)
WINDOWS = ("sine", "kbd")
VALID = Path(__file__).parents[2].parent / "shared" / "data" / "audio" / "valid"


def noise(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def direct_mdct(x, n, kind):
    """The double sum of the definition, in float64."""
    frames = num_frames(len(x), n)
    padded = np.zeros((frames + 1) * n)
    padded[n : n + len(x)] = x
    time, bins = np.arange(2 * n), np.arange(n)
    kernel = np.cos(np.pi / n * np.outer(time + 0.5 + n / 2, bins + 0.5))
    windowed = [window(n, kind) * padded[m * n : (m + 2) * n] for m in range(frames)]
    return np.sqrt(2 / n) * np.stack(windowed) @ kernel


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("n", [2, 16, 40, 128, 130, 256, 960])  # both sides of the matmul's limit
def test_equals_the_defining_sum(n, kind):
    with jax.enable_x64(True):
        x = noise(3 * n + 7, dtype=np.float64)
        coeffs = mdct(x, n, kind)
        assert coeffs.dtype == jnp.float64
        # The cosines of the sum lose digits to arguments of up to 2 pi N.
        assert relative_error(coeffs, direct_mdct(np.asarray(x), n, kind)) < 1e-12


@pytest.mark.parametrize("n", [64, 512])
def test_equals_scipy_dct_iv_of_the_folded_frame(n):
    x = np.asarray(noise(2 * n))  # frame 1 covers exactly these samples
    a, b, c, d = np.split(x * window(n), 4)
    folded = np.concatenate([-c[::-1] - d, a - b[::-1]])
    expected = scipy.fft.dct(folded, type=4, norm="ortho")
    assert relative_error(mdct(jnp.asarray(x), n)[1], expected) < 1e-6


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("n", SIZES)
def test_reconstruction_and_energy_in_float32(n, kind):
    """Gain 1; orthonormality makes the energy of the coefficients the signal's."""
    x = noise(3 * n + 7)
    coeffs = mdct(x, n, kind)
    assert coeffs.shape == (5, n) and coeffs.dtype == jnp.float32
    assert relative_error(imdct(coeffs, n, kind, length=x.size), x) < 1e-6
    energy = np.sum(np.square(np.asarray(coeffs, np.float64)))
    assert energy == pytest.approx(np.sum(np.square(np.asarray(x, np.float64))), rel=2e-6)


@pytest.mark.parametrize("n", [40, 256])
def test_any_length(n):
    for samples, frames in ((1, 2), (n - 1, 2), (n, 2), (n + 1, 3), (2 * n, 3)):
        x = noise(samples)
        coeffs = mdct(x, n)
        assert coeffs.shape == (frames, n) and num_frames(samples, n) == frames
        assert relative_error(imdct(coeffs, n, length=samples), x) < 1e-6


def test_empty_signal():
    coeffs = mdct(jnp.zeros((2, 0)), 16)
    assert coeffs.shape == (2, 1, 16)
    assert imdct(coeffs, 16, length=0).shape == (2, 0)


@pytest.mark.parametrize("n", [40, 256])
def test_transpose_is_the_inverse(n):
    """The gradient of ||mdct(x)||^2 / 2 is x; the pull-back of any coefficients is their imdct."""
    x = noise(3 * n + 7)
    gradient = jax.grad(lambda x: 0.5 * jnp.sum(jnp.square(mdct(x, n))))(x)
    assert relative_error(gradient, x) < 1e-6
    coeffs, pull_back = jax.vjp(lambda x: mdct(x, n), x)
    cotangent = noise(*coeffs.shape)
    assert relative_error(pull_back(cotangent)[0], imdct(cotangent, n, length=x.size)) < 1e-6


@pytest.mark.parametrize("n", [40, 256])
def test_leading_axes_vmap_and_jit_agree(n):
    x = noise(2, 3, 3 * n + 7)
    coeffs = mdct(x, n)
    assert coeffs.shape == (2, 3, 5, n)
    mapped = jax.jit(jax.vmap(jax.vmap(lambda x: mdct(x, n))))(x)
    np.testing.assert_allclose(mapped, coeffs, atol=1e-5)
    np.testing.assert_allclose(mdct(x[1, 2], n), coeffs[1, 2], atol=1e-5)
    np.testing.assert_allclose(imdct(coeffs, n, length=x.shape[-1]), x, atol=1e-5)


@pytest.mark.parametrize("kind", WINDOWS)
def test_frame_covers_its_2n_samples_and_no_more(kind):
    n = 32
    x = jnp.zeros(10 * n).at[5 * n].set(1.0)  # the first sample of block 5: frames 5 and 6
    energy = np.sum(np.square(mdct(x, n, kind)), axis=-1)
    assert set(np.flatnonzero(energy)) == {5, 6}


@pytest.mark.parametrize("n", [128, 256])
def test_sine_lands_in_its_bin(n):
    sample_rate, hz = 24_000, 1000.0
    x = jnp.asarray(np.sin(2 * np.pi * hz / sample_rate * np.arange(20 * n)), jnp.float32)
    energy = np.sum(np.square(mdct(x, n)[2:-2]), axis=0)  # frames without the edges of the signal
    bin_of_hz = int(hz / (sample_rate / 2) * n)
    # The main lobe of the sine window is three bins wide.
    assert energy[bin_of_hz - 1 : bin_of_hz + 2].sum() > 0.99 * energy.sum()
    assert abs(int(energy.argmax()) - bin_of_hz) <= 1


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("n", SIZES)
def test_window_is_symmetric_and_power_complementary(n, kind):
    w = window(n, kind)
    assert w.shape == (2 * n,) and w.dtype == np.float64 and not w.flags.writeable
    np.testing.assert_allclose(w, w[::-1], atol=1e-15)
    np.testing.assert_allclose(w[:n] ** 2 + w[n:] ** 2, 1, atol=1e-14)


def test_kbd_window_equals_scipy():
    expected = scipy.signal.windows.kaiser_bessel_derived(256, beta=4 * np.pi)
    np.testing.assert_allclose(window(128, "kbd"), expected, atol=1e-14)


def test_low_precision_input_is_computed_in_float32():
    x = noise(300).astype(jnp.bfloat16)
    coeffs = mdct(x, 256)
    assert coeffs.dtype == jnp.float32
    assert relative_error(imdct(coeffs, 256, length=300), x.astype(jnp.float32)) < 1e-6


def test_wrong_input_names_the_remedy():
    coeffs = jnp.zeros((3, 16))
    for hop_length in (0, -2, 15):
        with pytest.raises(InputError, match="even and positive"):
            mdct(jnp.zeros(40), hop_length)
    with pytest.raises(InputError, match="'sine' or 'kbd'"):
        window(16, "hann")
    with pytest.raises(InputError, match=r"length 33 is outside \[0, 32\]"):
        imdct(coeffs, 16, length=33)
    with pytest.raises(InputError, match="16 bins for hop_length 32"):
        imdct(coeffs, 32, length=16)


def test_reconstructs_music():
    if not VALID.is_dir():
        pytest.skip(f"no shared audio at {VALID}")
    audio, _ = soundfile.read(VALID / "music_sonicpi_loop_breakbeat.flac", dtype="float32")
    x = jnp.asarray(audio[:100_001].T)
    for n in (128, 1024):
        coeffs = mdct(x, n)
        assert relative_error(imdct(coeffs, n, length=x.shape[-1]), x) < 1e-6
        assert float(jnp.sum(coeffs**2) / jnp.sum(x**2)) == pytest.approx(1, rel=1e-5)
