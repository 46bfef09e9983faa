"""The trunks: the paper's four stacks (Table 1), and published networks of ImageNet.

Each table reads from the image to the last map before the pyramid. Of the paper's four
it says that "the padding is adjusted to produce the expected output feature map size";
these paddings give every size that it states, for 224 and for 180 pixels. The others
are as their authors published them: AlexNet, VGG-16, ResNets and SqueezeNet 1.1 in the
layouts of torchvision, EfficientNet-Lite as TensorFlow's. Batch normalisation is folded
into the convolutions when weights are read (pretrained.py), so no row is needed for it.

To add a trunk, write its table and add one line to `BACKBONES`; for pretrained weights,
one line to `pretrained.NAMES` besides.
"""

import difflib
from typing import NamedTuple

from sppnet_jax.network.stack import (
    LRN,
    Branches,
    Conv,
    Cut,
    Layer,
    MaxPool,
    Table,
    table_geometry,
)
from sppnet_jax.pyramid.geometry import Geometry

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # torchvision's, of 0 to 255
IMAGENET_STD = (58.395, 57.12, 57.375)


class Published(NamedTuple):
    """How a published network sees images and classifies them.

    `mean`, `std`: of its inputs, for each colour, of pixels of 0 to 255. `image_size`,
    `resize_side`: in pixels; of its crops, and the shorter side of images before them.
    `levels`, `reducer`, `head`: of its own classifier, see `create_model`.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int = 224
    resize_side: int = 256
    levels: tuple[int, ...] = (1,)
    reducer: str = "mean"
    head: str = "linear"


class Backbone(NamedTuple):
    """A stack of layers, and what belongs to it.

    `last_pool`: of the twin without SPP; it gives 6×6 bins at the paper's 224 pixels.
    `published`: of networks that come with weights.
    """

    layers: Table
    last_pool: MaxPool | None = None
    published: Published | None = None


# fmt: off
ZF5 = Backbone(
    layers=(
        Conv(96, kernel=7, stride=2, padding=1),              # 224 -> 110
        LRN(),
        MaxPool(kernel=3, stride=2, padding=1),               # 55
        Conv(256, kernel=5, stride=2, padding=1, bias=1.0),   # 27
        LRN(),
        MaxPool(kernel=3, stride=2),                          # 13
        Conv(384, kernel=3, padding=1),
        Conv(384, kernel=3, padding=1, bias=1.0),
        Conv(256, kernel=3, padding=1, bias=1.0),             # 13; 180 pixels give 10
    ),
    last_pool=MaxPool(kernel=3, stride=2),
)

CONVNET5 = Backbone(
    layers=(
        Conv(96, kernel=11, stride=4, padding=2),             # 224 -> 55
        LRN(),
        Conv(256, kernel=5, padding=2, bias=1.0),
        LRN(),
        MaxPool(kernel=3, stride=2),                          # 27
        Conv(384, kernel=3, padding=1),
        MaxPool(kernel=3, stride=2),                          # 13
        Conv(384, kernel=3, padding=1, bias=1.0),
        Conv(256, kernel=3, padding=1, bias=1.0),             # 13; 180 pixels give 10
    ),
    last_pool=MaxPool(kernel=3, stride=2),
)

OVERFEAT5 = Backbone(
    layers=(
        Conv(96, kernel=7, stride=2),                         # 224 -> 109
        MaxPool(kernel=3, stride=3),                          # 36
        LRN(),
        Conv(256, kernel=5, padding=2, bias=1.0),
        MaxPool(kernel=2, stride=2),                          # 18
        Conv(512, kernel=3, padding=1),
        Conv(512, kernel=3, padding=1, bias=1.0),
        Conv(512, kernel=3, padding=1, bias=1.0),             # 18; 180 pixels give 14
    ),
    last_pool=MaxPool(kernel=3, stride=3),
)

OVERFEAT7 = Backbone(
    layers=(
        *OVERFEAT5.layers,
        Conv(512, kernel=3, padding=1, bias=1.0),
        Conv(512, kernel=3, padding=1, bias=1.0),             # 18; 180 pixels give 14
    ),
    last_pool=MaxPool(kernel=3, stride=3),
)


def _fire(squeeze: int, expand: int) -> tuple[Layer, ...]:
    """SqueezeNet's module: 1×1 filters, then 1×1 and 3×3 ones side by side."""
    sides = (Conv(expand, kernel=1),), (Conv(expand, kernel=3, padding=1),)
    return Conv(squeeze, kernel=1), Branches(sides, "concat")


