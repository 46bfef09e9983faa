"""The network: backbone → spatial pyramid → fc6, fc7, fc8; and its twin without SPP.

The pyramid turns the last map, of any size, into a vector of one length, so one set of
weights takes images of any size. Without a pyramid, the last pooling and fc6 fix the
image to the size that the network was made for.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sppnet_jax.network.layers import (
    ValidSize,
    conv,
    depthwise_conv,
    join_maps,
    max_pool,
    run_table,
    zero_beyond,
)
from sppnet_jax.network.stack import (
    Branches,
    Conv,
    Cut,
    Table,
    convs_of,
    cut_table,
    table_geometry,
)
from sppnet_jax.network.trunks import BACKBONES, Backbone, Published, get_backbone
from sppnet_jax.pyramid.geometry import Geometry, Sliding
from sppnet_jax.pyramid.pooling import check_levels, num_bins, spatial_pyramid_pool
from sppnet_jax.pyramid.windows import window_pyramid_pool
from sppnet_jax.run.settings import Valid, at_least, between, one_of

Images = Float[Array, "batch height width 3"]
Intermediates = dict[str, Array]


WEIGHT_INITS = ("paper", "he")
REDUCERS = ("max", "mean")
HEADS = ("fc", "linear", "none")
HEAD_ONLY = "head"  # of `trainable`


class Architecture(NamedTuple):
    """Which network is made; see `create_model`.

    `backbone`: "zf5", "convnet5", "overfeat5" or "overfeat7"; or a published one, of
    which there may be weights, such as "efficientnet_lite0".
    `weights`: of the trunk before training: "" draws them, "pretrained" takes those
    that come with the backbone's package; or a file, see `find_weights`.
    `trainable`: "all" layers, the "head" alone, or those from a named one on, such as
    "conv30" or a cut.
    `cuts`: where the trunk ends, such as ("stride16",); several are joined. () is its
    last map. `levels`: the pyramid; () for the twin without SPP.
    `reducer`: of each bin, "max" or "mean". `head`: "fc" is fc6, fc7 and fc8, "linear"
    fc8 alone, "none" scores by the pooled vector itself.
    `width`: scales the filters and the units of fc6 and fc7. `dropout`: of fc6 and fc7,
    or of what a linear head sees. `weight_init`: "paper", or "he" for narrow networks.
    `bfloat16`: activations in bfloat16; parameters stay in float32.
    """

    backbone: Annotated[str, one_of(BACKBONES)] = "zf5"
    weights: str = ""
    trainable: str = "all"
    cuts: tuple[str, ...] = ()
    levels: tuple[Annotated[int, at_least(1)], ...] = (6, 3, 2, 1)
    reducer: Annotated[str, one_of(REDUCERS)] = "max"
    head: Annotated[str, one_of(HEADS)] = "fc"
    width: Annotated[float, Valid(0, 100, low_in=False)] = 1.0
    dropout: Annotated[float, between(0, 1)] = 0.5
    weight_init: Annotated[str, one_of(WEIGHT_INITS)] = "paper"
    bfloat16: bool = False

    @property
    def published(self) -> Published | None:
        """How its pretrained weights see images; None for drawn ones."""
        return get_backbone(self.backbone).published if self.weights else None


class Dense(nn.Module):
    """A fully connected layer, whole or of a lower rank.

    Its parameters are "kernel" [in, out] and "bias" [out]; instead of a kernel they may
    hold two that follow each other, "down" [in, rank] and "up" [rank, out].
    """

    units: int
    dtype: Any
    kernel_init: Callable[..., Array]
    bias_init: Callable[..., Array]

    @nn.compact
    def __call__(self, inputs: Float[Array, "batch in"]) -> Float[Array, "batch out"]:
        if self.has_variable("params", "down"):
            kernels = [self.get_variable("params", name) for name in ("down", "up")]
        else:
            shape = inputs.shape[-1], self.units
            kernels = [self.param("kernel", self.kernel_init, shape)]
        bias = self.param("bias", self.bias_init, (self.units,))
        outputs = inputs.astype(self.dtype)
        for kernel in kernels:
            outputs = outputs @ jnp.asarray(kernel, self.dtype)
        return outputs + jnp.asarray(bias, self.dtype)


class SPPNet(nn.Module):
    """A convolutional stack, a pyramid (or one fixed pooling), and a head.

    Made by `create_model`, which describes the fields.
    """

    backbone: Backbone
    levels: tuple[int, ...] | None
    num_classes: int
    width: float
    image_size: int
    dropout: float
    weight_init: str
    dtype: Any
    reducer: str = "max"
    head: str = "fc"
    cuts: tuple[str, ...] = ()
    frozen_rows: int = 0

    def setup(self) -> None:
        for number, layer in enumerate(convs_of(self.table), start=1):
            filters = _scaled(layer.filters, self.width)
            depthwise = layer.groups == layer.filters > 1
            before, after = Sliding(layer.kernel, layer.stride, layer.padding).pads
            layer_conv = nn.Conv(
                filters,
                kernel_size=(layer.kernel, layer.kernel),
                strides=layer.stride,
                padding=((before, after), (before, after)),
                feature_group_count=filters if depthwise else layer.groups,
                dtype=self.dtype,
                kernel_init=self._kernel_init(),
                bias_init=self._bias_init(layer.bias),
                conv_general_dilated=conv if layer.groups == 1 else depthwise_conv,
            )
            setattr(self, f"conv{number}", layer_conv)
        if self.head == "fc":
            self.fc6 = self._dense(_scaled(4096, self.width), bias=1.0)
            self.fc7 = self._dense(_scaled(4096, self.width), bias=1.0)
        if self.head != "none":
            self.fc8 = self._dense(self.num_classes, bias=0.0)
        self.drop = nn.Dropout(self.dropout)

    @property
    def table(self) -> Table:
        """The rows of the trunk, up to the last of the cuts."""
        ends = [cut_table(self.backbone.layers, cut) for cut in self.cuts or ("",)]
        return max(ends, key=len)

    @property
    def geometry(self) -> Geometry:
        """Where the units of the map lie that the pyramid sees."""
        return joined_geometry(self.backbone, self.cuts)

    def __call__(
        self,
        images: Images,
        valid_size: ValidSize | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "batch classes"], Intermediates]:
        """Scores of every class, and the named activations on the way.

        `images`: float [batch, height, width, 3], normalised.
        `valid_size`: int [batch, 2], the true (height, width) of images that sit at the
        top left of a larger bucket. The scores are those of the image at its own size.
        `train`: applies dropout (needs the rng "dropout").

        Returns: float32 logits [batch, classes], and a dict of activations: "conv1" …
        after their activation and the map at each cut, "pyramid" (what the head sees),
        "fc6" and "fc7" after their ReLU where there are such.

        Raises: ValueError for images or valid sizes that the network can't take.
        """
        features, maps = self.features(images, valid_size)
        pyramid = self.pool(features, valid_size)
        logits, fcs = self.classify(pyramid, train=train)
        return logits, {**maps, "pyramid": pyramid, **fcs}

    def features(
        self, images: Images, valid_size: ValidSize | None = None
    ) -> tuple[Float[Array, "batch rows columns channels"], Intermediates]:
        """The map that the pyramid sees, zero beyond the valid size; and all before.

        The maps of several cuts are joined on the grid of the finest: each of its units
        takes the units of the others with the closest centres (hypercolumns, Hariharan
        et al. 2015).
        """
        if self.levels is None:
            self._check_fixed_size(images, valid_size)
        self._check_valid_size(images, valid_size)
        maps = zero_beyond(images.astype(self.dtype), valid_size)
        count = sum(1 for _ in convs_of(self.table))
        names = [f"conv{number}" for number in range(1, count + 1)]
        convs = iter([(name, getattr(self, name)) for name in names])
        frozen, trained = self.table[: self.frozen_rows], self.table[self.frozen_rows :]
        maps, size, named, sizes = run_table(frozen, maps, valid_size, convs)
        if frozen:
            maps, named = jax.lax.stop_gradient((maps, named))
        maps, size, later, later_sizes = run_table(trained, maps, size, convs)
        named, sizes = named | later, sizes | later_sizes
        if len(self.cuts) > 1:
            maps = join_maps(
                [named[cut] for cut in self.cuts],
                [sizes[cut] for cut in self.cuts],
                _grids(self.backbone, self.cuts),
            )
        return maps, named

    def pool(
        self,
        features: Float[Array, "batch rows columns channels"],
        valid_size: ValidSize | None = None,
    ) -> Float[Array, "batch pooled"]:
        """The last map's pyramid as one vector; `valid_size` is in image pixels."""
        if self.levels is None:
            assert self.backbone.last_pool is not None
            pooled = max_pool(features, self.backbone.last_pool)
        else:
            pooled = spatial_pyramid_pool(
                features,
                self.levels,
                valid_size=self._map_size(valid_size),
                reducer=self.reducer,
            )
        return pooled.reshape(len(pooled), -1)

    def pool_windows(
        self,
        features: Float[Array, "rows columns channels"],
        windows: Int[Array, "windows 4"],
    ) -> Float[Array, "windows pooled"]:
        """The pyramid of each window of one map as a vector."""
        pooled = window_pyramid_pool(
            features, windows, self.levels or (), reducer=self.reducer
        )
        return pooled.reshape(len(windows), -1)

    def classify(
        self, pyramid: Float[Array, "batch pooled"], *, train: bool = False
    ) -> tuple[Float[Array, "batch classes"], Intermediates]:
        """Logits from pooled vectors, and the activations of fc6 and fc7.

        It needs the parameters of "fc6", "fc7" and "fc8" alone, whole or truncated.
        """
        if self.head == "none":
            return pyramid.astype(jnp.float32), {}
        if self.head == "linear":
            logits = self.fc8(self.drop(pyramid, deterministic=not train))
            return logits.astype(jnp.float32), {}
        fc6 = nn.relu(self.fc6(pyramid))
        fc7 = nn.relu(self.fc7(self.drop(fc6, deterministic=not train)))
        logits = self.fc8(self.drop(fc7, deterministic=not train))
        return logits.astype(jnp.float32), {"fc6": fc6, "fc7": fc7}

    def _map_size(self, valid_size: ValidSize | None) -> ValidSize | None:
        if valid_size is None:
            return None
        for layer in self.geometry.layers:
            valid_size = layer.output_size(valid_size)
        return valid_size

    def _check_fixed_size(self, images: Array, valid_size: Array | None) -> None:
        side = self.image_size
        if images.shape[1:3] != (side, side) or valid_size is not None:
            seen = "×".join(map(str, images.shape[1:3]))
            raise ValueError(
                f"this network has no spatial pyramid (levels=None) and takes images "
                f"of {side}×{side} pixels only, got {seen}. Crop or warp them, or "
                f"create the model with levels such as (6, 3, 2, 1), or another "
                f"image_size."
            )

    def _check_valid_size(self, images: Array, valid_size: ValidSize | None) -> None:
        if valid_size is None or isinstance(valid_size, jax.core.Tracer):
            return
        least, sizes = self.geometry.min_image_size, np.asarray(valid_size)
        if (sizes < least).any() or (sizes > images.shape[1:3]).any():
            raise ValueError(
                f"valid_size, the (height, width) of each image, must be at least "
                f"{least} and within the bucket {images.shape[1:3]}, got "
                f"{sizes.tolist()}"
            )

    def _dense(self, units: int, bias: float) -> Dense:
        return Dense(
            units,
            dtype=self.dtype,
            kernel_init=self._kernel_init(),
            bias_init=self._bias_init(bias),
        )

    def _kernel_init(self) -> Callable[..., Array]:
        if self.weight_init == "paper":
            return _drawn_as_matrix(nn.initializers.normal(0.01))
        return _drawn_as_matrix(nn.initializers.he_normal())

    def _bias_init(self, bias: float) -> Callable[..., Array]:
        return nn.initializers.constant(bias if self.weight_init == "paper" else 0.0)


