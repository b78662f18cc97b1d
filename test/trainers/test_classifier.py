"""The classifier of MNIST, trained by the program on toy digits, resumed, and loaded to score images."""

import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from meanflow_audio_codec.datasets.mnist import load_mnist
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools.train import main
from meanflow_audio_codec.trainers.train import load_classifier

pytestmark = pytest.mark.usefixtures("compile_fast")
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "mnist_classifier.py"
STEPS = 60  # of 16 images: 16 epochs of the toy digits
SMALL = {
    "total_steps": STEPS,
    "log_steps": 20,
    "checkpoint_steps": 20,
    "evals.validation.every_steps": 20,
    "optimizer.lr": 0.005,
    "model.width": 8,
    "model.num_features": 12,
    "evals.validation.batches": 2,
}


def train(workdir, data_dir):
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    main(["--config", f"{CONFIG}:data_dir={data_dir},runlocal", "--workdir", str(workdir), *flags])


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(workdir):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(STEPS) / "state")


@pytest.fixture(scope="module")
def workdir(digits, tmp_path_factory):
    """That of a finished run."""
    workdir = tmp_path_factory.mktemp("classifier") / "run"
    train(workdir, digits)
    return workdir


def test_it_learns_the_digits(workdir):
    """A tenth is right by chance."""
    rows = read(workdir)
    train_rows = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train_rows] == [20, 40, 60]
    assert train_rows[-1]["train/loss"] < 0.5 * train_rows[0]["train/loss"]
    assert rows[-1]["val/accuracy_percent"] > 80
    assert "classification, " in (workdir / "train.log").read_text()


def test_it_classifies_images_and_shows_their_features(workdir, digits):
    classify = load_classifier(str(workdir))
    images, labels = load_mnist(digits, "test")
    logits, features = classify(images)
    assert logits.shape == (40, 10) and features.shape == (40, 12)
    right = np.asarray(logits).argmax(axis=-1) == labels
    assert right.mean() > 0.8
    held_out = np.arange(32) * 40 // 32  # two batches of 16, evenly
    assert read(workdir)[-1]["val/accuracy_percent"] == pytest.approx(100 * right[held_out].mean(), rel=1e-5)


def test_it_resumes(workdir, digits, tmp_path):
    again = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    train(again, digits)
    assert (again / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, final_state(again), final_state(workdir))


def test_a_folder_without_a_classifier_is_refused(workdir, tmp_path):
    with pytest.raises(InputError, match=f"classifier: {tmp_path} holds no run; train one by configs/mnist_cla"):
        load_classifier(str(tmp_path))
    config = json.loads((workdir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"classifier: no complete checkpoint in {tmp_path}"):
        load_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"objective": {"name": "mean_flow"}}))
    with pytest.raises(InputError, match=f"classifier: {tmp_path} holds no classifier"):
        load_classifier(str(tmp_path))


def test_a_classifier_is_no_flow(tmp_path, digits):
    flag = "--config.objective.name=mean_flow"
    with pytest.raises(SystemExit, match="objective.name is 'mean_flow': a classifier has no tokens"):
        main(["--config", f"{CONFIG}:data_dir={digits}", "--workdir", str(tmp_path / "run"), flag])
    assert not (tmp_path / "run").exists()
