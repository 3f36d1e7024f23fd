"""The verb atlas: what the page holds, against the API, scikit-learn and counting; its size, and its refusals."""

import base64
import io
import json
import re

import numpy as np
import pytest
from convert_states import drawn_weights
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import beitv2_jax
from beitv2_jax import atlas
from beitv2_jax.convert.writing import write
from beitv2_jax.report import atlas as report

CLASSES = ("cat", "dog </script>")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four and three images of two classes, and one that is damaged; some are of one grey."""
    root = tmp_path_factory.mktemp("photos")
    for name, number in zip(CLASSES, (4, 3), strict=True):
        folder = root / "validation" / name.replace("/", "_")
        folder.mkdir(parents=True)
        for seed in range(number):
            darkest = 0 if seed % 2 else 250
            pixels = np.random.default_rng(seed).integers(darkest, 256, (30 + seed, 25, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{name[:3]}{seed}.png")
    (root / "validation" / "cat" / "cat9.png").write_bytes(b"damaged")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write(drawn_weights("vqkd", grid=4, seed=3), str(root / "one"), "run")
    write(drawn_weights("vqkd", grid=3, patch_size=5, seed=5), str(root / "two"), "run")
    write(drawn_weights("vqkd", grid=8, patch_size=48), str(root / "large"), "run")
    return root


def read_page(out):
    """Return the data of the page, with its arrays decoded."""
    text = (out / "atlas.html").read_text()
    (written,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)

    def decoded(value):
        if value.keys() == {"dtype", "data"}:
            return np.frombuffer(base64.b64decode(value["data"]), value["dtype"])
        return value

    return text, json.loads(written, object_hook=decoded)


def run(out, photos, *arguments):
    return atlas.main([*map(str, arguments), f"folder:{photos}", "--train_split=validation", f"--out={out}"])


def test_the_page_holds_what_the_api_says_of_every_image(photos, runs, tmp_path, capsys):
    assert run(tmp_path / "atlas", photos, runs / "one", runs / "two") == 0
    printed = capsys.readouterr()
    assert "1 of 8 images cannot be read" in printed.err and "cat9.png" in printed.err
    text, page = read_page(tmp_path / "atlas")
    assert not re.search(r"https?:|//cdn|<script src|@import|url\(", text)

    files = [path for path in sorted(photos.glob("*/*/*.png")) if path.name != "cat9.png"]
    assert page["names"] == [path.name for path in files]
    assert page["numImages"] == 7 and page["numUnreadable"] == 1 and len(page["classes"]) == 2
    assert page["labels"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    for number, name in enumerate(("one", "two")):
        tokenizer, found = beitv2_jax.load_tokenizer(runs / name), page["tokenizers"][number]
        ids = tokenizer.encode(files)
        assert found["grid"] == list(ids.shape[1:]) == list(tokenizer.grid)
        np.testing.assert_array_equal(found["ids"].reshape(ids.shape), ids)
        for code in range(19):
            hits = ids == code
            assert found["counts"][code] == hits.sum() and found["images"][code] == hits.any(axis=(1, 2)).sum()
            of_class = [hits[:4].sum(), hits[4:].sum()]
            if hits.any():
                assert found["purity"][code] == pytest.approx(max(of_class) / hits.sum())
                assert of_class[found["majority"][code]] == max(of_class)
            else:
                assert found["majority"][code] == -1
        used = np.flatnonzero(found["counts"])
        assert len(used) > 2
        width = min(5, len(used) - 1)
        search = NearestNeighbors(metric="cosine").fit(tokenizer.codebook[used])
        distances, order = search.kneighbors(n_neighbors=width)  # of the codes in use, without themselves
        np.testing.assert_allclose(found["distances"].reshape(19, width)[used], distances, atol=1e-6)
        np.testing.assert_array_equal(found["neighbours"].reshape(19, width)[used], used[order])
    thumbnail = Image.open(io.BytesIO(base64.b64decode(page["images"][3])))
    assert thumbnail.size == (page["side"], page["side"]) == (224, 224)
    names = {f"{name}_{number}.png" for name in ("most_used", "rare", "usage") for number in (1, 2)}
    assert {path.name for path in (tmp_path / "atlas").iterdir()} == names | {"atlas.html"}
    assert all(Image.open(tmp_path / "atlas" / name).width >= 900 for name in names)


def test_a_page_that_would_be_too_large_holds_some_of_the_images_but_counts_all(photos, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SIDES", (64,))
    assert run(tmp_path / "all", photos, runs / "one") == 0
    text, whole = read_page(tmp_path / "all")
    limit = len(text) - sum(map(len, whole["images"])) // 2
    monkeypatch.setattr(report, "LIMIT_BYTES", limit)
    assert run(tmp_path / "some", photos, runs / "one") == 0
    text, page = read_page(tmp_path / "some")
    assert len(text.encode()) < limit
    number = len(page["images"])
    assert 1 < number < 7
    chosen = np.linspace(0, 6, number).astype(int)
    assert page["names"] == [whole["names"][i] for i in chosen]
    np.testing.assert_array_equal(page["labels"], whole["labels"][chosen])
    of_all, of_some = whole["tokenizers"][0], page["tokenizers"][0]
    np.testing.assert_array_equal(of_some["ids"].reshape(-1, 16), of_all["ids"].reshape(-1, 16)[chosen])
    np.testing.assert_array_equal(of_some["counts"], of_all["counts"])


def test_thumbnails_are_as_large_as_the_limit_allows(photos, runs, tmp_path, monkeypatch):
    sizes = {}
    for side in (128, 96):
        monkeypatch.setattr(report, "SIDES", (side,))
        assert run(tmp_path / str(side), photos, runs / "one") == 0
        sizes[side] = (tmp_path / str(side) / "atlas.html").stat().st_size
    monkeypatch.setattr(report, "SIDES", (128, 96, 64))
    monkeypatch.setattr(report, "LIMIT_BYTES", sizes[96] + (sizes[128] - sizes[96]) // 2)
    assert run(tmp_path / "chosen", photos, runs / "one") == 0
    _, page = read_page(tmp_path / "chosen")
    assert page["side"] == 96 and len(page["images"]) == 7


def test_a_part_of_unlabelled_images_and_one_code(tmp_path, runs, photos):
    pixels = np.zeros((30, 30, 3), np.uint8)
    (tmp_path / "flat").mkdir()
    for number in range(5):
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{number}.png")
    arguments = [str(runs / "one"), f"folder:{tmp_path / 'flat'}", "--split=train", "--max_images=3"]
    assert atlas.main([*arguments, f"--out={tmp_path / 'atlas'}"]) == 0
    _, page = read_page(tmp_path / "atlas")
    assert page["names"] == ["0.png", "2.png", "4.png"]
    (found,) = page["tokenizers"]
    assert "purity" not in found and found["counts"].sum() == 3 * 16


@pytest.mark.parametrize(
    ("tokenizers", "out", "advice"),
    [
        (("one", "two", "one"), "atlas", "Write beitv2 atlas TOKENIZER DATA"),
        (("one",), "there", "with a name that is not taken"),
        (("one",), "missing/atlas", "in a folder that exists"),
        (("one", "large"), "atlas", "Write --image_size=12."),
    ],
)
def test_refusals_come_before_anything_is_written(tokenizers, out, advice, photos, runs, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert run(tmp_path / out, photos, *(runs / name for name in tokenizers)) == 2
    assert advice in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_nothing_is_left_where_no_image_can_be_read(runs, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"damaged")
    (tmp_path / "out").mkdir()
    command = [str(runs / "one"), f"folder:{tmp_path / 'bad'}", "--split=train", f"--out={tmp_path / 'out' / 'atlas'}"]
    assert atlas.main(command) == 2
    assert "None of the 1 images" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
