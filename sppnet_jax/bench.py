"""Measures the speed of this package on this machine, beside its alternatives.

    python -m sppnet_jax.bench pyramid windows --out=runs/bench

prints a table for each suite and writes SUITE.json and SUITE.png; without names it runs
all suites. One that is stopped leaves its rows in SUITE_unfinished.json. Alternatives
are timed in turn, so ratios hold on a busy machine too. Peers (PyTorch, ONNX Runtime)
are optional: `pip install -r requirements-bench.txt`.
None of the suites needs data; what takes data or whole command lines is measured by
experiments/*_speed.py.
"""

import importlib
import os
import sys
import traceback

from sppnet_jax.benchmarks.report import show, timing_of, timing_parser

# By name: the module in benchmarks/, and what it measures.
SUITES = {
    "buckets": ("bucket_costs", "compile time, FLOPs, bytes, images/s of every bucket"),
    "variable_sizes": (
        "variable_sizes",
        "images of 500 sizes: buckets, one jit a shape, warping, batch 1",
    ),
    "pyramid": ("pyramid_speed", "the layer, both directions, beside PyTorch's pools"),
    "windows": ("window_speed", "2,000 windows, beside masks, MaxRoiPool, roi_pool"),
    "training_step": ("training_step", "a step of all backbones, beside PyTorch"),
    "exported": ("exported_speed", "a network here, and its export in ONNX Runtime"),
    "scaling": ("scaling", "a training step over 1, 2, 4 devices and 1, 2 processes"),
}


def main() -> None:
    parser = timing_parser(
        "sppnet_jax.bench",
        __doc__,
        out="runs/bench",
        rounds=10,
        epilog="suites:\n" + "\n".join(f"  {k:15} {v[1]}" for k, v in SUITES.items()),
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="default: all")
    given, timing = timing_of(parser)
    unknown = [name for name in given.suites if name not in SUITES]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}: choose from {', '.join(SUITES)}")
    # On a GPU, peers need room in the same memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    failed = []
    for name in dict.fromkeys(given.suites or SUITES):
        try:
            module = f"sppnet_jax.benchmarks.{SUITES[name][0]}"
            suite = importlib.import_module(module)
            show(suite.run(timing), timing)
        except KeyboardInterrupt:
            sys.exit("interrupted; the suites before are written")
        except Exception as error:  # of a peer, too; the other suites still run
            if given.traceback:
                traceback.print_exc()
            print(f"error in {name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)} (--traceback shows where)")


if __name__ == "__main__":
    main()
