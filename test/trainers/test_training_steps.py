"""training_steps.py: a step is a pure function of (state, batch); the noise of a frame is its own."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.configuration import load_config, override_from_flags
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.models.train_state import TrainState
from meanflow_audio_codec.preprocessing import scaling
from meanflow_audio_codec.preprocessing.tokenizers import MdctTokenizer
from meanflow_audio_codec.tools.train import main
from meanflow_audio_codec.trainers import flow, training_steps
from meanflow_audio_codec.trainers.objectives import OBJECTIVES
from meanflow_audio_codec.trainers.optimizers import make_optimizer

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "meanflow_mdct.py"
TINY = (
    *("tokens.hop_length=8", "tokens.group=1", "input.num_tokens=8", "input.batch_size=4"),
    *("model.variant=mu", "model.backbone=mlp", "model.latent_dim=4", "optimizer.lr=0.01", "optimizer.warmup_steps=1"),
)


@pytest.fixture(scope="module")
def config():
    config = load_config(f"{CONFIG}:runlocal")
    return override_from_flags(config, [f"--config.{flag}" for flag in TINY])


@pytest.fixture(scope="module")
def run(config, hurried):
    """(train_step, predict_fns, the state at step 0, a batch, tokenizer), compiled once, in a hurry."""
    tokenizer = MdctTokenizer(hop_length=8, group=1)
    model = CodecModel(features=8, **config.model)
    tx, _ = make_optimizer(config, 100, None)
    init = lambda rng: TrainState.create(model.init(rng, jnp.zeros((1, 8, 8)))["params"], tx, jnp.ones(8))
    with hurried():
        state = jax.device_get(jax.jit(init)(jax.random.key(0)))  # on the host, for a step may consume what it is given
        batch = {"audio": 0.1 * jax.random.normal(jax.random.key(1), (4, tokenizer.segment_samples(8), 1))}
        predict_fns = training_steps.codec_predict_fns(model, tokenizer, config)
        loss_fn = training_steps.codec_loss(model, tokenizer, config)
        yield training_steps.make_train_step(loss_fn, tx, config.ema.decay), predict_fns, state, batch, tokenizer


@pytest.fixture(scope="module")
def first(run):
    """State and metrics after one step."""
    train_step, _, state, batch, _ = run
    return jax.device_get(train_step(state, batch, 0))


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_same_step_twice_is_the_same(run, first):
    train_step, _, state, batch, _ = run
    assert_trees_equal(jax.device_get(train_step(state, batch, 0)), first)


def test_successive_steps_draw_different_noise(run, first):
    """The same parameters and batch at steps 0, 1, 2: only the randomness differs, and so do the errors."""
    train_step, _, state, batch, _ = run
    metrics = [first[1]]
    for step in (1, 2):
        metrics.append(train_step(state.replace(step=np.int32(step)), batch, 0)[1])
    for name in ("v_mse", "u_mse"):
        assert len({float(row[name]) for row in metrics}) == 3
    assert len({float(row["code_bits"]) for row in metrics}) == 1  # the code draws nothing


def test_the_seed_is_an_argument_of_the_one_program(run, first):
    """Another seed is other randomness at the same step, and nothing is compiled anew."""
    train_step, _, state, batch, _ = run
    programs = train_step._cache_size()
    again, other = (jax.device_get(train_step(state, batch, seed)) for seed in (0, 1))
    assert train_step._cache_size() == programs
    assert_trees_equal(again, first)
    for name in ("v_mse", "u_mse", "grad_norm"):
        assert other[1][name] != first[1][name]
    assert other[1]["code_bits"] == first[1]["code_bits"]
    later = train_step(state.replace(step=np.int32(1)), batch, 0)[1]  # seeds and steps are no sum
    assert float(later["v_mse"]) != float(other[1]["v_mse"])


def test_a_step_updates_everything_once(run, first, config):
    _, _, state, _, _ = run
    after, metrics = first
    assert after.step == 1
    np.testing.assert_array_equal(after.scale, state.scale)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.params, state.params)
    assert max(jax.tree.leaves(moved)) == 0  # the schedule starts at a rate of 0
    assert metrics["update_norm"] == 0 and metrics["grad_norm"] > 0
    assert {"loss", "v_mse", "u_mse", "code_perplexity", "code_bits", "grad_norm", "param_norm"} <= set(metrics)


def test_average_follows_the_parameters(run, first):
    """After the second step it is 2/11 of the old and 9/11 of the new parameters."""
    train_step, _, _, batch, _ = run
    one, _ = first
    two, metrics = jax.device_get(train_step(one, batch, 0))
    assert metrics["update_norm"] > 0
    expected = jax.tree.map(lambda old, new: old * 2 / 11 + new * 9 / 11, one.ema_params, two.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), two.ema_params, expected)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (one.ema_params, two.ema_params)), strict=True))


def test_untrained_model_reconstructs_silence(run):
    """One step from noise by a zero head lands on x_hat = 0, whose error is the power of x."""
    _, predict_fns, state, batch, tokenizer = run
    decoded, mse = predict_fns["reconstruct"](state, batch, np.arange(4, dtype=np.uint32), 1)
    assert decoded.shape == batch["audio"].shape
    np.testing.assert_allclose(decoded, 0, atol=1e-9)
    x = scaling.compand(tokenizer.tokenize(batch["audio"]), 0.5, 1e-4)
    np.testing.assert_allclose(mse, np.mean(np.square(x), axis=(1, 2)), rtol=1e-5)


# --- the auxiliary head


def test_improved_mean_flow_trains_the_velocity_head(run, config):
    """Its error is in the metrics and moves the head, its block and the trunk.

    Here on rows without a derivative, which is half of the time to compile; test_official_formulation.py has those.
    """
    _, _, state, batch, tokenizer = run
    fields = {"model.velocity_head": True, "model.conditioning": "none", "objective.fm_fraction": 1.0}
    config = override_from_flags(
        load_config(f"{CONFIG}:runlocal"),
        [f"--config.{flag}" for flag in (*TINY, *(f"{name}={value}" for name, value in fields.items()))],
    )
    model = CodecModel(features=8, **config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8)))["params"]
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: draw(0, 0.2, leaf.shape).astype(np.float32), shapes)
    loss_fn = training_steps.codec_loss(model, tokenizer, config)
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True))
    gradients, metrics = jax.device_get(gradient(params, state.scale, batch, jax.random.key(0)))
    assert metrics["v_head_mse"] > 0 and metrics["v_head_mse"] != metrics["v_mse"]
    for name in ("velocity_head", "velocity_block", "Head_0", "FilmEmbedding_0"):
        for leaf in jax.tree.leaves(gradients["decoder"][name]):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name


def test_the_products_losses_are_logged_and_reach_every_parameter(run, config):
    """But for the entries of the levels, which stay as they were fitted."""
    _, _, state, batch, tokenizer = run
    fields = {"model.quantizer": "gain_shape", "objective.weighting": "band", "objective.mel_weight": 1.0}
    fields |= {"objective.fm_fraction": 1.0, "model.quantizer_dropout": 0.5}
    config = override_from_flags(
        load_config(f"{CONFIG}:runlocal"),
        [f"--config.{flag}" for flag in (*TINY, *(f"{name}={value}" for name, value in fields.items()))],
    )
    bands = tuple(tokenizer.bands(1, config.input.sample_rate).tolist())
    model = CodecModel(features=8, bands=bands, **config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8)))["params"]
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: draw(0, 0.2, leaf.shape).astype(np.float32), shapes)
    batch = {"audio": jnp.tile(batch["audio"], (1, 40, 1))[:, : tokenizer.segment_samples(240)]}
    gradient = jax.jit(jax.grad(training_steps.codec_loss(model, tokenizer, config), has_aux=True))
    gradients, metrics = jax.device_get(gradient(params, state.scale, batch, jax.random.key(0)))
    assert metrics["mel_distance"] > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert (np.abs(leaf).max() > 0) == (path[0].key != "level_quantizer"), jax.tree_util.keystr(path)


def mel_of(run, mel_fraction):
    """`(audio) -> (loss, metrics)` of a batch, with the mel distance at that share of its clips."""
    _, _, state, _, tokenizer = run
    flags = (*TINY, "objective.mel_weight=1.0", f"objective.mel_fraction={mel_fraction}")
    config = override_from_flags(load_config(f"{CONFIG}:runlocal"), [f"--config.{flag}" for flag in flags])
    loss_fn = training_steps.codec_loss(CodecModel(features=8, **config.model), tokenizer, config)
    scale, rng, draw = jnp.asarray(state.scale), jax.random.key(0), np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: draw(0, 0.2, leaf.shape).astype(np.float32), state.params)  # at first deaf to z
    return jax.jit(lambda audio: loss_fn(params, scale, {"audio": audio}, rng))


def test_mel_distance_is_that_of_the_first_clips(run):
    """And the loss takes half the spread, which fresh noise makes, from it."""
    _, _, _, batch, tokenizer = run
    audio = jnp.tile(batch["audio"][:4], (1, 40, 1))[:, : tokenizer.segment_samples(240)]
    loss = mel_of(run, 0.5)
    distance = lambda audio: float(loss(audio)[1]["mel_distance"])
    louder_second_half = audio.at[2:].multiply(2.0)
    assert distance(audio) == distance(louder_second_half) != distance(louder_second_half[::-1])
    total, metrics = loss(audio)
    assert 0 < metrics["mel_spread"] < 2 * metrics["mel_distance"]
    np.testing.assert_allclose(total, metrics["loss"] + metrics["mel_distance"] - metrics["mel_spread"] / 2, rtol=1e-5)


@pytest.mark.parametrize("mel_fraction", [0.1, 1.5])
def test_mel_fraction_of_no_clip_or_too_many_is_refused(run, mel_fraction):
    with pytest.raises(InputError, match=rf"objective.mel_fraction={mel_fraction}: is \d of 4 clips"):
        mel_of(run, mel_fraction)(jnp.zeros((4, run[4].segment_samples(240), 1)))


def test_unknown_weighting_is_refused_by_name(run, config):
    unknown = override_from_flags(load_config(f"{CONFIG}:runlocal"), ["--config.objective.weighting=ear"])
    with pytest.raises(InputError, match=r"objective.weighting is 'ear'; choose feature or band"):
        training_steps.codec_loss(CodecModel(features=8, **config.model), run[4], unknown)


@pytest.mark.parametrize("objective", ["autoencoder", "flow_matching", "mean_flow"])
def test_other_objectives_have_no_use_for_the_velocity_head(objective, tmp_path):
    spec = f"{CONFIG}:runlocal,objective={objective}"
    with pytest.raises(SystemExit) as stopped:
        main(["--config", spec, "--workdir", str(tmp_path / "run"), "--config.model.velocity_head=True"])
    message = stopped.value.code
    assert f"model.velocity_head serves objective improved_mean_flow; {objective} has no use" in message
    assert "\n" not in message and not (tmp_path / "run").exists()


# --- the code's part in the loss


def losses_of(run, *fields):
    """`loss(rng) -> (loss, metrics)` of a model with random parameters, flow matching, and its predict_fns' loss."""
    _, _, state, batch, tokenizer = run
    flags = (*TINY, "objective.fm_fraction=1.0", "model.num_quantizers=3", "model.codebook_size=16", *fields)
    config = override_from_flags(load_config(f"{CONFIG}:runlocal"), [f"--config.{flag}" for flag in flags])
    model = CodecModel(features=8, **config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8)))["params"]
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: draw(0, 0.2, leaf.shape).astype(np.float32), shapes)
    loss_fn = jax.jit(training_steps.codec_loss(model, tokenizer, config))
    state = state.replace(ema_params=params)
    validation = training_steps.codec_predict_fns(model, tokenizer, config)["loss"]
    return lambda rng: loss_fn(params, state.scale, batch, rng), lambda rng: validation(state, batch, rng)


