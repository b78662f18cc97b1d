"""codec.py and the flows: silence at the start, exact derivatives, bounded receptive fields, counted parameters."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models import codec, layers, mixer_flow, transformer_flow
from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.models.conv_flow import ConvFlow
from meanflow_audio_codec.models.mixer_flow import MixerFlow, TokenMixing
from meanflow_audio_codec.models.mlp_flow import MlpFlow
from meanflow_audio_codec.models.transformer_flow import BandAttention, TransformerFlow

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
    [
        *itertools.product(codec.BACKBONES, ("x", "u"), ("fsq", "rvq", "none"), ("float32",)),
        *itertools.product(codec.BACKBONES, ("x",), ("fsq",), ("bfloat16",)),
    ],
)
def test_shapes(backbone, output, quantizer, dtype):
    model = tiny(backbone=backbone, output=output, quantizer=quantizer, dtype=dtype)
    x, t = jnp.zeros((3, FRAMES, FEATURES)), jnp.ones(3)
    params = shapes_of(model, x)
    call = lambda method, *inputs: jax.eval_shape(
        lambda params, *inputs: model.apply({"params": params}, *inputs, method=method), params, *inputs
    )
    latents, codes, metrics = call("encode", x)
    assert latents.shape == (3, FRAMES // 2, LATENTS)
    assert codes.shape == (3, FRAMES // 2, {"fsq": LATENTS, "rvq": 8, "none": 0}[quantizer])
    assert latents.dtype == jnp.float32 and codes.dtype == jnp.int32
    of_codes = {"perplexity", "bits", "usage"}
    assert set(metrics) == {"fsq": of_codes, "rvq": of_codes | {"loss"}, "none": set()}[quantizer]
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


@pytest.mark.parametrize("field", ["variant", "backbone", "output", "conditioning", "times", "quantizer", "dtype"])
def test_unknown_choice_is_refused_by_name(field):
    model = CodecModel(features=FEATURES, **{field: "unheard"})
    with pytest.raises(InputError, match=rf"model\.{field} is 'unheard'; choose one of \w+"):
        shapes_of(model, jnp.zeros((1, FRAMES, FEATURES)))


QUANTITIES = [
    *(("fsq_levels", 1), ("latent_dim", 0), ("downsample", 0), ("num_quantizers", 0), ("codebook_size", 1)),
    *(("quantizer_dropout", -0.1), ("quantizer_dropout", 1.1)),
]


@pytest.mark.parametrize(("field", "value"), QUANTITIES)
def test_impossible_number_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"model\.{field} is {value}"):
        shapes_of(tiny(**{field: value}), jnp.zeros((1, FRAMES, FEATURES)))


@pytest.mark.parametrize(
    ("variant", "encoder", "upsampler", "decoders"),
    [
        ("N", 244_416, 80_064, (262_848, 261_056, 327_744, 311_744)),
        ("Ti", 504_640, 307_584, (766_592, 763_008, 879_616, 864_128)),
        ("S", 1_995_584, 1_733_120, (3_739_648, 3_728_896, 4_053_568, 4_031_872)),
    ],
)
def test_number_of_parameters(variant, encoder, upsampler, decoders):
    """With 256 features and 64 latents: a change of size must be meant, and no backbone wins by size.

    The mixer's maps of 32 frames do not shrink with the width: the smallest model has 11 % more with them.
    """
    for backbone, decoder in zip(codec.BACKBONES, decoders, strict=True):
        params = shapes_of(CodecModel(features=256, variant=variant, backbone=backbone), jnp.zeros((1, 2, 256)))
        assert {
            name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in params.items()
        } == {"encoder": encoder, "upsampler": upsampler, "decoder": decoder}
        assert encoder + upsampler + decoder < 1.12 * (encoder + upsampler + decoders[0])


def test_backbones_differ_by_their_taps_alone():
    x = jnp.zeros((1, FRAMES, FEATURES))
    conv, mlp = (
        sum(leaf.size for leaf in jax.tree.leaves(shapes_of(tiny(backbone=name), x))) for name in ("conv", "mlp")
    )
    assert conv - mlp == 7 * 16  # kernel_size * width for the one block


# --- conditioning: the code, the label, or nothing


@pytest.mark.parametrize("conditioning", ["latent", "label", "none"])
def test_every_conditioning_gives_each_frame_a_vector(conditioning):
    """With one latent for all frames, as an image has."""
    model, x = tiny(conditioning=conditioning, downsample=FRAMES), jnp.zeros((3, FRAMES, FEATURES))
    label = jnp.zeros(3, jnp.int32)
    params = shapes_of(model, x, label)
    parts = {"latent": {"encoder"}, "label": {"label_embedding"}, "none": set()}[conditioning]
    assert set(params) == {"upsampler", "decoder"} | parts  # nothing that nothing uses
    condition = lambda params: model.apply({"params": params}, x, label, method="condition")
    cond, metrics = jax.eval_shape(condition, params)
    assert (cond.shape, cond.dtype) == ((3, FRAMES, 16), jnp.float32)
    assert bool(metrics) == (conditioning == "latent")


def test_only_the_label_or_nothing_reaches_the_decoder():
    """With random parameters; the label reaches the rows that have it, and no more."""
    x, label = normal((4, FRAMES, FEATURES)), jnp.array([3, 5, 3, 9])

    def condition(name, x, label):
        model = tiny(conditioning=name, downsample=FRAMES)
        params = random_params(shapes_of(model, x, label))
        return model.apply({"params": params}, x, label, method="condition")[0]

    @jax.jit
    def conditions(x, label):
        return condition("label", x, label), condition("none", x, label)

    by_label, by_nothing = map(np.asarray, conditions(x, label))
    np.testing.assert_array_equal(by_label[0], by_label[2])  # one digit
    assert np.abs(by_label[0] - by_label[1]).max() > 0.1
    np.testing.assert_array_equal(by_nothing, by_nothing[:1].repeat(4, axis=0))
    for cond in (by_label, by_nothing):
        assert np.abs(cond[:, 0] - cond[:, 1]).max() > 0.1  # frames differ, though their latent is one
    for other_cond, cond in zip(conditions(2 * x + 1, label), (by_label, by_nothing), strict=True):
        np.testing.assert_array_equal(other_cond, cond)
    moved, still = conditions(x, label.at[1].set(0))
    assert set(np.flatnonzero((moved != by_label).any(axis=(1, 2)))) == {1}
    np.testing.assert_array_equal(still, by_nothing)


def test_a_label_without_labels_is_refused_by_name():
    with pytest.raises(InputError, match="model.conditioning is 'label', but this data has no labels"):
        shapes_of(tiny(conditioning="label"), jnp.zeros((1, FRAMES, FEATURES)))


# --- codes: what the codec stores and decodes


RVQ = {"quantizer": "rvq", "num_quantizers": 5, "codebook_size": 16}
BANDS = (0, 0, 0, 1, 1, 2, 2, 2)
GAIN_SHAPE = {"bands": BANDS, "quantizer": "gain_shape", "level_stages": 2, "max_bits": 96}
CODED = {"fsq": {"quantizer": "fsq", "fsq_levels": 6}, "rvq": RVQ, "gain_shape": GAIN_SHAPE}


def test_codebooks_are_known_without_parameters():
    """And how much dropout keeps: each number of rvq's, eighths of fsq's, of what gain and shape adds to its levels."""
    fsq, uneven, few = tiny(latent_dim=64, fsq_levels=4), tiny(latent_dim=20), tiny(latent_dim=3)
    rvq, none = tiny(**RVQ), tiny(quantizer="none")
    assert [(m.num_codebooks, m.cardinality) for m in (fsq, rvq, none)] == [(64, 4), (5, 16), (0, 1)]
    assert fsq.kept_steps == tuple(range(8, 65, 8))
    assert uneven.kept_steps == (3, 5, 8, 10, 13, 15, 18, 20)
    assert (few.kept_steps, rvq.kept_steps) == ((1, 2, 3), (1, 2, 3, 4, 5))
    gain_shape = tiny(**GAIN_SHAPE)
    assert (gain_shape.num_codebooks, gain_shape.cardinality) == (1 + 2 + 2 * FEATURES, 256)
    assert gain_shape.kept_steps == tuple(range(16, 97, 10))
    assert [m.bits for m in (fsq, rvq, gain_shape)] == [128, 20, 96]
    assert [m.kept_range for m in (fsq, rvq, gain_shape)] == [(1, 64), (1, 5), (16, 96)]


@pytest.fixture(scope="module", params=CODED)
def coded(request):
    """(model, parameters, x)."""
    model, x = tiny(**CODED[request.param]), normal((3, FRAMES, FEATURES))
    return model, random_params(shapes_of(model, x)), x


def some_kept(model):
    """All, and two less of it."""
    return (*model.kept_steps[:2], model.kept_range[1])


def test_decoding_the_codes_gives_the_encoders_latents(coded):
    """Of the whole code, of less, of less in each clip; of fsq and rvq given all codes, or those that are kept."""
    model, params, x = coded
    encode = jax.jit(lambda params, kept: model.apply({"params": params}, x, kept, method="encode"))
    decode = lambda codes: model.apply({"params": params}, codes, method="dequantize")
    whole, codes, _ = encode(params, None)
    assert codes.min() >= 0 and codes.max() < model.cardinality
    by_clip, codes_by_clip, _ = encode(params, jnp.array(some_kept(model)))
    for clip, kept in enumerate(some_kept(model)):
        latents, some, _ = encode(params, kept)
        np.testing.assert_array_equal(codes_by_clip[clip], some[clip])
        np.testing.assert_array_equal(by_clip[clip], latents[clip])
        if not model.has_levels:
            np.testing.assert_array_equal(some, codes)
            some = some[..., :kept]
        if model.quantizer == "fsq":
            np.testing.assert_array_equal(decode(some), latents)
            np.testing.assert_array_equal(latents[..., kept:], 0)
        np.testing.assert_allclose(decode(some), latents, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(latents, whole)  # all are all


def test_what_the_decoder_knows_comes_from_the_codes(coded):
    """condition = upsample(dequantize(codes)), and less of the code tells it something else."""
    model, params, x = coded
    apply = functools.partial(model.apply, {"params": params})
    condition = jax.jit(lambda kept: apply(x, kept=kept, method="condition")[0])
    from_codes = jax.jit(lambda codes: apply(apply(codes, method="dequantize"), method="condition_on"))
    few = some_kept(model)[1]
    for kept in (None, few):
        _, codes, _ = apply(x, kept, method="encode")
        codes = codes if model.has_levels else codes[..., :kept]
        np.testing.assert_allclose(from_codes(codes), condition(kept), rtol=1e-5, atol=1e-5)
    assert np.abs(condition(few) - condition(None)).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "kept", "message"),
    [(RVQ, 0, "1 to 5 codebooks"), (RVQ, 6, "1 to 5 codebooks"), (GAIN_SHAPE, 97, "16 to 96 bits a latent")],
)
def test_more_than_it_has_cannot_be_kept(fields, kept, message):
    model, x = tiny(**fields), jnp.zeros((1, FRAMES, FEATURES))
    params = shapes_of(model, x)
    with pytest.raises(InputError, match=f"kept={kept}: this model has {message}"):
        jax.eval_shape(lambda params: model.apply({"params": params}, x, kept, method="encode"), params)


def test_without_a_quantizer_there_is_nothing_to_decode_or_drop():
    x = jnp.zeros((1, FRAMES, FEATURES))
    with pytest.raises(InputError, match="model.quantizer is 'none': there are no codes to decode"):
        shapes_of(tiny(quantizer="none"), jnp.zeros((1, 4, 0), jnp.int32), method="dequantize")
    with pytest.raises(InputError, match="model.quantizer_dropout: quantizer 'none' has no codebooks"):
        shapes_of(tiny(quantizer="none", quantizer_dropout=0.5), x)


# --- times and the auxiliary head


@pytest.mark.parametrize("backbone", codec.BACKBONES)
def test_times_h_gives_the_film_one_time_of_two(backbone):
    z, t, cond = jnp.zeros((1, FRAMES, FEATURES)), jnp.ones(1), jnp.zeros((1, FRAMES, 16))
    seen = {}
    for name in ("t_h", "h"):
        params = shapes_of(tiny(backbone=backbone, times=name), z, t, t, cond, method="flow")
        seen[name] = params["decoder"]["FilmEmbedding_0"]["Dense_0"]["kernel"].shape[0]
    assert seen == {"t_h": 2 * 64, "h": 64}  # time_features has 64


@pytest.mark.parametrize("name", ["h", "t_h"])
def test_with_times_h_only_the_interval_matters(name):
    """u(z, t, r) at two t and one h, and at two h and one t; in powers of two, whose difference is exact."""
    model, z, cond = (
        tiny(backbone="mlp", output="u", times=name),
        normal((1, FRAMES, FEATURES)),
        normal((1, FRAMES, 16)),
    )
    params = random_params(shapes_of(model, z, times(1), times(0), cond, method="flow"))

    @jax.jit
    def u(t, h):
        return model.apply({"params": params}, z, t, t - h, cond, method="flow")

    u_1, u_2, u_3 = u(times(1.0), times(0.25)), u(times(0.5), times(0.25)), u(times(1.0), times(0.5))
    assert np.array_equal(u_1, u_2) == (name == "h")
    assert np.abs(u_1 - u_3).max() > 1e-2


@pytest.mark.parametrize("backbone", codec.BACKBONES)
def test_velocity_head_adds_parameters_under_its_names_alone(backbone):
    x = jnp.zeros((1, FRAMES, FEATURES))
    without, with_head = (shapes_of(tiny(backbone=backbone, velocity_head=given), x) for given in (False, True))
    added = {name for name in with_head["decoder"] if name not in without["decoder"]}
    assert added == {"velocity_block", "velocity_head"}
    kept = {name: part for name, part in with_head["decoder"].items() if name not in added}
    assert with_head | {"decoder": kept} == without


def test_velocity_head_leaves_the_average_velocity_as_it_is():
    """The same parameters give the same u with and without the head, whose own output is another."""
    z, cond = normal((2, FRAMES, FEATURES)), normal((2, FRAMES, 16), seed=1)
    t, r = times(0.9, 0.5), times(0.2, 0.5)
    without, with_head = (tiny(backbone="mlp", velocity_head=given) for given in (False, True))
    params = random_params(shapes_of(with_head, z))
    assert "velocity_head" in params["decoder"]

    @jax.jit
    def outputs(params):
        flow = lambda model, params: model.apply({"params": params}, z, t, r, cond, method="flow")
        kept = {name: part for name, part in params["decoder"].items() if not name.startswith("velocity_")}
        velocity = with_head.apply({"params": params}, z, t, cond, method="velocity")
        return flow(with_head, params), flow(without, params | {"decoder": kept}), velocity

    u, u_without, v = outputs(params)
    np.testing.assert_allclose(u, u_without, rtol=1e-6, atol=1e-6)
    assert v.shape == z.shape and np.abs(u - v).max() > 0.1


# --- levels


def test_gain_and_shape_are_coded_apart():
    """With entries that hit the levels, what is left to the flow has level 1; louder tokens have the same openness."""
    model, x = tiny(**GAIN_SHAPE), normal((1, FRAMES, FEATURES))
    params = model.init(jax.random.key(0), x)["params"]
    levels = jnp.round(model.gain_shape.levels(x) * 256) / 256
    entries = np.full((2, 256, 6), 50.0, np.float32)  # out of reach
    entries[0, :4], entries[1, 7] = levels[0], 0.0
    entries[0, 100:104] = entries[0, :4] + 177 / 256  # ln 2
    params["level_quantizer"] = {"codebook": jnp.asarray(entries)}
    apply = functools.partial(model.apply, {"params": params})
    _, codes, _ = apply(x, method="encode")
    np.testing.assert_array_equal(codes[0, :, 1:3], [[i, 7] for i in range(4)])
    _, louder, _ = apply(2 * x, method="encode")
    np.testing.assert_array_equal(louder[0, :, 1:3], [[100 + i, 7] for i in range(4)])
    assert abs(int(louder[0, 0, 0]) - (int(codes[0, 0, 0]) - round(0.69 * 16 * 166 / 256))) <= 1
    cond, _ = apply(x, kept=16, method="condition")  # the levels' alone
    w = model.to_flow(x, cond)
    np.testing.assert_allclose(model.gain_shape.levels(w), 0.0, atol=0.01)
    np.testing.assert_allclose(model.from_flow(w, cond), x, rtol=1e-5, atol=1e-6)


def test_what_the_code_says_is_no_longer_the_flows():
    """The flow's data are x / gain less what is known of it, over the deviation left; both in the latents."""
    model, x = tiny(**GAIN_SHAPE), normal((2, FRAMES, FEATURES))
    params = model.init(jax.random.key(0), x)["params"]
    apply = functools.partial(model.apply, {"params": params})
    cond, _ = apply(x, method="condition")
    latents, codes, _ = apply(x, method="encode")
    size = model.downsample * FEATURES
    known, deviation = (latents[..., i : i + size].reshape(x.shape) for i in (0, size))
    gain = model.gain_shape.gain(model.gain_shape.of_frames(latents[..., 2 * size :]))
    cells = np.asarray(codes[..., 3:]).reshape(x.shape) - 127
    np.testing.assert_array_equal(np.sign(known), np.sign(cells))
    assert 0 < (cells != 0).mean() < 1
    np.testing.assert_allclose(model.to_flow(x, cond), (x / gain - known) / deviation, rtol=1e-4, atol=1e-5)
    from_flow = model.from_flow(jnp.zeros_like(x), cond)  # the middle of what the code leaves possible
    np.testing.assert_allclose(from_flow, known * gain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conditioning": "none"}, "model.quantizer: gain_shape is a code; choose conditioning latent"),
        ({"max_bits": 16}, "model.max_bits is 16, which 2 level_stages take; choose more than 16"),
        ({"level_stages": 0}, "model.level_stages is 0; choose 1 or more"),
    ],
)
def test_a_code_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        shapes_of(tiny(**(GAIN_SHAPE | fields)), jnp.zeros((1, FRAMES, FEATURES)))


