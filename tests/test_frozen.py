"""Heads on a frozen trunk, and trunks trained from a layer on, against plain loops."""

import dataclasses
import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import folder_pretrained
from sppnet_jax.classification.evaluation import evaluate_networks
from sppnet_jax.data.datasets import open_split
from sppnet_jax.data.images import crop, decode_image, resize_whole, warp
from sppnet_jax.network.model import make_model
from sppnet_jax.network.pretrained import (
    named_params,
    pretrained_network,
    pretrained_params,
    with_pretrained,
)
from sppnet_jax.network.trained import load_network
from sppnet_jax.network.weight_files import read_tensors, write_tensors
from sppnet_jax.pyramid.pooling import num_bins
from sppnet_jax.run.metrics import read_metrics
from sppnet_jax.run.settings import read
from sppnet_jax.training import frozen
from sppnet_jax.training.frozen import Pooled, batch_loader, pool_split
from sppnet_jax.training.layer_features import Features
from sppnet_jax.training.network_settings import NetworkSettings
from sppnet_jax.training.networks import train_network
from sppnet_jax.training.steps import create_state
from tests.data_helpers import encode, picture, write_two_colors
from tests.network_helpers import (
    TINY_TRUNK,
    drawn_params,
    pooled_by_hand,
    run_with_tiny_trunk,
    tiny_maps,
    write_tiny_weights,
)

LEVELS = (2, 1)
EPOCHS, BATCH, TRAIN, TEST = 3, 8, 16, 8
CHANNELS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of two classes: wide ones, and an upright one of each."""
    root = tmp_path_factory.mktemp("pictures")
    write_two_colors(root, 44, 60)
    for label in "ab":
        (root / "train" / label / "0.png").write_bytes(encode(picture(70, 50, seed=9)))
    return root


@pytest.fixture(scope="module")
def make(root, tiny_trunk):
    """Settings of a head on the tiny trunk, some of them changed."""

    def settings(**changes):
        config = folder_pretrained.get_config()
        config.epochs, config.batch_size, config.log_steps = EPOCHS, BATCH, 1
        config.model.backbone, config.model.weights = TINY_TRUNK, str(tiny_trunk)
        config.model.levels, config.model.dropout = LEVELS, 0.0
        config.data.root, config.data.threads = str(root), 2
        config.data.image_size, config.data.resize_side = 32, 40
        config.update_from_flattened_dict(changes)
        return read(NetworkSettings, config.to_dict())

    return settings


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """The folder of a run of three epochs."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train_network(make(), workdir)
    return workdir


@pytest.fixture
def extracted(monkeypatch):
    """What went through a trunk: (split, levels, mirrored) of each pass."""
    passes, extract = [], frozen.extract_features

    def counted(network, source, **given):
        passes.append((source.split, network.model.levels, given["mirrored"]))
        return extract(network, source, **given)

    monkeypatch.setattr(frozen, "extract_features", counted)
    return passes


VIEWS = {
    "full": lambda image: resize_whole(image, 40, 4.0),
    "crop": lambda image: crop(resize_whole(image, 40, 4.0), 32, "center"),
    "warp": lambda image: warp(image, 32),
}


@pytest.fixture(scope="module")
def by_hand(tiny_trunk):
    """The pooled vectors of a split, each image convolved by itself."""
    trunk = pretrained_params(TINY_TRUNK, str(tiny_trunk))

    def pooled(source, view="full", *, mirrored=False, levels=LEVELS, reduce=np.mean):
        rows = []
        for number in range(len(source.records)):
            image = VIEWS[view](decode_image(source.records[number]["image"]))
            image = image[:, ::-1] if mirrored else image
            rows.append(pooled_by_hand(tiny_maps(trunk, image)[1], levels, reduce))
        return np.array(rows)

    return pooled


def labels_of(source):
    return np.array([source.records[n]["label"] for n in range(len(source.records))])


def pool(settings, network, source, folder=None, *, mirror=False):
    given = settings, network.model, network.params, network.preprocessing, source
    return pool_split(*given, mirror=mirror, folder=folder)


