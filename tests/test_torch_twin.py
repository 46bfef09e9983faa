"""PyTorch's network and step compute what ours do, else no ratio means anything."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sppnet_jax.network.model import create_model
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.trunks import PAPER
from sppnet_jax.run.parallel import unreplicate
from sppnet_jax.training.steps import (
    Optimizer,
    create_state,
    make_train_step,
    shard_batch,
)

torch = pytest.importorskip("torch")

from sppnet_jax.benchmarks import torch_twin  # noqa: E402

CLASSES = 7


def random_params(model, side, seed=0):
    """Parameters with biases that are not all alike."""
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, side, side, 3)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: p if p.ndim > 1 else rng.normal(0, 0.1, p.shape).astype(np.float32),
        params["params"],
    )


def flax_arrays(twin, *, gradients=False):
    """The twin's parameters, or their gradients, named and ordered as in Flax."""
    found = {}
    for name, layer in twin.named_layers().items():
        weight, bias = [p.grad if gradients else p for p in layer.parameters()]
        kernel = weight.detach().float().cpu().numpy()
        if kernel.ndim == 4:
            kernel = kernel.transpose(2, 3, 1, 0)
        else:
            bins = twin.bins if name == "fc6" else 1
            kernel = kernel.reshape(len(kernel), -1, bins).transpose(2, 1, 0)
            kernel = kernel.reshape(-1, kernel.shape[-1])
        found[name] = {"kernel": kernel, "bias": bias.detach().float().cpu().numpy()}
    return found


def assert_trees_agree(found, expected, tolerance=1e-4):
    """Each array to within a tolerance relative to its largest value."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * np.abs(b).max()
        ),
        found,
        jax.tree.map(np.asarray, expected),
    )


@pytest.mark.parametrize("levels", [(6, 3, 2, 1), None])
@pytest.mark.parametrize("name", PAPER)
def test_logits_and_gradients_are_ours(name, levels):
    side = 64
    arguments = {"width": 1 / 24, "image_size": side, "dropout": 0.0}
    model = create_model(name, levels, CLASSES, weight_init="he", **arguments)
    params = random_params(model, side)
    rng = np.random.default_rng(1)
    images = rng.normal(0, 40, (3, side, side, 3)).astype(np.float32)
    labels = np.array([0, 3, 6])

    @jax.jit
    def ours(params, images):
        def loss(params):
            logits, _ = model.apply({"params": params}, images, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits = ours(params, images)
    twin = torch_twin.Twin(name, levels, CLASSES, **arguments)
    torch_twin.load_params(twin, params)
    theirs = twin(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.nn.functional.cross_entropy(theirs, torch.from_numpy(labels)).backward()
    assert_trees_agree(theirs.detach().numpy(), logits)
    assert_trees_agree(flax_arrays(twin, gradients=True), gradients)
    assert_trees_agree(flax_arrays(twin), params, tolerance=0)


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_three_steps_give_our_losses_and_parameters(layout):
    side, rate, mean = 64, 0.01, 128.0
    optimizer = Optimizer(momentum=0.9, weight_decay=0.05)
    model = create_model(
        "zf5",
        (3, 2, 1),
        CLASSES,
        width=1 / 24,
        image_size=side,
        dropout=0.0,
        weight_init="he",
    )
    rng = np.random.default_rng(0)
    images = rng.integers(118, 139, (8, side, side, 3), np.uint8)
    labels = rng.integers(0, CLASSES, 8)
    preprocessing = Preprocessing(np.float32(mean), 1.0, np.zeros((3, 3), np.float32))
    step = make_train_step(model, optimizer, preprocessing)
    state = create_state(model, optimizer, seed=0)
    twin = torch_twin.Twin(
        "zf5", (3, 2, 1), CLASSES, width=1 / 24, image_size=side, dropout=0.0
    )
    torch_twin.load_params(twin, unreplicate(state.params))
    twin_step = torch_twin.make_twin_step(twin, optimizer, mean, layout=layout)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    pixels = pixels.contiguous(memory_format=getattr(torch, layout))
    batch = {"image": images, "label": labels, "mask": np.ones(8, bool)}
    losses = []
    for _ in range(3):
        state, metrics = step(state, shard_batch(batch), np.float32(rate))
        loss, correct = twin_step(pixels, torch.from_numpy(labels), rate)
        losses.append(float(metrics["loss"][0]))
        assert float(loss) == pytest.approx(losses[-1], rel=1e-4)
        assert int(correct) == int(metrics["correct"][0])
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)  # something was learnt
    params = unreplicate(state.params)
    assert_trees_agree(flax_arrays(twin), params, tolerance=1e-4)


def test_dropout_is_on_in_a_step_and_off_for_logits():
    twin = torch_twin.Twin("zf5", (1,), 3, width=1 / 24, dropout=0.5)
    images = torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)
    first, second = (torch_twin.twin_logits(twin, images, 128.0) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    step = torch_twin.make_twin_step(twin, Optimizer(), 128.0)
    losses = {float(step(images, torch.tensor([0, 1]), 0.0)[0]) for _ in range(4)}
    assert len(losses) > 1


def test_parameters_of_another_network_are_refused():
    model = create_model("zf5", (2, 1), 3, width=1 / 24, image_size=64)
    params = random_params(model, 64)
    with pytest.raises(ValueError, match="the kernel of fc6"):
        torch_twin.load_params(torch_twin.Twin("zf5", (1,), 3, width=1 / 24), params)
    deeper = torch_twin.Twin("overfeat7", (2, 1), 3, width=1 / 24)
    with pytest.raises(ValueError, match="do not fit a network of"):
        torch_twin.load_params(deeper, params)
    with pytest.raises(ValueError, match="unknown backbone"):
        torch_twin.Twin("zf6")
    with pytest.raises(ValueError, match="no label smoothing"):
        torch_twin.make_twin_step(deeper, Optimizer(label_smoothing=0.1), 128.0)
