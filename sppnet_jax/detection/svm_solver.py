"""Linear SVMs of all classes at once, on the device: block dual coordinate descent.

The SVM of a class is the minimum over (w, v) of

    ½ ‖w‖² + ½ v² + C · Σᵢ cᵢ · max(0, 1 − yᵢ (w·xᵢ + B v)),   its bias being B v,

where cᵢ is the positive weight for positives and 1 for negatives: the bias is the
weight of one more feature of the constant value B, and is regularised as liblinear's
is. Its dual has one variable for each example, between 0 and C·cᵢ, and nothing that
ties them together, so one can be optimised at a time; w and v follow from them.

liblinear does so one class at a time. But all classes share their examples, and differ
only in signs and bounds: an example that a class leaves out has the bounds 0 and 0. So
a block of examples is scored by all classes in one product of matrices, its variables
are optimised one after the other on the block's own small Gram matrix, and a second
product brings the weights up to date. The dual never falls, and its limit is the
optimum; the duality gap of every class bounds what remains, and decides when to stop.
"""

import functools
import gc
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.classification.ranking import check_finite
from sppnet_jax.classification.svm import LinearSVMs

log = logging.getLogger(__name__)

# Examples of a block: the products are large, the Gram matrix stays in the cache.
BLOCK = 128
# Epochs between two looks at the duality gap, which costs half an epoch.
EPOCHS_PER_LOOK = 4


class SolvedSVMs(NamedTuple):
    """SVMs with the proof of how good they are; dual variables to start others from."""

    svms: LinearSVMs
    duals: np.ndarray  # float32 [N, classes], 0 to C · the example's weight
    objectives: np.ndarray  # float64 [classes], of the primal problem
    gaps: np.ndarray  # float64 [classes], at most so far above the optimum
    epochs: int


