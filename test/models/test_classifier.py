"""classifier.py: shapes, and images that do not see each other."""

import jax
import jax.numpy as jnp
import numpy as np

from meanflow_audio_codec.models.classifier import Classifier


def test_logits_of_ten_digits_and_as_many_features_as_asked():
    model = Classifier(width=4, num_features=5)
    init = lambda: model.init_with_output(jax.random.key(0), jnp.zeros((3, 28, 28, 1)))
    (logits, features), variables = jax.eval_shape(init)
    assert (logits.shape, features.shape) == ((3, 10), (3, 5))
    assert set(variables) == {"params"}  # no statistics of a batch


def test_features_are_what_the_logits_are_made_of_and_each_images_own():
    """FID and KID compare them, of images in whatever batches they come."""
    model = Classifier(width=2, num_features=8)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 28, 28, 1)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    logits, features = apply(params, images)
    _, others = apply(params, np.concatenate([images[:1], -images[1:]]))
    np.testing.assert_array_equal(others[0], features[0])
    assert (others[1:] != features[1:]).any(axis=1).all()
    assert np.min(features) == 0 < np.max(features)
    dense = params["params"]["Dense_1"]
    np.testing.assert_allclose(features @ dense["kernel"] + dense["bias"], logits, rtol=1e-4, atol=1e-5)