def validation_of(workdir):
    return [row for row in read_metrics(workdir) if row["split"] == "validation"]


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def plain_sgd(kernel, bias, pooled, settings, gain):
    """NumPy's SGD of a linear head, in float64."""
    load, epoch_steps = batch_loader(pooled, settings.batch_size, settings.seed)
    own, classes = settings.optimizer, len(bias)
    values, speeds = [np.float64(kernel), np.float64(bias)], [0.0, 0.0]
    for step in range(settings.epochs * epoch_steps):
        batch = load(step)
        inputs = np.float64(batch["pooled"])
        targets = np.eye(classes)[batch["label"]]
        targets = (1 - own.label_smoothing) * targets + own.label_smoothing / classes
        errors = (softmax(inputs @ values[0] + values[1]) - targets) / len(targets)
        decay = own.weight_decay * values[0]
        grads = [gain * inputs.T @ errors + decay, errors.sum(axis=0)]
        rate = settings.schedule.rate(
            step,
            steps_per_epoch=epoch_steps,
            total_steps=settings.epochs * epoch_steps,
        )
        for part, grad in enumerate(grads):
            speeds[part] = own.momentum * speeds[part] + grad
            ahead = grad + own.momentum * speeds[part]
            values[part] = values[part] - rate * (
                ahead if own.nesterov else speeds[part]
            )
    return values


def test_the_trunk_stays_bit_for_bit_that_of_the_file(trained, tiny_trunk):
    trunk = pretrained_params(TINY_TRUNK, str(tiny_trunk))
    params = load_network(trained).params
    assert set(params) == {"conv1", "conv2", "fc8"}
    for name in ("conv1", "conv2"):
        assert_equal(params[name], trunk[name])


@pytest.mark.parametrize("reducer", ["mean", "max"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_pooled_as_from_the_map_of_the_image_alone(
    make, trained, by_hand, view, reducer
):
    settings, network = make(**{"data.view": view}), load_network(trained)
    network = dataclasses.replace(network, model=network.model.clone(reducer=reducer))
    source = open_split(settings.data, "train")
    pooled = pool(settings, network, source, mirror=True)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    shown = {"reduce": getattr(np, reducer)}
    close(pooled.values, by_hand(source, view, **shown))
    close(pooled.mirrored, by_hand(source, view, mirrored=True, **shown))
    assert np.abs(pooled.mirrored - pooled.values).max() > 0.01
    np.testing.assert_array_equal(pooled.labels, labels_of(source))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.nesterov": False, "optimizer.weight_decay": 0.3},
        {"optimizer.label_smoothing": 0.2, "data.flip": True},
        {"data.view": "crop", "model.levels": (1,), "schedule.warmup_epochs": 1.0},
    ],
    ids=str,
)
def test_the_head_is_what_plain_sgd_makes_of_the_same_batches(
    make, by_hand, tmp_path, changes
):
    """The first layer learns as if pooled vectors had a mean length of 20."""
    settings = make(**changes)
    train_network(settings, tmp_path)
    source = open_split(settings.data, "train")
    shown = {"view": settings.data.view, "levels": settings.model.levels}
    values = by_hand(source, **shown)
    mirrored = by_hand(source, **shown, mirrored=True) if settings.data.flip else None
    gain = (20 / np.linalg.norm(values, axis=1).mean()) ** 2
    model = make_model(settings.model, 2, 32)
    drawn = create_state(model, settings.optimizer, settings.seed).params["fc8"]
    begun = [np.asarray(drawn[part][0]) for part in ("kernel", "bias")]
    pooled = Pooled(values, mirrored, labels_of(source))
    expected = plain_sgd(*begun, pooled, settings, gain)
    found = load_network(tmp_path).params["fc8"]
    for part, values in zip(("kernel", "bias"), expected, strict=True):
        np.testing.assert_allclose(found[part], values, rtol=1e-3, atol=1e-5)
    assert np.abs(begun[0] - expected[0]).max() > 0.01


def test_every_epoch_sees_each_image_once_and_mirrors_half():
    rows = np.arange(10, dtype=np.float32)[:, None]
    pooled = Pooled(rows, rows + 100, np.arange(10, dtype=np.int32))
    load, steps = batch_loader(pooled, 5, seed=3)
    assert steps == 2
    mirrored, orders = 0, []
    for epoch in range(40):
        batches = [load(2 * epoch + place) for place in range(2)]
        labels = np.concatenate([batch["label"] for batch in batches])
        values = np.concatenate([batch["pooled"][:, 0] for batch in batches])
        assert sorted(labels) == list(range(10))
        np.testing.assert_array_equal(values % 100, labels)
        mirrored += (values >= 100).sum()
        orders.append(labels.tolist())
    assert 150 < mirrored < 250  # of 400
    assert len({str(order) for order in orders}) == 40
    np.testing.assert_array_equal(load(7)["pooled"], load(7)["pooled"])
    np.testing.assert_array_equal(pooled.values, rows)
    assert batch_loader(pooled, 4, seed=3)[1] == 2  # the last two wait


