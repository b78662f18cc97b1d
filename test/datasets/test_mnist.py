"""The MNIST stream: every example once an epoch, exact resume, shards; damaged data is named. On a data set of 70."""

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from meanflow_audio_codec.datasets.mnist import build_mnist_pipeline, load_mnist
from meanflow_audio_codec.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 50, "test": 20}
VERSION = Path("mnist", "3.0.1")


def picture(split, i):
    """Image i, whose first pixel is i and whose next two are the ends of the range."""
    image = np.random.default_rng([len(split), i]).integers(0, 256, (28, 28), dtype=np.uint8)
    image[0, :3] = i, 0, 255
    return image


def pictures(split):
    return np.stack([picture(split, i) for i in range(COUNTS[split])])[..., None]


def label(i):
    return 7 * i % 10


@pytest.fixture(scope="module")
def mnist(write_mnist, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("mnist")
    splits = {split: [picture(split, i) for i in range(count)] for split, count in COUNTS.items()}
    write_mnist(data_dir, {split: (images, map(label, range(len(images)))) for split, images in splits.items()})
    return data_dir


@pytest.fixture
def copy(mnist, tmp_path):
    """The data set, to be damaged."""
    return Path(shutil.copytree(mnist, tmp_path / "co py"))


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


def numbers(batches):
    """Which examples the batches hold, checked to be those to the last pixel."""
    images = np.concatenate([batch["image"] for batch in batches])
    found = np.rint((images[:, 0, 0, 0] + 1) * 127.5).astype(int)
    np.testing.assert_allclose(images, pictures("train")[found] / 127.5 - 1, rtol=0, atol=1e-7)  # float32
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in batches]), label(found))
    return found


@pytest.mark.parametrize("split", COUNTS)
def test_loads_a_split_in_order_and_in_range(mnist, split):
    images, labels = load_mnist(mnist, split)
    assert images.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_allclose(images, pictures(split) / 127.5 - 1, rtol=0, atol=1e-7)  # float32
    assert (images[:, 0, 1] == -1.0).all() and (images[:, 0, 2] == 1.0).all()
    np.testing.assert_array_equal(labels, label(np.arange(COUNTS[split])))


def test_loads_a_part(mnist):
    images, labels = load_mnist(str(mnist), "train[25:]")
    np.testing.assert_array_equal(numbers([{"image": images, "label": labels}]), np.arange(25, 50))
    batch = take(build_mnist_pipeline(data_dir=mnist, split="train[:5]", batch_size=5, seed=0), 1)
    assert sorted(numbers(batch)) == list(range(5))


def test_batches_are_of_the_shape_asked(mnist):
    for batch in take(build_mnist_pipeline(data_dir=mnist, batch_size=8, seed=0), 10):
        assert batch["image"].shape == (8, 28, 28, 1) and batch["image"].dtype == np.float32
        assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
        assert np.abs(batch["image"]).max() == 1.0


@pytest.mark.parametrize("batch_size", [1, 7, 50, 120])
def test_an_epoch_has_every_example_once(mnist, batch_size):
    batches = take(build_mnist_pipeline(data_dir=mnist, batch_size=batch_size, seed=3), -(-200 // batch_size))
    epochs = numbers(batches)[:200].reshape(4, 50)
    assert (np.sort(epochs) == np.arange(50)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order(mnist):
    def order(seed):
        return numbers(take(build_mnist_pipeline(data_dir=mnist, batch_size=50, seed=seed), 2)).tolist()

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("shard_count", [2, 3])
def test_shards_partition_the_stream(mnist, shard_count):
    def stream(batch_size, **shard):
        return numbers(take(build_mnist_pipeline(data_dir=mnist, batch_size=batch_size, seed=0, **shard), 20))

    shards = [stream(4, shard_index=i, shard_count=shard_count) for i in range(shard_count)]
    np.testing.assert_array_equal(np.stack(shards, axis=1).ravel(), stream(4 * shard_count))


def test_resumes_bit_for_bit(mnist):
    def build():
        return iter(build_mnist_pipeline(data_dir=mnist, batch_size=9, seed=0, shard_index=1, shard_count=2))

    iterator = build()
    for _ in range(8):  # into the third epoch
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(8)]
    resumed = build()
    resumed.set_state(json.loads(state))
    for batch in expected:
        found = next(resumed)
        np.testing.assert_array_equal(found["image"], batch["image"])
        np.testing.assert_array_equal(found["label"], batch["label"])


def test_reading_never_needs_tensorflow(mnist):
    script = (
        "import sys\n"
        "from meanflow_audio_codec.datasets import mnist\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "next(iter(mnist.build_mnist_pipeline(data_dir=sys.argv[1], batch_size=2, seed=0)))\n"
        "assert mnist.load_mnist(sys.argv[1], 'test')[0].shape == (20, 28, 28, 1)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script, mnist], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def fails(match, data_dir, **settings):
    with pytest.raises(InputError, match=match) as error:
        build_mnist_pipeline(**(dict(data_dir=data_dir, batch_size=2, seed=0) | settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_fields_are_named(mnist):
    fails("input.batch_size=0", mnist, batch_size=0)
    fails("seed=-1", mnist, seed=-1)
    fails("input.split='valid'.*'train', 'test'", mnist, split="valid")
    fails(r"input.split='train\[:99\]'.*50 examples", mnist, split="train[:99]")
    fails(r"input.split='train\[:0\]'", mnist, split="train[:0]")


def test_a_folder_without_mnist_is_told_how_to_get_it(tmp_path):
    for folder in (tmp_path, tmp_path / "no where"):
        message = fails("holds no MNIST", folder)
        command = message.partition(": run ")[2]
        assert shlex.split(command) == [
            *"python -m meanflow_audio_codec.tools.prepare_mnist --output-dir".split(),
            str(folder),
        ]


def test_another_format_is_refused(copy):
    info = copy / VERSION / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    fails("format tfrecord, of array_record needed", copy)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "no information", "wrong information"])
def test_damage_is_found(copy, damage):
    shard = copy / VERSION / "mnist-train.array_record-00001"
    information = copy / VERSION / "dataset_info.json"
    content = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(content[:-100])
    elif damage == "flipped":
        content[10000] ^= 1
        shard.write_bytes(content)
    else:
        information.write_text({"no information": "", "wrong information": "{}"}[damage])
    message = fails("3.0.1 is damaged .*: remove it, then run ", copy)
    assert message.endswith(f"--output-dir '{copy}'")
