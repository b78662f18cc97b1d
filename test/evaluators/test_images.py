"""The images evaluator with a fake network and a fake classifier: what is asked, scored and drawn."""

import itertools

import numpy as np
import pytest
from PIL import Image

from meanflow_audio_codec.evaluators import common, images

STATE = type("State", (), {"step": np.int32(7)})()
NUM, BATCH_SIZE = 40, 16
LABELS = (np.arange(NUM) % 10).astype(np.int32)


def draw_digits():
    """Each a bright row at its label's height on noise."""
    digits = np.random.default_rng(0).uniform(-1, -0.5, (NUM, 28, 28, 1)).astype(np.float32)
    digits[np.arange(NUM), 4 + 2 * LABELS] = 1
    return digits


DIGITS = draw_digits()


class Network:
    """Fake `predict_fns`, and examples, that remember how they were called."""

    def __init__(self, decode=lambda image, label, nfe: image):
        self.decode, self.calls, self.classified = decode, [], []

    def reconstruct(self, state, batch, seeds, nfe):
        assert state is STATE
        self.calls.append((seeds.tolist(), nfe))
        decoded = self.decode(batch["image"], batch["label"], nfe)
        x_mse = np.mean((decoded - batch["image"]) ** 2, axis=(1, 2, 3))
        return decoded.reshape(-1, 784, 1), x_mse

    def examples(self, num, seconds=None):
        assert seconds is None
        chosen = np.arange(NUM if num is None else num)
        return {"image": DIGITS[chosen], "label": LABELS[chosen]}, [f"image {i}" for i in chosen]

    def load_classifier(self, workdir):
        """See the brightest row as the class, and the means of six stripes as the features."""
        assert workdir == "classifier"

        def classify(image):
            self.classified.append(len(image))
            stripes = image[:, :, :, 0].mean(axis=2)
            return stripes[:, 4:24:2], stripes[:, :24].reshape(-1, 6, 4).mean(axis=2)

        return classify


def context(network, workdir="unused"):
    predict_fns = {"reconstruct": network.reconstruct}
    return common.Context(predict_fns, network.examples, 784, BATCH_SIZE, workdir, None, network.load_classifier)


def score(network, nfe=(1,), classifier="", num_images=NUM, workdir="unused", draw=False):
    evaluator = images.Evaluator(context(network, workdir), num_images, nfe, classifier, draw)
    rows = list(evaluator.run(STATE))
    assert all(type(value) is float and np.isfinite(value) for _, value in rows)
    assert len({name for name, _ in rows}) == len(rows)
    return {name.removeprefix("images/"): value for name, value in rows}


def test_perfect_decoder():
    scores = score(Network(), nfe=(1, 4), classifier="classifier")
    for nfe in (1, 4):
        assert scores[f"mse_nfe{nfe}"] == scores[f"x_mse_nfe{nfe}"] == 0
        assert scores[f"psnr_db_nfe{nfe}"] == 100  # the metric's limit
        assert scores[f"ssim_nfe{nfe}"] == pytest.approx(1)
        assert scores[f"accuracy_percent_nfe{nfe}"] == 100
        assert scores[f"mode_entropy_bits_nfe{nfe}"] == pytest.approx(np.log2(10))
        assert scores[f"fid_nfe{nfe}"] < 1e-8  # all test images, against themselves
        assert scores[f"fid_low_nfe{nfe}"] <= scores[f"fid_nfe{nfe}"] <= scores[f"fid_high_nfe{nfe}"]
        assert scores[f"kid_low_nfe{nfe}"] <= scores[f"kid_nfe{nfe}"] <= scores[f"kid_high_nfe{nfe}"]


def test_decoder_of_one_digit_has_no_variety():
    """All images are the first of the threes: a tenth is right, one mode, and the features have no variance.

    Then FID is the squared distance of the means and the variance of the real features.
    """
    network = Network(lambda image, label, nfe: np.repeat(DIGITS[3:4], len(image), axis=0))
    scores = score(network, classifier="classifier")
    assert scores["accuracy_percent_nfe1"] == pytest.approx(10)
    assert scores["mode_entropy_bits_nfe1"] == 0
    features = DIGITS[:, :24, :, 0].reshape(NUM, 6, 4, 28).mean(axis=(2, 3)).astype(float)
    expected = np.sum((features.mean(0) - features[3]) ** 2) + features.var(0, ddof=1).sum()
    assert scores["fid_nfe1"] == pytest.approx(expected, rel=1e-5)