def test_each_image_goes_through_the_trunk_once(make, extracted, tmp_path):
    train_network(make(**{"data.flip": True}), tmp_path)
    assert extracted == [
        ("train", LEVELS, False),
        ("train", LEVELS, True),
        ("test", LEVELS, False),
    ]
    assert len(validation_of(tmp_path)) == EPOCHS


@pytest.mark.parametrize("view", VIEWS)
def test_the_accuracy_of_an_epoch_is_that_of_the_head_on_the_view(
    make, by_hand, tmp_path, view
):
    settings = make(**{"data.view": view, "epochs": 1, "model.levels": (1,)})
    settings = settings._replace(schedule=settings.schedule._replace(learning_rate=0.0))
    train_network(settings, tmp_path)
    network, source = load_network(tmp_path), open_split(settings.data, "test")
    head, labels = network.params["fc8"], labels_of(source)
    pooled = by_hand(source, view, levels=(1,))
    scores = softmax(pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"]))
    (row,) = validation_of(tmp_path)
    assert row["top1"] == (scores.argmax(axis=1) == labels).mean()
    losses = -np.log(scores[np.arange(len(labels)), labels])
    assert row["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert row["count"] == TEST


@pytest.mark.parametrize(
    ("view", "protocol"), [("full", "full_image"), ("crop", "single")]
)
def test_evaluate_finds_the_accuracy_of_the_last_epoch(
    make, trained, tmp_path, view, protocol
):
    workdir = trained
    if view != "full":
        workdir = tmp_path
        train_network(make(**{"data.view": view}), workdir)
    report = evaluate_networks([workdir], protocol)
    assert report["top1"] == validation_of(workdir)[-1]["top1"]
    assert report["count"] == TEST


def test_an_interrupted_run_goes_on_to_the_same_head(make, trained, tmp_path):
    train_network(make(max_steps=3), tmp_path)
    assert load_network(tmp_path).step == 3
    train_network(make(), tmp_path)
    whole, resumed = load_network(trained), load_network(tmp_path)
    assert resumed.step == whole.step == EPOCHS * TRAIN // BATCH
    assert_equal(resumed.params, whole.params)
    assert [row["top1"] for row in validation_of(tmp_path)] == [
        row["top1"] for row in validation_of(trained)
    ]


@pytest.mark.parametrize("trainable", ["head", "conv2"])
def test_a_run_goes_on_when_the_weights_it_began_with_are_gone(
    make, tiny_trunk, tmp_path, trainable
):
    """Its checkpoint has the trunk, also where the file has another by then."""
    weights, changes = tmp_path / "own.safetensors", {"model.trainable": trainable}
    changes |= {"epochs": 2, "model.weights": str(weights)}
    shutil.copy(tiny_trunk, weights)
    train_network(make(**changes), tmp_path / "whole")
    for name, later in (("gone", None), ("other", drawn_weights)):
        shutil.copy(tiny_trunk, weights)
        train_network(make(**changes, max_steps=2), tmp_path / name)
        weights.unlink()
        if later:
            later(weights)
        train_network(make(**changes), tmp_path / name)
        whole, resumed = (load_network(tmp_path / n).params for n in ("whole", name))
        assert_equal(resumed, whole)


def drawn_weights(path):
    """Another trunk's."""
    tensors = read_tensors(write_tiny_weights(path))
    write_tensors(path, {name: -tensor for name, tensor in tensors.items()})


def test_one_device_makes_the_head_that_four_make(
    command_line, make, trained, tmp_path
):
    given = make()
    command_line(
        "train",
        "--config=configs/folder_pretrained.py",
        f"--workdir={tmp_path}",
        f"--config.data.root={given.data.root}",
        f"--config.model.backbone={TINY_TRUNK}",
        f"--config.model.weights={given.model.weights}",
        f"--config.model.levels={LEVELS}",
        "--config.model.dropout=0.0",
        "--config.data.image_size=32",
        "--config.data.resize_side=40",
        f"--config.batch_size={BATCH}",
        f"--config.epochs={EPOCHS}",
        how=run_with_tiny_trunk,
        devices=1,
    )
    assert jax.device_count() == 4
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, load_network(tmp_path).params, load_network(trained).params)


def test_fc_layers_are_trained_on_a_frozen_trunk_too(make, tmp_path):
    """fc6 alone sees pooled vectors, and alone learns as if they were longer."""
    weights, rate = tmp_path / "narrow.safetensors", 1e-3
    changes = {"head": "fc", "width": 0.3, "weight_init": "he", "weights": str(weights)}
    settings = make(
        epochs=1,
        batch_size=TRAIN,
        **{f"model.{name}": value for name, value in changes.items()},
        **{"schedule.learning_rate": rate},
    )
    model = make_model(settings.model, 2, 32)
    trunk = jax.tree.map(np.abs, drawn_params(model.clone(head="none")))  # none dies
    write_tensors(weights, named_params(trunk))
    train_network(settings, tmp_path / "run")
    network = load_network(tmp_path / "run")
    pooled = pool(settings, network, open_split(settings.data, "train"))
    gain = (20 / np.linalg.norm(pooled.values, axis=1).mean()) ** 2
    state = create_state(model, settings.optimizer, settings.seed)
    drawn = jax.tree.map(lambda leaf: leaf[0], state.params)
    inputs, labels = jnp.asarray(pooled.values), pooled.labels

    def loss(params):
        logits, _ = model.apply({"params": params}, inputs, method="classify")
        picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=1) - picked).mean()

    own, grads = settings.optimizer, jax.jit(jax.grad(loss))(drawn)
    for layer, faster in (("fc6", gain), ("fc7", 1), ("fc8", 1)):
        kernel, grad = (np.asarray(tree[layer]["kernel"]) for tree in (drawn, grads))
        moved = network.params[layer]["kernel"] - kernel
        expected = faster * grad + own.weight_decay * kernel
        expected *= -rate * (1 + own.momentum)  # Nesterov's first step
        np.testing.assert_allclose(moved, expected, rtol=1e-2, atol=1e-6)
        assert np.abs(expected).max() > 1e-4


