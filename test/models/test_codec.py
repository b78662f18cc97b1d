"""codec.py and the flows: silence at the start, exact derivatives, bounded receptive fields, counted parameters."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models import codec, layers
from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.models.conv_flow import ConvFlow
from meanflow_audio_codec.models.mlp_flow import MlpFlow

FEATURES, FRAMES, LATENTS = 8, 8, 4
REACH = 3  # frames that one convolution of 7 taps sees on either side


@pytest.fixture(scope="module", autouse=True)
def tiny_variant():
    """A size for tests: one decoder block, one block on each side of each bottleneck; compiled in a hurry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codec.VARIANTS, "tiny", {"width": 16, "depth": 1, "side_depth": 2})
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


def tiny(**fields):
    return CodecModel(**({"features": FEATURES, "variant": "tiny", "latent_dim": LATENTS} | fields))


def normal(shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_params(shapes, dtype=np.float32):
    """Fill a tree of shapes by noise of unit gain: nothing is left at zero, and nothing is compiled."""
    rng = np.random.default_rng(0)
    gain = lambda shape: shape[0] ** -0.5 if len(shape) == 2 else 1.0
    return jax.tree.map(lambda leaf: jnp.asarray(gain(leaf.shape) * rng.normal(size=leaf.shape), dtype), shapes)


def shapes_of(model, *inputs, **options):
    return jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), *inputs)["params"]


def times(*values, dtype=np.float32):
    return jnp.array(values, dtype)


# --- shapes


@pytest.mark.parametrize(
    ("backbone", "output", "quantizer", "dtype"),
    [*itertools.product(codec.BACKBONES, ("x", "u"), ("fsq", "none"), ("float32",)), ("conv", "x", "fsq", "bfloat16")],
)
def test_shapes(backbone, output, quantizer, dtype):
    model = tiny(backbone=backbone, output=output, quantizer=quantizer, dtype=dtype)
    x, t = jnp.zeros((3, FRAMES, FEATURES)), jnp.ones(3)
    params = shapes_of(model, x)
    call = lambda method, *inputs: jax.eval_shape(
        lambda params, *inputs: model.apply({"params": params}, *inputs, method=method), params, *inputs
    )
    latents, codes, metrics = call("encode", x)
    assert latents.shape == codes.shape == (3, FRAMES // 2, LATENTS)
    assert latents.dtype == jnp.float32 and codes.dtype == jnp.int32
    assert set(metrics) == ({"perplexity", "bits"} if quantizer == "fsq" else set())
    cond, _ = call("condition", x)
    assert cond.shape == (3, FRAMES, 16)
    u = call("flow", x, t, t, cond)
    assert (u.shape, u.dtype) == (x.shape, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}  # in bfloat16 as well


@pytest.mark.parametrize("downsample", [1, 4])
def test_downsample_sets_the_number_of_latents(downsample):
    model, x = tiny(downsample=downsample), jnp.zeros((1, FRAMES, FEATURES))
    encode = lambda params: model.apply({"params": params}, x, method="encode")[0]
    assert jax.eval_shape(encode, shapes_of(model, x)).shape == (1, FRAMES // downsample, LATENTS)


@pytest.mark.parametrize("field", ["variant", "backbone", "output", "quantizer", "dtype"])
def test_unknown_choice_is_refused_by_name(field):
    model = CodecModel(features=FEATURES, **{field: "unheard"})
    with pytest.raises(InputError, match=rf"model\.{field} is 'unheard'; choose one of \w+"):
        shapes_of(model, jnp.zeros((1, FRAMES, FEATURES)))


@pytest.mark.parametrize(("field", "value"), [("fsq_levels", 1), ("latent_dim", 0), ("downsample", 0)])
def test_impossible_number_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"model\.{field} is {value}"):
        shapes_of(tiny(**{field: value}), jnp.zeros((1, FRAMES, FEATURES)))


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        ("Ti", {"encoder": 504_640, "upsampler": 307_584, "decoder": 766_592}),
        ("S", {"encoder": 1_995_584, "upsampler": 1_733_120, "decoder": 3_739_648}),
    ],
)
def test_number_of_parameters(variant, parts):
    """With 256 features and 64 latents: a change of size must be meant."""
    params = shapes_of(CodecModel(features=256, variant=variant), jnp.zeros((1, 2, 256)))
    assert {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in params.items()
    } == parts


