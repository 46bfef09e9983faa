"""Settings: every field of every group is checked, and every config can be read."""

import functools
import json
import math
from typing import Annotated, NamedTuple, get_args, get_origin

import numpy as np
import pytest

from configs import (
    detect_digits,
    detect_folder,
    detect_pretrained,
    detect_voc,
    digits,
    folder,
    folder_pretrained,
    imagenet,
)
from sppnet_jax.detection.detector_settings import DetectorSettings, detector_settings
from sppnet_jax.network.trunks import BACKBONES
from sppnet_jax.run.settings import (
    MOVED,
    Valid,
    above,
    at_least,
    at_new_names,
    between,
    fields_of,
    one_of,
    plain,
    read,
    share,
    unknown_field,
)
from sppnet_jax.training.network_settings import NetworkSettings, network_settings

KINDS = {"network": NetworkSettings, "detector": DetectorSettings}
FIELDS = [
    pytest.param(kind, name, hint, id=f"{which}-{name}")
    for which, kind in KINDS.items()
    for name, hint in fields_of(kind)
]
# What can't be meant, by the type of a field.
WRONG = {
    int: [None, "3", 1.5, True, (1,), {}],
    float: [None, "0.5", math.nan, math.inf, -math.inf, False, [0.5]],
    bool: [None, 1, 0.0, "True", []],
    str: [None, 3, True, ["a"]],
    tuple: [None, 3, "(1, 2)", {}, [None], [[1, 2]], [math.nan, math.nan]],
}


class Group(NamedTuple):
    part: Annotated[float, share()] = 0.5
    count: Annotated[int, at_least(1)] = 1
    rate: Annotated[float, above(0)] = 0.1
    kind: Annotated[str, one_of(("one", "other"))] = "one"
    sides: tuple[Annotated[int, at_least(2)], ...] = ()
    either: int | str = 3


class Whole(NamedTuple):
    group: Group = Group()
    seed: Annotated[int, between(0, 10)] = 0

    def check(self) -> None:
        if self.seed > self.group.count:
            raise ValueError("more seeds than counts")


def nested(name, value):
    """{"a": {"b": value}} of a dotted name."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def type_of(hint):
    """The plain type of a field, and its valid values."""
    valid = Valid()
    if get_origin(hint) is Annotated:
        hint, valid = get_args(hint)
    return (tuple if get_origin(hint) is tuple else hint), valid


@pytest.mark.parametrize(("kind", "name", "hint"), FIELDS)
def test_every_field_refuses_what_can_not_be_meant_and_is_named(kind, name, hint):
    of_type, valid = type_of(hint)
    wrong = list(WRONG[of_type])
    if math.isfinite(valid.low):
        low = of_type(valid.low)
        wrong += [low - 1] if valid.low_in else [low, low - 1]
    if math.isfinite(valid.high):
        high = of_type(valid.high)
        wrong += [high + 1] if valid.high_in else [high, high + 1]
    wrong += ["?"] if valid.choices else []
    for value in wrong:
        with pytest.raises(ValueError, match=rf"config\.{name}\b"):
            read(kind, nested(name, value))


# What users have tried, and worse.
ANYTHING = [
    *(None, "text", "", True, -1, 0, -0.5, 0.0, math.nan, math.inf, -math.inf),
    *(1e300, 1e-300, 2**31, 2**63, 10**400, [], {}, (), (1,), (0,), (-1,), (1.5,)),
    *((1,) * 9, ("a", "b"), (None,), (math.nan,), ((1,),), ("text",), ("uniform", 0)),
]


@pytest.mark.parametrize(("kind", "name", "hint"), FIELDS)
def test_anything_at_all_is_a_valid_setting_or_told_with_its_name(kind, name, hint):
    """And what is valid is so again when it is read from a run's folder."""
    whole = plain(kind(network="runs/x") if kind is DetectorSettings else kind())
    *groups, last = name.split(".")
    group = functools.reduce(dict.get, groups, whole)
    told = "config.model, at|" * (groups == ["model"]) + f"config.{name}"
    for value in ANYTHING:
        group[last] = value
        try:
            settings = read(kind, whole)
        except ValueError:
            with pytest.raises(ValueError, match=told):
                read(kind, whole)
        else:
            assert read(kind, json.loads(json.dumps(plain(settings)))) == settings


@pytest.mark.parametrize(("kind", "name", "hint"), FIELDS)
def test_every_number_s_range_is_stated_but_of_those_that_may_be_any(kind, name, hint):
    of_type, valid = type_of(hint)
    if of_type in (int, float):
        assert valid != Valid() or name in ("inputs.mean", "svm.hard_score")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", 0), ("batch_size", 0), ("seed", -1), ("seed", 2**32)),
        *(("model.dropout", 1.0), ("model.width", 0.0), ("model.levels", (0,))),
        *(("schedule.learning_rate", -0.1), ("optimizer.momentum", 1.0)),
        *(("optimizer.weight_decay", -1e-4), ("optimizer.label_smoothing", 1.5)),
        *(("data.threads", 0), ("data.workers", -1), ("data.min_area", 0.0)),
        *(("inputs.scale", 0.0), ("keep_checkpoints", 0), ("inputs.scale", 1e-50)),
        *(("model.width", 1e9), ("batch_size", 2**31), ("data.resize_side", 2**16)),
        *(("data.train_split", ""), ("data.workers", 10**6)),
    ],
)
def test_values_at_the_edge_of_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read(NetworkSettings, nested(name, value))


