"""Every setting of a detector with its meaning; configs/detect_*.py change some.

The values here are the paper's for VOC 2007 (section 4), whose networks see 224 pixels.
On the command line each can be overridden: `--config.proposals.method=edge_boxes`.
"""

from ml_collections import ConfigDict

from sppnet_jax.config import at_least, check_fields, one_of

SYSTEMS = ("spp", "rcnn")
SCORERS = ("svm", "softmax")
LAYERS = ("pyramid", "fc6", "fc7")
METHODS = ("selective_search", "edge_boxes", "file")
RULES = ("paper", "closest")
DTYPES = ("float32", "float16")


def detection_base_config() -> ConfigDict:
    """The paper's recipe for VOC 2007 (section 4)."""
    config = ConfigDict()
    config.seed = 0
    config.network = ""  # the workdir of a trained classifier, runs/NAME
    config.system = "spp"  # spp, or rcnn: every window warped and convolved by itself
    config.cache = ""  # of proposals and maps, to share between workdirs; "": WORKDIR

    config.data = ConfigDict()
    config.data.name = "voc/2007"  # voc/2012, voc_folder, digit_scenes/detection
    config.data.root = ""  # the folder of a voc_folder
    config.data.data_dir = ""  # where TFDS keeps data; "" is its own default
    config.data.train_split = ""  # "": trainval, train+validation, or train
    config.data.test_split = ""  # "": test, or validation
    config.data.threads = 8

    config.proposals = ConfigDict()
    config.proposals.method = "selective_search"  # edge_boxes, file
    config.proposals.width = 500  # images are searched at this width; 0: their own
    config.proposals.min_side = 20  # of a box, in pixels at that width
    config.proposals.max_windows = 2000  # of an image
    config.proposals.workers = 0  # threads that search; 0: one for each core
    config.proposals.file = ""  # of method "file": .npz, or VOC's .mat; see the README
    config.proposals.test_file = ""  # the same for the test split; "": the same file
    config.proposals.model = ""  # of method "edge_boxes": its model file

    config.scales = (688,)  # shorter sides; (480, 576, 688, 864, 1200) for five
    config.window_side = 0  # a window's scale brings its area closest to this squared;
    # 0: the side that the network was trained at
    config.rule = "paper"  # box to window: paper, or closest
    config.buckets = 4  # compiled programs for each scale, at most
    config.batch_size = 16  # images of the training size that are convolved at a time
    config.maps_dtype = "float32"  # on disk; float16 halves it
    config.context = -1  # of system "rcnn", in pixels; -1: 16 of 227, in proportion

    config.finetune = ConfigDict()
    config.finetune.steps = 300_000  # 0: none
    config.finetune.batch_size = 128  # windows, over all devices
    config.finetune.images = 8  # that a batch's windows are from
    config.finetune.positives = 0.25  # the share of windows on objects
    config.finetune.positive_overlap = 0.5  # at least this with an object
    config.finetune.negative_overlap = (0.1, 0.5)  # from the first to below the second
    config.finetune.learning_rate = 1e-4
    config.finetune.drop_steps = (250_000,)
    config.finetune.drop_factor = 10.0
    config.finetune.momentum = 0.9
    config.finetune.weight_decay = 5e-4
    config.finetune.dropout = 0.5
    config.finetune.checkpoint_steps = 500
    config.finetune.memory_gb = 4.0  # of pooled windows kept for later steps

    config.scorer = "svm"  # or softmax, the fine-tuned fc8
    config.layer = "fc7"  # that the SVMs see: pyramid, fc6, fc7
    config.svm = ConfigDict()
    config.svm.C = 1e-3
    config.svm.bias_multiplier = 10.0
    config.svm.positive_weight = 2.0
    config.svm.feature_norm = 20.0  # features are scaled to this mean length
    config.svm.negative_overlap = 0.3  # at most this with the class's objects
    config.svm.thinning = 0.7  # a negative that overlaps another by more is dropped
    config.svm.max_rounds = 3  # of hard-negative mining; the release's one pass over
    # the images trains the SVMs again and again on the way
    config.svm.initial_per_image = 5  # negatives at random, for each class
    config.svm.max_rows = 100_000  # negatives in memory, of all classes together
    config.svm.hard_per_image = 50  # at most, for each class and round

    config.regression = ConfigDict()
    config.regression.enabled = True
    config.regression.overlap = 0.5  # at least this with an object
    config.regression.ridge = 4000.0
    config.regression.max_examples = 20_000  # drawn at random if there are more

    config.fc_rank = (0, 0)  # of fc6 and fc7, truncated by SVD at test; 0: whole

    config.test = ConfigDict()
    config.test.nms = 0.3
    config.test.max_per_class = 100  # detections of an image
    return config


