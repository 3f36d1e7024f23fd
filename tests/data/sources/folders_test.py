"""Image folders: which split numbers the classes, what is found below a class, and what is left out and why."""

import io
import pickle
import unicodedata

import numpy as np
import pytest
from paths import CONFIGS
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.data.decode import IMAGE_SUFFIXES, decode_image
from beitv2_jax.data.sources import open_source, open_splits
from beitv2_jax.errors import UserError
from beitv2_jax.tasks import inputs


def fill(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"not decoded here")


def labels(source):
    return [source[i]["label"] for i in range(len(source))]


def test_classes_are_numbered_by_the_training_split_that_the_run_names(tmp_path):
    fill(tmp_path, "Train/a/1.png", "Train/b/1.png", "Train/c/1.png", "Valid/a/2.png", "Valid/c/2.png")
    config = config_lib.load(str(CONFIGS / "finetune.py")).unlock()
    config.data.update(source=f"folder:{tmp_path}", train_split="Train", eval_split="Valid")
    train, evaluation = inputs.open_sources(config)
    assert train.class_names == evaluation.class_names == ("a", "b", "c")
    assert labels(train) == [0, 1, 2] and labels(evaluation) == [0, 2]
    assert (train.empty_classes, evaluation.empty_classes) == ((), ("b",))


def test_another_folder_named_train_numbers_nothing(tmp_path):
    fill(tmp_path, "train/a/1.png", "train/c/1.png", "train2/a/1.png", "train2/b/1.png", "train2/c/1.png")
    fill(tmp_path, "val/b/1.png", "val/c/1.png")
    assert labels(open_source(f"folder:{tmp_path}", "validation", train_split="train2")) == [1, 2]
    with pytest.raises(UserError, match=f"class folder 'b', which the training split {tmp_path}/train has not"):
        open_source(f"folder:{tmp_path}", "validation")


def test_folders_that_are_no_known_splits_are_named(tmp_path):
    fill(tmp_path, "Train/a/1.png", "Valid/a/2.png")
    with pytest.raises(UserError, match=r"no split 'validation'; it has Train, Valid"):
        open_source(f"folder:{tmp_path}", "validation")


@pytest.mark.parametrize("folders", [("",), ("a/", "b/deep/")])
def test_a_folder_without_splits_gives_every_tenth_image_of_a_class_for_evaluation(tmp_path, folders):
    fill(tmp_path, *(f"{folder}{number:02d}.png" for folder in folders for number in range(23)))
    train, evaluation = open_splits(f"folder:{tmp_path}", "train", "validation")
    assert (train.split, evaluation.split) == ("train", "validation")
    assert train.class_names == evaluation.class_names
    names = [
        [str(source.path_of(i).relative_to(tmp_path)) for i in range(len(source))] for source in (train, evaluation)
    ]
    assert names[1] == [f"{folder}{number}.png" for folder in folders for number in ("01", "11", "21")]
    whole = open_source(f"folder:{tmp_path}", "train")
    assert sorted([*names[0], *names[1]]) == [str(whole.path_of(i).relative_to(tmp_path)) for i in range(len(whole))]
    assert len({source.name for source in (train, evaluation, whole)}) == 3
    assert pickle.loads(pickle.dumps(evaluation)).name == evaluation.name
    # asked for explicitly, the same images serve both
    assert [len(source) for source in open_splits(f"folder:{tmp_path}", "train", "train")] == [len(whole)] * 2


