"""Training steps and the training loop, on four host devices."""

import json
import logging
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from sppnet_jax.data.batches import eval_batches, train_batches
from sppnet_jax.data.sources import Source
from sppnet_jax.network.model import create_model
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.run import parallel
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.interrupt import Interrupted
from sppnet_jax.run.metrics import read_metrics
from sppnet_jax.training.loop import train
from sppnet_jax.training.sizes import epoch_size
from sppnet_jax.training.step_log import DivergedError, Pace
from sppnet_jax.training.steps import (
    Optimizer,
    create_state,
    make_train_step,
    shard_batch,
)
from sppnet_jax.training.validation import count_correct, make_test_step
from tests.network_helpers import SHALLOW

SIDE = 32
PLAIN = Preprocessing(np.float32(128), 64.0, np.zeros((3, 3), np.float32))
MODEL = create_model(
    "zf5", (1,), 3, width=0.02, image_size=SIDE, dropout=0.0, weight_init="he"
).clone(backbone=SHALLOW)


class Squares:
    """Records whose class is the brightest colour channel, as PNG bytes."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        import cv2

        image = np.random.default_rng(index).integers(0, 100, (40, 36, 3), np.uint8)
        image[..., 2 - index % 3] += 100
        encoded = cv2.imencode(".png", image)[1].tobytes()
        return {"image": encoded, "label": index % 3, "name": f"{index}.png"}


SOURCE = Source(Squares(40), ("red", "green", "blue"), "squares", "train")


def random_batch(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (rows, SIDE, SIDE, 3)).astype(np.uint8),
        "label": rng.integers(0, 3, rows).astype(np.int32),
        "mask": np.ones(rows, bool),
    }


@pytest.fixture(scope="module")
def train_step():
    return make_train_step(MODEL, Optimizer(weight_decay=0.1), PLAIN)


@pytest.fixture(scope="module")
def test_step():
    return make_test_step(MODEL, PLAIN)


def first(tree):
    return jax.tree.map(np.asarray, parallel.unreplicate(tree))


def one_update(train_step, batch, rate=0.1):
    state = create_state(MODEL, Optimizer(), seed=0)
    before = first(state.params)
    state, metrics = train_step(state, parallel.shard(batch), np.float32(rate))
    return before, first(state.params), first(metrics)


def test_four_devices_step_as_one_on_the_same_batch(train_step):
    """The oracle computes loss and gradient of the whole batch on one device."""
    assert jax.local_device_count() == 4
    batch = random_batch(8)
    before, after, metrics = one_update(train_step, batch)

    def loss(params):
        inputs = (jnp.asarray(batch["image"], jnp.float32) - 128) / 64
        logits, _ = MODEL.apply({"params": params}, inputs)
        picked = jax.nn.log_softmax(logits)[np.arange(8), batch["label"]]
        return -picked.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(before)
    assert metrics["loss"] / metrics["count"] == pytest.approx(float(value), rel=1e-5)

    def expected(path, weight, slope):
        decay = 0.1 if path[-1].key == "kernel" else 0.0
        return weight - 0.1 * (slope + decay * weight)

    wanted = jax.tree_util.tree_map_with_path(expected, before, gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        after,
        wanted,
    )


def test_masked_rows_change_nothing(train_step):
    batch = random_batch(8)
    batch["mask"][[1, 6]] = False
    _, after, metrics = one_update(train_step, batch)
    batch["image"][[1, 6]] = 255
    batch["label"][[1, 6]] = 2
    _, again, _ = one_update(train_step, batch)
    assert metrics["count"] == 6
    jax.tree.map(np.testing.assert_array_equal, after, again)


def test_a_batch_of_broken_images_only_leaves_finite_weights(train_step):
    batch = random_batch(8)
    batch["mask"][:] = False
    _, after, metrics = one_update(train_step, batch)
    assert metrics["count"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_top_1_and_top_5_equal_a_count_by_hand(test_step):
    batch = random_batch(12, seed=3)
    batch["mask"][-1] = False
    state = create_state(MODEL, Optimizer(), seed=1)
    counts = first(test_step(state.params, parallel.shard(batch)))
    inputs = (jnp.asarray(batch["image"], jnp.float32) - 128) / 64
    logits, _ = MODEL.apply({"params": first(state.params)}, inputs)
    best = np.asarray(logits).argmax(axis=1)
    assert counts["top1"] == (best == batch["label"])[:11].sum()
    assert counts["top5"] == counts["count"] == 11


def run_training(
    workdir,
    *,
    epochs=2,
    seed=0,
    rate=0.05,
    workers=0,
    sizes=(),
    size_multiple=1,
    **pace,
):
    """Trains on the squares: 5 steps an epoch."""
    shape = {"batch_size": 8, "image_size": SIDE, "resize_side": SIDE}
    test = make_test_step(MODEL, PLAIN)

    def validate(params):
        return count_correct(test, params, eval_batches(SOURCE, **shape), records=40)

    def size_of(epoch):
        if not sizes:
            return None
        return epoch_size(sizes, epoch, seed=seed, multiple=size_multiple)

    with train_batches(
        SOURCE, seed=seed, epochs=epochs, workers=workers, **shape
    ) as batches:
        train(
            workdir,
            "training",
            Pace(5 * epochs, batch_size=8, epoch_steps=5, **{"log_steps": 1, **pace}),
            make_state=lambda: create_state(MODEL, Optimizer(), seed),
            batches=batches,
            place=shard_batch,
            make_program=lambda size: make_train_step(
                MODEL, Optimizer(), PLAIN, size=size
            ),
            rate=lambda step, errors: rate,
            size_of=size_of,
            validate=validate,
        )
    return read_metrics(workdir)


def losses(rows):
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def untimed(rows):
    """What must be the same in every run: not its speed, nor when it compiled."""
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in rows
        if row["split"] != "compile"
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_training(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("stops", [(3,), (5,), (2, 7)], ids=str)
def test_a_resumed_run_repeats_the_losses_of_an_uninterrupted_one_exactly(
    stops, uninterrupted, tmp_path
):
    for stop in stops:
        run_training(tmp_path, max_steps=stop)
    rows = run_training(tmp_path)
    assert losses(rows) == losses(uninterrupted)
    assert list(losses(rows)) == list(range(1, 11))
    assert untimed(rows) == untimed(uninterrupted)


def test_an_interrupt_saves_a_checkpoint_and_the_run_goes_on(
    uninterrupted, tmp_path, monkeypatch
):
    rows_written = []

    def interrupt_at_step_4(self, split, step, values, write=None):
        rows_written.append(step)
        original(self, split, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    from sppnet_jax.run.metrics import MetricsLog

    original = MetricsLog.write
    monkeypatch.setattr(MetricsLog, "write", interrupt_at_step_4)
    with pytest.raises(Interrupted, match="at step 4 of 10; the same command goes on"):
        run_training(tmp_path)
    monkeypatch.undo()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 4
    assert losses(run_training(tmp_path)) == losses(uninterrupted)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The loss of the first step is finite, what the step makes of the weights not."""
    with pytest.raises(DivergedError, match="weights are not finite after step 1"):
        run_training(tmp_path, rate=float("inf"), checkpoint_steps=1)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None