def test_kept_features_serve_other_heads_and_other_pyramids(
    make, trained, extracted, tmp_path
):
    kept = tmp_path / "features"
    train_network(make(), tmp_path / "one", kept)
    assert [levels for _, levels, _ in extracted] == [LEVELS, LEVELS]
    assert_equal(load_network(tmp_path / "one").params, load_network(trained).params)
    extracted.clear()
    train_network(make(seed=1), tmp_path / "two", kept)
    assert not extracted
    train_network(make(**{"model.levels": (3, 2)}), tmp_path / "three", kept)
    assert extracted == [("train", (3,), False), ("test", (3,), False)]
    train_network(make(**{"model.levels": (3, 2)}), tmp_path / "four")
    three, four = (load_network(tmp_path / name).params for name in ("three", "four"))
    assert_equal(three, four)


def test_kept_features_are_not_taken_for_those_of_something_else(
    make, root, tiny_trunk, tmp_path, monkeypatch
):
    passes = []

    def extract(network, source, **given):
        passes.append(given)
        labels = labels_of(source)
        width = num_bins(network.model.levels) * CHANNELS
        values = np.full((len(labels), width), len(passes), np.float32)
        return Features(values, labels, np.arange(len(labels)), (), ("a", "b"), 0)

    monkeypatch.setattr(frozen, "extract_features", extract)

    def pooled_in_pass(split="train", *, mirror=False, **changes):
        settings = make(**{name.replace("__", "."): v for name, v in changes.items()})
        network = pretrained_network(
            settings.model._replace(head="none"), image_size=settings.data.image_size
        )
        source = open_split(settings.data, split)
        found = pool(settings, network, source, tmp_path / "kept", mirror=mirror)
        values = found.mirrored if mirror else found.values
        (number,) = set(values.ravel().tolist())
        return number

    other, copy = tmp_path / "other.safetensors", tmp_path / "copy"
    tensors = read_tensors(tiny_trunk)
    write_tensors(other, tensors | {"conv2.bias": tensors["conv2.bias"] + 1e-3})
    shutil.copytree(root, copy)
    (copy / "train/a/3.png").write_bytes(encode(picture(80, 50, seed=77)))
    others = [
        {},
        {"split": "test"},
        {"mirror": True},
        {"data__train_split": "train[:12]"},
        {"data__resize_side": 44},
        {"data__view": "warp"},
        {"data__view": "crop"},
        {"data__view": "crop", "data__image_size": 36},
        {"model__reducer": "max"},
        {"model__cuts": ("stride2",)},
        {"model__bfloat16": True},
        {"model__weights": str(other)},
        {"data__root": str(copy)},
    ]
    first = [pooled_in_pass(**one) for one in others]
    assert first == list(range(1, len(others) + 1))
    assert [pooled_in_pass(**one) for one in others] == first
    same = {"seed": 4, "epochs": 9, "data__threads": 1, "model__dropout": 0.5}
    assert pooled_in_pass(**same) == 1
    assert len(passes) == len(others)


