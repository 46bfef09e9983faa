"""Buckets: a few static input shapes that serve images of every size.

`choose_buckets` finds those that pad a data set the least; a `BucketTable` compiles
a function for each of them and runs images of every size through the programs.
"""

from sppnet_jax.buckets.choice import choose_buckets
from sppnet_jax.buckets.table import BucketTable, padding_waste

__all__ = ["BucketTable", "choose_buckets", "padding_waste"]
