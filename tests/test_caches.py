"""What is traced once for all starts: found again, made again, never mistaken."""

import dataclasses

import jax
import numpy as np
import pytest

from sppnet_jax.classification.svm import LinearSVMs
from sppnet_jax.detection import maps
from sppnet_jax.detection.scales import map_size_of
from sppnet_jax.detection.window_features import from_maps, make_program, rows_of
from sppnet_jax.network.model import create_model
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.trained import as_network
from sppnet_jax.run import caches
from sppnet_jax.training.steps import init_params


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs are kept, in this test; of small functions too."""
    monkeypatch.setattr(caches, "LEAST_ARRAYS", 1)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / caches.TRACED
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def start():
    """`jit_once` as a new process calls it, and how often it was traced since."""
    traced = []

    def new(decided_by="it"):
        def doubled(x, both):  # JAX has not seen this one before
            traced.append(x.shape)
            return 2 * x + both["a"] - both["b"][0]

        return caches.jit_once(doubled, decided_by)

    return new, traced


ARGUMENTS = np.arange(3.0, dtype=np.float32), {"a": np.float32(1), "b": [2.0]}


def test_a_second_start_traces_nothing_and_gives_the_same(folder, start):
    new, traced = start
    first = new()(*ARGUMENTS)
    assert traced
    traced.clear()
    np.testing.assert_array_equal(new()(*ARGUMENTS), first)
    assert not traced
    np.testing.assert_array_equal(first, [-1, 1, 3])


@pytest.mark.parametrize("changed", ["shape", "dtype", "what decides", "code", "x64"])
def test_what_could_differ_is_traced_anew(folder, start, changed, monkeypatch):
    new, traced = start
    new()(*ARGUMENTS)
    traced.clear()
    x, both = ARGUMENTS
    if changed == "shape":
        x = np.ones(4, np.float32)
    if changed == "dtype":
        x = x.astype(np.int32)
    if changed == "code":
        monkeypatch.setattr(caches.files, "own_code", lambda: "of tomorrow")
    with jax.enable_x64(changed == "x64"):
        new("that" if changed == "what decides" else "it")(x, both)
    assert traced


def test_a_damaged_file_is_made_again(folder, start):
    new, traced = start
    expected = new()(*ARGUMENTS)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        kept.write_bytes(damaged)
        traced.clear()
        np.testing.assert_array_equal(new()(*ARGUMENTS), expected)
        assert traced
        assert len(kept.read_bytes()) > 100


def test_a_folder_that_cannot_be_written_to_costs_no_result(folder, start):
    folder.write_text("a file")
    new, _ = start
    np.testing.assert_array_equal(new()(*ARGUMENTS), [-1, 1, 3])


def test_nothing_is_kept_where_no_programs_are(folder, start):
    new, _ = start
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        new()(*ARGUMENTS)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not folder.exists()


def test_nothing_is_kept_of_a_function_that_is_traced_at_once(
    folder, start, monkeypatch
):
    monkeypatch.setattr(caches, "LEAST_ARRAYS", 4)
    new, traced = start
    np.testing.assert_array_equal(new()(*ARGUMENTS), [-1, 1, 3])
    assert traced
    assert not folder.exists()


@pytest.mark.slow
def test_maps_from_a_kept_program_are_those_of_the_network(folder):
    model = create_model("zf5", (3, 2, 1), 5, width=0.02, image_size=64)
    network = as_network(
        model,
        init_params(model, jax.random.key(0)),
        Preprocessing(np.array(128, np.float32), 1.0, np.zeros((3, 3), np.float32)),
    )
    image = np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8)
    maps._last_maps.cache_clear()
    (first,) = maps.convolve_image(network, image, sides=[64])
    assert len(list(folder.iterdir())) == 1
    maps._last_maps.cache_clear()
    (second,) = maps.convolve_image(network, image, sides=[64])
    np.testing.assert_array_equal(first, second)
    params = jax.tree.map(lambda x: x + 1, network.params)
    other = dataclasses.replace(network, params=params)
    (third,) = maps.convolve_image(other, image, sides=[64])
    assert not np.array_equal(first, third)  # weights are no part of a program


def test_scores_of_windows_from_a_kept_program_are_those_of_the_head(folder):
    rng = np.random.default_rng(0)
    geometry = create_model("zf5").geometry
    cells = map_size_of((144, 192), geometry)
    features = [np.float32(rng.normal(size=(*cells, 4)))]
    boxes = [np.array([[0, 0, 90, 120], [16, 16, 64, 100]], np.float32)]
    svms = LinearSVMs(np.float32(rng.normal(size=(2, 20))), np.ones(2, np.float32))
    traced = []

    def head(svms, pooled):
        traced.append(pooled.shape)
        return svms.scores(pooled), None

    def rows(decided_by, svms=svms):
        given = from_maps(
            lambda image: features,
            boxes,
            np.array([[144, 192]]),
            sides=[144],
            geometry=geometry,
            levels=(2, 1),
            area=64.0**2,
        )
        program = make_program(given, head, decided_by)
        return rows_of(given, program, svms, 0, np.arange(2))

    expected, none = rows("")
    assert none is None
    assert not folder.exists()
    np.testing.assert_array_equal(rows("it")[0], expected)
    traced.clear()
    np.testing.assert_array_equal(rows("it")[0], expected)
    assert not traced
    other = svms._replace(biases=np.zeros(2, np.float32))
    np.testing.assert_allclose(rows("it", other)[0], expected - 1, rtol=1e-5, atol=1e-5)
    assert not traced  # weights are no part of a program
    rows("that")
    assert traced