@pytest.mark.parametrize(
    "config",
    [
        *(digits.get_config(), folder.get_config(), folder_pretrained.get_config()),
        *(
            imagenet.get_config(f"{backbone},{recipe}")
            for backbone, own in BACKBONES.items()
            for recipe in ("spp", "spp30", "spp_multi", "spp_uniform", "no_spp")
            if own.last_pool or recipe != "no_spp"
        ),
    ],
)
def test_every_network_s_config_is_whole_and_valid(config):
    config.data.root = "photos"
    settings = read(NetworkSettings, config.to_dict())
    assert read(NetworkSettings, json.loads(json.dumps(plain(settings)))) == settings
    assert plain(settings).keys() == config.to_dict().keys()


@pytest.mark.parametrize(
    "config",
    [
        *(detect_digits.get_config(), detect_folder.get_config()),
        detect_pretrained.get_config(),
        *(detect_voc.get_config(scales) for scales in ("1", "5")),
    ],
)
def test_every_detector_s_config_is_whole_and_valid(config):
    config.data.root, config.network = "photos", "runs/network"
    settings = read(DetectorSettings, config.to_dict())
    assert read(DetectorSettings, json.loads(json.dumps(plain(settings)))) == settings
    assert plain(settings).keys() == config.to_dict().keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group": {"part": 1.5}}, "c.group.part must be at least 0 and at most 1"),
        ({"group": {"count": 0}}, "c.group.count must be at least 1, got 0"),
        ({"group": {"rate": 0}}, "c.group.rate must be more than 0, got 0.0"),
        ({"seed": 10}, "c.seed must be at least 0 and less than 10, got 10"),
        ({"group": {"kind": "on"}}, r"one of one, other \(did you mean 'one'\?\)"),
        ({"group": {"sides": [2, 1]}}, "each part of c.group.sides must be at least 2"),
        ({"group": {"either": 1.0}}, "c.group.either must be a whole number or text"),
        ({"group": 3}, "c.group is a group of settings, c.group.part, c.group.count"),
        ({"grup": {}}, "unknown field 'grup': c has the fields group, seed"),
        ({"seed": 3}, "more seeds than counts"),
    ],
)
def test_errors_say_what_was_seen_and_what_is_valid(values, message):
    with pytest.raises(ValueError, match=message):
        read(Whole, values, "c")


def test_plain_values_become_those_that_are_meant():
    values = {"group": {"part": 1, "count": np.int64(4), "sides": [3, 2]}, "seed": 2}
    settings = read(Whole, values)
    assert settings == Whole(Group(part=1.0, count=4, sides=(3, 2)), seed=2)
    assert type(settings.group.part) is float
    assert type(settings.group.count) is int
    assert read(Whole, {}) == Whole()
    assert plain(Whole())["group"]["kind"] == "one"


def test_names_of_before_are_answered_with_the_new_ones():
    known = dict(fields_of(NetworkSettings))
    for old, new in MOVED.items():
        assert new in known
        if old != "schedule":
            told = f"unknown field {old!r}: it is now config.{new}"
            assert unknown_field(NetworkSettings, old) == told
    assert (
        "is a group of settings: set one of schedule.learning_rate, schedule.kind"
        in unknown_field(NetworkSettings, "schedule")
    )
    assert unknown_field(NetworkSettings, "schedule.kind") == ""
    told = unknown_field(NetworkSettings, "data.image_sice")
    assert told.endswith("did you mean data.image_size?")


def test_a_run_of_before_is_read_with_its_settings_at_their_new_names(tmp_path):
    old = {
        **{"seed": 3, "epochs": 2, "batch_size": 8, "schedule": "cosine"},
        **{"learning_rate": 0.02, "warmup_epochs": 0.5, "momentum": 0.8},
        **{"nesterov": True, "mean": 128.0, "scale": 64.0, "color_sigma": 0.0},
        "model": {"backbone": "zf5", "levels": [2, 1], "width": 0.1},
        "data": {"name": "imagenet2012"},
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    settings = network_settings(tmp_path)
    assert settings.schedule.kind == "cosine"
    assert settings.schedule.learning_rate == 0.02
    assert settings.optimizer.momentum == 0.8
    assert settings.optimizer.nesterov
    assert (settings.inputs.mean, settings.inputs.scale) == (128.0, 64.0)
    assert settings.model.levels == (2, 1)
    assert at_new_names(plain(settings)) == plain(settings)


def test_a_folder_of_the_other_kind_is_named(tmp_path):
    for name, settings in {
        "network": plain(NetworkSettings()),
        "detector": plain(DetectorSettings(network="runs/network")),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="detector holds a detector, no network"):
        network_settings(tmp_path / "detector")
    with pytest.raises(ValueError, match="network holds a trained classifier"):
        detector_settings(tmp_path / "network")
