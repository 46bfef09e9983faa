"""Scoring whole images through buckets, and the pictures of a run."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppnet_jax import plots
from sppnet_jax.classification.full_image import make_image_scorer
from sppnet_jax.classification.preprocess import Preprocessing, normalize
from sppnet_jax.classification.step import init_params
from sppnet_jax.data.images import crop, resize_shorter_side
from sppnet_jax.metrics import MetricsLog
from sppnet_jax.model import create_model
from tests.data_helpers import picture

SIDE = 64
MEAN_IMAGE = Preprocessing(
    np.random.default_rng(0).uniform(90, 160, (32, 32, 3)).astype(np.float32),
    64.0,
    np.zeros((3, 3), np.float32),
)


def build(levels):
    model = create_model("zf5", levels, 7, width=0.05, image_size=61, weight_init="he")
    return model, init_params(model, jax.random.key(0))


def probabilities(model, params, image):
    inputs = normalize(jnp.asarray(image[None]), MEAN_IMAGE)
    logits, _ = jax.jit(model.apply)({"params": params}, inputs)
    return jax.nn.softmax(logits[0])


@pytest.mark.parametrize("size", [(50, 50), (40, 63), (160, 41), (33, 90)])
def test_a_whole_image_scores_in_its_bucket_as_it_does_alone(size):
    model, params = build((3, 2, 1))
    image = picture(*size, seed=sum(size))
    scores = make_image_scorer(model, params, MEAN_IMAGE, resize_side=SIDE)(image)
    alone = probabilities(model, params, resize_shorter_side(image, SIDE))
    np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-6)


def test_a_needle_of_an_image_is_squeezed_and_scored():
    model, params = build((3, 2, 1))
    score = make_image_scorer(model, params, MEAN_IMAGE, resize_side=SIDE)
    for image in (picture(1, 3000), picture(3000, 2), picture(1, 1)):
        assert score(image).sum() == pytest.approx(1, rel=1e-5)


def test_a_network_without_spp_scores_the_centre_crop():
    model, params = build(None)
    image = picture(50, 70)
    scores = make_image_scorer(model, params, MEAN_IMAGE, resize_side=SIDE)(image)
    centre = crop(resize_shorter_side(image, SIDE), 61, "center")
    expected = probabilities(model, params, centre)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_the_curves_of_a_run_are_drawn_even_from_a_single_row(tmp_path):
    with MetricsLog(tmp_path, resumed_step=0) as log:
        log.write("train", 1, {"epoch": 0.5, "loss": 2.0})
    drawn = cv2.imread(str(plots.plot_training(tmp_path)))
    assert drawn.std() > 1


@pytest.mark.filterwarnings("ignore:Glyph")
def test_predictions_are_drawn_whatever_the_class_names(tmp_path):
    names = ["cat", "c^$\\x$", "ワニ", "a_{b}"]
    shown = [
        plots.Prediction(picture(20 + 9 * k, 60), name, 0.5, label)
        for k, (name, label) in enumerate(zip(names, [None, *names], strict=False))
    ]
    drawn = cv2.imread(str(plots.plot_predictions(shown, tmp_path / "drawn.png")))
    assert drawn.std() > 10