# --- at the start


@pytest.mark.parametrize("backbone", codec.BACKBONES)
def test_untrained_model_decodes_to_silence(backbone):
    """The head is zero: x_hat = 0 for output "x", so u = z / clip(t, 0.05, 1) and one step from noise gives 0."""
    model, z = tiny(backbone=backbone), normal((3, FRAMES, FEATURES))
    t, r = times(1.0, 0.3, 0.02), times(0.0, 0.3, 0.01)
    cond = normal((3, FRAMES, 16), seed=1)

    @jax.jit
    def init_and_flow(rng):
        params = model.init(rng, z, t, r, cond, method="flow")
        flow = lambda model: model.apply(params, z, t, r, cond, method="flow")
        return flow(model), flow(tiny(backbone=backbone, output="u"))

    u, raw = init_and_flow(jax.random.key(0))
    np.testing.assert_allclose(u, z / np.maximum(t, 0.05)[:, None, None], rtol=1e-6)
    np.testing.assert_array_equal(z[0] - u[0], 0)
    np.testing.assert_array_equal(raw, 0)


# --- derivatives

FLOAT32_MODULES = (codec, layers, mixer_flow, transformer_flow)  # those that cast to float32


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
    for module in FLOAT32_MODULES:
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


# Decoders of two blocks, what frame 11 of 24 changes, and where a chunk begins: anywhere, or where a window does.
DECODERS = {
    "conv": (ConvFlow(16, 2), range(11 - 2 * REACH, 11 + 2 * REACH + 1), 11),
    "mlp": (MlpFlow(16, 2), range(11, 12), 11),
    "mixer": (MixerFlow(16, 2, window=8), range(4, 20), 16),  # [8, 16), then [4, 12) and [12, 20)
    "transformer": (TransformerFlow(16, 2, window=4), range(11 - 2 * 4, 11 + 2 * 4 + 1), 11),
}


