"""Table 2: does a pyramid help, and does training at several sizes help?

python -m experiments.table2_pyramid_and_multi_size --preset=digits
"""

from experiments import setting
from experiments.presets import Network
from experiments.runs import networks_of

BACKBONES = ("zf5", "convnet5", "overfeat5", "overfeat7")
NETWORKS = [
    network
    for backbone in BACKBONES
    for network in (
        Network(backbone, levels=()),
        Network(backbone),
        Network(backbone, training="multi"),
    )
] + [
    Network("zf5", levels=(4, 3, 2, 1)),
    Network("overfeat7", training="uniform"),
]


def main(given: setting.Setting) -> None:
    networks_of(given, NETWORKS)


if __name__ == "__main__":
    setting.run(main, __doc__)