@pytest.mark.parametrize("quantizer", ["fsq", "rvq"])
def test_quantizer_dropout_follows_the_key_and_trains_alone(run, quantizer):
    """The same noise and times with and without: only what the code tells differs. Validation keeps all codebooks."""
    all_kept, _ = losses_of(run, f"model.quantizer={quantizer}")
    dropped, validation = losses_of(run, f"model.quantizer={quantizer}", "model.quantizer_dropout=1.0")
    rng = jax.random.key(0)
    assert dropped(rng)[0] == dropped(rng)[0]
    assert dropped(rng)[1]["v_mse"] != all_kept(rng)[1]["v_mse"]
    assert dropped(rng)[1]["v_share_t0_25"] == all_kept(rng)[1]["v_share_t0_25"]
    np.testing.assert_allclose(validation(rng)["v_mse"], all_kept(rng)[1]["v_mse"], rtol=1e-5)


def test_dropout_draws_what_the_objective_does_not(run):
    """fold_in(key, i) is the i-th key of split: its stream must lie beyond those."""
    rng = jax.random.key(0)
    taken = {tuple(jax.random.key_data(key).tolist()) for key in jax.random.split(rng, 1000)}
    ours = jax.random.fold_in(rng, training_steps.QUANTIZER_DROPOUT_STREAM)
    assert tuple(jax.random.key_data(ours).tolist()) not in taken
    assert tuple(jax.random.key_data(jax.random.fold_in(rng, 1)).tolist()) in taken