def test_the_plateau_knows_the_errors_of_before_the_resume(tmp_path):
    run_training(tmp_path, max_steps=5)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state = create_state(MODEL, Optimizer(), seed=0)
        rest = first(state)._asdict()
        params = rest.pop("params")
        *_, host = checkpoints.restore(params=params, training=rest)
    assert len(host["memory"]["validation_errors"]) == 1


def test_rows_of_a_killed_run_are_not_repeated(tmp_path, uninterrupted):
    run_training(tmp_path, max_steps=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"split": "train", "step": 5, "loss": 99.0}) + "\n")
        file.write('{"split": "train", "st')  # killed while writing
    assert losses(run_training(tmp_path)) == losses(uninterrupted)


def test_training_learns_what_there_is_to_learn(uninterrupted):
    tests = [row for row in uninterrupted if row["split"] == "validation"]
    assert len(tests) == 2
    assert tests[-1]["count"] == 40
    assert tests[-1]["loss"] < tests[0]["loss"] < np.log(3) * 1.2


def test_a_resumed_run_continues_the_sequence_of_sizes(tmp_path):
    drawn = {"sizes": ("uniform", 29, 32), "size_multiple": 1, "epochs": 4}
    whole = run_training(tmp_path / "whole", **drawn)
    run_training(tmp_path / "parts", max_steps=7, **drawn)  # in the second epoch
    parts = run_training(tmp_path / "parts", **drawn)
    assert losses(parts) == losses(whole)
    sizes = [row["size"] for row in whole if row["split"] == "train_epoch"]
    expected = [
        epoch_size(drawn["sizes"], epoch, seed=0, multiple=1) for epoch in range(4)
    ]
    assert sizes == expected
    assert len(set(sizes)) > 1
    compiled = [row["size"] for row in whole if row["split"] == "compile"]
    assert sorted(compiled) == sorted(set(sizes))
    assert all(row["seconds"] > 0 for row in whole if row["split"] == "compile")