def test_backbones_differ_by_their_taps_alone():
    x = jnp.zeros((1, FRAMES, FEATURES))
    conv, mlp = (
        sum(leaf.size for leaf in jax.tree.leaves(shapes_of(tiny(backbone=name), x))) for name in ("conv", "mlp")
    )
    assert conv - mlp == 7 * 16  # kernel_size * width for the one block


# --- at the start


def test_untrained_model_decodes_to_silence():
    """The head is zero: x_hat = 0 for output "x", so u = z / clip(t, 0.05, 1) and one step from noise gives 0."""
    model, z = tiny(), normal((3, FRAMES, FEATURES))
    t, r = times(1.0, 0.3, 0.02), times(0.0, 0.3, 0.01)
    cond = normal((3, FRAMES, 16), seed=1)

    @jax.jit
    def init_and_flow(rng):
        params = model.init(rng, z, t, r, cond, method="flow")
        flow = lambda model: model.apply(params, z, t, r, cond, method="flow")
        return flow(model), flow(tiny(output="u"))

    u, raw = init_and_flow(jax.random.key(0))
    np.testing.assert_allclose(u, z / np.maximum(t, 0.05)[:, None, None], rtol=1e-6)
    np.testing.assert_array_equal(z[0] - u[0], 0)
    np.testing.assert_array_equal(raw, 0)


# --- derivatives


class Float64Numpy:
    """`jax.numpy` as the models see it, where float32 is float64: their casts hide nothing from the test."""

    def dtype(self, name):
        return jnp.dtype("float64")

    def __getattr__(self, name):
        return getattr(jnp, "float64" if name == "float32" else name)


@pytest.mark.parametrize("output", ["x", "u"])
@pytest.mark.parametrize("backbone", codec.BACKBONES)
def test_jvp_equals_the_central_difference(backbone, output, monkeypatch):
    """Along (v, 1, 0) in (z, t, r), on both sides of the clip at t = 0.05, in float64."""
    for module in (layers, codec):
        monkeypatch.setattr(module, "jnp", Float64Numpy())
    with jax.enable_x64(True):
        model = tiny(backbone=backbone, output=output)
        shape, f64 = (3, FRAMES, FEATURES), np.float64
        z, v, cond = normal(shape, 0, f64), normal(shape, 1, f64), normal((3, FRAMES, 16), 2, f64)
        t, r = times(0.9, 0.3, 0.02, dtype=f64), times(0.1, 0.3, 0.01, dtype=f64)
        params = random_params(shapes_of(model, z, t, r, cond, method="flow"), f64)

        @jax.jit
        def derivatives(params, eps):
            u_fn = lambda z, t, r: model.apply({"params": params}, z, t, r, cond, method="flow")
            u, tangent = jax.jvp(u_fn, (z, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))
            return u, tangent, (u_fn(z + eps * v, t + eps, r) - u_fn(z - eps * v, t - eps, r)) / (2 * eps)

        u, tangent, difference = derivatives(params, 1e-5)
        assert u.dtype == np.float64
        np.testing.assert_allclose(tangent, difference, rtol=1e-6, atol=1e-6 * np.abs(difference).max())
        assert np.abs(tangent).max() > 0.1  # the comparison is not of zeros


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_time_features_are_slow(scale):
    """At most 10 per unit of scaled time, where an embedding of 1000 t would have 1000."""
    t = jnp.linspace(0, 1, 101)
    embed = functools.partial(layers.time_features, scale=scale)
    features, slopes = jax.jvp(embed, (t,), (jnp.ones_like(t),))
    assert features.shape == (101, 64)
    assert np.abs(slopes).max() <= 10.0001 * scale
    assert np.abs(features[1:] - features[:-1]).max(axis=1).min() > 1e-3 * scale  # yet no two times look alike


# --- receptive fields: what is far away changes nothing, so that a chunk can equal the whole


