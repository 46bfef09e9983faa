"""SPP-net in JAX: spatial pyramid pooling for recognition and detection.

The layer is in `spp`, the backbones in `backbones`, the network in `model`.
"""

from sppnet_jax.backbones import backbone_geometry
from sppnet_jax.model import create_model
from sppnet_jax.spp import num_bins, pyramid_bins, spatial_pyramid_pool

__all__ = [
    "backbone_geometry",
    "create_model",
    "num_bins",
    "pyramid_bins",
    "spatial_pyramid_pool",
]