def test_too_few_images_to_divide_are_named(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png")
    with pytest.raises(UserError, match="too few images"):
        open_splits(f"folder:{tmp_path}", "train", "validation")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_ending_is_that_of_a_format_that_is_decoded(suffix, tmp_path):
    Image.init()
    kind = {".mpo": "JPEG"}.get(suffix) or Image.registered_extensions()[suffix]
    image = Image.new("1" if suffix == ".pbm" else "L", (5, 7), 1)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    assert decode_image(buffer.getvalue()).shape == (7, 5, 3)


def test_every_format_and_every_sub_folder_is_read(tmp_path):
    fill(tmp_path, "train/a/z.JPG", "train/a/1.tif", "train/a/2.gif", "train/a/deep/er/3.ppm", "train/b/in/deep/4.png")
    source = open_source(f"folder:{tmp_path}", "train")
    found = [source[i]["where"].removeprefix(f"{tmp_path}/train/").partition(" ")[0] for i in range(len(source))]
    assert found == ["a/1.tif", "a/2.gif", "a/deep/er/3.ppm", "a/z.JPG", "b/in/deep/4.png"]
    assert labels(source) == [0, 0, 0, 0, 1] and (source.left_out, source.empty_classes) == ((), ())


def test_what_is_left_out_is_kept_with_its_cause(tmp_path):
    fill(tmp_path, "a/1.png", "a/notes.txt", "a/2", "a/sub/x.heic", "a/.hidden", "list.csv", "a/@eaDir/1.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a")
    source = open_source(f"folder:{tmp_path}", "train")
    assert len(source) == 1
    causes = {left_out.where.removeprefix(f"{tmp_path}/"): left_out.cause for left_out in source.left_out}
    assert causes == {
        "list.csv": "its name ends in .csv, which is no image format that is read",
        "a/notes.txt": "its name ends in .txt, which is no image format that is read",
        "a/sub/x.heic": "its name ends in .heic, which is no image format that is read",
        "a/2": "its name has no ending",
        "a/@eaDir": "it is a folder of the operating system or the file server",
        "a/gone.png": "it is a link to nothing, or no ordinary file",
        "a/round": "it is a link to a folder that holds it",
    }


def test_a_folder_without_readable_formats_says_what_it_holds(tmp_path):
    fill(tmp_path, "a/1.heic", "a/2.heic")
    with pytest.raises(UserError, match=r"no images in .*; 2 files are left out, such as .*1.heic: its name ends in"):
        open_source(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("name", ["@eaDir", ".DS_Store", "__MACOSX", "lost+found", "$RECYCLE.BIN"])
def test_system_folders_are_no_classes(tmp_path, name):
    fill(tmp_path, "train/a/1.png", "train/b/1.png", f"train/{name}/1.png", "val/b/1.png", f"val/{name}/1.png")
    for split, expected in (("train", [0, 1]), ("val", [1])):
        source = open_source(f"folder:{tmp_path}", split)
        assert source.class_names == ("a", "b") and labels(source) == expected


def test_an_empty_class_counts_in_the_identity(tmp_path):
    fill(tmp_path, "b/1.png")
    before = open_source(f"folder:{tmp_path}", "train")
    (tmp_path / "a").mkdir()
    source = open_source(f"folder:{tmp_path}", "train")
    assert (source.class_names, source.empty_classes, labels(source)) == (("a", "b"), ("a",), [1])
    assert source.name != before.name
    (tmp_path / "a").rename(tmp_path / "aa")
    assert open_source(f"folder:{tmp_path}", "train").name not in (source.name, before.name)


def test_both_spellings_of_an_accent_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "épée") for form in ("NFC", "NFD"))
    assert composed != decomposed
    fill(tmp_path, f"train/{decomposed}/1.png", "train/a/1.png", f"val/{composed}/1.png")
    for split, expected in (("train", [0, 1]), ("val", [1])):
        source = open_source(f"folder:{tmp_path}", split)
        assert source.class_names == ("a", composed) and labels(source) == expected
    name = open_source(f"folder:{tmp_path}", "train").name
    # a copy on a file system that spells otherwise is the same data; with both spellings it is one class still
    (tmp_path / "train" / decomposed).rename(tmp_path / "train" / composed)
    assert open_source(f"folder:{tmp_path}", "train").name == name
    fill(tmp_path, f"train/{decomposed}/2.png")
    both = open_source(f"folder:{tmp_path}", "train")
    assert both.class_names == ("a", composed) and labels(both) == [0, 1, 1]
    assert all(np.char.endswith([both[i]["image"] for i in range(3)], b"here"))
