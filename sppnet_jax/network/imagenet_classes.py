"""The 1,000 classes of ImageNet's challenge, as pretrained networks number them."""

# The words are WordNet 3.0's. WordNet 3.0 Copyright 2006 by Princeton University. All
# rights reserved. https://wordnet.princeton.edu/license-and-commercial-use

import collections
import functools
from importlib import resources
from typing import NamedTuple


class ImageNetClass(NamedTuple):
    """A class: its synset "n01440764", and its words "tench, Tinca tinca"."""

    wordnet_id: str
    words: str


@functools.cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The classes in the order of a network's 1,000 logits, by ascending WordNet id."""
    file = resources.files("sppnet_jax.network") / "imagenet_classes.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(ImageNetClass(*line.split(" ", 1)) for line in lines)


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """A short name of each class, no two alike: its first word where that will do."""
    choices = [
        (one.words.split(",")[0], one.words, f"{one.words} ({one.wordnet_id})")
        for one in imagenet_classes()
    ]
    counts = [collections.Counter(names) for names in zip(*choices, strict=True)]
    return tuple(
        next(own for own, count in zip(names, counts, strict=True) if count[own] == 1)
        for names in choices
    )