def _residual(*table: Layer, shortcut: Table = ()) -> Branches:
    return Branches((table, shortcut), "add", activation="relu")


def _basic(filters: int, stride: int, shortcut: Table) -> Branches:
    """A block of ResNet-18."""
    return _residual(
        Conv(filters, kernel=3, stride=stride, padding=1),
        Conv(filters, kernel=3, padding=1, activation="none"),
        shortcut=shortcut,
    )


def _bottleneck(filters: int, stride: int, shortcut: Table) -> Branches:
    """A block of ResNet-50, its stride at the 3×3 filters as in torchvision."""
    return _residual(
        Conv(filters, kernel=1),
        Conv(filters, kernel=3, stride=stride, padding=1),
        Conv(4 * filters, kernel=1, activation="none"),
        shortcut=shortcut,
    )


def _resnet(kind: str, depths: tuple[int, int, int, int]) -> Table:
    block, wider = (_basic, 1) if kind == "basic" else (_bottleneck, 4)
    rows: list[Layer] = [
        Conv(64, kernel=7, stride=2, padding=3),
        MaxPool(kernel=3, stride=2, padding=1),
    ]
    channels = 64
    for stage, depth in enumerate(depths):
        filters, stride = 64 << stage, 1 if stage == 0 else 2
        for number in range(depth):
            down = stride if number == 0 else 1
            shortcut: Table = ()
            if down > 1 or channels != wider * filters:
                shortcut = (
                    Conv(wider * filters, kernel=1, stride=down, activation="none"),
                )
            rows.append(block(filters, down, shortcut))
            channels = wider * filters
        rows.append(Cut(f"stride{4 << stage}"))
    return tuple(rows)


# Filters out, kernel, stride, blocks and expansion of the stages of EfficientNet-Lite0.
_LITE_STAGES = (
    (16, 3, 1, 1, 1),
    (24, 3, 2, 2, 6),
    (40, 5, 2, 2, 6),
    (80, 3, 2, 3, 6),
    (112, 5, 1, 3, 6),
    (192, 5, 2, 4, 6),
    (320, 3, 1, 1, 6),
)