def decoder_of(model):
    """`(z, t, h, cond) -> out` with random parameters."""
    z, t = jnp.zeros((1, 24, FEATURES)), jnp.ones(1)
    params = random_params(shapes_of(model, z, t, t, jnp.zeros((1, 24, 16))))
    return jax.jit(functools.partial(model.apply, {"params": params}))


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    """A row of `DECODERS`, with random parameters."""
    model, changes, begin = DECODERS[request.param]
    return decoder_of(model), changes, begin


def changed_frames(before, after):
    return set(np.flatnonzero((np.asarray(before) != np.asarray(after)).any(axis=(0, 2))))


@pytest.mark.parametrize("which", ["z", "cond"])
def test_decoder_looks_no_further_than_its_receptive_field(decoder, which):
    apply, changes, _ = decoder
    z, cond = normal((1, 24, FEATURES)), normal((1, 24, 16), seed=1)
    t, h = times(0.8), times(0.5)
    inputs = {"z": z, "t": t, "h": h, "cond": cond}
    out, moved = apply(**inputs), apply(**inputs | {which: inputs[which].at[:, 11].add(1)})
    assert changed_frames(out, moved) == set(changes)


def test_decoder_of_a_chunk_equals_that_of_the_whole(decoder):
    """Given as many frames of context as one sees, and not without."""
    apply, changes, begin = decoder
    z, cond, t = normal((1, 96, FEATURES)), normal((1, 96, 16), seed=1), times(0.8)
    end, context = 93, len(changes) - 1
    whole, chunk = apply(z, t, t, cond), apply(z[:, begin:end], t, t, cond[:, begin:end])
    kept = slice(begin + context, end - context)
    np.testing.assert_allclose(chunk[:, context : end - begin - context], whole[:, kept], rtol=1e-4, atol=1e-5)
    if context:
        assert np.abs(chunk[:, 0] - whole[:, begin]).max() > 1e-2


