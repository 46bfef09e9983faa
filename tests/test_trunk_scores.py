"""Protocols and predictions of pretrained trunks, against loops over views by hand."""

import jax
import numpy as np
import pytest

from sppnet_jax import predict
from sppnet_jax.classification.image_scores import score_images
from sppnet_jax.classification.scores import score_split
from sppnet_jax.classification.views import named_protocol
from sppnet_jax.data.images import crop, crop_corner, decode_image, resize_whole
from sppnet_jax.network import trunks
from sppnet_jax.network.imagenet_classes import imagenet_names
from sppnet_jax.network.model import Architecture, make_model
from sppnet_jax.network.preprocess import Inputs, make_preprocessing
from sppnet_jax.network.pretrained import (
    pretrained_network,
    pretrained_params,
    published_architecture,
)
from sppnet_jax.network.trained import as_network
from sppnet_jax.network.weight_files import read_tensors, write_tensors
from sppnet_jax.pyramid.geometry import boxes_to_windows
from sppnet_jax.training.network_settings import published_settings
from tests.data_helpers import encode, make_source, picture
from tests.network_helpers import (
    TINY,
    TINY_TRUNK,
    drawn_params,
    joined_by_hand,
    pooled_by_hand,
    tiny_maps,
)

SIDE, RESIZED, LEVELS, SCALES = 32, 40, (3, 1), (32, 46)
SIZES = [(70, 80), (44, 40), (33, 120)]


@pytest.fixture(scope="module")
def network(tiny_trunk):
    """Mean-pooled bins of two cuts below a linear head."""
    architecture = Architecture(
        TINY_TRUNK,
        str(tiny_trunk),
        cuts=("stride2", "stride4"),
        levels=LEVELS,
        reducer="mean",
        head="linear",
    )
    model = make_model(architecture, 3, SIDE)
    params = drawn_params(model) | pretrained_trunk(tiny_trunk)
    inputs = Inputs(color_sigma=0.0)
    return as_network(
        model, params, make_preprocessing(inputs, None, architecture.published)
    )


def pretrained_trunk(path):
    found = pretrained_params(TINY_TRUNK, str(path))
    return {name: layer for name, layer in found.items() if name.startswith("conv")}


def softmax_by_hand(network, pooled):
    head = network.params["fc8"]
    powers = np.exp(pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"]))
    return powers / powers.sum()


def scores_by_hand(network, image, protocol):
    """The softmax of each distinct view of an image, convolved by itself."""
    rows = []
    for scale in protocol.scales:
        resized = resize_whole(image, scale, 4.0)
        height, width = resized.shape[:2]
        corners = {
            crop_corner(height - SIDE, width - SIDE, position)
            for position in protocol.positions
        }
        for shown in [resized, resized[:, ::-1]][: 1 + protocol.flip]:
            joined = joined_by_hand(*tiny_maps(network.params, shown))
            parts = []
            for top, left in corners:
                if protocol.on_map:
                    box = np.array([[top, left, top + SIDE, left + SIDE]], float)
                    size = joined.shape[:2]
                    (window,) = boxes_to_windows(box, network.geometry, size).tolist()
                    parts.append(joined[window[0] : window[2], window[1] : window[3]])
                    continue
                view = resized[top : top + SIDE, left : left + SIDE]
                view = view if shown is resized else view[:, ::-1]
                parts.append(joined_by_hand(*tiny_maps(network.params, view)))
            parts += [joined] if scale in protocol.whole_at else []
            pooled = [pooled_by_hand(part, LEVELS, np.mean) for part in parts]
            rows += [softmax_by_hand(network, vector) for vector in pooled]
    return np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flip", "scales"),
    [
        ("single", False, ()),
        ("ten_view", True, ()),
        ("ten_view_map", True, ()),
        ("full_image", False, ()),
        ("multi_view", True, SCALES),
        ("multi_view_full", True, SCALES),
    ],
)
def test_every_protocol_scores_views_as_by_hand(network, name, flip, scales):
    protocol = named_protocol(
        name, view=SIDE, resize_side=RESIZED, flip=flip, scales=scales
    )
    source = make_source(SIZES)
    found, _ = score_split(network, source, protocol, batch_size=8, threads=2)
    for index, record in enumerate(source.records):
        rows = scores_by_hand(network, decode_image(record["image"]), protocol)
        assert found.views[index] == len(rows)
        np.testing.assert_allclose(
            found.scores[index], rows.mean(axis=0), rtol=1e-4, atol=1e-6
        )
    assert np.ptp(found.scores, axis=0).min() > 1e-3


