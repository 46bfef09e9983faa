"""The layer of an end-to-end detector that moves its windows onto objects."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of encoded boxes (dy, dx, log dh, log dw): the layer predicts multiples of these.
SPREAD = np.array([0.1, 0.1, 0.2, 0.2], np.float32)
BOX = "box"  # its name among the parameters


def predict_boxes(params: Any, seen: jax.Array) -> jax.Array:
    """How each class would move the windows: encoded boxes [windows, classes, 4]."""
    layer = params[BOX]
    moves = seen.astype(jnp.float32) @ layer["kernel"] + layer["bias"]
    return moves.reshape(len(seen), -1, 4) * SPREAD
