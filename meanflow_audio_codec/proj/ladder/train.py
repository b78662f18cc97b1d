"""The training program with one objective more, whose derivative has its tangents swapped: a failure worth showing.

python -m meanflow_audio_codec.proj.ladder.train --config configs/mnist.py:objective=swapped_tangent,...
"""

from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from meanflow_audio_codec.tools import train
from meanflow_audio_codec.trainers import flow
from meanflow_audio_codec.trainers.objectives import OBJECTIVES, Loss, Weight, improved_mean_flow


def swapped_tangent(
    u_fn: flow.UFn, x: Float[Array, "b ..."], cond: Any, rng: PRNGKeyArray, cfg: Any, weight: Weight = None
) -> Loss:
    """Improved mean flow with du/dt along (v, 0, 1) in place of (v, 1, 0) of (z, t, r).

    It is what a network with arguments (z, r, t) gets when the tangents keep the order (z, t, r): table 1b of MeanFlow
    (arXiv 2505.13447), FID 329 for 61.
    """

    def swapped(z: Array, t: Array, r: Array, cond: Any) -> Array:
        still = jax.lax.stop_gradient(t)  # the value of t without its tangent, which goes to r
        return u_fn(z, still, r + (t - still), cond)

    return improved_mean_flow(swapped, x, cond, rng, cfg, weight)


if __name__ == "__main__":
    OBJECTIVES["swapped_tangent"] = swapped_tangent
    flow.SAMPLERS["swapped_tangent"] = flow.SAMPLERS["improved_mean_flow"]
    train.main()
