"""Muon's steps are orthogonal and of Adam's size; tables and vectors are Adam's; the schedule is as documented."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meanflow_audio_codec.configuration import load_config, override_from_flags
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.trainers.optimizers import make_optimizer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
LR = 0.01


def config_of(name="muon", **fields):
    fields = {"name": name, "lr": LR, "warmup_steps": 1, "grad_clip_norm": 1e9} | fields
    return override_from_flags(
        load_config(str(CONFIGS / "meanflow_mdct.py")),
        [f"--config.optimizer.{key}={value}" for key, value in fields.items()],
    )


@pytest.fixture
def params():
    draw = np.random.default_rng(0).normal
    shapes = {"kernel": (12, 40), "bias": (40,), "codebook": (16, 8), "embedding": (10, 6), "scale": ()}
    shapes["wide"] = (129, 130)  # both sides above the width, 128
    return {"layer": {name: jnp.asarray(draw(size=shape), jnp.float32) for name, shape in shapes.items()}}


def first_update(config, params, gradients):
    """The update of step 2: at step 1 the learning rate is still 0."""
    tx, _ = make_optimizer(config, 1000, None)
    state = tx.init(params)
    update = jax.jit(tx.update)
    _, state = update(gradients, state, params)
    updates, _ = update(gradients, state, params)
    return jax.device_get(updates)["layer"]


def test_a_kernels_step_is_the_orthogonal_part_of_its_gradient(params):
    updates = first_update(config_of(), params, params)
    left, _, right = np.linalg.svd(np.asarray(params["layer"]["kernel"]), full_matrices=False)
    orthogonal = -LR * 0.2 * np.sqrt(40) * left @ right  # of the RMS 0.2 LR, whatever the gradient's size
    singular = np.linalg.svd(updates["kernel"] @ orthogonal.T / np.sum(orthogonal**2) * 12)[1]
    assert singular.min() > 0.6 and singular.max() < 1.3  # where Newton-Schulz in five steps puts them
    alignment = np.sum(updates["kernel"] * orthogonal) / np.linalg.norm(updates["kernel"]) / np.linalg.norm(orthogonal)
    assert alignment > 0.97
    np.testing.assert_allclose(np.sqrt(np.mean(updates["kernel"] ** 2)), 0.2 * LR, rtol=0.15)


def test_a_kernels_step_does_not_depend_on_the_size_of_the_gradient(params):
    small = jax.tree.map(lambda leaf: 1e-3 * leaf, params)
    steps = [first_update(config_of(), params, gradients)["kernel"] for gradients in (params, small)]
    np.testing.assert_allclose(*steps, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["bias", "codebook", "embedding", "scale", "wide"])
def test_vectors_tables_and_wide_maps_take_adams_step(params, name):
    """An entry that did not occur has no gradient and stays; an orthogonal step would move it as far as the others."""
    gradients = jax.tree.map(lambda leaf: leaf.at[..., :3].set(0) if leaf.ndim else leaf, params)
    update = first_update(config_of(), params, gradients)[name]
    gradient = np.asarray(gradients["layer"][name])
    assert not update[gradient == 0].any()
    np.testing.assert_allclose(update[gradient != 0], -LR * np.sign(gradient[gradient != 0]), rtol=0.35)


def test_no_gradient_no_step(params):
    updates = first_update(config_of(), params, jax.tree.map(jnp.zeros_like, params))
    assert not any(update.any() for update in updates.values())


def test_adamw_is_optax_adamw(params):
    config = config_of("adamw", b1=0.8, wd=0.1)
    spec = config.optimizer
    _, schedule = make_optimizer(config, 1000, None)
    reference = optax.adamw(schedule, b1=0.8, b2=spec.b2, weight_decay=0.1)
    state = reference.init(params)
    _, state = reference.update(params, state, params)
    expected, _ = reference.update(params, state, params)
    updates = first_update(config, params, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected["layer"])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_schedule_climbs_and_falls(name):
    _, schedule = make_optimizer(config_of(name, warmup_steps=100), 1000, None)
    rates = np.asarray([schedule(step) for step in (0, 50, 100, 550, 1000)])
    middle = LR * (1 + 0.05) / 2
    np.testing.assert_allclose(rates, [0, LR / 2, LR, middle, 0.05 * LR], rtol=1e-5)


def test_unknown_optimizer_is_refused_by_name():
    with pytest.raises(InputError, match="optimizer.name is 'sgd'; choose muon or adamw"):
        make_optimizer(config_of("sgd"), 1000, None)


def test_muon_is_refused_for_the_classifier():
    config = load_config(str(CONFIGS / "mnist_classifier.py"))
    config = override_from_flags(config, ["--config.optimizer.name=muon"])
    with pytest.raises(InputError, match="for a classifier choose adamw"):
        make_optimizer(config, 1000, None)
