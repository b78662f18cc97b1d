"""The cost of networks whose FLOPs, bytes and parameters are known by hand; 30 s."""

import functools
import json
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import common, cost
from meanflow_audio_codec.models.codec import CodecModel

B, L, F, D = 4, 6, 10, 16  # examples, tokens, features, width
TIMINGS = ((20, 2.0), (40, 4.0), (60, 1.0))  # step, steps/s: 10 + 5 + 20 s


def dense_state():
    """A decoder of two matrices and a bias, an encoder of one matrix."""
    params = {
        "encoder": {"kernel": jnp.ones((F, D))},
        "decoder": {"in": jnp.ones((F, D)), "out": jnp.ones((D, F)), "bias": jnp.zeros(F)},
    }
    return SimpleState(params, jnp.ones(F), jnp.zeros((), jnp.int32) + 60)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "scale", "step"), meta_fields=())
class SimpleState(SimpleNamespace):
    def __init__(self, params, scale, step):
        super().__init__(params=params, scale=scale, step=step)


@jax.jit
def condition(state, batch):
    return batch["audio"].reshape(-1, L, F) @ state.params["encoder"]["kernel"]


@jax.jit
def flow(state, z, t, r, cond):
    decoder = state.params["decoder"]
    return z @ decoder["in"] @ decoder["out"] + decoder["bias"]


@functools.partial(jax.jit, static_argnames="nfe")
def reconstruct(state, batch, seeds, nfe):
    cond = condition(state, batch)
    z = jnp.zeros((len(seeds), L, F))
    t = jnp.ones(len(seeds))
    z = jax.lax.fori_loop(0, nfe, lambda i, z: z - flow(state, z, t, t, cond), z)
    return z.reshape(batch["audio"].shape), jnp.zeros(len(seeds))


CONDITION = 2 * L * F * D
FLOW = 2 * 2 * L * F * D + L * F


def make(workdir, num_examples=B, nfe=(1, 4), lower=None, timings=TIMINGS, **functions):
    text = "".join(json.dumps({"step": step, "time": 0.0, "steps_per_s": speed}) + "\n" for step, speed in timings)
    (workdir / "timings.jsonl").write_text(text)

    def examples(num, seconds=None):
        assert seconds == 0.5
        return {"audio": np.zeros((num, L * F, 1), np.float32)}, ["clip"] * num

    def lower_train_step(state):
        x = jax.ShapeDtypeStruct((8, F), jnp.float32)
        return jax.jit(lambda state, x: jnp.mean(x @ state.params["decoder"]["in"])).lower(state, x)

    fields = dict.fromkeys(common.Context._fields) | dict(
        predict_fns=dict(condition=condition, flow=flow, reconstruct=reconstruct) | functions,
        examples=examples,
        sample_rate=120,
        workdir=workdir,
        lower_train_step=lower or lower_train_step,
    )
    return cost.Evaluator(common.Context(**fields), num_examples, nfe, seconds=0.5)


def run(evaluator, workdir):
    return dict(evaluator.run(dense_state())), json.loads((workdir / "cost.json").read_text())


def test_flops_and_parameters_are_those_counted_by_hand(tmp_path):
    scores, written = run(make(tmp_path), tmp_path)
    step = 2 * 8 * F * D + 8 * D + 1  # matmul, sum, division
    expected = {
        "parameters": 3 * F * D + F,
        "decoder_parameters": 2 * F * D + F,
        "train_flops_per_step": pytest.approx(step, abs=1),
        "condition_flops_per_sample": CONDITION,
        "flow_flops_per_evaluation": FLOW,
        "flops_per_sample_nfe1": CONDITION + FLOW,
        "flops_per_sample_nfe4": CONDITION + 4 * FLOW,
    }
    assert scores == {f"cost/{name}": value for name, value in expected.items()}
    assert all(type(value) is float for value in scores.values())
    assert {name: written[name] for name in expected} == expected


@pytest.mark.parametrize("num_examples", [1, 3])
def test_figures_of_a_sample_do_not_depend_on_their_number(tmp_path, num_examples):
    _, written = run(make(tmp_path, num_examples), tmp_path)
    assert written["flow_flops_per_evaluation"] == FLOW
    assert written["condition_flops_per_sample"] == CONDITION
    assert written["num_examples"] == num_examples


def test_the_rest_of_the_file(tmp_path):
    _, written = run(make(tmp_path), tmp_path)
    assert {"sample_seconds_nfe1", "sample_seconds_nfe4"} <= set(written)
    assert all(0 < written[f"sample_seconds_nfe{nfe}"] < 60 for nfe in (1, 4))
    assert written["audio_seconds"] == 0.5
    assert written["train_seconds"] == pytest.approx(35)
    assert written["step"] == 60
    assert written["device"] == jax.devices()[0].device_kind and written["jax_version"] == jax.__version__
    assert written["peak_rss_bytes"] > 50e6  # JAX alone takes more
    for name, value in written.items():
        assert isinstance(value, str if name in ("device", "jax_version") else (int, float)), name
    arguments = 4 * (8 * F + F * D)  # jit drops what the step does not use
    assert written["train_bytes_accessed_per_step"] >= arguments
    assert arguments <= written["train_peak_bytes"] <= arguments + 4 * 8 * D + 1000