def test_a_smaller_size_is_the_same_crop_resized():
    """Pillow's bilinear filter, widened where it shrinks, is the oracle."""
    batch = random_batch(8, seed=5)
    small = np.stack(
        [
            np.stack(
                [
                    PIL.Image.fromarray(image[..., c].astype(np.float32)).resize(
                        (29, 29), PIL.Image.Resampling.BILINEAR
                    )
                    for c in range(3)
                ],
                axis=-1,
            )
            for image in batch["image"]
        ]
    )
    optimizer = Optimizer()
    step = make_train_step(MODEL, optimizer, PLAIN, size=29)
    state = create_state(MODEL, optimizer, seed=0)
    inputs = jnp.asarray((small - 128) / 64)
    logits, _ = MODEL.apply({"params": first(state.params)}, inputs)
    picked = jax.nn.log_softmax(logits)[np.arange(8), batch["label"]]
    _, metrics = step(state, parallel.shard(batch), np.float32(0.1))
    found = first(metrics)
    assert found["loss"] / 8 == pytest.approx(float(-picked.mean()), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(DivergedError, match=r"last finite loss was .* at step \d"):
        run_training(tmp_path, rate=1e9)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None


def test_a_checkpoint_of_another_model_is_refused_with_the_shapes(tmp_path, train_step):
    run_training(tmp_path, max_steps=1)
    other = MODEL.clone(levels=(2,))
    params = first(create_state(other, Optimizer(), seed=0).params)
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        pytest.raises(ValueError, match=r"another model .*") as error,
    ):
        checkpoints.restore_params(params)
    message = str(error.value)
    assert "fc6/kernel: checkpoint (5, 82), config (20, 82)" in message
    assert "conv1" not in message


def test_every_example_counts_once_whatever_the_batch(test_step):
    params = create_state(MODEL, Optimizer(), seed=0).params
    results = []
    for batch_size in (8, 12, 64):
        batches = eval_batches(
            SOURCE, batch_size=batch_size, image_size=SIDE, resize_side=SIDE
        )
        results.append(count_correct(test_step, params, batches, records=40))
    assert [result["count"] for result in results] == [40, 40, 40]
    assert len({result["top1"] for result in results}) == 1


def traces(workdir):
    return sorted((workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))


def traced_steps(path):
    """The numbers of the steps in a trace, by JAX's own reader."""
    steps = set()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    steps.add(dict(event.stats)["step_num"])
    return sorted(steps)


def test_a_profile_holds_the_steps_asked_for_and_changes_no_loss(
    uninterrupted, tmp_path, caplog
):
    with caplog.at_level(logging.INFO, logger="sppnet_jax"):
        rows = run_training(tmp_path, profile_steps=2)
    assert losses(rows) == losses(uninterrupted)
    (path,) = traces(tmp_path)
    assert traced_steps(path) == [3, 4]
    (message,) = (text for text in caplog.messages if "profile" in text)
    assert f"2 steps from step 4 on is in {tmp_path / 'profile'}" in message


def test_a_training_that_ends_while_profiled_leaves_a_trace_and_so_does_its_resume(
    tmp_path,
):
    run_training(tmp_path, profile_steps=100, max_steps=5)
    (first_trace,) = traces(tmp_path)
    assert traced_steps(first_trace) == [3, 4]
    run_training(tmp_path, profile_steps=1)
    first_again, second = traces(tmp_path)
    assert first_again == first_trace
    assert traced_steps(second) == [8]


def test_an_error_while_profiled_leaves_a_trace(tmp_path, monkeypatch):
    from sppnet_jax.run.metrics import MetricsLog

    def fail_at_step_5(self, split, step, values):
        if step == 5:
            raise OSError("the disk is full")

    monkeypatch.setattr(MetricsLog, "write", fail_at_step_5)
    with pytest.raises(OSError, match="disk is full"):
        run_training(tmp_path, profile_steps=100)
    assert len(traces(tmp_path)) == 1


def test_a_run_too_short_to_be_profiled_says_so(tmp_path, caplog):
    run_training(tmp_path, profile_steps=1, max_steps=3)
    assert "no step was profiled: the training ended before its step 4" in caplog.text
    assert not traces(tmp_path)
