"""The evaluators with fake networks: what they ask for, what they score, what they write."""

import json

import jax
import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import common, reconstruction, sampling, validation

RATE, SAMPLES = 8000, 2400
STATE = type("State", (), {"step": np.int32(7)})()


def music(num_clips, channels=1):
    rng = np.random.default_rng(0)
    return (0.3 * rng.normal(size=(num_clips, SAMPLES, channels))).astype(np.float32)


class Network:
    """Fake `predict_fns` that remember how they were called."""

    def __init__(self, decode=lambda audio, nfe: audio, losses=()):
        self.decode, self.losses, self.calls = decode, iter(losses), []

    def reconstruct(self, state, batch, seeds, nfe, *kept):
        audio = batch["audio"]
        self.calls.append((len(audio), seeds.tolist(), nfe, *kept))
        decoded = self.decode(np.asarray(audio), nfe)
        return decoded, np.mean((decoded - audio) ** 2, axis=(1, 2))

    def loss(self, state, batch, rng):
        audio = batch["audio"]
        self.calls.append((len(audio), jax.random.key_data(rng).tolist(), float(audio.sum())))
        return next(self.losses)


def context(network, workdir="", channels=1, batch_size=2):
    def examples(num_clips, seconds):
        assert seconds == 0.3
        return {"audio": music(num_clips, channels)}, [f"clip {i}" for i in range(num_clips)]

    predict_fns = {"reconstruct": network.reconstruct, "loss": network.loss}
    return common.Context(predict_fns, examples, RATE, batch_size, workdir, None, None)


def reconstruct(network, nfe=(1,), autoencoder="", num_clips=3, channels=1, kept=()):
    there = context(network, channels=channels)
    return dict(reconstruction.Evaluator(there, num_clips, 0.3, nfe, autoencoder, kept).run(STATE))


def silence(audio, nfe):
    return np.zeros_like(audio)


# --- validation


def test_validation_averages_over_its_batches():
    network = Network(losses=[{"loss": np.float32(1), "u_mse": np.float32(4)}, {"loss": 2.0, "u_mse": 0.0}])
    scores = dict(validation.Evaluator(context(network), batches=2, seconds=0.3).run(STATE))
    assert scores == {"val/loss": 1.5, "val/u_mse": 2.0}
    assert all(type(value) is float for value in scores.values())
    assert [size for size, _, _ in network.calls] == [2, 2]


def test_validation_repeats_its_clips_and_its_noise():
    """Every batch has its own, and the next run the same ones."""
    network = Network(losses=[{"loss": 1.0}] * 4)
    evaluator = validation.Evaluator(context(network), batches=2, seconds=0.3)
    for _ in range(2):
        list(evaluator.run(STATE))
    first, second = network.calls[:2], network.calls[2:]
    assert first == second
    (_, key, audio), (_, other_key, other_audio) = first
    assert key != other_key and audio != other_audio


def test_validation_weighs_a_quarter_of_t_by_its_rows():
    """An error over no rows is 0 with share 0 and must not count; with no rows at all it stays 0."""
    rows = [
        {"v_mse_t0_25": 0.0, "v_share_t0_25": 0.0, "v_mse_t25_50": 3.0, "v_share_t25_50": 0.25, "v_mse_t50_75": 0.0},
        {"v_mse_t0_25": 4.0, "v_share_t0_25": 0.5, "v_mse_t25_50": 1.0, "v_share_t25_50": 0.75, "v_mse_t50_75": 0.0},
    ]
    rows = [row | {"v_share_t50_75": 0.0} for row in rows]
    scores = dict(validation.Evaluator(context(Network(losses=rows)), batches=2, seconds=0.3).run(STATE))
    assert scores["val/v_mse_t0_25"] == pytest.approx(4.0)
    assert scores["val/v_mse_t25_50"] == pytest.approx((3 * 0.25 + 1 * 0.75) / 1)
    assert scores["val/v_mse_t50_75"] == 0
    assert scores["val/v_share_t0_25"] == pytest.approx(0.25)


# --- reconstruction


def test_perfect_decoder():
    scores = reconstruct(Network(), nfe=(1, 4))
    for nfe in (1, 4):
        assert scores[f"reconstruction/x_mse_nfe{nfe}"] == 0
        assert scores[f"reconstruction/si_sdr_db_nfe{nfe}"] == 100  # the metric's limit
        assert scores[f"reconstruction/mel_distance_nfe{nfe}"] == 0
        assert scores[f"reconstruction/lsd_db_nfe{nfe}"] == 0
    assert not any("mse_ratio" in name for name in scores)


def test_silent_decoder():
    scores = reconstruct(Network(silence))
    np.testing.assert_allclose(scores["reconstruction/x_mse_nfe1"], np.mean(music(3) ** 2), rtol=1e-5)
    assert scores["reconstruction/si_sdr_db_nfe1"] == -100
    assert all(np.isfinite(value) for value in scores.values())


