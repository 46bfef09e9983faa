"""SPP-net in JAX: spatial pyramid pooling for recognition and detection.

The layer is in `spp`, the backbones in `backbones`, the network in `model`.
"""

from sppnet_jax.network.model import create_model
from sppnet_jax.network.trunks import backbone_geometry
from sppnet_jax.pyramid.geometry import boxes_to_windows
from sppnet_jax.pyramid.pooling import num_bins, pyramid_bins, spatial_pyramid_pool
from sppnet_jax.pyramid.windows import window_pyramid_pool

__all__ = [
    "backbone_geometry",
    "boxes_to_windows",
    "create_model",
    "num_bins",
    "pyramid_bins",
    "spatial_pyramid_pool",
    "window_pyramid_pool",
]