def _lite(width: float, depth: float) -> Table:
    """EfficientNet-Lite: inverted bottlenecks with ReLU6.

    At stride 2 the padding is TensorFlow's SAME of even sizes, for every size: the maps
    are those of TensorFlow where the image's sides are multiples of 32. At the 240 and
    260 pixels of Lite1 and Lite2 a map on the way is odd, and scores differ a little.
    """
    rows: list[Layer] = [_lite_conv(32, 3, 2)]
    channels, total_stride = 32, 2
    last = len(_LITE_STAGES) - 1
    for stage, (base, kernel, stride, blocks, expansion) in enumerate(_LITE_STAGES):
        filters = int(base * width + 4) // 8 * 8  # no case loses a tenth by rounding
        repeats = blocks if stage in (0, last) else -int(-blocks * depth // 1)
        for number in range(repeats):
            down = stride if number == 0 else 1
            wide = channels * expansion
            if expansion > 1:
                rows_in: list[Layer] = [Conv(wide, kernel=1, activation="relu6")]
            else:
                rows_in = []
            rows_out = (
                _lite_conv(wide, kernel, down, groups=wide),
                Conv(filters, kernel=1, activation="none"),
            )
            if down == 1 and channels == filters:
                rows.append(Branches(((*rows_in, *rows_out), ()), "add"))
            else:
                if down == 2:
                    rows.append(Cut(f"stride{total_stride}"))
                    rows.extend(rows_in)
                    rows.append(Cut(f"stride{total_stride}_wide"))
                    total_stride *= 2
                else:
                    rows.extend(rows_in)
                rows.extend(rows_out)
            channels = filters
    name = f"stride{total_stride}"
    head = Conv(1280, kernel=1, activation="relu6")
    return (*rows, Cut(name), head, Cut(f"{name}_wide"))


def _lite_conv(filters: int, kernel: int, stride: int, groups: int = 1) -> Conv:
    half = kernel // 2
    padding = (half - 1, half) if stride == 2 else (half, half)
    return Conv(filters, kernel, stride, padding, activation="relu6", groups=groups)


def _lite_published(image_size: int) -> Published:
    # Trained and tested on centre crops of size/(size + 32) of the shorter side.
    return Published((127.0,) * 3, (128.0,) * 3, image_size, image_size + 32)


ALEXNET = Backbone(
    layers=(
        Conv(64, kernel=11, stride=4, padding=2),
        MaxPool(kernel=3, stride=2),
        Conv(192, kernel=5, padding=2),
        MaxPool(kernel=3, stride=2),
        Conv(384, kernel=3, padding=1),
        Conv(256, kernel=3, padding=1),
        Conv(256, kernel=3, padding=1),
        Cut("stride16"),
        MaxPool(kernel=3, stride=2),
    ),
    published=Published(IMAGENET_MEAN, IMAGENET_STD, levels=(6,), head="fc"),
)

VGG16 = Backbone(
    layers=(
        *(2 * (Conv(64, kernel=3, padding=1),)),
        MaxPool(kernel=2, stride=2),
        *(2 * (Conv(128, kernel=3, padding=1),)),
        MaxPool(kernel=2, stride=2),
        *(3 * (Conv(256, kernel=3, padding=1),)),
        MaxPool(kernel=2, stride=2),
        *(3 * (Conv(512, kernel=3, padding=1),)),
        Cut("stride8"),
        MaxPool(kernel=2, stride=2),
        *(3 * (Conv(512, kernel=3, padding=1),)),
        Cut("stride16"),
        MaxPool(kernel=2, stride=2),
    ),
    published=Published(IMAGENET_MEAN, IMAGENET_STD, levels=(7,), head="fc"),
)

SQUEEZENET = Backbone(
    layers=(
        Conv(64, kernel=3, stride=2),
        MaxPool(kernel=3, stride=2, padding=(0, 1)),          # sizes are rounded up
        *_fire(16, 64),
        *_fire(16, 64),
        MaxPool(kernel=3, stride=2, padding=(0, 1)),
        *_fire(32, 128),
        *_fire(32, 128),
        Cut("stride8"),
        MaxPool(kernel=3, stride=2, padding=(0, 1)),
        *_fire(48, 192),
        *_fire(48, 192),
        *_fire(64, 256),
        *_fire(64, 256),
        Cut("stride16"),
        Conv(1000, kernel=1),                                 # a map of each class
    ),
    published=Published(IMAGENET_MEAN, IMAGENET_STD, head="none"),
)

RESNET18 = Backbone(
    layers=_resnet("basic", (2, 2, 2, 2)),
    published=Published(IMAGENET_MEAN, IMAGENET_STD),
)

RESNET50 = Backbone(
    layers=_resnet("bottleneck", (3, 4, 6, 3)),
    published=Published(IMAGENET_MEAN, IMAGENET_STD),
)

EFFICIENTNET_LITE0 = Backbone(_lite(1.0, 1.0), published=_lite_published(224))
EFFICIENTNET_LITE1 = Backbone(_lite(1.0, 1.1), published=_lite_published(240))
EFFICIENTNET_LITE2 = Backbone(_lite(1.1, 1.2), published=_lite_published(260))
# fmt: on

BACKBONES: dict[str, Backbone] = {
    "zf5": ZF5,
    "convnet5": CONVNET5,
    "overfeat5": OVERFEAT5,
    "overfeat7": OVERFEAT7,
    "alexnet": ALEXNET,
    "vgg16": VGG16,
    "squeezenet": SQUEEZENET,
    "resnet18": RESNET18,
    "resnet50": RESNET50,
    "efficientnet_lite0": EFFICIENTNET_LITE0,
    "efficientnet_lite1": EFFICIENTNET_LITE1,
    "efficientnet_lite2": EFFICIENTNET_LITE2,
}
PAPER = ("zf5", "convnet5", "overfeat5", "overfeat7")


def get_backbone(name: str) -> Backbone:
    """A backbone's table; ValueError with the valid names if there is none."""
    if name not in BACKBONES:
        close = difflib.get_close_matches(str(name), BACKBONES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown backbone {name!r}: choose from {', '.join(BACKBONES)}{hint}"
        )
    return BACKBONES[name]


def backbone_geometry(name: str) -> Geometry:
    """Stride, receptive field and map sizes of a backbone's last map."""
    return table_geometry(get_backbone(name).layers)