@pytest.fixture(scope="module", params=[(ConvFlow, 2 * REACH), (MlpFlow, 0)], ids=["conv", "mlp"])
def decoder(request):
    """A decoder `(z, t, h, cond) -> out` of 24 frames with random parameters, and its reach in frames."""
    kind, reach = request.param
    model, z, t = kind(width=16, depth=2, dtype=jnp.dtype("float32")), jnp.zeros((1, 24, FEATURES)), jnp.ones(1)
    params = random_params(shapes_of(model, z, t, t, jnp.zeros((1, 24, 16))))
    return jax.jit(functools.partial(model.apply, {"params": params})), reach


def changed_frames(before, after):
    return set(np.flatnonzero((np.asarray(before) != np.asarray(after)).any(axis=(0, 2))))


@pytest.mark.parametrize("which", ["z", "cond"])
def test_decoder_looks_no_further_than_its_receptive_field(decoder, which):
    apply, reach = decoder
    z, cond = normal((1, 24, FEATURES)), normal((1, 24, 16), seed=1)
    t, h = times(0.8), times(0.5)
    inputs = {"z": z, "t": t, "h": h, "cond": cond}
    out, moved = apply(**inputs), apply(**inputs | {which: inputs[which].at[:, 11].add(1)})
    assert changed_frames(out, moved) == set(range(11 - reach, 11 + reach + 1))


def test_batch_of_n_equals_n_batches_of_one(decoder):
    apply, _ = decoder
    z, cond = normal((3, 24, FEATURES)), normal((3, 24, 16), seed=1)
    t, h = times(0.9, 0.5, 0.1), times(0.9, 0.2, 0.0)
    one_by_one = [apply(z[i : i + 1], t[i : i + 1], h[i : i + 1], cond[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(apply(z, t, h, cond), np.concatenate(one_by_one), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def conditioner():
    """x -> (latents, cond) without rounding, which would hide small changes, with random parameters."""
    model = tiny(quantizer="none")
    params = random_params(shapes_of(model, jnp.zeros((1, FRAMES, FEATURES))))

    def latents_and_cond(x):
        latents, _, _ = model.apply({"params": params}, x, method="encode")
        return latents, model.apply({"params": params}, x, method="condition")[0]

    return jax.jit(latents_and_cond)


# One block before joining 2 frames to a latent, whose 3 frames are 2 latents, and one after. The upsampler mirrors it.
ENCODER_REACH, CONDITION_REACH = 2 + REACH, 2 * (2 + REACH)


def test_encoder_and_upsampler_look_no_further_than_their_receptive_field(conditioner):
    x = normal((1, 64, FEATURES))
    touched = slice(32, 34)  # latent 16
    (latents, cond), (moved_latents, moved_cond) = conditioner(x), conditioner(x.at[:, touched].add(1))
    assert changed_frames(latents, moved_latents) == set(range(16 - ENCODER_REACH, 16 + ENCODER_REACH + 1))
    changed_latents = {frame // 2 for frame in changed_frames(cond, moved_cond)}
    assert changed_latents == set(range(16 - CONDITION_REACH, 16 + CONDITION_REACH + 1))


def test_condition_of_a_chunk_equals_that_of_the_whole(conditioner):
    """Given the receptive field as context, and not without it."""
    x = normal((1, 64, FEATURES))
    _, whole = conditioner(x)
    _, chunk = conditioner(x[:, 16:64])
    context = 2 * CONDITION_REACH
    np.testing.assert_allclose(chunk[:, context:], whole[:, 16 + context :], rtol=1e-4, atol=1e-5)
    assert np.abs(chunk[:, 0] - whole[:, 16]).max() > 1e-2


# --- gradients


def test_gradients_pass_the_quantizer_to_every_parameter():
    model, x = tiny(), normal((2, FRAMES, FEATURES))
    params = random_params(shapes_of(model, x))
    t, r = times(1.0, 0.7), times(0.0, 0.7)

    @jax.jit
    @jax.grad
    def gradient(params):
        cond, _ = model.apply({"params": params}, x, method="condition")
        return jnp.sum(model.apply({"params": params}, x, t, r, cond, method="flow") ** 2)

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(gradient(params))):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)