def check_detection_config(config: ConfigDict) -> None:
    """Raises ValueError with the valid values for a setting that can't work.

    It needs no data and no device: mistakes are found before anything is loaded.
    """
    if "proposals" not in config and "model" in config:
        raise ValueError(
            "this is the config of a classifier; a detector's is one such as "
            "configs/detect_folder.py, and its --workdir one of its own"
        )
    check_fields(config, detection_base_config(), "config")
    one_of(config, "system", SYSTEMS)
    one_of(config, "proposals.method", METHODS)
    one_of(config, "rule", RULES)
    one_of(config, "maps_dtype", DTYPES)
    one_of(config, "scorer", SCORERS)
    one_of(config, "layer", LAYERS)
    for name in (
        "seed",
        "proposals.width",
        "proposals.min_side",
        "proposals.workers",
        "window_side",
        "finetune.steps",
        "finetune.learning_rate",
        "finetune.momentum",
        "finetune.weight_decay",
        "finetune.dropout",
        "finetune.checkpoint_steps",
        "finetune.memory_gb",
        "svm.max_rounds",
        "svm.thinning",
        "svm.negative_overlap",
        "regression.ridge",
        "test.nms",
    ):
        at_least(config, name, 0)
    for name in (
        "data.threads",
        "proposals.max_windows",
        "buckets",
        "batch_size",
        "finetune.batch_size",
        "finetune.images",
        "finetune.drop_factor",
        "svm.initial_per_image",
        "svm.hard_per_image",
        "svm.max_rows",
        "regression.max_examples",
        "test.max_per_class",
    ):
        at_least(config, name, 1)
    for name in (
        "svm.C",
        "svm.bias_multiplier",
        "svm.positive_weight",
        "svm.feature_norm",
        "finetune.positive_overlap",
        "regression.overlap",
    ):
        at_least(config, name, 0, strictly=True)
    _check_together(config)


def _check_together(config: ConfigDict) -> None:
    if not config.network:
        raise ValueError(
            "give the workdir of a trained classifier: --config.network=runs/NAME"
        )
    if not config.scales or min(config.scales) < 1:
        raise ValueError(
            "config.scales must be the images' shorter sides in pixels, such as "
            f"(688,), got {tuple(config.scales)}"
        )
    if len(set(config.scales)) < len(config.scales):
        raise ValueError(f"config.scales has a side twice: {tuple(config.scales)}")
    if not 0 < config.finetune.positives < 1:
        raise ValueError(
            f"config.finetune.positives must be in (0, 1), got "
            f"{config.finetune.positives}"
        )
    for name in (
        "finetune.positive_overlap",
        "svm.negative_overlap",
        "svm.thinning",
        "regression.overlap",
        "test.nms",
    ):
        group, field = name.split(".")
        if config[group][field] > 1:
            raise ValueError(
                f"config.{name} is an overlap (IoU), at most 1, got "
                f"{config[group][field]}"
            )
    low, high = config.finetune.negative_overlap
    if config.finetune.positive_overlap < high:
        raise ValueError(
            f"config.finetune.positive_overlap, {config.finetune.positive_overlap}, "
            f"must be at least the upper negative_overlap, {high}: a box would be both"
        )
    if not 0 <= low < high <= 1:
        raise ValueError(
            "config.finetune.negative_overlap must be (low, high) with 0 ≤ low < high "
            f"≤ 1, got {(low, high)}"
        )
    if not 0 <= config.finetune.dropout < 1:
        raise ValueError(
            f"config.finetune.dropout must be in [0, 1), got {config.finetune.dropout}"
        )
    if config.scorer == "softmax" and not config.finetune.steps:
        raise ValueError(
            "config.scorer='softmax' is the fc8 that fine-tuning makes, but "
            "config.finetune.steps is 0: fine-tune, or use scorer 'svm'"
        )
    if config.data.name == "voc_folder" and not config.data.root:
        raise ValueError("give the folder in VOC layout: --config.data.root=FOLDER")
    if config.proposals.method == "file" and not config.proposals.file:
        raise ValueError("give the file of boxes: --config.proposals.file=FILE")
    if config.proposals.method == "edge_boxes" and not config.proposals.model:
        raise ValueError(
            "EdgeBoxes needs its structured-edge model: --config.proposals.model="
            "model.yml.gz (opencv_extra has it)"
        )
    if len(config.fc_rank) != 2 or min(config.fc_rank) < 0:
        raise ValueError(
            "config.fc_rank must be the ranks of fc6 and fc7, 0 for whole, got "
            f"{tuple(config.fc_rank)}"
        )
