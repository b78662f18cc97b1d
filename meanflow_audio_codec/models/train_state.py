"""What a run carries from step to step and into its checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int


class TrainState(struct.PyTreeNode):
    """Parameters with their average and optimizer, and the measured scale of the tokens (see preprocessing.scaling)."""

    # Any, for JAX also builds states whose leaves are shapes, shardings or None.
    step: Any  # int32 []
    params: Any
    ema_params: Any
    opt_state: Any
    scale: Any  # float32 [f]

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation, scale: Float[Array, "f"]) -> "TrainState":
        """Start a run at step 0; the average starts at the parameters."""
        return cls(jnp.zeros((), jnp.int32), params, None, tx.init(params), scale).start_from(params)

    def start_from(self, params: Any) -> "TrainState":
        """Take over parameters; the average starts at them, as a copy, for a step may consume the buffers of both."""
        return self.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))


def ema_update(ema_params: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """Average with warm-up: after n steps min(decay, (1 + n) / (10 + n)), so that short runs forget their start."""
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda average, new: average * rate + new * (1 - rate), ema_params, params)
