"""Trains the same network with different pyramids and tells what each is worth.

    from sppnet_jax.ablation import ablate, ablation_table, plot_ablation

    rows = ablate([(6, 3, 2, 1), (1,), None], seeds=(0, 1), epochs=4)
    pandas.DataFrame(rows)  # or ablation_table(rows), plot_ablation(rows)

Each network has a folder of its own, below one that is named after the settings that
all share. So a cell that is run again trains only what is new in it, and goes on where
it was interrupted; and no setting can be mistaken for another.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sppnet_jax.network.model import HEAD_ONLY
from sppnet_jax.pyramid.pooling import check_levels, num_bins
from sppnet_jax.run.settings import plain, read, unknown_field
from sppnet_jax.training.network_settings import NetworkSettings, published_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sppnet_jax.data.sources import Source

Levels = tuple[int, ...] | None
PYRAMIDS = ((6, 3, 2, 1), (4, 3, 2, 1), (1,), None)
FEATURES = "features"  # the folder of what a frozen trunk gives

_NOT_HERE = {
    "seed": "give seeds=(0, 1)",
    "model.levels": "give the pyramids as levels=[(6, 3, 2, 1), (1,), None]",
    "max_steps": "only finished networks can be compared: give epochs",
}


class AblationRow(NamedTuple):
    """One network of an ablation; many make a tidy table.

    `levels`: its pyramid, None for the twin without SPP. `seed`: of its weights and of
    the order of its data. `bins`: what the last map is pooled into, for each channel.
    `fc6_inputs`: the length of the pooled vector. `fc6_parameters`: weights and biases.
    `top1`: the share of the tested images that it names right, 0 to 1; None where the
    training diverged. `images`: how many were tested. `seconds`: of training, with
    compiling and the tests after each epoch; what was killed on the way is not in it.
    `diverged`: why there is no result, else "". `workdir`: the network's folder.
    """

    levels: Levels
    seed: int
    bins: int
    fc6_inputs: int
    fc6_parameters: int
    top1: float | None
    images: int
    seconds: float
    diverged: str
    workdir: str


def ablate(
    levels: Sequence[Sequence[int] | None] = PYRAMIDS,
    seeds: Sequence[int] = (0, 1),
    *,
    config: ConfigDict | None = None,
    folder: str | Path = "runs/ablation",
    protocol: str = "",
    trunk: str = "",
    root: str = "",
    **settings: Any,
) -> list[AblationRow]:
    """Trains and tests a network for each pyramid and seed, unless that is done.

    `levels`: the pyramids; None, or (), is the twin without SPP, of which a frozen
    trunk has none.
    `seeds`: of the networks that each pyramid gets; whole numbers from 0 on.
    `config`: all other settings, from the `get_config` of any config file; the
    default, `small_config`, trains on the embedded digit scenes.
    `folder`: where the networks are kept. Other settings or other data make other
    networks beside those that are there.
    `protocol`: how they are tested, by default "single" (the centre crop), or another
    of `sppnet_jax.evaluate`.
    `trunk`: a published network such as "efficientnet_lite0" below every pyramid,
    frozen, with linear heads on what it gives; each image goes through it once for all
    pyramids and seeds, and tests see images as the training does. `root`: the folder of
    class folders that it sees; the default config is then `trunk_config`.
    `settings`: fields of the config that are to be others, `epochs=8`,
    `model={"width": 0.25}` or `**{"model.width": 0.25}`.

    It goes seed by seed, so that an interrupted ablation has compared all pyramids at
    some. One network's training may diverge: its row says why, and the others go on.

    Returns: a row for each network, by pyramid and then by seed, in the order given.
    Raises: ValueError for pyramids, seeds or settings that can't work, before any
    training; KeyboardInterrupt after one was interrupted and saved.
    """
    if config is None:
        config = trunk_config(trunk, root) if trunk else small_config()
    elif trunk or root:
        raise ValueError("give a config, or a trunk and its root: not both")
    shared = _changed(config, settings)
    frozen = shared.model.trainable == HEAD_ONLY
    if frozen and levels is PYRAMIDS:
        levels = [one for one in PYRAMIDS if one]
    pyramids, seeds = _check_pyramids(levels), _check_seeds(seeds)
    if frozen and protocol:
        raise ValueError(
            "networks with a frozen trunk are tested as they are trained, by "
            f"config.data.view: leave out protocol={protocol!r}"
        )
    protocol = protocol or "single"
    _check_protocol(protocol, pyramids)
    wanted = {
        (pyramid, seed): _one_network(shared, pyramid, seed)
        for seed in seeds
        for pyramid in pyramids
    }

    # Here, not above: a mistake in the arguments should show before these are loaded.
    from sppnet_jax.data.datasets import open_split
    from sppnet_jax.run import caches, files, parallel

    parallel.check_batch_size(shared.batch_size)
    caches.use_compilation_cache()  # the seeds of a pyramid compile the same programs
    train, test = (open_split(shared.data, name) for name in ("train", "test"))
    below = Path(folder).expanduser() / _digest(shared, train, test)
    try:
        files.check_folder(below)
    except OSError as error:
        raise ValueError(f"networks can't be kept in {folder}: {error}") from error
    if frozen:
        from sppnet_jax.training.networks import pool_all

        union = tuple(sorted({n for p in pyramids for n in p or ()}, reverse=True))
        everything = _one_network(shared, union, seeds[0])
        sources = [train, open_split(shared.data, "validation"), test]
        pool_all(everything, sources, below.parent / FEATURES)
    rows = {}
    for number, ((pyramid, seed), one) in enumerate(wanted.items(), start=1):
        name = f"{'-'.join(map(str, pyramid or ())) or 'no_spp'}_seed{seed}"
        title = f"network {number} of {len(wanted)}: {label(pyramid)}, seed {seed}"
        row = _network(one, pyramid, below / name, (train, test), protocol, title)
        rows[pyramid, seed] = row
    return [rows[pyramid, seed] for pyramid in pyramids for seed in seeds]


def small_config() -> ConfigDict:
    """A setting that trains in half a minute: configs/digits.py, made small.

    A ZF-5 of 1/12 width sees the centre of each embedded digit scene three times:
    enough to learn from, not for the best accuracy. At its 64 pixels the last map has
    3×3 cells, so the twin without SPP pools it into one bin, as (1,) does.
    """
    config = ConfigDict(plain(NetworkSettings()))
    config.epochs = 3
    config.batch_size = 32
    config.model.width = 1 / 12
    config.model.dropout = 0.0
    config.model.weight_init = "he"
    config.data.name = "digit_scenes/classification"
    config.data.image_size = 64
    config.data.resize_side = 72
    config.data.crop = "center"
    config.data.flip = False  # a mirrored digit is no digit
    config.inputs.scale = 64.0
    config.inputs.color_sigma = 0.0
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 0.3
    config.schedule.learning_rate = 0.03
    config.optimizer.nesterov = True
    config.log_steps = 10
    config.keep_checkpoints = 1
    return config


def trunk_config(trunk: str, root: str) -> ConfigDict:
    """A setting of linear heads on a frozen trunk: configs/folder_pretrained.py's.

    `root`: the folder of class folders.
    """
    settings = published_settings(trunk)
    config = ConfigDict(plain(settings))
    config.epochs = 30
    config.batch_size = 64
    config.model.trainable = HEAD_ONLY
    config.model.head = "linear"
    config.data.name = "image_folder"
    config.data.root = root
    config.data.resize_side = 256
    config.data.flip = False
    config.schedule.learning_rate = 0.02
    config.schedule.kind = "cosine"
    config.optimizer.nesterov = True
    config.log_steps = 10
    config.keep_checkpoints = 1
    return config


def label(levels: Levels) -> str:
    """A pyramid in the paper's words: {6,3,2,1}, or no SPP."""
    return f"{{{','.join(map(str, levels))}}}" if levels else "no SPP"