def _drawn_as_matrix(init: Callable[..., Array]) -> Callable[..., Array]:
    """The same numbers; XLA takes three times as long to compile four dimensions."""

    def drawn(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return init(rng, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)

    return drawn


def create_model(
    name: str,
    levels: Sequence[int] | None = (6, 3, 2, 1),
    num_classes: int = 1000,
    *,
    width: float = 1.0,
    image_size: int = 224,
    dropout: float = 0.5,
    weight_init: str = "paper",
    dtype: Any = jnp.float32,
    reducer: str = "max",
    head: str = "fc",
    cuts: Sequence[str] = (),
    trainable: str = "all",
) -> SPPNet:
    """A Linen model: a trunk, a pyramid and a head.

    `name`: of one of the paper's backbones, "zf5", "convnet5", "overfeat5" or
    "overfeat7"; or of a published one, see `trunks.BACKBONES`.
    `levels`: the pyramid; None makes the twin without SPP, whose last pooling is fixed
    (6×6 at 224 pixels) and which refuses images of any size but `image_size`.
    `width`: scales the filters of every convolution and the units of fc6 and fc7.
    `weight_init`: "paper" (N(0, 0.01), biases of 1 as in the authors' release), or "he"
    for narrow networks, whose signal dies under N(0, 0.01).
    `dtype`: of the activations; parameters are float32.
    `reducer`: of each bin, "max" or "mean".
    `head`: "fc" is fc6, fc7 and fc8; "linear" is fc8 alone; "none" scores by the pooled
    vector itself, of a trunk whose last map has a channel for each class.
    `cuts`: where the trunk ends, of its table's; maps of several are joined on the grid
    of the finest. () is the last map.
    `trainable`: from which layer on gradients flow: "all", "head", or the name of a
    convolution or a cut.

    Raises: ValueError for an unknown backbone, or values that do not fit.
    """
    backbone = get_backbone(name)
    for what, value, known in (
        ("weight_init", weight_init, WEIGHT_INITS),
        ("reducer", reducer, REDUCERS),
        ("head", head, HEADS),
    ):
        if value not in known:
            words = ", ".join(map(repr, known))
            raise ValueError(f"unknown {what} {value!r}: use one of {words}")
    if not (width > 0 and num_classes >= 1 and 0 <= dropout < 1):
        raise ValueError(
            "width must be positive, num_classes at least 1 and dropout in [0, 1), "
            f"got {width=}, {num_classes=}, {dropout=}"
        )
    if len(set(cuts)) < len(cuts):
        raise ValueError(f"cuts has one twice: {tuple(cuts)}")
    if levels is None:
        if backbone.last_pool is None or cuts:
            raise ValueError(
                f"{name} has no twin without a pyramid: give levels such as (1,)"
                if not cuts
                else "the twin without a pyramid has no cuts: give levels"
            )
        last = (*backbone.layers, backbone.last_pool)
        table_geometry(last).map_size(image_size)
    joined_geometry(backbone, cuts).map_size(image_size)
    model = SPPNet(
        backbone=backbone,
        levels=None if levels is None else check_levels(levels),
        num_classes=num_classes,
        width=width,
        image_size=image_size,
        dropout=dropout,
        weight_init=weight_init,
        dtype=dtype,
        reducer=reducer,
        head=head,
        cuts=tuple(cuts),
    )
    return with_trainable(model, trainable)


def make_model(architecture: Architecture, num_classes: int, image_size: int) -> SPPNet:
    """The network of some settings; `image_size` is the side that it is trained at."""
    named = architecture._asdict()
    dtype = jnp.bfloat16 if named.pop("bfloat16") else jnp.float32
    name, levels = named.pop("backbone"), named.pop("levels") or None
    del named["weights"]
    return create_model(
        name, levels, num_classes, image_size=image_size, dtype=dtype, **named
    )


def joined_geometry(backbone: Backbone, cuts: Sequence[str]) -> Geometry:
    """The geometry of a trunk's last map, or of the maps of its cuts, joined.

    Raises: ValueError for a cut that the trunk doesn't have.
    """
    grids = _grids(backbone, cuts)
    finest = min(grids, key=lambda grid: grid.stride)
    if len(grids) == 1:
        return finest
    return finest._replace(
        receptive_field=max(grid.receptive_field for grid in grids),
        deepest=max(grids, key=lambda grid: grid.min_image_size).layers,
    )


def frozen_convs(model: SPPNet, trainable: str) -> tuple[str, ...]:
    """The convolutions that a training leaves as they are.

    `trainable`: "all", "head", or the name of the first layer that is trained.

    Raises: ValueError for a name that the trunk doesn't have.
    """
    count = sum(1 for _ in convs_of(model.table))
    names = tuple(f"conv{number}" for number in range(1, count + 1))
    if trainable == "all":
        return ()
    if trainable == HEAD_ONLY:
        return names
    if trainable in names:
        return names[: names.index(trainable)]
    cuts = {}
    for row, layer in enumerate(model.table):
        if isinstance(layer, Cut):
            before = sum(1 for _ in convs_of(model.table[:row]))
            cuts[layer.name] = names[:before]
    if trainable not in cuts:
        raise ValueError(
            f"unknown layer to train from, trainable {trainable!r}: use all, head, "
            f"conv1 to conv{count}" + "".join(f", {cut}" for cut in cuts)
        )
    return cuts[trainable]


def with_trainable(model: SPPNet, trainable: str) -> SPPNet:
    """The model, with gradients from a layer on; see `Architecture`."""
    frozen = set(frozen_convs(model, trainable))
    return model.clone(frozen_rows=_frozen_rows(model.table, frozen))


def _frozen_rows(table: Table, frozen: set[str]) -> int:
    """How many rows at the start of a table have nothing to train."""
    numbers = itertools.count(1)
    for row, layer in enumerate(table):
        names = {f"conv{next(numbers)}" for _ in convs_of((layer,))}
        if not names <= frozen:
            return row
    return len(table) if frozen else 0


def _grids(backbone: Backbone, cuts: Sequence[str]) -> list[Geometry]:
    return [table_geometry(cut_table(backbone.layers, cut)) for cut in cuts or ("",)]


def param_shapes(model: SPPNet) -> Any:
    """The shapes of a model's parameters, from its table: to trace it takes longer."""
    shapes, _ = _trunk_shapes(model)
    length = pooled_length(model)
    if model.head == "fc":
        for name in ("fc6", "fc7"):
            units = _scaled(4096, model.width)
            shapes[name], length = _weights(length, units), units
    if model.head != "none":
        shapes["fc8"] = _weights(length, model.num_classes)
    return shapes


def pooled_length(model: SPPNet) -> int:
    """The length of the vector that the pyramid makes of a map."""
    _, channels = _trunk_shapes(model)
    if model.levels is not None:
        return channels * num_bins(model.levels)
    assert model.backbone.last_pool is not None
    last = (*model.backbone.layers, model.backbone.last_pool)
    return channels * table_geometry(last).map_size(model.image_size) ** 2


def _trunk_shapes(model: SPPNet) -> tuple[dict[str, Any], int]:
    """The shapes of all convolutions' parameters, and the channels of the last map."""
    shapes: dict[str, Any] = {}
    cuts: dict[str, int] = {}

    def follow(table: Table, channels: int) -> int:
        for layer in table:
            if isinstance(layer, Conv):
                filters = _scaled(layer.filters, model.width)
                depthwise = layer.groups == layer.filters > 1
                seen = channels // (filters if depthwise else layer.groups)
                sides = layer.kernel, layer.kernel
                shapes[f"conv{len(shapes) + 1}"] = _weights(*sides, seen, filters)
                channels = filters
            elif isinstance(layer, Branches):
                ends = [follow(own, channels) for own in layer.tables]
                channels = sum(ends) if layer.join == "concat" else ends[0]
            elif isinstance(layer, Cut):
                cuts[layer.name] = channels
        return channels

    channels = follow(model.table, 3)
    joined = len(model.cuts) > 1
    return shapes, sum(cuts[cut] for cut in model.cuts) if joined else channels


def _weights(*shape: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a kernel and its bias."""
    parts = {"kernel": shape, "bias": shape[-1:]}
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in parts.items()}


def init_params(model: SPPNet, rng: jax.Array) -> Any:
    """The model's random initial parameters."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return model.init(rng, images)["params"]


def _scaled(units: int, width: float) -> int:
    return max(1, round(units * width))
