"""The costs on paper, against sums by hand and XLA's count of FLOPs."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppnet_jax.benchmarks.allreduce import (
    Cluster,
    Link,
    fc_share,
    parameter_counts,
    ring_seconds,
    scaling_table,
    training_flops,
    two_level_seconds,
)
from sppnet_jax.network.model import create_model

REPOSITORY = Path(__file__).parent.parent
ZF5 = (
    (7 * 7 * 3 * 96 + 96)
    + (5 * 5 * 96 * 256 + 256)
    + (3 * 3 * 256 * 384 + 384)
    + (3 * 3 * 384 * 384 + 384)
    + (3 * 3 * 384 * 256 + 256)
)
FC78 = (4096 * 4096 + 4096) + (4096 * 1000 + 1000)


def test_parameters_are_counted_as_by_hand():
    pyramid = 50 * 256 * 4096 + 4096 + FC78
    fixed = 36 * 256 * 4096 + 4096 + FC78
    assert sum(parameter_counts("zf5", (6, 3, 2, 1)).values()) == ZF5 + pyramid
    assert sum(parameter_counts("zf5", None).values()) == ZF5 + fixed
    assert fc_share("zf5", None) == pytest.approx(fixed / (ZF5 + fixed))


def test_a_ring_sends_every_byte_twice_but_for_one_part():
    """Played out: p parts go round the ring, to be summed and then to be shared."""
    size, devices, link = 8000.0, 4, Link(bandwidth=100.0, latency=0.5)
    values = np.random.default_rng(0).integers(0, 9, (devices, devices))
    held, seconds = values.copy(), 0.0
    for add, first in ((True, 0), (False, 1)):
        for step in range(devices - 1):
            before = held.copy()
            for device in range(devices):
                part = (device + first - step) % devices
                to = (device + 1) % devices
                held[to, part] = before[device, part] + (before[to, part] if add else 0)
            seconds += size / devices / link.bandwidth + link.latency
    np.testing.assert_array_equal(held, [values.sum(axis=0)] * devices)
    assert ring_seconds(size, devices, link) == pytest.approx(seconds)
    assert ring_seconds(size, 1, link) == 0


def test_two_levels_by_hand():
    """32 nodes of 8, 308 MB: 2·7/8·308/450e3 + 2·31/32·38.5/50e3 s, and latencies."""
    cluster = Cluster("", 32, 8, Link(450e9, 3e-6), Link(50e9, 1e-5), 1e15)
    inside = 2 * 7 / 8 * 308e6 / 450e9 + 2 * 7 * 3e-6
    between = 2 * 31 / 32 * 38.5e6 / 50e9 + 2 * 31 * 1e-5
    assert two_level_seconds(308e6, cluster) == pytest.approx(inside + between)
    one_node = cluster._replace(nodes=1)
    assert two_level_seconds(308e6, one_node) == pytest.approx(inside)


@pytest.mark.parametrize(
    ("name", "levels"), [("zf5", (6, 3, 2, 1)), ("zf5", None), ("overfeat7", (2, 1))]
)
def test_flops_are_those_xla_counts_but_for_the_small_operations(name, levels):
    model = create_model(name, levels)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)

    def forward(params, images):
        return model.apply(params, images)[0]

    counted = jax.jit(forward).lower(params, images).cost_analysis()["flops"]
    first = 96 * 2 * 49 * 3 * (110 if name == "zf5" else 109) ** 2
    estimate = (training_flops(name, levels) + first) / 3
    # XLA leaves out what falls into the padding, and counts pooling and LRN.
    assert 0.99 * counted < estimate < 1.08 * counted


def test_the_table_follows_from_its_own_columns():
    for row in scaling_table(16):
        step, wait = row["step ms"], row["all-reduce ms"]
        assert row["efficiency"] == pytest.approx(step / (step + wait))
        assert row["overlapped"] == pytest.approx(min(1, step / wait))
    small, large = ({r["step ms"] for r in scaling_table(n)} for n in (1, 2))
    assert sorted(large) == pytest.approx([2 * ms for ms in sorted(small)])


def test_the_command_prints_the_table_of_the_document() -> None:
    document = (REPOSITORY / "docs" / "scaling.md").read_text()
    printed = subprocess.run(
        [sys.executable, "-m", "sppnet_jax.benchmarks.allreduce", "--batch=16"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in filter(None, printed.splitlines()):
        assert line in document
