"""Which class of the weights a class of the data is: by name, by WordNet id, by number, or refused."""

import pytest

from beitv2_jax.errors import UserError
from beitv2_jax.evaluation.classes import imagenet_ids, match_classes, read_class_names

NUMBERS = tuple(map(str, range(1000)))


@pytest.mark.parametrize(
    ("names", "data_names", "numbers", "said"),
    [
        (("cat", "dog"), ("cat", "dog"), [0, 1], "same order"),
        (("cat", "dog"), ("dog", "cat"), [1, 0], "another order"),
        (("ant", "cat", "dog"), ("dog", "ant"), [2, 0], "among the 3 of the weights"),
        (NUMBERS[:2], ("cat", "dog"), [0, 1], "do not name their classes"),
        (NUMBERS, ("n01440764", "n01443537", "n15075141"), [0, 1, 999], "WordNet ids"),
        (("tench", "goldfish", *NUMBERS[2:]), ("n01443537",), [1], "WordNet ids"),
    ],
)
def test_classes_are_found(names, data_names, numbers, said):
    found = match_classes(names, data_names)
    assert found.numbers.tolist() == numbers and said in found.stated
    assert [found.names[number] for number in numbers] == list(data_names)


def test_other_classes_keep_the_names_that_the_weights_have():
    assert match_classes(("tench", "goldfish", *NUMBERS[2:]), ("n01443537",)).names[0] == "tench"
    assert match_classes(NUMBERS, ("n01443537",)).names[0] == "n01440764"
    assert imagenet_ids() == tuple(sorted(set(imagenet_ids()))) and len(imagenet_ids()) == 1000


@pytest.mark.parametrize(
    ("names", "data_names", "said"),
    [
        (("cat", "dog"), ("cat", "dogs"), "Did you mean the class 'dog'"),
        (NUMBERS[:3], ("cat", "dog"), "2 of 2 classes of the data"),
        (NUMBERS, ("n01440764", "n99999999"), "2 of 2 classes of the data"),
        (("crane", "ant", "crane"), ("crane",), "2 classes called 'crane'"),
    ],
)
def test_classes_that_are_not_found_are_refused(names, data_names, said):
    with pytest.raises(UserError) as raised:
        match_classes(names, data_names)
    assert said in str(raised.value) and "--classes=FILE" in str(raised.value)


def test_names_in_a_file(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\nsea urchin\n")
    assert read_class_names(str(tmp_path / "labels.txt"), 2) == ("cat", "sea urchin")
    with pytest.raises(UserError, match="has 2 lines, and the weights have 3 classes"):
        read_class_names(str(tmp_path / "labels.txt"), 3)
    with pytest.raises(UserError, match="no file"):
        read_class_names(str(tmp_path / "x.txt"), 3)