@pytest.fixture
def vgg_like(tiny_trunk, tmp_path, monkeypatch):
    """A trunk with fc6, fc7 and fc8 of its own, on all of its 8×8 map at 32 pixels."""
    own = TINY.published._replace(levels=(8,), reducer="max", head="fc")
    monkeypatch.setitem(trunks.BACKBONES, TINY_TRUNK, TINY._replace(published=own))
    rng = np.random.default_rng(0)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(tiny_trunk).items()
        if name.startswith("conv")
    }
    turned = np.zeros((4096, 4096), np.float32)
    turned[np.arange(4096), rng.permutation(4096)] = 1
    kernels = {
        "fc6": rng.normal(0, 0.06, (8 * 8 * 8, 4096)),
        "fc7": turned,
        "fc8": rng.normal(0, 0.02, (4096, 1000)),
    }
    for name, kernel in kernels.items():
        tensors[f"{name}.kernel"] = kernel.astype(np.float32)
        bias = rng.normal(0, 0.1, kernel.shape[1])
        tensors[f"{name}.bias"] = bias.astype(np.float32)
    write_tensors(tmp_path / "vgg.safetensors", tensors)
    return str(tmp_path / "vgg.safetensors"), tensors


def test_a_network_with_fc_layers_of_its_own_names_images_of_any_size(
    vgg_like, tmp_path, capsys
):
    weights, tensors = vgg_like
    network = pretrained_network(published_architecture(TINY_TRUNK, weights))
    images = [
        picture(32, 32, seed=1),
        picture(50, 90, seed=2),
        picture(120, 33, seed=3),
    ]
    found = score_images(network, images)
    for image, scores in zip(images, found, strict=True):
        maps = tiny_maps(network.params, resize_whole(image, RESIZED, 4.0))[1]
        values = pooled_by_hand(maps, (8,), np.max)
        for name in ("fc6", "fc7", "fc8"):
            values = values @ tensors[f"{name}.kernel"] + tensors[f"{name}.bias"]
            values = np.maximum(values, 0) if name != "fc8" else values
        powers = np.exp(values - values.max())
        np.testing.assert_allclose(scores, powers / powers.sum(), rtol=1e-3, atol=1e-7)

    settings = published_settings(TINY_TRUNK, weights)
    photo = tmp_path / "wide.png"
    photo.write_bytes(encode(images[1]))
    assert not predict.show_images(settings, network, [str(photo)])
    first = capsys.readouterr().out.splitlines()[1]
    best = found[1].argmax()
    assert first == f"  {found[1][best]:6.1%}  {imagenet_names()[best]}"


def test_at_its_own_size_the_one_level_is_the_flattened_map(vgg_like):
    weights, _ = vgg_like
    network = pretrained_network(published_architecture(TINY_TRUNK, weights))
    image = crop(resize_whole(picture(60, 70), RESIZED, 4.0), SIDE, "center")
    maps = tiny_maps(network.params, image)[1]
    assert maps.shape == (8, 8, 8)
    model, params = network.model, {"params": network.params}
    pooled = jax.jit(lambda maps: model.apply(params, maps, method="pool"))(maps[None])
    np.testing.assert_array_equal(pooled[0], maps.ravel())
