"""inputs.py: batches, held-out examples and their words, of 60 + 40 toy digits and of audio."""

import itertools
import pathlib

import numpy as np
import pytest
import soundfile
from etils import epath

from meanflow_audio_codec.configuration import load_config, override_from_flags
from meanflow_audio_codec.datasets.inputs import INPUTS, AudioInput, MnistInput, signals
from meanflow_audio_codec.datasets.mnist import load_mnist
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.preprocessing.tokenizers import MdctTokenizer, ReshapeTokenizer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TOKENIZERS = {"mdct": MdctTokenizer(hop_length=112, group=1), "reshape": ReshapeTokenizer(hop_length=112)}


def open_mnist(data_dir, tokens="mdct", **fields):
    config = load_config(f"{CONFIGS / 'mnist.py'}:data_dir={data_dir},tokens={tokens},runlocal")
    config = override_from_flags(config, [f"--config.{name}={value}" for name, value in fields.items()])
    return MnistInput(config, TOKENIZERS[tokens], epath.Path("unused"), None)


def open_audio(tmp_path, **fields):
    config = override_from_flags(
        load_config(f"{CONFIGS / 'meanflow_mdct.py'}:runlocal"),
        [f"--config.{name}={value}" for name, value in fields.items()],
    )
    return AudioInput(config, MdctTokenizer(hop_length=128, group=2), epath.Path(tmp_path), None)


@pytest.fixture(scope="module")
def mnist(digits):
    return open_mnist(digits)


def take(source, seed, count=5):
    return list(itertools.islice(iter(source.stream(seed)), count))


# --- MNIST


def test_batches_are_what_is_announced(mnist):
    assert set(mnist.batch) == {"image", "label"}
    for batch in take(mnist, seed=0):
        assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
            name: (like.shape, like.dtype) for name, like in mnist.batch.items()
        }
    assert mnist.batch["image"].shape == (16, 28, 28, 1)


def test_stream_is_a_function_of_the_seed(mnist):
    labels = [np.stack([batch["label"] for batch in take(mnist, seed)]) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()


def test_held_out_examples_come_evenly_from_the_test_images(mnist, digits):
    images, labels = load_mnist(digits, "test")
    batch, names = mnist.examples(8)
    np.testing.assert_array_equal(batch["image"], images[::5])
    np.testing.assert_array_equal(batch["label"], labels[::5])
    assert names == [f"{label}, test image {5 * i}" for i, label in enumerate(labels[::5])]
    _, names = mnist.examples(3)  # does not divide 40
    assert [name.split()[-1] for name in names] == ["0", "13", "26"]


def test_all_examples(mnist, digits):
    images, labels = load_mnist(digits, "test")
    for num in (None, 40):
        batch, names = mnist.examples(num)
        np.testing.assert_array_equal(batch["image"], images)
        np.testing.assert_array_equal(batch["label"], labels)
        assert len(set(names)) == 40


@pytest.mark.parametrize("num", [0, 41])
def test_as_many_examples_as_there_are(mnist, num):
    with pytest.raises(InputError, match=f"{num} images asked for of 40 test images"):
        mnist.examples(num)


@pytest.mark.parametrize(("batch_size", "steps"), [(16, 3), (60, 1), (100, 1)])
def test_steps_of_an_epoch(digits, batch_size, steps):
    assert open_mnist(digits, **{"input.batch_size": batch_size}).steps_per_epoch == steps


@pytest.mark.parametrize(
    ("tokens", "downsample", "line"),
    [("mdct", 8, "24 bits/image"), ("mdct", 4, "48 bits/image"), ("reshape", 7, "24 bits/image")],
)
def test_rate_of_an_image(digits, tokens, downsample, line):
    """8 values of 8 levels for each of the latents, whose number is that of the tokens over `downsample`."""
    assert open_mnist(digits, tokens, **{"model.downsample": downsample}).rate(8 * 3.0) == line


@pytest.mark.parametrize(("tokens", "downsample", "count"), [("mdct", 7, 8), ("reshape", 8, 7)])
def test_latents_must_fill_an_image(digits, tokens, downsample, count):
    message = f"model.downsample={downsample} does not divide an image's {count} tokens"
    with pytest.raises(InputError, match=message):
        open_mnist(digits, tokens, **{"model.downsample": downsample})


def test_a_classifier_needs_no_tokens(digits):
    config = load_config(f"{CONFIGS / 'mnist_classifier.py'}:data_dir={digits},runlocal")
    source = MnistInput(config, None, epath.Path("unused"), None)
    assert source.batch["label"].shape == (16,)
    assert source.describe() == f"MNIST in {digits}"


# --- audio


def test_synthetic_music(tmp_path):
    source = open_audio(tmp_path)
    assert source.describe().startswith("built-in synthetic music")
    assert source.steps_per_epoch is None
    source.save(epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())  # there are no files to write down


def test_rate_of_audio(tmp_path):
    """24 kHz in steps of 256 samples, two to a latent of 64 values of 4 levels: 46.875 latents/s of 128 bits."""
    assert open_audio(tmp_path).rate(64 * 2.0) == "93.75 tokens/s, 6.00 kbps"


def test_clips_have_a_number_and_a_length(tmp_path):
    source = open_audio(tmp_path)
    batch, names = source.examples(2, 0.1)
    # 9.375 tokens of 256 samples, to whole latents of two: 10, whose last frame is half outside.
    assert batch["audio"].shape == (2, 10 * 256 - 128, 1)
    assert len(set(names)) == 2
    for wrong in ((2,), (2, None), (None, 0.1)):
        with pytest.raises(InputError, match="a number of clips of some seconds; give both"):
            source.examples(*wrong)


def test_latents_must_fill_a_crop(tmp_path):
    with pytest.raises(InputError, match="input.num_tokens=7 is not a positive multiple of model.downsample"):
        open_audio(tmp_path, **{"input.num_tokens": 7})


def test_a_folder_of_audio_is_described_and_written_down(tmp_path):
    (tmp_path / "music").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).normal(0, 0.1, 2 * 24_000)
        soundfile.write(tmp_path / "music" / f"{i}.wav", noise, 24_000)
    source = open_audio(tmp_path, **{"input.data_dir": tmp_path / "music", "input.num_tokens": 8})
    assert source.describe() == f"{tmp_path / 'music'}: 2 files, 0.00 h to train; 1 files, 0.00 h to validate"
    source.save(epath.Path(tmp_path))
    assert len((tmp_path / "files.jsonl").read_text().splitlines()) >= 3


# --- both


def test_signals_are_audio_or_pixels_row_by_row():
    audio = np.ones((2, 5, 1))
    assert signals({"audio": audio}) is audio
    image = np.arange(2 * 28 * 28.0).reshape(2, 28, 28, 1)
    signal = signals({"image": image, "label": np.zeros(2)})
    assert signal.shape == (2, *MnistInput.segment)
    np.testing.assert_array_equal(signal[1, 28:56, 0], image[1, 1, :, 0])
    np.testing.assert_array_equal(signal.reshape(image.shape), image)


def test_inputs_have_the_names_of_the_configs():
    names = {name: load_config(str(CONFIGS / f"{name}.py")).input.name for name in ("meanflow_mdct", "mnist")}
    assert INPUTS == {names["meanflow_mdct"]: AudioInput, names["mnist"]: MnistInput}
