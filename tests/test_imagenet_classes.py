"""ImageNet's classes are in the order in which pretrained networks number them."""

from importlib import resources

from sppnet_jax.network.imagenet_classes import imagenet_classes


def test_the_classes_are_those_of_tensorflow_datasets_in_its_order():
    folder = resources.files("tensorflow_datasets") / "datasets" / "imagenet2012"
    theirs = (folder / "labels.txt").read_text().split()
    assert [one.wordnet_id for one in imagenet_classes()] == theirs


def test_there_are_1000_distinct_classes_by_ascending_id():
    ids = [one.wordnet_id for one in imagenet_classes()]
    assert len(set(ids)) == 1000
    assert ids == sorted(ids)


def test_the_words_are_those_of_their_numbers():
    classes = imagenet_classes()
    assert classes[0] == ("n01440764", "tench, Tinca tinca")
    assert classes[281].words == "tabby, tabby cat"
    assert classes[999].words.startswith("toilet tissue")
    assert all(one.words.strip() == one.words != "" for one in classes)