def test_distribution_is_that_of_all_test_images():
    """Ten images decode to themselves: their features are held against those of all 40."""
    network = Network()
    scores = score(network, num_images=10, classifier="classifier")
    assert network.classified == [NUM, 10]
    assert scores["mse_nfe1"] == 0 and scores["fid_nfe1"] > 0


def test_each_nfe_gets_its_own_scores():
    """At nfe decoding is nfe / 8 too bright; what leaves the range of an image is cut off, but not in the tokens."""
    scores = score(Network(lambda image, label, nfe: image + nfe / 8), nfe=(1, 2, 4))
    for nfe in (1, 2, 4):
        inside = np.minimum(DIGITS + nfe / 8, 1)
        errors = np.mean((inside - DIGITS) ** 2, axis=(1, 2, 3))
        assert scores[f"mse_nfe{nfe}"] == pytest.approx(errors.mean(), rel=1e-5)
        assert scores[f"psnr_db_nfe{nfe}"] == pytest.approx(np.mean(10 * np.log10(4 / errors)), rel=1e-5)
        assert scores[f"x_mse_nfe{nfe}"] == pytest.approx((nfe / 8) ** 2, rel=1e-5)
    assert 1 > scores["ssim_nfe1"] > scores["ssim_nfe2"] > scores["ssim_nfe4"]


def test_names_without_a_classifier():
    scores = score(Network(), nfe=(1, 50))
    assert set(scores) == {f"{name}_nfe{nfe}" for name in ("mse", "psnr_db", "ssim", "x_mse") for nfe in (1, 50)}


def test_names_with_a_classifier():
    distances = [f"{name}{end}" for name in ("fid", "kid") for end in ("", "_low", "_high")]
    names = {"mse", "psnr_db", "ssim", "x_mse", "accuracy_percent", "mode_entropy_bits", *distances}
    assert set(score(Network(), nfe=(2,), classifier="classifier")) == {f"{name}_nfe2" for name in names}


def test_noise_is_seeded_by_the_number_of_the_image():
    network = Network()
    score(network, nfe=(1, 4))
    numbers = [list(range(16)), list(range(16, 32)), list(range(32, 40))]
    assert network.calls == list(itertools.chain(*([(seeds, nfe) for seeds in numbers] for nfe in (1, 4))))


def test_accuracy_compares_with_the_label_that_the_decoder_was_given():
    """A generator that draws its label's digit, whatever the image, is right every time."""
    scores = score(Network(lambda image, label, nfe: DIGITS[label]), classifier="classifier")
    assert scores["accuracy_percent_nfe1"] == 100
    assert scores["mse_nfe1"] > 0


# --- the grid


def panels(path):
    """The size of the PNG, and its rows as gray images in [0, 1]: opaque, where all else but text is transparent."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"), float) / 255
    opaque = pixels[..., 3] == 1
    rows = opaque.mean(axis=1) > 0.5  # no title is so wide
    edges = np.flatnonzero(np.diff(rows.astype(int), prepend=0, append=0)).reshape(-1, 2)
    columns = opaque[rows].mean(axis=0) > 0.9
    first, last = np.flatnonzero(columns)[[0, -1]]
    return pixels.shape, [pixels[top:bottom, first : last + 1, 0] for top, bottom in edges]


@pytest.mark.parametrize(("num_images", "drawn"), [(NUM, 24), (10, 10)])
def test_grid_shows_a_row_of_images_for_each_nfe(num_images, drawn, tmp_path):
    """The last row is the negative of the others: dark where the first is bright."""
    network = Network(lambda image, label, nfe: -image if nfe == 2 else image)
    score(network, nfe=(1, 2), num_images=num_images, workdir=tmp_path, draw=True)
    assert [path.name for path in (tmp_path / "samples" / "7").iterdir()] == ["grid.png"]
    size, rows = panels(tmp_path / "samples" / "7" / "grid.png")
    assert size == (3 * 42, drawn * 40 + 90, 4)
    assert len(rows) == 3
    for row in rows:
        assert row.shape[1] / row.shape[0] == pytest.approx(drawn, rel=0.05)
    original, perfect, negative = rows
    np.testing.assert_allclose(perfect, original, atol=0.02)
    np.testing.assert_allclose(np.mean(negative), 1 - np.mean(original), atol=0.05)
    # The ink of image i lies at its label's height: white is -1, black 1.
    for i, cell in enumerate(np.array_split(original, drawn, axis=1)):
        darkest = cell.mean(axis=1).argmin() / len(cell) * 28
        assert darkest == pytest.approx(4 + 2 * LABELS[i] + 0.5, abs=1)


def test_nothing_is_written_unless_it_is_asked_for(tmp_path):
    score(Network(), workdir=tmp_path)
    assert not list(tmp_path.iterdir())