def test_nothing_yielded_depends_on_the_clock(tmp_path):
    first, _ = run(make(tmp_path), tmp_path)
    again, _ = run(make(tmp_path, timings=((60, 1e-3),)), tmp_path)
    assert first == again
    assert not [name for name in first if "second" in name or "bytes" in name]


def test_file_is_replaced_whole(tmp_path, monkeypatch):
    (tmp_path / "cost.json").write_text("old")

    class Full(Exception):
        pass

    def fail(self, target):
        assert json.loads(self.read_text())["parameters"] == 3 * F * D + F  # complete before it gets its name
        raise Full

    evaluator = make(tmp_path)
    monkeypatch.setattr(type(cost.epath.Path(tmp_path)), "replace", fail)
    with pytest.raises(Full):
        list(evaluator.run(dense_state()))
    assert (tmp_path / "cost.json").read_text() == "old"
    monkeypatch.undo()
    run(evaluator, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.json", "timings.jsonl"]


def test_backend_that_does_not_tell_is_logged_and_its_figures_left_out(tmp_path, monkeypatch, caplog):
    """As on GPUs, where JAX counts nothing before compiling, and as it might be after it."""
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda self: {"transcendentals": 1.0})
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    with caplog.at_level(logging.INFO):
        scores, written = run(make(tmp_path), tmp_path)
    assert set(scores) == {"cost/parameters", "cost/decoder_parameters"}
    assert not [name for name in written if "flops" in name or name.startswith("train_") and name != "train_seconds"]
    left_out = ("train_flops_per_step", "condition_flops_per_sample", "flow_flops_per_evaluation")
    left_out += ("train_bytes_accessed_per_step", "train_peak_bytes")
    assert [line.split(" is left out")[0] for line in caplog.messages] == [f"cost: {name}" for name in left_out]


def test_a_loop_counts_once():
    """Why the cost of a sample is added up from its parts."""
    x = jnp.ones((B, F))
    w = jnp.ones((F, F))
    turns = lambda n: (
        jax.jit(lambda x: jax.lax.fori_loop(0, n, lambda i, x: x @ w, x)).lower(x).cost_analysis()["flops"]
    )
    assert turns(2) == turns(50) == pytest.approx(2 * B * F * F, abs=4)


def test_counts_before_compiling_are_those_of_the_program():
    """A matmul costs 2 b n m before and after; elementwise work that fusion repeats for two consumers more after."""
    x, w, scale = jnp.ones((64, 128)), jnp.ones((128, 96)), jnp.ones(128)
    lowered = jax.jit(lambda x, w: x @ w).lower(x, w)
    assert lowered.cost_analysis()["flops"] == lowered.compile().cost_analysis()["flops"] == 2 * 64 * 128 * 96

    def two_sums(x, scale):
        y = x * scale + 1.0  # 2 for each element
        return jnp.sum(y * y, axis=1), jnp.sum(y, axis=0)  # 3 for each

    lowered = jax.jit(two_sums).lower(x, scale)
    assert lowered.cost_analysis()["flops"] == pytest.approx(5 * 64 * 128, rel=0.03)  # n - 1 additions in a sum of n
    assert lowered.compile().cost_analysis()["flops"] >= lowered.cost_analysis()["flops"]


def test_gradient_of_a_matmul_is_two_more():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 96))
    lowered = jax.jit(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2), argnums=(0, 1))).lower(w, x)
    assert lowered.cost_analysis()["flops"] == pytest.approx(3 * 2 * 64 * 128 * 96, rel=0.02)


def test_codec_model_costs_its_matrices():
    """Nearly every weight of the mlp decoder multiplies once a token, those that embed the times once an example."""
    model = CodecModel(features=256, variant="mu", backbone="mlp")
    x, t = jnp.zeros((2, 16, 256)), jnp.ones(2)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    apply = lambda method: jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))
    cond = jax.eval_shape(apply("condition"), params, x)[0]
    flops = apply("flow").lower(params, x, t, t, cond).cost_analysis()["flops"]
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]) if leaf.ndim == 2)
    assert 0.8 < flops / (2 * 2 * 16 * kernels) < 1.1


# --- train_seconds


def seconds(tmp_path, *rows):
    path = cost.epath.Path(tmp_path) / "timings.jsonl"
    path.write_text("".join(json.dumps({"step": step, "steps_per_s": speed}) + "\n" for step, speed in rows))
    return cost._train_seconds(path)


def test_train_seconds_across_a_resumption(tmp_path):
    """Resumed from step 30: the line of step 40 was measured from 31 on, and stands for all 20 steps."""
    assert seconds(tmp_path, (20, 10.0), (40, 5.0), (50, 10.0)) == pytest.approx(2 + 4 + 1)


def test_train_seconds_of_a_line_without_speed_go_to_the_next(tmp_path):
    """With log_steps=1 the first line holds only the step that compiles."""
    assert seconds(tmp_path, (1, 0.0), (2, 2.0), (3, 4.0)) == pytest.approx(2 / 2 + 1 / 4)


def test_bad_number_of_examples_names_the_field(tmp_path):
    with pytest.raises(InputError, match="num_examples=0"):
        make(tmp_path, num_examples=0)
