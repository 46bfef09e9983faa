"""Fine-tuning of the fc layers on windows, on four host devices."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_helpers import drawn_params

from sppnet_jax.detection import finetune as finetuning
from sppnet_jax.detection.examples import Examples
from sppnet_jax.detection.finetune import (
    Finetuning,
    draw_batch,
    finetune,
    load_finetuned,
)
from sppnet_jax.detection.window_features import WindowFeatures
from sppnet_jax.network.model import create_model
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.interrupt import Interrupted
from sppnet_jax.run.metrics import read_metrics
from sppnet_jax.training.step_log import DivergedError

CLASSES = 3
IMAGES = 5
WINDOWS = 24
SETTINGS = Finetuning(
    steps=7,
    batch_size=16,
    images=2,
    memory_gb=0.0,
    learning_rate=0.01,
    drop_steps=(),
    log_steps=1,
)


def network(dropout=0.0):
    """A network whose fc8 has other classes than the one that was trained."""
    made = functools.partial(
        create_model, "zf5", (1,), width=1 / 64, image_size=32, dropout=dropout
    )
    return made(CLASSES + 1), drawn_params(made(7))


MODEL, PARAMS = network()
POOLED = PARAMS["fc6"]["kernel"].shape[0]
FC7 = PARAMS["fc8"]["kernel"].shape[0]


def make_examples():
    """Of each image the first third are positives; the middle is nothing at all."""
    rng = np.random.default_rng(1)
    third = WINDOWS // 3
    return [
        Examples(
            np.arange(third),
            rng.integers(CLASSES, size=third),
            np.arange(2 * third, WINDOWS),
        )
        for _ in range(IMAGES)
    ]


EXAMPLES = make_examples()


def pooled_vectors(image):
    """Windows whose class can be read off; of zeros where they are no examples."""
    found = EXAMPLES[image]
    rng = np.random.default_rng((2, image))
    pooled = np.zeros((WINDOWS, POOLED), np.float32)
    pooled[found.positives, found.labels] = 3
    pooled[found.negatives, CLASSES] = 3
    used = np.concatenate([found.positives, found.negatives])
    pooled[used] += np.abs(rng.normal(0, 0.1, (len(used), POOLED)))
    return pooled


def make_features(on_load=None):
    """Pooled vectors in memory; `on_load` is called with the number of each load."""
    loads = []

    def inputs(image, chosen):
        loads.append(image)
        if on_load is not None:
            on_load(len(loads))
        padded = np.zeros((WINDOWS, POOLED), np.float32)
        rows, which = np.unique(chosen, return_inverse=True)
        padded[: len(rows)] = pooled_vectors(image)[rows]
        return padded, len(rows), which

    boxes = [np.zeros((WINDOWS, 4))] * IMAGES
    return WindowFeatures(boxes, inputs, jnp.asarray)


def run(folder, settings=SETTINGS, *, seed=0, dropout=0.0, on_load=None):
    model = network(dropout)[0]
    features = make_features(on_load)
    return finetune(folder, model, PARAMS, features, EXAMPLES, settings, seed)


def train_rows(folder):
    return [row for row in read_metrics(folder) if row["split"] == "train"]


def weights(folder):
    return load_finetuned(folder, MODEL, PARAMS)


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def assert_close(first, second):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, first, second)


def batch_of(step, seed=0, **changes):
    settings = SETTINGS._replace(**changes)
    return draw_batch(EXAMPLES, [0, 1, 3, 4], settings, CLASSES, seed, step)


def test_a_batch_is_a_function_of_the_seed_and_the_step():
    def as_lists(*arguments, **changes):
        return [part.tolist() for part in batch_of(*arguments, **changes)]

    batches = [as_lists(step) for step in range(6)]
    assert batches[::-1] == [as_lists(step) for step in reversed(range(6))]
    assert len({str(batch) for batch in batches}) == 6
    assert as_lists(3, seed=1) != batches[3]


@pytest.mark.parametrize(
    ("size", "share", "positives"), [(16, 0.25, 4), (128, 0.25, 32), (20, 0.5, 10)]
)
def test_a_quarter_of_a_batch_are_positives_and_labels_are_theirs(
    size, share, positives
):
    for step in range(8):
        images, rows, labels = batch_of(step, batch_size=size, positives=share)
        assert len(images) == len(rows) == len(labels) == size
        assert (labels != CLASSES).sum() == positives
        for image, row, label in zip(images, rows, labels, strict=True):
            found = EXAMPLES[image]
            if label == CLASSES:
                assert row in found.negatives
            else:
                place = found.positives.tolist().index(row)
                assert label == found.labels[place]


def test_windows_repeat_only_where_there_are_too_few():
    """Two images have 16 positives and 16 negatives."""
    images, rows, labels = batch_of(0, batch_size=20)  # 5 and 15
    assert len(set(zip(images, rows, strict=True))) == 20
    images, rows, labels = batch_of(0, batch_size=40)  # 10 and 30
    few = labels == CLASSES
    assert len(set(zip(images[few], rows[few], strict=True))) <= 16 < few.sum()
    assert len(set(zip(images[~few], rows[~few], strict=True))) == 10


def test_every_image_comes_as_often_as_the_others():
    """Two of four images a step: each pair of steps sees them all."""
    for first in range(0, 12, 2):
        seen = [set(batch_of(step)[0].tolist()) for step in (first, first + 1)]
        assert seen[0] | seen[1] == {0, 1, 3, 4}
        assert not seen[0] & seen[1]
    many = set(batch_of(0, images=99)[0].tolist())
    assert many == {0, 1, 3, 4}


def plain_sgd(settings):
    """The same steps on one device, written out: (weights, losses)."""
    key = jax.random.PRNGKey(0)
    fresh = 0.01 * jax.random.normal(key, (FC7, CLASSES + 1))
    current = {"fc6": PARAMS["fc6"], "fc7": PARAMS["fc7"]}
    current["fc8"] = {"kernel": fresh, "bias": jnp.zeros(CLASSES + 1)}
    speed = jax.tree.map(np.zeros_like, current)

    @jax.jit
    def slope(layers, pooled, labels):
        def loss(layers):
            fc6 = jnp.maximum(
                pooled @ layers["fc6"]["kernel"] + layers["fc6"]["bias"], 0
            )
            fc7 = jnp.maximum(fc6 @ layers["fc7"]["kernel"] + layers["fc7"]["bias"], 0)
            logits = fc7 @ layers["fc8"]["kernel"] + layers["fc8"]["bias"]
            chances = jax.nn.log_softmax(logits)
            return -chances[jnp.arange(len(labels)), labels].mean()

        return jax.value_and_grad(loss)(layers)

    losses = []
    for step in range(settings.steps):
        images, rows, labels = draw_batch(
            EXAMPLES, range(IMAGES), settings, CLASSES, 0, step
        )
        pairs = zip(images, rows, strict=True)
        pooled = np.stack([pooled_vectors(image)[row] for image, row in pairs])
        loss, gradient = slope(current, pooled, labels)
        losses.append(float(loss))
        rate = 0.01 if step < 4 else 0.001
        for layer in current:
            for part in ("kernel", "bias"):
                decay = settings.weight_decay if part == "kernel" else 0
                turn = gradient[layer][part] + decay * current[layer][part]
                speed[layer][part] = settings.momentum * speed[layer][part] + turn
                moved = current[layer][part] - rate * speed[layer][part]
                current[layer] = {**current[layer], part: moved}
    return current, losses


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_any_number_of_devices_gives_the_weights_of_plain_sgd(
    devices, tmp_path, monkeypatch
):
    used = jax.local_devices()[:devices]
    monkeypatch.setattr(jax, "pmap", functools.partial(jax.pmap, devices=used))
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(jax, name, lambda: devices)
    settings = SETTINGS._replace(drop_steps=(4,), weight_decay=0.1)
    report = run(tmp_path, settings)
    expected, losses = plain_sgd(settings)
    found = weights(tmp_path)
    assert_close({name: found[name] for name in expected}, expected)
    assert_equal(found["conv1"], PARAMS["conv1"])
    rows = train_rows(tmp_path)
    np.testing.assert_allclose([row["loss"] for row in rows], losses, rtol=1e-4)
    assert report["loss"] == rows[-1]["loss"]
    counts = (report["images"], report["positives"], report["negatives"])
    assert counts == (IMAGES, 8 * IMAGES, 8 * IMAGES)


def test_the_loss_falls_where_classes_can_be_told_apart(tmp_path):
    settings = SETTINGS._replace(steps=60, learning_rate=0.02)
    report = run(tmp_path, settings, dropout=0.2)
    losses = [row["loss"] for row in train_rows(tmp_path)]
    assert losses[0] > 1.2
    assert report["loss"] < 0.3
    assert report["accuracy"] > 0.9


def test_dropout_is_drawn_anew_at_each_step_and_from_the_seed(tmp_path, monkeypatch):
    """Without a rate, and with one window over and over, only dropout is random."""
    first = np.zeros(SETTINGS.batch_size, int)
    monkeypatch.setattr(finetuning, "draw_batch", lambda *_: (first, first, first))
    settings = SETTINGS._replace(steps=2, learning_rate=0.0)
    losses = []
    for name, seed, dropout in (
        ("a", 0, 0.5),
        ("b", 0, 0.5),
        ("c", 1, 0.5),
        ("d", 0, 0.0),
    ):
        (tmp_path / name).mkdir()
        run(tmp_path / name, settings, seed=seed, dropout=dropout)
        losses.append([row["loss"] for row in train_rows(tmp_path / name)])
    assert losses[0] == losses[1]
    assert len({*losses[0], *losses[2]}) == 4
    assert losses[3][0] == losses[3][1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, SETTINGS._replace(checkpoint_steps=0), dropout=0.5)
    return folder


def untimed(folder):
    return [(row["step"], row["loss"], row["accuracy"]) for row in train_rows(folder)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    number, uninterrupted, tmp_path
):
    def interrupt(load):
        if load == 6:  # two images a step: the third is being loaded
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=r"at step \d of 7; the same command"):
        run(tmp_path, dropout=0.5, on_load=interrupt)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert 1 <= (checkpoints.latest_step() or 0) < 7
    run(tmp_path, dropout=0.5)
    assert_equal(weights(tmp_path), weights(uninterrupted))
    assert untimed(tmp_path) == untimed(uninterrupted)


def test_a_killed_run_goes_on_from_its_last_checkpoint(uninterrupted, tmp_path):
    class Killed(BaseException):
        pass

    def die(load):
        if load == 11:
            raise Killed

    settings = SETTINGS._replace(checkpoint_steps=3)
    with pytest.raises(Killed):
        run(tmp_path, settings, dropout=0.5, on_load=die)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 3
    assert [row["step"] for row in train_rows(tmp_path)] == [1, 2, 3, 4]
    run(tmp_path, settings, dropout=0.5)
    assert_equal(weights(tmp_path), weights(uninterrupted))
    assert untimed(tmp_path) == untimed(uninterrupted)


def test_a_run_killed_after_its_last_step_reports_what_it_reached(uninterrupted):
    """The checkpoint is there, but the stage was not noted as done."""
    loads = []
    before = weights(uninterrupted)
    report = run(uninterrupted, dropout=0.5, on_load=loads.append)
    last = train_rows(uninterrupted)[-1]
    assert (report["steps"], report["loss"]) == (7, last["loss"])
    assert report["accuracy"] == last["accuracy"]
    assert not loads
    assert_equal(weights(uninterrupted), before)


@pytest.mark.parametrize("kept", [0, 1, IMAGES])
def test_pooled_windows_that_are_kept_change_nothing(kept, uninterrupted, tmp_path):
    """Seven steps of two images each, with memory for so many images."""
    counted = []
    settings = SETTINGS._replace(memory_gb=kept * 16 * POOLED * 4 / 1e9)
    run(tmp_path, settings, dropout=0.5, on_load=counted.append)
    assert_equal(weights(tmp_path), weights(uninterrupted))
    if kept == IMAGES:
        assert len(counted) == IMAGES
    else:
        assert IMAGES < len(counted) <= 14 - 2 * kept


def test_images_without_both_kinds_of_windows_are_left_out(tmp_path):
    none = np.zeros(0, int)
    examples = list(EXAMPLES)
    examples[0] = examples[0]._replace(negatives=none)
    examples[2] = examples[2]._replace(positives=none, labels=none)
    seen = set()
    features = make_features()

    def inputs(image, chosen):
        seen.add(image)
        return features.inputs(image, chosen)

    report = finetune(
        tmp_path,
        MODEL,
        PARAMS,
        features._replace(inputs=inputs),
        examples,
        SETTINGS._replace(steps=3),
        0,
    )
    assert seen == {1, 3, 4}
    assert report["images"] == 3


def test_nothing_to_train_on_is_an_error(tmp_path):
    none = np.zeros(0, int)
    empty = [Examples(none, none, none)] * IMAGES
    given = (MODEL, PARAMS, make_features())
    with pytest.raises(ValueError, match=r"none of the 5 .* Check the annotations"):
        finetune(tmp_path, *given, empty, SETTINGS, 0)
    with pytest.raises(ValueError, match="multiple of the number of devices, 4"):
        finetune(tmp_path, *given, EXAMPLES, SETTINGS._replace(batch_size=6), 0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    settings = SETTINGS._replace(learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"fine-tuning.*lower learning_rate"):
        run(tmp_path, settings)
    with pytest.raises(FileNotFoundError):
        weights(tmp_path)
