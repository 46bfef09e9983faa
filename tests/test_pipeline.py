"""Batches are shuffled, shared and resumed exactly; no image is lost silently."""

import itertools
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
from data_helpers import encode, make_source, picture

from sppnet_jax.data import images
from sppnet_jax.data.batches import (
    describe_broken,
    eval_batches,
    steps_per_epoch,
    train_batches,
    warped_batches,
    whole_images,
    whole_sizes,
)
from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.sources import Source, open_source

SIZES = {"image_size": 16, "resize_side": 20}
Batch = dict[str, np.ndarray]


def train(source, count, **options):
    with train_batches(source, **{"batch_size": 4, **SIZES, **options}) as batches:
        return list(itertools.islice(batches, count))


def evaluate(source, **options):
    with eval_batches(source, **{"batch_size": 4, **SIZES, **options}) as batches:
        return list(batches)


def make_multi_label_source(count, broken=()):
    """Class c of record i is present, difficult or absent by (i + c) % 3."""
    source = make_source(count, broken)
    records = [
        {
            "image": record["image"],
            "labels": np.array([(i + c) % 3 - 1 for c in range(3)], np.int8),
            "name": record["name"],
        }
        for i, record in enumerate(source.records)
    ]
    return source._replace(records=records, multi_label=True)


def read_whole(source, **options):
    with closing(
        whole_images(source, **{"sides": (16,), "max_aspect": 3.0, **options})
    ) as examples:
        return list(examples)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


@pytest.mark.parametrize("make", [train_batches, eval_batches])
def test_a_batch_has_these_arrays(make):
    with make(make_source(9), batch_size=4, **SIZES) as batches:
        batch = next(batches)
    shapes = {key: (array.dtype.name, array.shape) for key, array in batch.items()}
    assert shapes == {
        "image": ("uint8", (4, 16, 16, 3)),
        "label": ("int32", (4,)),
        "mask": ("bool", (4,)),
        "index": ("int32", (4,)),
    }
    assert batch["mask"].all()
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