def test_the_loss_of_rvq_is_added_to_the_objectives(run):
    total, metrics = losses_of(run, "model.quantizer=rvq")[0](jax.random.key(0))
    assert metrics["code_loss"] > 0
    np.testing.assert_allclose(total, metrics["loss"] + metrics["code_loss"], rtol=1e-6)


@pytest.mark.parametrize(("quantizer", "codebooks"), [("fsq", 4), ("rvq", 3)])
def test_effective_bitrate(run, quantizer, codebooks):
    """24 kHz in tokens of 8 samples, two to a latent: 1500 latents/s."""
    _, metrics = losses_of(run, f"model.quantizer={quantizer}")[0](jax.random.key(0))
    np.testing.assert_allclose(metrics["code_kbps"], 1.5 * codebooks * metrics["code_bits"], rtol=1e-5)
    assert {"code_usage", "code_perplexity"} <= set(metrics)


# --- tokens and noise


def test_scale_gives_unit_power_in_every_band(config):
    """On the audio that it was measured on, whatever its spectrum; and the path back is exact."""
    tokenizer = MdctTokenizer(hop_length=64, group=2)
    white = np.random.default_rng(0).normal(0, 0.05, (2, tokenizer.segment_samples(16), 1))
    audio = jnp.asarray(np.cumsum(white, axis=1), jnp.float32)  # brown: 40 dB from band to band
    bands, (exponent, eps) = tokenizer.bands(1, 24_000), (config.tokens.exponent, config.tokens.eps)
    scale = scaling.band_scale(scaling.compand(tokenizer.tokenize(audio), exponent, eps), bands)
    assert scale.max() > 3 * scale.min()
    x = training_steps.to_tokens(audio, scale, tokenizer, config)
    power = np.mean(np.square(x), axis=(0, 1))
    rms = [np.sqrt(power[bands == band].mean()) for band in np.unique(bands)]
    np.testing.assert_allclose(rms, 1, rtol=1e-4)
    tokens = scaling.denormalize(x, scale, exponent, eps)
    np.testing.assert_allclose(tokenizer.detokenize(tokens, *audio.shape[1:]), audio, atol=1e-4)


def test_noise_of_a_frame_depends_on_key_and_index_alone():
    noise = lambda seed, frames: flow.frame_noise(jax.random.key(seed), jnp.arange(frames), 8)
    eight = noise(0, 8)
    np.testing.assert_array_equal(noise(0, 4), eight[:4])
    assert np.any(noise(1, 8) != eight)
    assert len({float(frame[0]) for frame in eight}) == 8


def test_noise_of_frames_is_standard_normal():
    noise = flow.frame_noise(jax.random.key(0), jnp.arange(2000), 8)
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.03)
    correlation = np.corrcoef(np.concatenate([noise[:-1], noise[1:]], axis=1).T)  # with the next frame's
    np.testing.assert_allclose(correlation, np.eye(16), atol=0.12)


def test_every_objective_has_its_sampler():
    assert set(flow.SAMPLERS) == set(OBJECTIVES)
    assert flow.SAMPLERS["autoencoder"] == (flow.flow_map_sample, 0.0)
    assert flow.SAMPLERS["flow_matching"][0] is flow.euler_sample
