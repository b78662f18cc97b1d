"""What tests in several folders share: compiled programs, a codec of random weights, and a small MNIST."""

import contextlib
import io
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Share compiled programs between the tests of this session, in whatever process; and bytecode, where none is."""
    workers = tmp_path_factory.getbasetemp().parent  # shared, for each has a folder there
    cache = workers / "compiled" if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("compiled")
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # each process would compile all modules that it imports
        os.environ["PYTHONPYCACHEPREFIX"] = str(cache / "bytecode")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def hurried():
    """`with hurried():` compiles in half of the time, without most optimizations; programs round otherwise then."""
    import jax

    @contextlib.contextmanager
    def compile_fast():
        before = jax.config.read("jax_disable_most_optimizations")
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()

    return compile_fast


@pytest.fixture(scope="module")
def compile_fast(hurried):
    """For a module whose programs run a few times and are compared with none of another module."""
    with hurried():
        yield


@pytest.fixture(scope="session")
def random_codec():
    """`random_codec(seed=0, tokens={}, **network)`: 8 kHz, 64 samples a code frame, 8 codes of 4 values, untrained."""
    import jax
    import numpy as np

    from meanflow_audio_codec.codec import Codec, build_model

    mdct = {"name": "mdct", "hop_length": 32, "group": 1, "window": "sine", "exponent": 0.5, "eps": 1e-4}

    def make(seed=0, tokens=None, **network):
        rng = np.random.default_rng(seed)
        network = {"variant": "mu", "latent_dim": 8, "fsq_levels": 4, "downsample": 2} | network
        config = {"objective": "improved_mean_flow", "sample_rate": 8000, "tokens": mdct | (tokens or {})}
        config["model"] = network
        model = build_model(config)
        example = np.zeros((1, 2 * network["downsample"], 32), np.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
        leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
        arrays = {"scale": np.linspace(0.3, 0.05, 32, dtype=np.float32)}
        for path, leaf in leaves:  # of unit gain, none at zero; 16 bits, as in a bundle
            gain = leaf.shape[0] ** -0.5 if len(leaf.shape) == 2 else 1.0
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            values = gain * rng.normal(size=leaf.shape)
            arrays[name] = (np.round(256 * values) / 256 if "level" in name else values).astype(np.float16)
        return Codec(f"random_{seed}", config, arrays)

    return make


@pytest.fixture(scope="session")
def write_mnist():
    """`write_mnist(data_dir, {split: (images uint8 [n, 28, 28], labels)})` writes what TFDS calls MNIST.

    30 examples a file, so that more are several files.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    from PIL import Image

    def write(data_dir, splits):
        features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
        folder = Path(data_dir, "mnist", "3.0.1")
        folder.mkdir(parents=True)
        identity = tfds.core.DatasetIdentity(
            name="mnist", version=tfds.core.Version("3.0.1"), data_dir=str(folder), module_name="test"
        )
        info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
        writer = tfds.core.SequentialWriter(
            info, max_examples_per_shard=30, overwrite=False, file_format="array_record"
        )
        writer.initialize_splits(list(splits))
        for split, (images, labels) in splits.items():
            for image, label in zip(images, labels, strict=True):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                png.seek(0)
                writer.add_examples({split: [{"image": png, "label": int(label)}]})
        writer.close_all()

    return write


@pytest.fixture(scope="session")
def digits(write_mnist, tmp_path_factory):
    """A folder of 60 training and 40 test images of ten classes, each a bright row at its label's height on noise."""
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(count):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 4 + 2 * labels] = 255
        return images, labels

    data_dir = tmp_path_factory.mktemp("digits")
    write_mnist(data_dir, {"train": draw(60), "test": draw(40)})
    return data_dir
