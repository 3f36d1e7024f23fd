"""Every error about the classes of an evaluation, its pictures and files of features: provoked, its advice followed."""

import pytest
from user_errors import check_all_provoked, flag, provoked

from beitv2_jax import embed
from beitv2_jax.evaluation.classes import match_classes, read_class_names
from beitv2_jax.evaluation.features import held_out
from beitv2_jax.report import evaluation


def test_a_training_split_without_an_image_to_hold_out():
    with provoked("Write a --config.data.source of at least two training images"):
        held_out(1, 0.1, 0)
    assert [images.tolist() for images in held_out(2, 0.9, 0)] in ([[0], [1]], [[1], [0]])


def test_files_of_class_names(tmp_path):
    with provoked("Write --classes=FILE with a text file of one class name a line"):
        read_class_names(str(tmp_path / "names.txt"), 2)
    (tmp_path / "names.txt").write_text("owl\n")
    with provoked("Write one line for each class of the weights, in the order of their numbers"):
        read_class_names(str(tmp_path / "names.txt"), 2)
    (tmp_path / "names.txt").write_text("owl\ncrow\n")
    assert read_class_names(str(tmp_path / "names.txt"), 2) == ("owl", "crow")


@pytest.mark.parametrize(
    "names, meant",
    [
        (("owl", "crows"), "Did you mean the class 'crows'?"),
        (("owl", "xyz"), "The weights may name their classes otherwise, or not."),
        (("crow", "crow"), "Some data sets give two classes one name, as ImageNet does with 'crane'."),
    ],
)
def test_classes_of_the_data(names, meant, tmp_path):
    with provoked("Write --classes=FILE with ") as caught:
        match_classes(names, ["crow"])
    assert caught.value.meant == meant
    (tmp_path / "names.txt").write_text("owl\ncrow")
    assert match_classes(read_class_names(str(tmp_path / "names.txt"), 2), ["crow"]).numbers.tolist() == [1]


def test_pictures_without_the_library_that_draws(monkeypatch):
    with monkeypatch.context() as patch, provoked("or leave out --out to see the table alone"):
        patch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
        evaluation.require_matplotlib()
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: name)
    evaluation.require_matplotlib()


def test_files_of_features(tmp_path, monkeypatch):
    with provoked("--out=FOLDER/features.parquet or --out=FOLDER/features") as caught:
        embed._checked_format(tmp_path / "features.csv")
    for name in caught.value.instead.replace("FOLDER", str(tmp_path)).split("--out=")[1:]:
        pytest.importorskip("pyarrow")
        embed._checked_format(type(tmp_path)(name.split()[0].rstrip(",.")))
    with monkeypatch.context() as patch, provoked("or write --out=FOLDER/features.npz"):
        patch.setattr(embed.importlib.util, "find_spec", lambda name: None)
        embed._checked_format(tmp_path / "features.parquet")
    embed._checked_format(tmp_path / "features.npz")


def test_names_of_tokens():
    with provoked("--tokens=NAMES with some of") as caught:
        embed._checked_tokens("cls mean")
    listed = caught.value.instead.partition("some of ")[2].rstrip(".")
    assert embed._checked_tokens(listed) == listed.split(",")
    assert flag(caught.value.instead, "tokens") == "NAMES"


def test_every_error_of_evaluations_was_provoked(request):
    check_all_provoked(request, "evaluation", "report", "models", "embed.py")