class Table(str):
    """A table in Markdown: text to print, and a table where a notebook shows it."""

    def _repr_markdown_(self) -> str:
        return str(self)


def ablation_table(rows: Sequence[AblationRow]) -> Table:
    """A line for each pyramid, in the order of the rows; mean ± sd over its seeds.

    The standard deviation is that of a sample; a single seed has none.

    Returns: Markdown, which a notebook shows as a table.
    Raises: ValueError without a row.
    """
    lines = [
        "| pyramid | bins | fc6's input | fc6's parameters | top-1 in % | networks "
        "| seconds of training |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for levels, group in _by_levels(rows).items():
        first, seconds = group[0], np.mean([row.seconds for row in group])
        cells = [
            label(levels),
            *(f"{n:,}" for n in (first.bins, first.fc6_inputs, first.fc6_parameters)),
            _mean_and_spread(_accuracies(group)),
            _count(group),
            f"{seconds:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return Table("\n".join(lines) + "\n")


def plot_ablation(rows: Sequence[AblationRow]) -> "Figure":
    """Draws top-1 accuracy over fc6's parameters: every network, each pyramid's mean.

    A bar is the standard deviation over the seeds. A pyramid whose trainings all
    diverged is named below the axis.

    Returns: a figure, which a notebook shows; `figure.savefig` writes it.
    Raises: ValueError without a row.
    """
    # Here, not above: a training has no need of it.
    import matplotlib.ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lost = []
    for levels, group in _by_levels(rows).items():
        shares = 100 * np.array(_accuracies(group))
        if not len(shares):
            lost.append(label(levels))
            continue
        size = group[0].fc6_parameters
        axes.plot([size] * len(shares), shares, "o", color="0.65", markersize=5)
        spread = shares.std(ddof=1) if len(shares) > 1 else 0.0
        color, marker = ("C0", "o") if levels else ("C1", "D")
        axes.errorbar(
            size, shares.mean(), spread, fmt=marker, color=color, capsize=4, ms=8
        )
        axes.annotate(
            f"{label(levels)}\n{_bins(group[0].bins)}",
            (size, shares.mean()),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.margins(x=0.25, y=0.15)
    missing = f"\ndiverged: {', '.join(lost)}" if lost else ""
    axes.set_xlabel(f"parameters of fc6{missing}")
    axes.set_ylabel("top-1 accuracy in %")
    axes.set_title("gray: single networks; mean ± sd over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _network(
    settings: NetworkSettings,
    levels: Levels,
    workdir: Path,
    sources: tuple["Source", "Source"],
    protocol: str,
    title: str,
) -> AblationRow:
    """The row of one network, trained and tested if that was not done before."""
    frozen = settings.model.trainable == HEAD_ONLY
    features = workdir.parent.parent / FEATURES if frozen else None
    from sppnet_jax.classification.evaluation import evaluate_once
    from sppnet_jax.run import run_folder
    from sppnet_jax.run.files import write_json
    from sppnet_jax.training import once
    from sppnet_jax.training.networks import head_accuracy
    from sppnet_jax.training.step_log import DivergedError

    result = workdir / f"ablation_{protocol}.json"
    reason, report = "", dict[str, Any](top1=None, count=0)
    known = result.exists() or (workdir / once.DIVERGED).exists()
    if not known:
        _say(title)
    try:
        if not result.exists():
            once.train_once(settings, workdir, features)
        if features is None:
            report = evaluate_once([workdir], protocol, result)
        elif result.exists():
            report = run_folder.read_json(result)
        else:
            report = head_accuracy(settings, workdir, sources[1], features)
            write_json(result, report)
    except DivergedError as error:
        reason = str(error)
    if not known:
        _say(f"  diverged: {reason}" if reason else f"  top-1 {report['top1']:.1%}")
    inputs, parameters, channels = _fc6(settings, len(sources[0].class_names))
    return AblationRow(
        levels=levels,
        seed=settings.seed,
        bins=inputs // channels,
        fc6_inputs=inputs,
        fc6_parameters=parameters,
        top1=report["top1"],
        images=report["count"],
        seconds=once.training_seconds(workdir),
        diverged=reason,
        workdir=str(workdir),
    )


def _fc6(settings: NetworkSettings, num_classes: int) -> tuple[int, int, int]:
    """What the head's first layer takes and its parameters; the map's channels."""
    from sppnet_jax.network.model import make_model, param_shapes

    model = make_model(settings.model, num_classes, settings.data.image_size)
    shapes = param_shapes(model)
    first = shapes.get("fc6", shapes["fc8"])  # a linear head is fc8 alone
    kernel, bias = first["kernel"], first["bias"]
    # Without a pyramid as many bins as the last pooling leaves.
    bins = num_bins(model.levels) if model.levels else _last_bins(model)
    return kernel.shape[0], kernel.size + bias.size, kernel.shape[0] // bins


def _last_bins(model: Any) -> int:
    from sppnet_jax.network.stack import table_geometry

    last = table_geometry((*model.table, model.backbone.last_pool))
    return last.map_size(model.image_size) ** 2


def _say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _one_network(
    shared: NetworkSettings, pyramid: Levels, seed: int
) -> NetworkSettings:
    """The settings of one network, checked."""
    model = shared.model._replace(levels=pyramid or ())
    return read(NetworkSettings, plain(shared._replace(seed=seed, model=model)))


def _digest(settings: NetworkSettings, train: "Source", test: "Source") -> str:
    """Eight letters for all that the networks of an ablation have in common."""
    from sppnet_jax.training.once import deciding

    told = {n: value for n, value in deciding(settings).items() if n not in _NOT_HERE}
    splits = [
        (source.name, source.split, source.class_names, source.digest)
        for source in (train, test)
    ]
    text = json.dumps([told, splits], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _named(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of dicts in dicts, by its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> NetworkSettings:
    """The settings of a config with other values of some fields."""
    if not isinstance(config, ConfigDict):
        raise ValueError(
            "config must be a ConfigDict, such as small_config() or a config file's "
            f"get_config() returns, got {config!r}"
        )
    values = config.to_dict()
    for path, value in _named(changes):
        if path in _NOT_HERE:
            raise ValueError(f"{path}={value!r} can't be given here: {_NOT_HERE[path]}")
        fault = unknown_field(NetworkSettings, path)
        if fault:
            raise ValueError(fault)
        *groups, name = path.split(".")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[name] = value
    settings = read(NetworkSettings, values)
    if settings.max_steps:
        raise ValueError(
            f"config.max_steps is {settings.max_steps}: set it to 0, since "
            f"{_NOT_HERE['max_steps']}"
        )
    return settings


def _check_pyramids(levels: Sequence[Sequence[int] | None]) -> list[Levels]:
    listed = isinstance(levels, Sequence) and not isinstance(levels, str)
    if not listed or not levels or any(isinstance(one, int) for one in levels):
        raise ValueError(
            "levels must be a list of pyramids such as [(6, 3, 2, 1), (1,), None], got "
            f"{levels!r}"
        )
    pyramids = [
        None if one is None or not len(one) else check_levels(one) for one in levels
    ]
    _check_distinct("levels", pyramids)
    return pyramids


def _check_seeds(seeds: Sequence[int]) -> list[int]:
    if isinstance(seeds, int | str) or not len(seeds):
        raise ValueError(
            f"seeds must be a list such as (0, 1) or range(3), got {seeds!r}"
        )
    whole = [isinstance(s, int | np.integer) and not isinstance(s, bool) for s in seeds]
    if not all(whole) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(
            f"seeds must be whole numbers from 0 to 2**32 − 1, got {tuple(seeds)!r}"
        )
    _check_distinct("seeds", seeds)
    return [int(seed) for seed in seeds]


def _check_distinct(name: str, values: Sequence[Any]) -> None:
    twice = [value for k, value in enumerate(values) if value in values[:k]]
    if twice:
        raise ValueError(f"{name} holds {twice[0]!r} twice: each network is made once")


def _check_protocol(protocol: str, pyramids: Sequence[Levels]) -> None:
    from sppnet_jax.classification import views

    if protocol not in views.NAMES:
        raise ValueError(
            f"unknown protocol {protocol!r}: choose from {', '.join(views.NAMES)}"
        )
    if None in pyramids and protocol not in views.ON_CROPS:
        raise ValueError(
            f"a network without SPP (None) can't be tested with {protocol!r}, which "
            "pools from maps of any size: leave it out of levels, or use protocol="
            f"{' or '.join(map(repr, views.ON_CROPS))}"
        )


def _by_levels(rows: Sequence[AblationRow]) -> dict[Levels, list[AblationRow]]:
    if not rows:
        raise ValueError("there is no row to show: give what ablate returned")
    groups: dict[Levels, list[AblationRow]] = {}
    for row in rows:
        groups.setdefault(row.levels, []).append(row)
    return groups


def _accuracies(group: Sequence[AblationRow]) -> list[float]:
    return [row.top1 for row in group if row.top1 is not None]


def _count(group: Sequence[AblationRow]) -> str:
    lost = sum(row.top1 is None for row in group)
    return f"{len(group)} ({lost} diverged)" if lost else f"{len(group)}"


def _mean_and_spread(shares: Sequence[float]) -> str:
    if not shares:
        return "–"
    mean = f"{100 * np.mean(shares):.1f}"
    return mean if len(shares) < 2 else f"{mean} ± {100 * np.std(shares, ddof=1):.1f}"


def _bins(count: int) -> str:
    return f"{count} bin{'s' * (count > 1)}"


def _short(value: float, _: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
