"""The page of the verb atlas in a Chromium of this machine, for the extra "browser"."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from beitv2_jax.report import atlas

NUM_CODES, NUM_IMAGES = 300, 24
PHONE = {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def chromium():
    """A browser that is installed already: nothing is downloaded here."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "No Chromium is installed. On Debian and Ubuntu: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def codes(seed, grid):
    """Codes of which 0 is on every patch of the first row, and the last hundred are unused."""
    rng = np.random.default_rng(seed)
    code_ids = (rng.integers(1, 15, (NUM_IMAGES, grid, grid)) ** 2).clip(max=NUM_CODES - 101)
    code_ids[:, 0] = 0
    return atlas.Codes(f"runs/{seed}", code_ids, rng.normal(size=(NUM_CODES, 8)).astype(np.float32))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return what pages were made of, and the pages of one tokenizer, of two, and without labels."""
    root, thumbnails = tmp_path_factory.mktemp("pages"), []
    for number in range(NUM_IMAGES):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (10 * number, 120, 60)).save(buffer, "WEBP")
        thumbnails.append(buffer.getvalue())
    labels = np.arange(NUM_IMAGES, dtype=np.int32) % 3
    pictures = atlas.Pictures(thumbnails, 64, labels, [f"{number}.jpg" for number in range(NUM_IMAGES)])
    both = codes(0, 4), codes(1, 8)
    about = {"class_names": ("cat", "dog", "<b>"), "data": "photos, split val", "num_unreadable": 2}
    atlas.write_page(root / "one.html", both[:1], pictures, **about)
    atlas.write_page(root / "two.html", both, pictures, **about)
    unlabelled = pictures._replace(labels=np.full(NUM_IMAGES, -1, np.int32))
    alone = both[0]._replace(code_ids=np.zeros_like(both[0].code_ids))
    atlas.write_page(root / "plain.html", [alone], unlabelled, **about | {"class_names": ()})
    return both, root


@pytest.fixture
def opened(chromium, written):
    """Return a function that opens a page, and fail if it wrote an error or asked for anything but itself."""
    faults, contexts = [], []

    def open_page(name, **options):
        context = chromium.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and faults.append(request.url))
        page.goto((written[1] / name).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def listed(page, pane=0):
    """Return the codes of the rows that exist, from above."""
    rows = page.locator(".pane").nth(pane).locator(".row").all()
    return [int(row.get_attribute("data-code")) for row in sorted(rows, key=lambda row: row.bounding_box()["y"])]


def colors_of(page, selector):
    """Return the colour in the middle of every tile of the first canvas of `selector`."""
    return page.eval_on_selector(
        selector,
        """canvas => { const found = [], context = canvas.getContext("2d"), scale = canvas.width / canvas.clientWidth;
        for (let left = 0; left + 76 <= canvas.clientWidth; left += 80)
            found.push([...context.getImageData((left + 38) * scale, 38 * scale, 1, 1).data]);
        return found; }""",
    )


def test_the_list_is_sorted_filtered_and_drawn_as_one_scrolls(opened, written):
    page, ids = opened("one.html"), written[0][0].code_ids
    counts = np.bincount(ids.ravel(), minlength=NUM_CODES)
    used = np.flatnonzero(counts)
    by_use = sorted(used.tolist(), key=lambda code: (-counts[code], code))
    assert listed(page) == by_use[: len(listed(page))]
    page.select_option("#sort", "number")
    page.fill("#least", "0")
    assert listed(page) == list(range(len(listed(page))))
    assert len(listed(page)) < 40  # rows that are not seen do not exist
    expect(page.locator(".pane p")).to_contain_text(f"300 of 300 codes shown; {len(used)} in use")
    page.eval_on_selector(".scroll", "scroll => { scroll.scrollTop = scroll.scrollHeight; }")
    expect(page.locator('.row[data-code="299"]')).to_be_visible()
    page.fill("#least", "20")
    page.fill("#most", "30")
    assert set(listed(page)) <= {code for code in used.tolist() if 20 <= counts[code] <= 30}
    page.fill("#least", "1")
    page.fill("#most", "")
    page.fill("#pure", "50")
    of_class = np.stack([np.bincount(ids[label::3].ravel(), minlength=NUM_CODES) for label in range(3)])
    page.select_option("#class", "dog")
    wanted = [c for c in used.tolist() if of_class[:, c].argmax() == 1 and of_class[1, c] >= 0.5 * counts[c]]
    assert listed(page) == wanted


def test_a_row_shows_patches_of_different_images(opened):
    page = opened("one.html")
    page.wait_for_function("document.querySelector('.row canvas').getContext('2d').getImageData(40, 40, 1, 1).data[3]")
    reds = [round(color[0] / 10) for color in colors_of(page, ".row canvas")]
    assert len(set(reds)) == len(reds) > 5 and reds[0] == 0 and reds[-1] == NUM_IMAGES - 1


def test_search_neighbours_and_back(opened):
    page = opened("one.html")
    page.keyboard.press("/")
    page.keyboard.type("16")
    page.keyboard.press("Enter")
    expect(page.locator("#heading")).to_have_text("code 16")
    expect(page.locator(".neighbour")).to_have_count(5)
    neighbour = page.locator(".neighbour > button").first.inner_text().split()[1]
    page.locator(".neighbour > button").first.click()
    expect(page.locator("#heading")).to_have_text(f"code {neighbour}")
    page.go_back()
    expect(page.locator("#heading")).to_have_text("code 16")
    page.keyboard.press("Escape")
    expect(page.locator("#dialog")).to_be_hidden()
    page.fill("#search", "300")
    page.press("#search", "Enter")
    expect(page.locator("#dialog")).to_be_hidden()


def test_a_patch_shows_where_else_its_code_occurs(opened, written):
    ids = written[0][0].code_ids
    page = opened("one.html")
    page.click("#show-images")
    expect(page.locator("#thumbnails img")).to_have_count(NUM_IMAGES)
    page.locator("#thumbnails button").nth(5).click()
    expect(page.locator("#heading")).to_have_text("5.jpg, <b>")
    box = page.locator("canvas.map").bounding_box()
    for row, column in ((2, 1), (0, 3)):
        page.mouse.move(box["x"] + box["width"] * (column + 0.5) / 4, box["y"] + box["height"] * (row + 0.5) / 4)
        code = ids[5, row, column]
        here, everywhere = (ids[5] == code).sum(), (ids == code).sum()
        expect(page.locator(".token")).to_contain_text(f"code {code}{here} here, {everywhere} in all")
    others = (ids == 0).any(axis=(1, 2)).sum() - 1
    expect(page.locator(".maps .tiles button")).to_have_count(min(24, int(others)))
    page.locator(".maps .tiles button").last.click()
    expect(page.locator("#heading")).to_have_text(f"{NUM_IMAGES - 1}.jpg, <b>")
    expect(page.locator(".token")).to_contain_text("code 0")


def test_keys_alone_reach_a_patch(opened, written):
    page = opened("one.html")
    page.keyboard.press("ArrowDown")
    # another width draws the rows anew, which keeps the focus
    page.set_viewport_size({"width": 1000, "height": 500})
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.keyboard.press("End")
    last = page.evaluate("Number(document.activeElement.dataset.code)")
    assert (
        last
        == sorted(
            np.unique(written[0][0].code_ids).tolist(), key=lambda code: (-(written[0][0].code_ids == code).sum(), code)
        )[-1]
    )
    page.keyboard.press("Enter")
    expect(page.locator("#heading")).to_have_text(f"code {last}")
    page.keyboard.press("p")
    expect(page.locator("#heading")).not_to_have_text(f"code {last}")
    page.keyboard.press("Escape")
    page.keyboard.press("i")
    page.locator("#thumbnails button").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#heading")).to_have_text("0.jpg, cat")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token")).to_contain_text(f"code {written[0][0].code_ids[0, 1, 1]}")
    page.keyboard.press("n")
    expect(page.locator("#heading")).to_have_text("1.jpg, dog")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.locator("#heading")).to_have_text("Keys, and what is shown")


def test_two_tokenizers_are_side_by_side_and_one_by_one_on_a_phone(opened, written):
    first, second = written[0]
    page = opened("two.html")
    assert listed(page, 0)[0] == np.bincount(first.code_ids.ravel()).argmax()
    assert listed(page, 1)[0] == np.bincount(second.code_ids.ravel()).argmax()
    page.goto(f"{page.url}#image-3")
    box = page.locator("canvas.map").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.9)
    expect(page.locator(".token").nth(0)).to_contain_text(f"code {first.code_ids[3, 3, 1]}")
    expect(page.locator(".token").nth(1)).to_contain_text(f"code {second.code_ids[3, 7, 3]}")

    phone = opened("two.html", viewport=PHONE, has_touch=True, is_mobile=True)
    expect(phone.locator(".pane").nth(0)).to_be_visible()
    expect(phone.locator(".pane").nth(1)).to_be_hidden()
    phone.get_by_role("button", name="B", exact=True).click()
    expect(phone.locator(".pane").nth(1)).to_be_visible()
    phone.goto(f"{phone.url}#image-3")
    phone.locator("canvas.map").nth(1).tap(position={"x": 5, "y": 5})
    expect(phone.locator(".token").nth(1)).to_contain_text("code 0")
    assert phone.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_images_without_labels_and_a_single_code_in_use(opened):
    page = opened("plain.html")
    assert listed(page) == [0]
    expect(page.locator(".labelled")).to_have_count(0)
    page.locator(".row .number").click()
    expect(page.locator("#heading")).to_have_text("code 0")
    page.goto(f"{page.url.partition('#')[0]}#code-0-7")
    expect(page.locator("#dialog")).to_contain_text("No patch of these images has this code.")


def test_the_page_is_dark_where_the_system_is(opened):
    def back(scheme):
        page = opened("one.html", color_scheme=scheme)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))

    assert back("light") > 3 * 200 and back("dark") < 3 * 60
