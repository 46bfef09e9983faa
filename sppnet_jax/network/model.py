"""The network: backbone → spatial pyramid → fc6, fc7, fc8; and its twin without SPP.

The pyramid turns the last map, of any size, into a vector of one length, so one set of
weights takes images of any size. Without a pyramid, the last pooling and fc6 fix the
image to the size that the network was made for.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sppnet_jax.network.layers import (
    ValidSize,
    image_conv,
    local_response_norm,
    max_pool,
    zero_beyond,
)
from sppnet_jax.network.trunks import (
    BACKBONES,
    LRN,
    Backbone,
    Conv,
    get_backbone,
    layers_geometry,
    output_size,
)
from sppnet_jax.pyramid.pooling import check_levels, spatial_pyramid_pool
from sppnet_jax.run.settings import above, at_least, between, one_of

Images = Float[Array, "batch height width 3"]
Intermediates = dict[str, Array]


WEIGHT_INITS = ("paper", "he")


class Architecture(NamedTuple):
    """Which network is made; see `create_model`.

    `backbone`: "zf5", "convnet5", "overfeat5" or "overfeat7". `levels`: the pyramid; ()
    for the twin without SPP. `width`: scales the filters and the units of fc6 and fc7.
    `dropout`: of fc6 and fc7. `weight_init`: "paper", or "he" for narrow networks.
    `bfloat16`: activations in bfloat16; parameters stay in float32.
    """

    backbone: Annotated[str, one_of(BACKBONES)] = "zf5"
    levels: tuple[Annotated[int, at_least(1)], ...] = (6, 3, 2, 1)
    width: Annotated[float, above(0)] = 1.0
    dropout: Annotated[float, between(0, 1)] = 0.5
    weight_init: Annotated[str, one_of(WEIGHT_INITS)] = "paper"
    bfloat16: bool = False


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
    """A convolutional stack, a pyramid (or one fixed pooling), three fc layers.

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

    def setup(self) -> None:
        convs = [layer for layer in self.backbone.layers if isinstance(layer, Conv)]
        for number, layer in enumerate(convs, start=1):
            conv = nn.Conv(
                _scaled(layer.filters, self.width),
                kernel_size=(layer.kernel, layer.kernel),
                strides=layer.stride,
                padding=layer.padding,
                dtype=self.dtype,
                kernel_init=self._kernel_init(),
                bias_init=self._bias_init(layer.bias),
                conv_general_dilated=image_conv if number == 1 else None,
            )
            setattr(self, f"conv{number}", conv)
        self.fc6 = self._dense(_scaled(4096, self.width), bias=1.0)
        self.fc7 = self._dense(_scaled(4096, self.width), bias=1.0)
        self.fc8 = self._dense(self.num_classes, bias=0.0)
        self.drop = nn.Dropout(self.dropout)

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
        after their ReLU, "pyramid" (what fc6 sees), "fc6" and "fc7" after their ReLU.
        """
        features, convs = self.features(images, valid_size)
        pyramid = self.pool(features, valid_size)
        logits, fcs = self.classify(pyramid, train=train)
        return logits, {**convs, "pyramid": pyramid, **fcs}

    def features(
        self, images: Images, valid_size: ValidSize | None = None
    ) -> tuple[Float[Array, "batch rows columns channels"], Intermediates]:
        """The last map, zero beyond the valid size, and each convolution's output."""
        if self.levels is None:
            self._check_fixed_size(images, valid_size)
        size = valid_size
        maps = zero_beyond(images.astype(self.dtype), size)
        convs: Intermediates = {}
        for layer in self.backbone.layers:
            if isinstance(layer, LRN):
                maps = local_response_norm(maps, *layer)
                continue
            if isinstance(layer, Conv):
                name = f"conv{len(convs) + 1}"
                maps = nn.relu(getattr(self, name)(maps))
            else:
                maps = max_pool(maps, layer)
            if size is not None:
                size = output_size(layer, size)
                maps = zero_beyond(maps, size)
            if isinstance(layer, Conv):
                convs[name] = maps
        return maps, convs

    def pool(
        self,
        features: Float[Array, "batch rows columns channels"],
        valid_size: ValidSize | None = None,
    ) -> Float[Array, "batch pooled"]:
        """The last map's pyramid as one vector; `valid_size` is in image pixels."""
        if self.levels is None:
            pooled = max_pool(features, self.backbone.last_pool)
        else:
            pooled = spatial_pyramid_pool(
                features, self.levels, valid_size=self._map_size(valid_size)
            )
        return pooled.reshape(len(pooled), -1)

    def classify(
        self, pyramid: Float[Array, "batch pooled"], *, train: bool = False
    ) -> tuple[Float[Array, "batch classes"], Intermediates]:
        """Logits from pooled vectors, and the activations of fc6 and fc7.

        It needs the parameters of "fc6", "fc7" and "fc8" alone, whole or truncated.
        """
        fc6 = nn.relu(self.fc6(pyramid))
        fc7 = nn.relu(self.fc7(self.drop(fc6, deterministic=not train)))
        logits = self.fc8(self.drop(fc7, deterministic=not train))
        return logits.astype(jnp.float32), {"fc6": fc6, "fc7": fc7}

    def _map_size(self, valid_size: ValidSize | None) -> ValidSize | None:
        if valid_size is None:
            return None
        for layer in self.backbone.layers:
            valid_size = output_size(layer, valid_size)
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
) -> SPPNet:
    """A Linen model over one of the paper's backbones.

    `name`: "zf5", "convnet5", "overfeat5" or "overfeat7".
    `levels`: the pyramid; None makes the twin without SPP, whose last pooling is fixed
    (6×6 at 224 pixels) and which refuses images of any size but `image_size`.
    `width`: scales the filters of every convolution and the units of fc6 and fc7.
    `weight_init`: "paper" (N(0, 0.01), biases of 1 as in the authors' release), or "he"
    for narrow networks, whose signal dies under N(0, 0.01).
    `dtype`: of the activations; parameters are float32.

    Raises: ValueError for an unknown backbone, or values that do not fit.
    """
    backbone = get_backbone(name)
    if weight_init not in WEIGHT_INITS:
        raise ValueError(f"unknown weight_init {weight_init!r}: use 'paper' or 'he'")
    if not (width > 0 and num_classes >= 1 and 0 <= dropout < 1):
        raise ValueError(
            "width must be positive, num_classes at least 1 and dropout in [0, 1), "
            f"got {width=}, {num_classes=}, {dropout=}"
        )
    last_pool = (backbone.last_pool,) if levels is None else ()
    layers_geometry((*backbone.layers, *last_pool)).map_size(image_size)
    return SPPNet(
        backbone=backbone,
        levels=None if levels is None else check_levels(levels),
        num_classes=num_classes,
        width=width,
        image_size=image_size,
        dropout=dropout,
        weight_init=weight_init,
        dtype=dtype,
    )


def make_model(architecture: Architecture, num_classes: int, image_size: int) -> SPPNet:
    """The network of some settings; `image_size` is the side that it is trained at."""
    named = architecture._asdict()
    dtype = jnp.bfloat16 if named.pop("bfloat16") else jnp.float32
    name, levels = named.pop("backbone"), named.pop("levels") or None
    return create_model(
        name, levels, num_classes, image_size=image_size, dtype=dtype, **named
    )


def param_shapes(model: SPPNet) -> Any:
    """The shapes of a model's parameters; nothing is computed."""
    return jax.eval_shape(lambda rng: init_params(model, rng), jax.random.PRNGKey(0))


def init_params(model: SPPNet, rng: jax.Array) -> Any:
    """The model's random initial parameters."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return model.init(rng, images)["params"]


def _scaled(units: int, width: float) -> int:
    return max(1, round(units * width))
