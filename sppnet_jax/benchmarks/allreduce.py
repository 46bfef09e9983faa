"""What summing gradients over many accelerators costs, on paper.

    python -m sppnet_jax.benchmarks.allreduce --batch=16

prints the table of docs/scaling.md, which derives the formulas. Bytes and FLOPs are
those of the networks of this package; rates of accelerators and links are assumptions.
Nothing here is measured.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sppnet_jax.benchmarks.report import Measurements, table
from sppnet_jax.network.model import create_model, init_params
from sppnet_jax.network.stack import Conv, output_size
from sppnet_jax.network.trunks import get_backbone

NETWORKS: tuple[tuple[str, tuple[int, ...] | None], ...] = (
    ("zf5", (6, 3, 2, 1)),
    ("zf5", None),
    ("overfeat7", (6, 3, 2, 1)),
)
BYTES = {"float32": 4, "bfloat16": 2}


class Link(NamedTuple):
    """What a link is assumed to do: bytes/s in each direction, seconds per message."""

    bandwidth: float
    latency: float


class Cluster(NamedTuple):
    """Nodes of accelerators, with assumed links within and between them.

    `inner`: of each accelerator to the next of its node; `outer`: of each accelerator
    to its counterpart in the next node. `peak`: FLOP/s of an accelerator in bfloat16.
    """

    name: str
    nodes: int
    per_node: int
    inner: Link
    outer: Link
    peak: float


GPU_LINKS = (Link(450e9, 3e-6), Link(50e9, 10e-6))
TPU_LINKS = (Link(100e9, 1e-6), Link(100e9, 1e-6))
CLUSTERS = (
    Cluster("8 GPUs", 1, 8, *GPU_LINKS, 1e15),
    Cluster("256 GPUs, 32 × 8", 32, 8, *GPU_LINKS, 1e15),
    Cluster("8 TPUs", 1, 8, *TPU_LINKS, 275e12),
    Cluster("256 TPUs, 16 × 16", 16, 16, *TPU_LINKS, 275e12),
)
SHARE_OF_PEAK = 0.4  # that a training step reaches


def scaling_table(batch: int) -> list[Measurements]:
    """Time of the all-reduce beside that of the step, for each network and cluster.

    `batch`: images per accelerator.

    Returns: rows; "efficiency" is the share of the time that computes when the
    all-reduce waits for the gradients, "overlapped" when all of it hides behind the
    computation.
    """
    rows: list[Measurements] = []
    for name, levels in NETWORKS:
        parameters = sum(parameter_counts(name, levels).values())
        flops = batch * training_flops(name, levels)
        for cluster in CLUSTERS:
            compute = flops / (SHARE_OF_PEAK * cluster.peak)
            for dtype, width in BYTES.items():
                sent = width * parameters
                wait = two_level_seconds(sent, cluster)
                rows.append(
                    {
                        "network": name,
                        "levels": ",".join(map(str, levels)) if levels else "no SPP",
                        "accelerators": cluster.name,
                        "gradients": dtype,
                        "MB": sent / 1e6,
                        "all-reduce ms": wait * 1e3,
                        "step ms": compute * 1e3,
                        "efficiency": compute / (compute + wait),
                        "overlapped": compute / max(compute, wait),
                    }
                )
    return rows


def ring_seconds(size: float, devices: int, link: Link) -> float:
    """Seconds of a ring all-reduce of `size` bytes over `devices` accelerators.

    2(p − 1) messages of size/p bytes follow one another.
    """
    steps = 2 * (devices - 1)
    return steps * (size / devices / link.bandwidth + link.latency)


def two_level_seconds(size: float, cluster: Cluster) -> float:
    """Seconds of an all-reduce within nodes, then between them.

    Reduce-scatter in each node, a ring between the nodes for each accelerator's part,
    all-gather in each node: the first and the last make one ring all-reduce.
    """
    inside = ring_seconds(size, cluster.per_node, cluster.inner)
    return inside + ring_seconds(size / cluster.per_node, cluster.nodes, cluster.outer)


def parameter_counts(name: str, levels: Sequence[int] | None) -> dict[str, int]:
    """The number of parameters of every layer of a network with 1000 classes."""
    model = create_model(name, levels)
    shapes = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
    return {
        layer: sum(int(leaf.size) for leaf in jax.tree.leaves(leaves))
        for layer, leaves in shapes.items()
    }


def training_flops(name: str, levels: Sequence[int] | None) -> float:
    """FLOPs of a training step per image of 224 pixels, a multiply-add as two.

    Convolutions and fc layers, once forward and twice backward (for inputs and for
    kernels; the first needs none for the image). The rest is left out: it is bound by
    memory.
    """
    model = create_model(name, levels)
    size, channels, forward, first = model.image_size, 3, 0.0, 0.0
    for layer in get_backbone(name).layers:
        size = output_size(layer, size)
        if isinstance(layer, Conv):
            products = layer.kernel**2 * channels * layer.filters
            channels = layer.filters
            forward += 2 * size**2 * products
            first = first or forward
    counts = parameter_counts(name, levels)
    kernels = sum(counts[fc] for fc in ("fc6", "fc7", "fc8")) - 2 * 4096 - 1000
    return 3 * (forward + 2 * kernels) - first


def fc_share(name: str, levels: Sequence[int] | None) -> float:
    """The share of the parameters, and so of the gradients' bytes, in fc6 to fc8."""
    counts: Any = parameter_counts(name, levels)
    return sum(counts[fc] for fc in ("fc6", "fc7", "fc8")) / sum(counts.values())


def network_table() -> list[Measurements]:
    """Parameters, FLOPs and the fc layers' share of the networks."""
    return [
        {
            "network": name,
            "levels": ",".join(map(str, levels)) if levels else "no SPP",
            "parameters, millions": sum(parameter_counts(name, levels).values()) / 1e6,
            "share of fc6, fc7, fc8": fc_share(name, levels),
            "GFLOP an image": training_flops(name, levels) / 1e9,
        }
        for name, levels in NETWORKS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sppnet_jax.benchmarks.allreduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=16, help="images per accelerator")
    given = parser.parse_args()
    if given.batch < 1:
        parser.error(f"--batch must be at least 1, got {given.batch}")
    print(table(network_table()), table(scaling_table(given.batch)), sep="\n\n")


if __name__ == "__main__":
    main()