def test_broken_images_are_left_out_and_counted(make, root, by_hand, tmp_path, caplog):
    copy = tmp_path / "pictures"
    shutil.copytree(root, copy)
    for name in ("train/a/1.png", "test/b/2.png"):
        (copy / name).write_bytes((copy / name).read_bytes()[:60])
    settings = make(**{"data.root": str(copy)})
    with caplog.at_level(logging.WARNING, logger="sppnet_jax"):
        train_network(settings, tmp_path / "run", tmp_path / "features")
    assert "1.png" in caplog.text
    assert "2.png" in caplog.text
    row = validation_of(tmp_path / "run")[-1]
    assert (row["count"], row["broken"]) == (TEST - 1, 1)
    whole, source = open_split(make().data, "train"), open_split(settings.data, "train")
    again = pool(
        settings, load_network(tmp_path / "run"), source, tmp_path / "features"
    )
    there = [n for n in range(TRAIN) if whole.records[n]["name"] != "train/a/1.png"]
    assert len(there) == TRAIN - 1
    np.testing.assert_allclose(
        again.values, by_hand(whole)[there], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(again.labels, labels_of(whole)[there])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.weights": ""}, "freezes layers that were never trained"),
        ({"model.head": "none"}, "has nothing to train: use 'fc' or 'linear'"),
        ({"sizes": (32, 28)}, "sees each image once"),
        ({"model.levels": ()}, "no twin without a pyramid: give levels"),
        (
            {"model.backbone": "zf5", "model.levels": (), "data.resize_side": 224}
            | {"data.image_size": 224},
            r"is pooled by a pyramid: give config.model.levels such as \(1,\)",
        ),
        ({"batch_size": 20}, "has 16 records, less than one batch of 20; lower"),
        ({"model.trainable": "conv9"}, "from, trainable 'conv9': use all"),
        ({"model.trainable": "stride8"}, "conv1 to conv2, stride2, stride4"),
        ({"model.width": 0.5}, r"don't fit conv1: .*config.model.width=1"),
        ({"model.weights": "absent.pth"}, "no weight file .*absent.pth"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_in_words(make, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_network(make(**changes), tmp_path / "run")


def test_a_batch_that_broken_images_leave_too_large_is_refused():
    pooled = Pooled(np.ones((7, 2), np.float32), None, np.zeros(7, np.int32))
    with pytest.raises(ValueError, match=r"7 images that can be read, and .* is 8"):
        batch_loader(pooled, 8, seed=0)


@pytest.mark.parametrize("trainable", ["conv2", "stride2"])
def test_layers_before_the_first_trained_one_stay_and_later_ones_move(
    make, tiny_trunk, tmp_path, trainable
):
    train_network(make(**{"model.trainable": trainable, "epochs": 1}), tmp_path)
    trunk = pretrained_params(TINY_TRUNK, str(tiny_trunk))
    params = load_network(tmp_path).params
    assert_equal(params["conv1"], trunk["conv1"])
    for part in ("kernel", "bias"):
        assert np.abs(params["conv2"][part] - trunk["conv2"][part]).max() > 1e-6


def test_the_rate_of_the_trunk_scales_its_updates_alone(make, tmp_path):
    """After one step at a rate r, updates are r, or r·trunk_rate, times the same."""
    changes = {"model.trainable": "all", "max_steps": 1, "optimizer.trunk_rate": 1.0}
    moved = {}
    for rate in (1.0, 0.25, 0.0):
        settings = make(**changes | {"optimizer.trunk_rate": rate})
        workdir = tmp_path / str(rate)
        train_network(settings, workdir)
        begun = with_pretrained(
            jax.tree.map(
                lambda leaf: leaf[0],
                create_state(
                    make_model(settings.model, 2, 32), settings.optimizer, 0
                ).params,
            ),
            settings.model,
        )
        moved[rate] = jax.tree.map(
            lambda now, then: np.asarray(now) - np.asarray(then),
            load_network(workdir).params,
            begun,
        )
    for rate in (0.25, 0.0):
        for layer, parts in moved[rate].items():
            scale = rate if layer.startswith("conv") else 1.0
            for part, found in parts.items():
                expected = scale * moved[1.0][layer][part]
                np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-6)
    assert np.abs(moved[1.0]["conv1"]["kernel"]).max() > 1e-4
