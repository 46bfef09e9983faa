"""All the settings of a detector: what its config holds."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from sppnet_jax.data.datasets import BoxData
from sppnet_jax.detection.box_regression import BoxRegression
from sppnet_jax.detection.detector import Suppression
from sppnet_jax.detection.finetune import Finetuning
from sppnet_jax.detection.hard_negatives import Mining
from sppnet_jax.detection.proposals import ProposalSettings
from sppnet_jax.network.described import PRETRAINED, absolute_weights
from sppnet_jax.network.model import REDUCERS
from sppnet_jax.network.trunks import BACKBONES
from sppnet_jax.pyramid.geometry import RULES
from sppnet_jax.run.files import absolute
from sppnet_jax.run.run_folder import load_config
from sppnet_jax.run.settings import at_least, between, one_of, pixels, read

SYSTEMS = ("spp", "rcnn", "end_to_end")
SCORERS = ("svm", "softmax")
LAYERS = ("pyramid", "fc6", "fc7")
DTYPES = ("float32", "float16")


class DetectorSettings(NamedTuple):
    """Everything that a detector is made from; the paper's recipe for VOC 2007.

    `network`: the workdir of a trained classifier, or the name of a published trunk
    such as "efficientnet_lite0", whose `weights` are taken: "pretrained", or a file.
    `cuts`, `levels`, `reducer`: of the windows' pyramids, see `Architecture`; () and ""
    are the network's own. `system`: "spp"; "rcnn", which warps and convolves every
    window by itself; or "end_to_end", whose trunk is trained with the head, and moves
    boxes by a layer of its own. `cache`: the folder of proposals and maps, to share
    between workdirs; "" is in the workdir.
    `scales`: images' shorter sides in pixels; (480, 576, 688, 864, 1200) for five.
    `window_side`: a window's scale brings its area closest to this squared, and "rcnn"
    warps windows to it; 0 is the side that the network was trained at. `rule`: from
    box to window, see `boxes_to_windows`. `context`: of "rcnn", in pixels; -1 is 16 of
    227, in proportion.
    `buckets`: compiled programs for each scale, at most. `batch_size`: images of the
    training size that are convolved at a time. `maps_dtype`: on disk; "float16" halves
    it.
    `scorer`: "svm", or "softmax", the fine-tuned fc8. `layer`: that the SVMs see.
    `fc_rank`: of fc6 and fc7, truncated by SVD at test; 0 is whole.
    """

    seed: Annotated[int, between(0, 2**31)] = 0
    network: str = ""
    weights: str = PRETRAINED
    cuts: tuple[str, ...] = ()
    levels: tuple[Annotated[int, at_least(1)], ...] = ()
    reducer: Annotated[str, one_of(("", *REDUCERS))] = ""
    system: Annotated[str, one_of(SYSTEMS)] = "spp"
    cache: str = ""
    data: BoxData = BoxData()
    proposals: ProposalSettings = ProposalSettings()
    scales: tuple[Annotated[int, pixels()], ...] = (688,)
    window_side: Annotated[int, pixels(0)] = 0
    rule: Annotated[str, one_of(RULES)] = "paper"
    buckets: Annotated[int, at_least(1)] = 4
    batch_size: Annotated[int, at_least(1)] = 16
    maps_dtype: Annotated[str, one_of(DTYPES)] = "float32"
    context: Annotated[int, at_least(-1)] = -1
    finetune: Finetuning = Finetuning()
    scorer: Annotated[str, one_of(SCORERS)] = "svm"
    layer: Annotated[str, one_of(LAYERS)] = "fc7"
    svm: Mining = Mining()
    regression: BoxRegression = BoxRegression()
    fc_rank: tuple[Annotated[int, at_least(0)], Annotated[int, at_least(0)]] = (0, 0)
    test: Suppression = Suppression()

    def check(self) -> None:
        """Raises ValueError for settings that don't fit together."""
        if not self.network:
            raise ValueError(
                "give the workdir of a trained classifier, --config.network=runs/NAME, "
                "or a published trunk: --config.network=efficientnet_lite0"
            )
        if not self.scales:
            raise ValueError(
                "config.scales must be the images' shorter sides in pixels, such as "
                "(688,), got ()"
            )
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"config.scales has a side twice: {self.scales}")
        if self.scorer == "softmax" and not self.finetune.steps:
            raise ValueError(
                "config.scorer='softmax' is the fc8 that fine-tuning makes, but "
                "config.finetune.steps is 0: fine-tune, or use scorer 'svm'"
            )
        if self.system == "end_to_end" and not self.finetune.steps:
            raise ValueError(
                "config.system='end_to_end' trains trunk and head together, but "
                "config.finetune.steps is 0: give steps, or use system 'spp'"
            )

    def with_absolute_paths(self) -> "DetectorSettings":
        """The same, found again from any folder."""
        files = ("file", "test_file", "model")
        paths: Any = {name: absolute(getattr(self.proposals, name)) for name in files}
        network = self.network if self.is_published else absolute(self.network)
        return self._replace(
            network=network,
            weights=absolute_weights(self.weights),
            cache=absolute(self.cache),
            data=self.data.with_absolute_paths(),
            proposals=self.proposals._replace(**paths),
        )

    @property
    def is_published(self) -> bool:
        """Whether `network` names a published trunk, not a folder."""
        return self.network in BACKBONES and not Path(self.network).exists()

    def cache_folder(self, workdir: Path) -> Path:
        """Where proposals and maps are kept."""
        return Path(self.cache).expanduser() if self.cache else workdir / "cache"


def detector_settings(workdir: Path) -> DetectorSettings:
    """The settings that a detector was trained with.

    Raises: FileNotFoundError for a folder without one, ValueError for a classifier's.
    """
    saved: dict[str, Any] = load_config(workdir)
    if "proposals" not in saved:
        raise ValueError(
            f"{workdir} holds a trained classifier, no detector: give the detector's "
            "own --workdir"
        )
    return read(DetectorSettings, saved)
