"""The same network and training step in PyTorch, built from the same table of layers.

It is what people write in PyTorch: `nn.LocalResponseNorm`, one `adaptive_max_pool2d`
per level, channels before bins in the vector that fc6 sees. `load_params` reorders
fc6's weights accordingly, so both networks compute the same function.

This is the only module that imports PyTorch, which is optional.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sppnet_jax.network.stack import LRN, Conv, MaxPool, table_geometry
from sppnet_jax.network.trunks import get_backbone
from sppnet_jax.pyramid.pooling import num_bins
from sppnet_jax.training.steps import Optimizer

Params = Mapping[str, Mapping[str, np.ndarray]]  # layer → kernel, bias


class Twin(nn.Module):
    """The network that `create_model` makes of the same arguments, in PyTorch.

    Images: float [batch, 3, height, width]. Returns float logits [batch, classes].
    Raises: ValueError for an unknown backbone or levels that are none.
    """

    def __init__(
        self,
        name: str,
        levels: Sequence[int] | None = (6, 3, 2, 1),
        num_classes: int = 1000,
        *,
        width: float = 1.0,
        image_size: int = 224,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        backbone = get_backbone(name)
        layers: list[nn.Module] = []
        channels = 3
        for layer in backbone.layers:
            if isinstance(layer, Conv):
                filters = _scaled(layer.filters, width)
                sliding = layer.kernel, layer.stride, layer.padding
                layers.append(nn.Conv2d(channels, filters, *sliding))
                layers.append(nn.ReLU(inplace=True))
                channels = filters
            elif isinstance(layer, LRN):
                # PyTorch divides α by the number of channels in the window.
                alpha = layer.alpha * layer.size
                lrn = nn.LocalResponseNorm(layer.size, alpha, layer.beta, layer.k)
                layers.append(lrn)
            elif isinstance(layer, MaxPool):
                layers.append(_pool(layer))
            else:
                raise ValueError(f"{name} is none of the paper's backbones: no twin")
        self.stack = nn.Sequential(*layers)
        self.levels = levels
        if levels is None and backbone.last_pool is not None:
            self.last_pool = _pool(backbone.last_pool)
            stack = table_geometry((*backbone.layers, backbone.last_pool))
            self.bins = stack.map_size(image_size) ** 2
        else:
            self.bins = num_bins(levels or ())
        self.fc6 = nn.Linear(self.bins * channels, _scaled(4096, width))
        self.fc7 = nn.Linear(self.fc6.out_features, _scaled(4096, width))
        self.fc8 = nn.Linear(self.fc7.out_features, num_classes)
        self.drop = nn.Dropout(dropout)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(self.stack(images))
        fc6 = self.drop(functional.relu(self.fc6(pooled)))
        fc7 = self.drop(functional.relu(self.fc7(fc6)))
        return self.fc8(fc7)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """The last map's pyramid (or last pooling), channels before bins."""
        if self.levels is None:
            return self.last_pool(features).flatten(1)
        pooled = [
            functional.adaptive_max_pool2d(features, n).flatten(2) for n in self.levels
        ]
        return torch.cat(pooled, dim=2).flatten(1)

    def named_layers(self) -> dict[str, Any]:  # Conv2d or Linear
        """The layers with parameters, by the names of the Flax model."""
        convs = [layer for layer in self.stack if isinstance(layer, nn.Conv2d)]
        named = {f"conv{n}": conv for n, conv in enumerate(convs, start=1)}
        return {**named, "fc6": self.fc6, "fc7": self.fc7, "fc8": self.fc8}


def load_params(twin: Twin, params: Params) -> None:
    """Copies the parameters of the Flax model of the same arguments.

    `params`: layer → "kernel" (float [kernel, kernel, in, out] or [in, out]) and
    "bias".
    Raises: ValueError for parameters of another network.
    """
    layers = twin.named_layers()
    if sorted(layers) != sorted(params):
        raise ValueError(
            f"parameters of {sorted(params)} do not fit a network of {sorted(layers)}"
        )
    for name, layer in layers.items():
        kernel, bias = np.array(params[name]["kernel"]), np.array(params[name]["bias"])
        weight = _to_torch(kernel, twin.bins if name == "fc6" else 1)
        if weight.shape != tuple(layer.weight.shape):
            raise ValueError(
                f"the kernel of {name}, {kernel.shape}, makes weights {weight.shape}, "
                f"not {tuple(layer.weight.shape)}: it is of another network"
            )
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))


def make_twin_step(
    twin: Twin,
    optimizer: Optimizer,
    mean: float,
    *,
    layout: str = "contiguous_format",
    bfloat16: bool = False,
    compiled: bool = False,
) -> Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]:
    """The step `(images, labels, learning_rate) -> (sum of losses, correct)`.

    SGD as ours: momentum, and weight decay on kernels only; it changes the twin.

    `images`: uint8 [batch, 3, height, width] in the layout that the maps are to have;
    `labels`: int64 [batch]. They are brought to the twin's device if they aren't there.
    `layout`: "contiguous_format" or "channels_last", of the weights.
    `bfloat16`: under autocast. `compiled`: the network through `torch.compile`.
    The results stay on the device.
    Raises: ValueError for label smoothing, which it does not do.
    """
    if optimizer.label_smoothing:
        raise ValueError("the twin has no label smoothing, set it to 0")
    form = getattr(torch, layout)
    # PyTorch's annotations don't know this argument.
    device = _device(twin.to(memory_format=form))  # type: ignore[call-overload]
    network = torch.compile(twin) if compiled else twin
    layers = twin.named_layers().values()
    decay = optimizer.weight_decay
    sgd = torch.optim.SGD(
        [
            {"params": [layer.weight for layer in layers], "weight_decay": decay},
            {"params": [layer.bias for layer in layers], "weight_decay": 0.0},
        ],
        lr=0.0,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        fused=True,  # several times as fast as a pass for each operation
    )

    def step(
        images: torch.Tensor, labels: torch.Tensor, learning_rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        twin.train()
        for group in sgd.param_groups:
            group["lr"] = learning_rate
        sgd.zero_grad(set_to_none=True)
        pixels = images.to(device, non_blocking=True).float() - mean
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = network(pixels)
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        sgd.step()
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        return loss.detach() * len(labels), correct

    return step


def twin_logits(
    twin: Twin, images: torch.Tensor, mean: float, *, bfloat16: bool = False
) -> np.ndarray:
    """Logits [batch, classes] of uint8 images [batch, 3, height, width], no dropout."""
    device = _device(twin.eval())
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        logits = twin(images.to(device).float() - mean)
    return logits.float().cpu().numpy()


def _device(twin: Twin) -> torch.device:
    return twin.fc8.weight.device


def _to_torch(kernel: np.ndarray, bins: int) -> np.ndarray:
    """A kernel in PyTorch's order, where fc6 sees channels before bins."""
    if kernel.ndim == 4:
        return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    rows, units = kernel.shape
    if rows % bins:
        raise ValueError(f"fc6 has {rows} inputs, no multiple of the {bins} bins")
    ordered = kernel.reshape(bins, rows // bins, units).transpose(2, 1, 0)
    return np.ascontiguousarray(ordered.reshape(units, rows))


def _pool(layer: MaxPool) -> nn.MaxPool2d:
    return nn.MaxPool2d(layer.kernel, layer.stride, layer.padding)


def _scaled(units: int, width: float) -> int:
    return max(1, round(units * width))
