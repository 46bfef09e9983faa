"""SPP-net in JAX: spatial pyramid pooling for recognition and detection.

The layer is in `pyramid.pooling`, the trunks in `network.trunks`, the network in
`network.model`; `network.trained` reads what a training left.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppnet_jax.classification.image_scores import score_images
    from sppnet_jax.data.photographs import read_image
    from sppnet_jax.network.model import create_model
    from sppnet_jax.network.pretrained import load_pretrained
    from sppnet_jax.network.trained import load_network
    from sppnet_jax.network.trunks import backbone_geometry
    from sppnet_jax.pyramid.geometry import boxes_to_windows
    from sppnet_jax.pyramid.pooling import num_bins, pyramid_bins, spatial_pyramid_pool
    from sppnet_jax.pyramid.windows import window_pyramid_pool
    from sppnet_jax.run.memory import keep_memory

__all__ = [
    "backbone_geometry",
    "boxes_to_windows",
    "create_model",
    "keep_memory",
    "load_network",
    "load_pretrained",
    "num_bins",
    "pyramid_bins",
    "read_image",
    "score_images",
    "spatial_pyramid_pool",
    "window_pyramid_pool",
]
# Loaded when asked for: the layer has no need of checkpoints and images, and what was
# exported none of the layer.
_LATER = {
    "backbone_geometry": "sppnet_jax.network.trunks",
    "boxes_to_windows": "sppnet_jax.pyramid.geometry",
    "create_model": "sppnet_jax.network.model",
    "keep_memory": "sppnet_jax.run.memory",
    "load_network": "sppnet_jax.network.trained",
    "load_pretrained": "sppnet_jax.network.pretrained",
    "num_bins": "sppnet_jax.pyramid.pooling",
    "pyramid_bins": "sppnet_jax.pyramid.pooling",
    "read_image": "sppnet_jax.data.photographs",
    "score_images": "sppnet_jax.classification.image_scores",
    "spatial_pyramid_pool": "sppnet_jax.pyramid.pooling",
    "window_pyramid_pool": "sppnet_jax.pyramid.windows",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