def test_each_nfe_gets_its_own_scores_and_every_clip_counts():
    """At nfe decoding is `nfe` times as far off, in one of three clips of which the last batch holds one."""

    def decode(audio, nfe):
        decoded = audio.copy()
        if len(audio) == 1:
            decoded += nfe
        return decoded

    network = Network(decode)
    scores = reconstruct(network, nfe=(1, 2))
    np.testing.assert_allclose(scores["reconstruction/x_mse_nfe1"], 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(scores["reconstruction/x_mse_nfe2"], 4 / 3, rtol=1e-5)
    assert [(size, nfe) for size, _, nfe in network.calls] == [(2, 1), (1, 1), (2, 2), (1, 2)]
    assert [seeds for _, seeds, _ in network.calls] == [[0, 1], [2]] * 2  # each clip has its own noise, always the same


def test_lower_bitrates_have_groups_of_their_own():
    network = Network(lambda audio, nfe: audio + 1)
    scores = reconstruct(network, kept=(8, 16))
    for group in ("reconstruction", "reconstruction_8", "reconstruction_16"):
        np.testing.assert_allclose(scores[f"{group}/x_mse_nfe1"], 1, rtol=1e-5)
    assert [kept for _, _, _, *kept in network.calls] == [[], [], [8], [8], [16], [16]]


def test_channels_are_scored_apart():
    """Swapping the channels of a stereo clip is no perfect reconstruction."""
    scores = reconstruct(Network(lambda audio, nfe: audio[..., ::-1]), channels=2)
    assert scores["reconstruction/si_sdr_db_nfe1"] < 0


@pytest.fixture
def autoencoder(tmp_path):
    """The workdir of an autoencoder whose newest error is 0.03, on other lines as well."""
    rows = [
        {"step": 10, "train/loss": 1.0},
        {"step": 10, "reconstruction/x_mse_nfe1": 0.5},
        {"step": 20, "reconstruction/x_mse_nfe1": 0.03},
        {"step": 21, "train/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def test_mse_ratio_to_the_autoencoder(autoencoder):
    scores = reconstruct(Network(silence), nfe=(1, 2), autoencoder=autoencoder)
    for nfe in (1, 2):
        ratio = scores[f"reconstruction/x_mse_nfe{nfe}"] / 0.03
        assert scores[f"reconstruction/mse_ratio_nfe{nfe}"] == pytest.approx(ratio)


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "train/loss": 1.0}\n'])
def test_autoencoder_without_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match="evals.reconstruction.autoencoder: .*metrics.jsonl"):
        reconstruct(Network(), autoencoder=str(tmp_path))


def test_autoencoder_that_was_killed(autoencoder, tmp_path):
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "recon')
    assert "reconstruction/mse_ratio_nfe1" in reconstruct(Network(silence), autoencoder=autoencoder)


# --- sampling


@pytest.mark.parametrize("channels", [1, 2])
def test_sampling_writes_what_can_be_heard_and_seen(tmp_path, channels):
    network = Network(lambda audio, nfe: 0.5 * nfe * audio)
    evaluator = sampling.Evaluator(context(network, tmp_path, channels), 2, 0.3, (1, 16))
    assert list(evaluator.run(STATE)) == []
    folder = tmp_path / "samples" / "7"
    labels = ("reference.wav", "nfe01.wav", "nfe16.wav")
    names = {f"0{i}_{label}" for i in (0, 1) for label in labels} | {"00.png", "01.png"}
    assert {path.name for path in folder.iterdir()} == names
    audio = music(2, channels)
    for i in (0, 1):
        for label, gain in zip(labels, (1, 0.5, 8), strict=True):
            written, rate = soundfile.read(folder / f"0{i}_{label}", always_2d=True)
            assert rate == RATE
            np.testing.assert_allclose(written, np.clip(gain * audio[i], -1, 1), atol=2 / 32768)  # no wrap-around
        assert (folder / f"0{i}.png").read_bytes().startswith(b"\x89PNG")


# --- configs


def test_from_config_builds_each_type_without_its_schedule(tmp_path):
    when = {"first_steps": 1, "every_epochs": 2.0}
    evals = ConfigDict(
        {
            "a": {"type": "validation", "batches": 1, "seconds": 0.3} | when,
            "b": {"type": "reconstruction", "num_clips": 1, "seconds": 0.3, "nfe": (1,), "autoencoder": ""} | when,
            "c": {"type": "sampling", "num_clips": 1, "seconds": 0.3, "nfe": (1,)} | when,
            "e": {"type": "cost", "num_examples": 1, "seconds": 0.3, "nfe": (1,)} | when,
        }
    )
    built = list(common.from_config(evals, context(Network(), tmp_path)))
    types = [name for name in common.TYPES if name not in ("tones", "images")]  # which want other examples
    assert [type(evaluator).__module__.rpartition(".")[2] for _, evaluator in built] == types
    assert [spec.type for spec, _ in built] == types
    assert not list(tmp_path.iterdir())  # nothing is written before the first run


def test_unknown_type_is_refused():
    evals = ConfigDict({"mine": {"type": "listening", "every_steps": 1}})
    with pytest.raises(InputError, match="evals.mine.type is 'listening'; choose one of validation"):
        list(common.from_config(evals, context(Network())))


@pytest.mark.parametrize("spec", [{"batches": 1, "seconds": 0.3, "clips": 3}, {"seconds": 0.3}])
def test_unknown_or_missing_field_is_refused(spec):
    with pytest.raises(InputError, match="evals.mine"):
        list(common.from_config(ConfigDict({"mine": {"type": "validation"} | spec}), context(Network())))