def test_batch_of_n_equals_n_batches_of_one(decoder):
    apply, _, _ = decoder
    z, cond = normal((3, 24, FEATURES)), normal((3, 24, 16), seed=1)
    t, h = times(0.9, 0.5, 0.1), times(0.9, 0.2, 0.0)
    one_by_one = [apply(z[i : i + 1], t[i : i + 1], h[i : i + 1], cond[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(apply(z, t, h, cond), np.concatenate(one_by_one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [MixerFlow, TransformerFlow])
def test_any_length_works_and_far_frames_change_nothing(kind):
    """At the default window and reach of 32 frames, with lengths beside their multiples."""
    apply, t = decoder_of(kind(16, 2)), times(0.8)
    z, cond = normal((1, 160, FEATURES)), normal((1, 160, 16), seed=1)
    whole = apply(z, t, t, cond)
    for length in (1, 31, 32, 33, 100):
        out = apply(z[:, :length], t, t, cond[:, :length])
        assert out.shape == (1, length, FEATURES) and np.isfinite(out).all()
        # What sees no frame beyond the cut: whole windows less half a one, or all but twice the reach.
        alike = max(0, length // 32 * 32 - 16 if kind is MixerFlow else length - 64)
        np.testing.assert_allclose(out[:, :alike], whole[:, :alike], rtol=1e-4, atol=1e-5)
    sees_50 = range(16, 80) if kind is MixerFlow else range(0, 115)
    changed = changed_frames(whole, apply(z.at[:, 50].add(1), t, t, cond))
    assert set(range(34, 67)) <= changed <= set(sees_50)  # attention at the edge may round to nothing


def test_shifted_frames_shift_the_transformers_output():
    """Rotary positions are relative: away from the ends frames 5 later give the same 5 later, as in no other block."""
    apply, t = decoder_of(TransformerFlow(16, 2, window=4)), times(0.8)
    z, cond = normal((1, 48, FEATURES)), normal((1, 48, 16), seed=1)
    moved = apply(jnp.roll(z, 5, 1), t, t, jnp.roll(cond, 5, 1))
    np.testing.assert_allclose(moved[:, 13:40], apply(z, t, t, cond)[:, 8:35], rtol=1e-4, atol=1e-5)


def modulated_norm(y, film, dense):
    """The beginning of a residual in numpy: modulated y [l d] and the gate, from the weights of its modulation."""
    scale, shift, gate = np.split(film @ dense["kernel"] + dense["bias"], 3, axis=-1)
    normed = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return normed * (1 + scale) + shift, gate


@pytest.mark.parametrize("length", [1, 7, 16, 37])
def test_attention_equals_a_slow_loop(length, monkeypatch):
    """Query by query over its band, positions counted from the file's begin as phases of complex numbers."""
    monkeypatch.setattr(transformer_flow, "HEAD_WIDTH", 8)
    model, reach, heads, width = BandAttention(reach=8), 8, 2, 8
    y, film = normal((2, length, 16)), normal((2, length, layers.FILM_WIDTH), seed=1)
    params = random_params(shapes_of(model, y, film))
    out = np.asarray(model.apply({"params": params}, y, film))
    p, y, film = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, y, film))
    phases = np.exp(1j * np.outer(np.arange(length), 8.0 ** -(np.arange(4) / 3)))
    rms_norm = lambda q, norm: q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"]
    for row in range(2):
        normed, gate = modulated_norm(y[row], film[row], p["Dense_0"])
        qkv = (normed @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]).reshape(length, 3, heads, width)
        mixed = np.zeros((length, heads, width))
        for head in range(heads):
            q, k = (rms_norm(qkv[:, i, head], p[f"RMSNorm_{i}"]) for i in range(2))
            q, k = ((part[:, :4] + 1j * part[:, 4:]) * phases for part in (q, k))
            for i in range(length):
                band = slice(max(0, i - reach), i + reach + 1)
                weights = np.exp((q[i] * k[band].conj()).real.sum(-1) / np.sqrt(width))
                mixed[i, head] = weights @ qkv[band, 2, head] / weights.sum()
        residual = mixed.reshape(length, 16) @ p["Dense_2"]["kernel"] + p["Dense_2"]["bias"]
        np.testing.assert_allclose(out[row], y[row] + gate * residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("length", [1, 4, 8, 21])
def test_token_mixing_equals_a_slow_loop(offset, length):
    """Window by window with those frames of it that there are, so that nothing can come from beyond the ends."""
    model = TokenMixing(window=8, offset=offset)
    y, film = normal((2, length, 16)), normal((2, length, layers.FILM_WIDTH), seed=1)
    params = random_params(shapes_of(model, y, film))
    out = np.asarray(model.apply({"params": params}, y, film))
    p, y, film = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, y, film))
    for row in range(2):
        normed, gate = modulated_norm(y[row], film[row], p["Dense_0"])
        for begin in range(-offset, length, 8):
            frames = np.arange(max(begin, 0), min(begin + 8, length))
            hidden = p["Dense_1"]["kernel"][frames - begin].T @ normed[frames] + p["Dense_1"]["bias"][:, None]
            hidden = np.asarray(jax.nn.gelu(hidden))
            mixed = p["Dense_2"]["kernel"].T @ hidden + p["Dense_2"]["bias"][:, None]
            expected = y[row, frames] + gate[frames] * mixed[frames - begin]
            np.testing.assert_allclose(out[row, frames], expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize(("backbone", "quantizer"), [*((name, "fsq") for name in codec.BACKBONES), ("conv", "rvq")])
def test_gradients_pass_the_quantizer_to_every_parameter(backbone, quantizer):
    model = tiny(backbone=backbone, **CODED[quantizer] | {"num_quantizers": 2})
    x = normal((2, FRAMES, FEATURES))
    params = random_params(shapes_of(model, x))
    t, r = times(1.0, 0.7), times(0.0, 0.7)

    @jax.jit
    @jax.grad
    def gradient(params):
        cond, metrics = model.apply({"params": params}, x, method="condition")
        u = model.apply({"params": params}, x, t, r, cond, method="flow")
        return jnp.sum(u**2) + metrics.get("loss", 0.0)

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(gradient(params))):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)