def solve_svms(
    features: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    C: float = 1e-3,
    positive_weight: float = 2.0,
    bias_multiplier: float = 10.0,
    tolerance: float = 1e-3,
    max_epochs: int = 1000,
    start: np.ndarray | None = None,
    seed: int = 0,
) -> SolvedSVMs:
    """Trains the linear SVM of every class, L1 hinge loss, to a known accuracy.

    The defaults are those of the R-CNN release, for features of a mean length of 20.

    `features`: float [N, D], finite, or several such arrays, taken one after the other;
    computed with in float32. Beside them one copy is made, and no more.
    `labels`: int8 [N, classes]: 1 for a positive of the class, -1 for a negative, 0
    where the example is left out of the class. A class without any gets zeros.
    `C`, `positive_weight`: the weight of a negative's loss, and how many times that of
    a positive counts. `bias_multiplier`: B, not negative; 0 is an SVM without a bias.
    `tolerance`: every class ends within so much of its optimum, relative to its
    objective. float32 allows about 1e-5.
    `max_epochs`: visits of all examples at most; where they do not suffice, the log
    names the classes and their gaps.
    `start`: float [N, classes], dual variables to start from, such as those of an
    earlier solution with rows of zeros appended for new examples.
    `seed`: of the order in which examples are visited; equal seeds, equal results.

    Raises: ValueError for arguments that do not fit.
    """
    several = not isinstance(features, np.ndarray)
    parts = [np.asarray(part) for part in (features if several else [features])]
    labels = np.asarray(labels)
    _check(parts, labels)
    count, classes = labels.shape
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    blocks = -(-count // BLOCK)
    signs = _in_blocks([labels], order)
    bounds = np.float32(C) * np.where(signs > 0, np.float32(positive_weight), signs**2)
    duals = np.zeros_like(signs)
    if start is not None:
        start = np.asarray(start)
        if start.shape != labels.shape or not np.isfinite(start).all():
            raise ValueError(
                f"start must be finite dual variables [N, classes] = {labels.shape}, "
                f"got shape {start.shape}; append rows of zeros for new examples"
            )
        duals = np.clip(_in_blocks([start], order), 0, bounds)
    x, constant = jax.device_put(_in_blocks(parts, order)), jnp.float32(bias_multiplier)
    examples = _Examples(
        x, jnp.asarray(signs), jnp.asarray(bounds), _grams(x, constant), constant
    )
    # From here on a dual variable has the sign of its example.
    signed = jnp.asarray(duals * signs)
    epochs = 0
    while True:
        weights, bias, *found = _look(examples, signed)
        objectives, gaps = (np.asarray(part, np.float64) for part in found)
        open_classes = gaps > tolerance * objectives
        if not open_classes.any() or epochs >= max_epochs:
            break
        some = min(EPOCHS_PER_LOOK, max_epochs - epochs)
        visits = np.concatenate([rng.permutation(blocks) for _ in range(some)])
        turns = rng.permuted(np.tile(np.arange(BLOCK), (len(visits), 1)), axis=1)
        signed = _visit(
            examples,
            signed,
            weights,
            bias,
            jnp.asarray(visits, jnp.int32),
            jnp.asarray(turns, jnp.int32),
        )
        epochs += some
    if open_classes.any():
        named = (
            f"class {number} (gap {gaps[number] / objectives[number]:.1e})"
            for number in np.flatnonzero(open_classes)
        )
        log.warning(
            "SVMs not within %g of their optimum after %d epochs: %s. Lower C, scale "
            "the features down, or raise max_epochs",
            tolerance,
            epochs,
            ", ".join(named),
        )
    # JAX lets go of memory that it was lent when garbage is collected, not before.
    del x, examples
    gc.collect()
    final = np.zeros((count, classes), np.float32)
    final[order] = np.abs(np.asarray(signed).reshape(-1, classes)[:count])
    biases = bias_multiplier * np.asarray(bias, np.float32)
    svms = LinearSVMs(np.asarray(weights), biases)
    return SolvedSVMs(svms, final, objectives, gaps, epochs)


class _Examples(NamedTuple):
    """Examples in blocks; the same for all epochs."""

    x: jax.Array  # [blocks, BLOCK, D]
    signs: jax.Array  # [blocks, BLOCK, classes]
    bounds: jax.Array  # [blocks, BLOCK, classes]
    grams: jax.Array  # [blocks, BLOCK, BLOCK], the constant feature included
    bias_feature: jax.Array


# TensorFloat-32, which GPUs would use, is too coarse for a gap of 1e-3.
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _grams(x: jax.Array, constant: jax.Array) -> jax.Array:
    return jax.lax.map(lambda block: _dot(block, block.T) + constant**2, x)


@jax.jit
def _visit(
    examples: _Examples,
    signed: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
    visits: jax.Array,
    turns: jax.Array,
) -> jax.Array:
    """Optimises the blocks in the order `visits`, the examples of each in the order
    `turns` [visits, BLOCK]; returns the new dual variables."""
    lowest = jnp.minimum(0, examples.signs * examples.bounds)
    highest = jnp.maximum(0, examples.signs * examples.bounds)

    def visit(
        state: tuple[jax.Array, jax.Array, jax.Array],
        block_and_turns: tuple[jax.Array, jax.Array],
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        signed, weights, bias = state
        k, turns = block_and_turns
        x, gram = examples.x[k], examples.grams[k]
        errors = _dot(x, weights.T) + examples.bias_feature * bias - examples.signs[k]
        low, high = lowest[k], highest[k]

        def step(
            turn: jax.Array, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            block, errors = state
            i = turns[turn]
            # An example of zeros without a bias has no say: its slope is never 0.
            best = block[i] - errors[i] / jnp.maximum(gram[i, i], 1e-30)
            change = jnp.clip(best, low[i], high[i]) - block[i]
            return block.at[i].add(change), errors + gram[i][:, None] * change

        block, _ = jax.lax.fori_loop(0, BLOCK, step, (signed[k], errors))
        change = block - signed[k]
        weights = weights + _dot(change.T, x)
        bias = bias + examples.bias_feature * change.sum(axis=0)
        return (signed.at[k].set(block), weights, bias), None

    (signed, _, _), _ = jax.lax.scan(visit, (signed, weights, bias), (visits, turns))
    return signed


@jax.jit
def _look(examples: _Examples, signed: jax.Array) -> tuple[jax.Array, ...]:
    """The weights [classes, D] that dual variables stand for, and for each class that
    of the constant feature, the objective and the gap."""
    # Summed anew, so that rounding errors of many updates do not add up.
    flat = signed.reshape(-1, signed.shape[-1])
    x = examples.x.reshape(len(flat), -1)
    weights = _dot(flat.T, x)
    bias = examples.bias_feature * flat.sum(axis=0)
    scores = _dot(x, weights.T) + examples.bias_feature * bias
    signs = examples.signs.reshape(flat.shape)
    losses = examples.bounds.reshape(flat.shape) * jnp.maximum(0, 1 - signs * scores)
    length = (weights**2).sum(axis=1) + bias**2
    loss, dual = losses.sum(axis=0), jnp.abs(flat).sum(axis=0)
    return weights, bias, length / 2 + loss, length + loss - dual


def _in_blocks(parts: Sequence[np.ndarray], order: np.ndarray) -> np.ndarray:
    """Rows in an order, float32 [blocks, BLOCK, …]: blocks mix examples of all images.

    `parts`: the rows, those of the first array first. Blank ones, bounded by 0, fill
    the last block. One copy and no more: features may take gigabytes.
    """
    count = -(-len(order) // BLOCK) * BLOCK
    columns = parts[0].shape[1]
    # device_put takes this memory as it is on a CPU, if it begins at 64 bytes.
    room = np.zeros(count * columns + 16, np.float32)
    first = -room.ctypes.data % 64 // 4
    filled = room[first : first + count * columns].reshape(count, columns)
    places, done = np.argsort(order), 0
    for part in parts:
        filled[places[done : done + len(part)]] = part
        done += len(part)
    return filled.reshape(-1, BLOCK, columns)


def _check(parts: Sequence[np.ndarray], labels: np.ndarray) -> None:
    shapes = [part.shape for part in parts]
    told = ", ".join(map(str, shapes))
    count = sum(shape[0] for shape in shapes if len(shape) == 2)
    if (
        len({shape[1:] for shape in shapes}) != 1
        or len(shapes[0]) != 2
        or labels.ndim != 2
        or count != len(labels)
    ):
        raise ValueError(
            f"features {told} must be [N, D], and labels {labels.shape} [N, classes], "
            "of the same N"
        )
    if not labels.size or not count * shapes[0][1]:
        raise ValueError(
            f"features {told} and labels {labels.shape} hold nothing to train on"
        )
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError(
            "labels must be 1 (positive), -1 (negative) or 0 (left out), but there are "
            f"{np.unique(labels)[:10].tolist()}"
        )
    for part in filter(len, parts):
        check_finite(part, "features")