def test_an_epoch_holds_each_record_at_most_once_and_in_a_new_order():
    source = make_source(22)
    steps = steps_per_epoch(source, 4)
    assert steps == 5
    batches = train(source, 3 * steps, epochs=3)
    epochs = [indices(batches[i * steps : (i + 1) * steps]) for i in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # others are left out
    assert len(train(source, 100, epochs=3)) == 15


def test_the_seed_decides_order_and_augmentation():
    source = make_source(22)
    assert_same(train(source, 12, seed=7), train(source, 12, seed=7))
    assert indices(train(source, 5, seed=7)) != indices(train(source, 5, seed=8))


def test_each_epoch_augments_anew():
    source = make_source(4)
    epochs = train(source, 8, crop="random")
    first = {image.tobytes() for image in epochs[0]["image"]}
    assert any({i.tobytes() for i in batch["image"]} != first for batch in epochs[1:])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_of_one_process(count):
    source = make_source(30)
    alone = train(source, 12, batch_size=8)
    shares = [
        train(source, 12, batch_size=8, process_index=rank, process_count=count)
        for rank in range(count)
    ]
    for step, batch in enumerate(alone):
        for rank in range(count):
            for key, array in batch.items():
                share = shares[rank][step][key]
                np.testing.assert_array_equal(share, array[rank::count])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_iterator_repeats_nothing_and_skips_nothing(workers):
    source = make_source(14)
    expected = train(source, 11)
    with train_batches(source, batch_size=4, workers=workers, **SIZES) as batches:
        first = [next(batches) for _ in range(4)]  # in the second epoch
        state = batches.get_state()
        second = [next(batches) for _ in range(3)]
        batches.set_state(state)
        assert_same([next(batches) for _ in range(7)], expected[4:])
    assert_same(first + second, expected[:7])
    # A checkpoint doesn't depend on the number of workers it was written with.
    with train_batches(source, batch_size=4, threads=1, **SIZES) as batches:
        batches.set_state(state)
        assert_same([next(batches) for _ in range(7)], expected[4:])


def test_an_iterator_restored_at_its_end_is_at_its_end():
    with train_batches(make_source(8), batch_size=4, epochs=1, **SIZES) as batches:
        assert len(list(batches)) == 2
        batches.set_state(batches.get_state())
        assert list(batches) == []


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_change_nothing(threads):
    source = make_source(14)
    assert_same(train(source, 9, threads=threads), train(source, 9))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("total", [1, 4, 7, 8, 9])
def test_a_test_counts_every_record_once_on_any_number_of_processes(total, count):
    source = make_source(total)
    shares = [
        evaluate(source, process_index=rank, process_count=count)
        for rank in range(count)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = [index for share in shares for index in indices(share)]
    assert sorted(index for index in seen if index >= 0) == list(range(total))
    for share in shares:
        for batch in share:
            assert batch["image"].shape == (4 // count, 16, 16, 3)
            np.testing.assert_array_equal(batch["mask"], batch["index"] >= 0)


def read_each_way(source):
    """Batches of every kind, and whole images, as lists of arrays."""
    crops = [
        [batch["image"] for batch in train(source, 3, crop=crop, seed=2)]
        for crop in images.CROPS
    ]
    places = [batch["image"] for batch in evaluate(source, positions=images.POSITIONS)]
    with warped_batches(source, batch_size=4, image_size=16) as batches:
        warped = [batch["image"] for batch in batches]
    whole = [example["images"] for example in read_whole(source, sides=(16, 24))]
    return [*itertools.chain(*crops), *places, *warped, *itertools.chain(*whole)]


def test_large_jpegs_are_decoded_small_and_look_the_same(monkeypatch):
    """Crops lie where they would if they were decoded whole."""
    source = make_source(8)
    large = [
        {**record, "image": encode(picture(148 + index, 201, seed=index), ".jpg")}
        for index, record in enumerate(source.records)
    ]
    source = source._replace(records=large)
    reductions, reduction = [], images._reduction
    with monkeypatch.context() as patch:
        patch.setattr(
            images,
            "_reduction",
            lambda *given: reductions.append(reduction(*given)) or reductions[-1],
        )
        found = read_each_way(source)
    assert {1, 2, 4} >= set(reductions) >= {2, 4}
    monkeypatch.setattr(images, "_reduction", lambda *_: 1)
    for one, other in zip(found, read_each_way(source), strict=True):
        assert one.shape == other.shape
        assert np.abs(one.astype(int) - other).mean() < 3


def test_a_test_sees_centre_crops():
    source = make_source(3)
    batch = evaluate(source)[0]
    for index in range(3):
        image = images.decode_image(source.records[index]["image"])
        expected = images.crop(images.resize_shorter_side(image, 20), 16, "center")
        np.testing.assert_array_equal(batch["image"][index], expected)


def test_a_test_may_see_several_crops_of_each_record():
    source = make_source(5, broken=(1,))
    positions = ("center", "top", "bottom_right")
    batches = evaluate(source, positions=positions)
    assert [batch["image"].shape for batch in batches] == [(4, 3, 16, 16, 3)] * 2
    for column, position in enumerate(positions):
        alone = evaluate(source, positions=(position,))
        for batch, expected in zip(batches, alone, strict=True):
            np.testing.assert_array_equal(batch["image"][:, column], expected["image"])
            for key in ("label", "mask", "index"):
                np.testing.assert_array_equal(batch[key], expected[key])
    for positions in [(), ("center", "middle"), "center"]:
        with pytest.raises(ValueError, match=r"positions must name .*'top_left'"):
            evaluate(source, positions=positions)


def test_a_warped_image_is_all_there_whatever_its_aspect():
    # Left half black, right half white: so is a warped one, of any aspect.
    halves = np.zeros((30, 90, 3), np.uint8)
    halves[:, 45:] = 255
    shapes = [halves, halves[:, 30:60], np.repeat(halves, 7, axis=0)]
    records = [
        {"image": encode(image), "label": 0, "name": str(image.shape)}
        for image in shapes
    ]
    source = Source(records, ("a",), "memory", "test")
    with warped_batches(source, batch_size=2, image_size=16) as batches:
        first, second = batches
    assert first["image"].shape == second["image"].shape == (2, 16, 16, 3)
    expected = np.zeros((16, 16, 3))
    expected[:, 8:] = 255
    for image in [*first["image"], second["image"][0]]:
        np.testing.assert_array_equal(image, expected)
    assert indices([first, second]) == [0, 1, 2, -1]
    assert second["mask"].tolist() == [True, False]


def test_warped_batches_mask_broken_images_and_are_shared_as_crops_are():
    source = make_multi_label_source(5, broken=(1,))
    (whole,) = warped_batches(source, batch_size=6, image_size=16)
    assert whole["mask"].tolist() == [True, False, True, True, True, False]
    assert whole["index"].tolist() == [0, 1, 2, 3, 4, -1]
    for process in range(2):
        (share,) = warped_batches(
            source, batch_size=6, image_size=16, process_index=process, process_count=2
        )
        for key, array in share.items():
            np.testing.assert_array_equal(array, whole[key][process::2])
    with pytest.raises(ValueError, match="can't be shared evenly"):
        warped_batches(source, batch_size=5, image_size=16, process_count=2)


def test_whole_images_come_in_order_at_every_size():
    source = make_source(23)
    examples = read_whole(source, sides=(16, 30))
    assert [example["index"] for example in examples] == list(range(23))
    for record, example in zip(source.records, examples, strict=True):
        image = images.decode_image(record["image"])
        for side, resized in zip((16, 30), example["images"], strict=True):
            expected = images.resize_whole(image, side, 3.0)
            np.testing.assert_array_equal(resized, expected)
        assert example["mask"]
        assert example["label"] == record["label"]


@pytest.mark.parametrize("max_aspect", [1.1, 3.0])
def test_the_sizes_of_whole_images_are_known_beforehand(max_aspect):
    source = make_source(23, broken=(3,))
    damaged = bytearray(source.records[5]["image"])  # whole, but not inside
    middle = len(damaged) // 2
    damaged[middle : middle + 40] = bytes(40)
    source.records[5]["image"] = bytes(damaged)
    for side in (16, 40):
        examples = read_whole(source, sides=(side,), max_aspect=max_aspect)
        assert [example["index"] for example in examples if not example["mask"]] == [
            *(3, 5)
        ]
        shapes = [example["images"][0].shape[:2] for example in examples]
        sizes = whole_sizes(source, side, max_aspect)
        assert sizes.dtype == np.int32
        np.testing.assert_array_equal(sizes, shapes)
        assert sizes[3].tolist() == [side, side]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_whole_images(count):
    source = make_source(10)
    for rank in range(count):
        share = read_whole(source, process_index=rank, process_count=count)
        assert [example["index"] for example in share] == list(range(rank, 10, count))


def test_a_broken_whole_image_is_masked_reported_or_an_error_if_strict(caplog):
    source = make_source(8, broken=(2, 5))
    broken = BrokenImages(source)
    for example in read_whole(source, sides=(16, 20)):
        broken.report(example)
        broken.report(example)
        if not example["mask"]:
            assert [image.shape for image in example["images"]] == [
                *((16, 16, 3), (20, 20, 3))
            ]
            assert not any(image.any() for image in example["images"])
    assert len(broken) == 2
    assert caplog.text.count("picture_5.png: truncated after") == 1
    broken.summarize()
    assert "skipped 2 broken images of the 8" in caplog.text
    with pytest.raises(ValueError, match=r"picture_2\.png', record 2 of split 'train'"):
        read_whole(source, strict=True)


def test_several_labels_come_with_whole_images_and_crops():
    source = make_multi_label_source(7, broken=(4,))
    labels = np.stack([record["labels"] for record in source.records])
    examples = read_whole(source)
    np.testing.assert_array_equal([example["label"] for example in examples], labels)
    batches = evaluate(source)
    assert examples[0]["label"].dtype == batches[1]["label"].dtype == np.int8
    seen = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(seen, [*labels, [0, 0, 0]])


def test_several_labels_must_be_one_of_three_for_each_class():
    for wrong in ([1, 0], [2, 0, 0]):
        source = make_multi_label_source(3)
        source.records[1]["labels"] = np.array(wrong, np.int8)
        with pytest.raises(ValueError, match=r"'picture_1.png' .* has labels"):
            read_whole(source)


class CountingRecords(list):
    def __init__(self, records):
        super().__init__(records)
        self.read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


def test_few_whole_images_are_loaded_ahead_and_no_thread_is_left():
    source = make_source(40)
    records = CountingRecords(source.records)
    before = set(threading.enumerate())
    examples = whole_images(
        source._replace(records=records), sides=(16,), max_aspect=3.0, threads=2
    )
    assert set(threading.enumerate()) == before
    for _ in range(3):
        next(examples)
    assert len(set(threading.enumerate()) - before) == 2
    examples.close()
    assert 3 <= records.read <= 3 + 2 * 2
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sides": ()}, "sides must be one or more"),
        ({"sides": (16, 0)}, r"at least 1 pixel, not \(16, 0\)"),
        ({"max_aspect": 0.5}, "max_aspect .* at least 1, not 0.5"),
        ({"threads": 0}, "at least one thread"),
        ({"process_index": 2, "process_count": 2}, "no process 2 among 2"),
    ],
)
def test_whole_images_need_sensible_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        whole_images(make_source(3), **{"sides": (16,), "max_aspect": 3.0, **options})


def views(source, **options):
    batches = train(source, 60, batch_size=1, **options)
    return {batch["image"].tobytes() for batch in batches}


def test_the_papers_crops_are_five_places_of_the_whole_image_and_their_mirrors():
    record = {"image": encode(picture(20, 30)), "label": 0, "name": "a"}
    source = Source([record], ("a", "b"), "memory", "train")
    image = images.decode_image(record["image"])
    positions = ("center", "top_left", "top_right", "bottom_left", "bottom_right")
    crops = [images.crop(image, 16, position) for position in positions]
    straight = {crop.tobytes() for crop in crops}
    mirrored = {np.ascontiguousarray(crop[:, ::-1]).tobytes() for crop in crops}
    assert views(source) == straight | mirrored
    assert views(source, flip=False) == straight
    assert views(source, flip=False, crop="center") == {crops[0].tobytes()}
    assert len(views(source, flip=False, crop="random")) > 20
    assert len(views(source, flip=False, crop="random_resized")) > 50


def test_a_broken_image_is_masked_and_can_be_named():
    source = make_source(8, broken=(2, 5))
    for batches in (train(source, 2), evaluate(source)):
        masked = {}
        for batch in batches:
            for row in np.flatnonzero(~batch["mask"]):
                masked[int(batch["index"][row])] = batch["image"][row].max()
        assert masked == {2: 0, 5: 0}
        assert sorted(indices(batches)) == list(range(8))
    assert describe_broken(source, 5).startswith("picture_5.png: truncated after")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_an_error_if_strict(workers):
    source = make_source(8, broken=(5,))
    with pytest.raises(ValueError, match=r"picture_5\.png', record 5 of split 'train'"):
        train(source, 2, strict=True, workers=workers)
    with pytest.raises(ValueError, match=r"picture_5\.png', record 5 of split 'train'"):
        evaluate(source, strict=True)


def test_an_image_too_narrow_to_resize_is_masked():
    record = {"image": encode(picture(1, 4000)), "label": 0, "name": "needle"}
    source = Source([record], ("a", "b"), "memory", "train")
    assert not evaluate(source)[0]["mask"].any()
    assert "not resized" in describe_broken(source, 0)


def test_a_label_outside_the_range_is_always_an_error():
    source = make_source(4, labels=(0, 1, 2, 3))
    loads = (
        lambda: train(source, 1),
        lambda: evaluate(source),
        lambda: read_whole(source),
    )
    for load in loads:
        with pytest.raises(
            ValueError, match=r"picture_3\.png' .* has label 3, outside"
        ):
            load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9}, "8 records, less than one batch of 9"),
        ({"resize_side": 15}, "resize_side 15 is smaller than image_size 16"),
        ({"process_count": 3}, "batch_size 4 can't be shared evenly by 3 processes"),
        ({"process_index": 1}, "no process 1 among 1"),
        ({"crop": "middle"}, "unknown crop 'middle'; there are .*'paper'"),
        ({"min_area": 0.0}, "min_area must be above 0"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_arguments_that_do_not_fit_together_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        train(make_source(8), 1, **options)


def test_worker_processes_read_a_tfds_source_as_threads_do(digit_scenes_dir):
    source = open_source("digit_scenes/classification", "test")
    options = {"batch_size": 16, "image_size": 64, "resize_side": 72}
    assert_same(
        train(source, 3, workers=2, **options), train(source, 3, workers=0, **options)
    )


PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from data_helpers import make_source
from sppnet_jax.data.batches import train_batches

if __name__ == "__main__":
    def load():
        return train_batches(
            make_source(40), batch_size=4, image_size=16, resize_side=20, workers=2
        )
    {}
"""
FORGETS = """
    batches = load()
    next(batches)
"""
CLOSES = """
    for taken in (1, 6):
        with load() as batches:
            kept = [next(batches) for _ in range(taken)]
"""
WAITS = """
    batches = load()
    next(batches)
    print("loaded", flush=True)
    while True:
        time.sleep(0.1)
        next(batches)
"""


def start_program(tmp_path, body, **options):
    (tmp_path / "program.py").write_text(PROGRAM.format(body.strip()))
    here = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(here)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=here.parent,
        env={"PYTHONPATH": str(here.parent)},
        **options,
    )


@pytest.mark.parametrize("body", [FORGETS, CLOSES])
def test_worker_processes_end_quietly_with_the_program(body, tmp_path):
    program = start_program(tmp_path, body)
    printed = program.communicate(timeout=120)[1]
    assert program.returncode == 0, printed
    assert "Error" not in printed
    assert "leaked" not in printed


def test_worker_processes_end_when_the_main_process_is_killed(tmp_path):
    program = start_program(tmp_path, WAITS)
    assert program.stdout.readline() == "loaded\n", program.communicate()[1]
    workers = psutil.Process(program.pid).children(recursive=True)
    assert len(workers) >= 2
    program.kill()
    program.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_ctrl_c_ends_no_worker_process(tmp_path):
    """The main process alone decides, also while a worker begins."""
    program = start_program(tmp_path, WAITS, start_new_session=True)
    assert program.stdout.readline() == "loaded\n", program.communicate()[1]
    workers = psutil.Process(program.pid).children(recursive=True)
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    assert len(psutil.wait_procs(workers, timeout=1)[1]) == len(workers)
    program.kill()
    program.communicate(timeout=60)
