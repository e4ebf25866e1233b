"""The page in a headless Chromium: what a user sees and does."""

import base64
import io
import json
import threading
import time

import numpy as np
from PIL import Image
import pytest

from taskexpert_jax.app import answers
from taskexpert_jax.report import gate_maps
from taskexpert_jax.tasks import panels
from tests.app import chromium, serving

pytestmark = pytest.mark.skipif(chromium.program() is None, reason="no Chromium: apt-get install chromium")

HEIGHT, WIDTH = 28, 40  # in frames of 32x48: the borders of tokens are not those of the image
NASTY = '<img src=x onerror="document.title=1">&amp;.png'
SHOWN = "!document.getElementById('results').hidden && !document.body.classList.contains('busy')"


def picture(seed, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def client(run, diverged):
    """A server whose model has diverged for PPM images only, and waits for `may_answer` with BMP."""

    asked = []

    def predict(data):
        asked.append(data)
        if data.startswith(b"BM"):
            assert may_answer.wait(chromium.SECONDS)
        return answers.answer(diverged if data.startswith(b"P6") else run, data)

    may_answer = threading.Event()
    with serving.served(predict, answers.about(run), megabytes=0.1) as client:
        client.may_answer, client.asked = may_answer, asked
        yield client
        may_answer.set()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium.Browser(chromium.program(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(client, browser):
    """The page, ready for an image; at the end it must have logged no error but those of `expected_errors`."""
    page = browser.page(client.url)
    page.wait("document.querySelectorAll('#examples img').length === 3")
    yield page
    assert [error for error in page.errors() if error not in page.expected_errors] == []
    page.close()


def give(page, data, name, way="drop"):
    """Drops or pastes a file."""
    page.run(f"""(() => {{
      const bytes = Uint8Array.from(atob({json.dumps(base64.b64encode(data).decode())}), (c) => c.charCodeAt(0));
      const files = new DataTransfer();
      files.items.add(new File([bytes], {json.dumps(name)}));
      document.dispatchEvent({json.dumps(way)} === "drop"
        ? new DragEvent("drop", {{dataTransfer: files, cancelable: true}})
        : new ClipboardEvent("paste", {{clipboardData: files}}));
    }})()""")


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.textContent)")


def readouts(page):
    return dict(zip(texts(page, "#panels .title"), texts(page, "#panels .readout"), strict=True))


def point(page, panel, x, y):
    """Moves the pointer to the centre of a pixel of a panel."""
    page.run(f"document.querySelectorAll('.stage')[{panel}].scrollIntoView({{block: 'center'}})")
    box = page.run(f"document.querySelectorAll('.stage')[{panel}].getBoundingClientRect().toJSON()")
    at = {"x": box["left"] + box["width"] * (x + 0.5) / WIDTH, "y": box["top"] + box["height"] * (y + 0.5) / HEIGHT}
    page.send("Input.dispatchMouseEvent", type="mouseMoved", **at)


def layer(page, panel):
    """Pixels of a panel's upper canvas, (H, W, 4)."""
    data = page.run(f"""(() => {{
      const canvas = document.querySelectorAll('.stage canvas.layer')[{panel}];
      return btoa(String.fromCharCode(...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data));
    }})()""")
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(HEIGHT, WIDTH, 4)


def until(condition):
    end = time.monotonic() + chromium.SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def minus(text):
    return text.replace("-", "−")


def expected_texts(run, prediction, x, y):
    """Texts of the panels for a pixel."""
    normal = prediction["normals"][y, x]
    angle = np.degrees(np.arccos(np.clip(-normal[2].astype(float), -1, 1)))
    return {
        "semantic segmentation": run.classes["semseg"][prediction["semseg"][y, x]],
        "human parts": run.classes["human_parts"][prediction["human_parts"][y, x]],
        "depth": f"{prediction['depth'][y, x]:.3f} m",
        "boundaries": f"p = {prediction['edge'][y, x]:.3f}",
        "saliency": f"p = {prediction['sal'][y, x]:.3f}",
        "surface normals": minus("({:.3f}, {:.3f}, {:.3f})".format(*normal) + f" · {angle:.1f}°"),
    }


def test_a_chosen_image_is_predicted_and_the_pointer_reads_the_arrays(page, run, tmp_path):
    image = picture(1)
    (tmp_path / "room.png").write_bytes(encoded(image))
    page.choose("#file", tmp_path / "room.png")
    page.wait(SHOWN)
    assert texts(page, "#name") == ["room.png"]
    assert texts(page, "#panels .title") == ["input", *(task.title for task in run.tasks.values())]
    prediction = run.predict(image)
    for panel, x, y in [(0, 0, 0), (2, 31, 9), (3, WIDTH - 1, HEIGHT - 1), (8, 17, 22)]:  # 8: a gate map
        point(page, panel, x, y)
        red, green, blue = image[y, x]
        assert readouts(page) == {
            "input": f"x {x}, y {y} · RGB {red} {green} {blue}",
            **expected_texts(run, prediction, x, y),
        }
        # The same position is marked on every panel.
        marks = page.run("[...document.querySelectorAll('.marker')].map((mark) => [mark.style.left, mark.style.top])")
        assert len(marks) == 7 + 1 + len(run.gates(image).slots)
        assert marks == [[f"{(x + 0.5) / WIDTH * 100:g}%", f"{(y + 0.5) / HEIGHT * 100:g}%"]] * len(marks)
    for index, (name, task) in enumerate(run.tasks.items()):
        drawn = layer(page, index + 1)
        np.testing.assert_array_equal(drawn[..., :3], panels.colour(task, prediction[name]))
        assert (drawn[..., 3] == 255).all()
    said = texts(page, "#facts dd")
    assert f"{HEIGHT} × {WIDTH}" in said and "step 0 (latest)" in said and said[-1].endswith(" ms")


def test_arrow_keys_move_the_position_and_are_spoken(page, run):
    image = picture(2)
    give(page, encoded(image), "room.png", "paste")
    page.wait(SHOWN)
    point(page, 1, 10, 10)
    page.run("document.querySelectorAll('.stage')[1].focus()")
    for key, code in (("ArrowRight", 39), ("ArrowDown", 40), ("ArrowDown", 40)):
        page.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code)
    expected = expected_texts(run, run.predict(image), 11, 12)
    found = readouts(page)
    assert found.pop("input").startswith("x 11, y 12 ") and found == expected
    spoken = [f"{name}: {text}" for name, text in readouts(page).items() if name != "input"]
    assert texts(page, "#spoken") == ["; ".join(["x 11, y 12", *spoken])]


def test_classes_are_switched_off_and_on(page, run):
    image = picture(3)
    give(page, encoded(image), "room.png")
    page.wait(SHOWN)
    ids = run.predict(image)["semseg"]
    names = texts(page, "figure:nth-of-type(2) .class")
    shares = {name: (ids == run.classes["semseg"].index(name)).mean() for name in names}
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert texts(page, "figure:nth-of-type(2) .share")[0] == f"{100 * shares[names[0]]:.1f} %"
    first = "document.querySelector('figure:nth-of-type(2) .classes button')"
    hidden = ids == run.classes["semseg"].index(names[0])
    page.run(f"{first}.click()")
    assert page.run(f"{first}.getAttribute('aria-pressed')") == "false"
    np.testing.assert_array_equal(layer(page, 1)[..., 3], np.where(hidden, 0, 255))
    np.testing.assert_array_equal(layer(page, 5)[..., 3], 255)  # human parts are another panel
    page.run("document.querySelectorAll('figure:nth-of-type(2) .plain')[1].click()")
    assert not layer(page, 1)[..., 3].any()
    page.run("document.querySelectorAll('figure:nth-of-type(2) .plain')[0].click()")
    np.testing.assert_array_equal(layer(page, 1)[..., :3], panels.colour(run.tasks["semseg"], ids))
    # Below the results is the image, which the slider uncovers.
    page.run(
        "(() => { const slider = document.getElementById('overlay'); slider.value = 25; "
        "slider.dispatchEvent(new Event('input')); })()"
    )
    opacity = page.run(
        "[...document.querySelectorAll('.stage canvas.layer')].map((found) => getComputedStyle(found).opacity)"
    )
    assert set(opacity) == {"0.25"}


def test_gate_maps_follow_tap_and_task(page, run):
    image = picture(4)
    give(page, encoded(image), "room.png")
    page.wait(SHOWN)
    gates = run.gates(image)
    weights = gates.at_pixels()  # (S, T, rows, columns, slots)
    point(page, 0, 21, 5)
    for tap, task in ((1, "semseg"), (3, "semseg"), (3, "sal")):
        page.run(f"""(() => {{
          const tap = document.getElementById('gate-tap'), task = document.getElementById('gate-task');
          tap.value = {tap}; tap.dispatchEvent(new Event('input'));
          task.value = {json.dumps(task)}; task.dispatchEvent(new Event('change'));
        }})()""")
        shown = weights[tap - 1, list(run.tasks).index(task)]
        winners = shown.argmax(axis=-1)
        np.testing.assert_array_equal(layer(page, 7)[..., :3], gate_maps.choice_colours(gates.slots)[winners])
        for slot in range(len(gates.slots)):
            expected = gate_maps.weight_colours()[gate_maps.steps(shown[..., slot])]
            np.testing.assert_array_equal(layer(page, 8 + slot)[..., :3], expected)
        said = texts(page, "#gate-maps .readout")
        assert said[0] == gates.slots[winners[5, 21]]
        means = shown.reshape(-1, len(gates.slots)).mean(axis=0, dtype=np.float64)
        assert said[1:] == [f"{w:.3f} · mean {m:.3f}" for w, m in zip(shown[5, 21], means, strict=True)]
        assert texts(page, "#gate-tap-said") == [f"{tap} of {len(weights)}"]


def test_downloads_are_the_arrays(page, run, tmp_path):
    image = picture(5)
    give(page, encoded(image), "my room.png")
    page.wait(SHOWN)
    page.browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    prediction = run.predict(image)
    expected = {f"my_room_{name}.npy" for name in [*run.tasks, "gates"]} | {"my_room.zip", "my_room_montage.png"}
    assert set(page.run("[...document.querySelectorAll('a[download]')].map((link) => link.download)")) == expected
    for name in sorted(expected):
        page.run(f"document.querySelector('a[download=\"{name}\"]').click()")
        until(lambda name=name: (tmp_path / name).is_file())
    for name, values in prediction.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"my_room_{name}.npy"), values)
    with np.load(tmp_path / "my_room.zip") as archive:
        np.testing.assert_array_equal(archive["depth"], prediction["depth"])
        np.testing.assert_array_equal(archive["gates"], np.load(tmp_path / "my_room_gates.npy"))
    montage = np.asarray(Image.open(tmp_path / "my_room_montage.png"))
    np.testing.assert_array_equal(montage, run.draw(prediction, image)["montage"])


def test_markup_in_the_name_of_a_file_stays_text(page):
    give(page, encoded(picture(6)), NASTY)
    page.wait(SHOWN)
    assert texts(page, "#name") == [NASTY]
    assert page.run("document.title") == "TaskExpert"
    assert page.run("document.querySelectorAll('#name *').length") == 0
    names = page.run("[...document.querySelectorAll('a[download]')].map((link) => link.download)")
    assert len(names) == 9 and all(
        set(name) <= set("_.abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") for name in names
    )


def test_two_users_at_once_get_their_own_results(client, browser, run):
    pages = [browser.page(client.url) for _ in range(2)]
    images = [picture(7), picture(8, 20, 30)]
    for page in pages:
        page.wait("document.querySelectorAll('#examples img').length === 3")
    for page, image in zip(pages, images, strict=True):
        give(page, encoded(image), f"{len(image)} rows.png")
    for page, image in zip(pages, images, strict=True):
        page.wait(SHOWN)
        height, width = image.shape[:2]
        assert texts(page, "#name") == [f"{height} rows.png"]
        found = readouts(page)
        x, y = width // 2, height // 2  # where the position is at first
        assert found.pop("input").startswith(f"x {x}, y {y} · RGB {image[y, x][0]} ")
        assert found == expected_texts(run, run.predict(image), x, y)
        page.close()


def test_who_waits_sees_how_many_are_before(client, browser):
    client.may_answer.clear()
    pages = [browser.page(client.url) for _ in range(2)]
    for page, form in zip(pages, ("BMP", "PNG"), strict=True):
        page.wait("document.querySelectorAll('#examples img').length === 3")
        give(page, encoded(picture(14), form), f"{form}.image")
        page.wait(f"document.getElementById('status').textContent.startsWith('Predicting {form}.image')")
    pages[1].wait("document.getElementById('status').textContent === 'PNG.image waits: 1 image before it ...'")
    client.may_answer.set()
    for page, form in zip(pages, ("BMP", "PNG"), strict=True):
        page.wait(SHOWN)
        assert page.run("document.getElementById('name').textContent") == f"{form}.image"
        page.close()


def test_of_several_images_in_a_row_the_last_is_shown_and_none_is_predicted_in_vain(page, client):
    client.may_answer.clear()
    give(page, encoded(picture(9), "BMP"), "first.bmp")
    until(lambda: encoded(picture(9), "BMP") in client.asked)
    for seed in (10, 11):
        give(page, encoded(picture(seed)), f"image {seed}.png")
    client.may_answer.set()
    page.wait(SHOWN)
    assert texts(page, "#name") == ["image 11.png"]
    assert encoded(picture(11)) in client.asked and encoded(picture(10)) not in client.asked


def test_errors_are_shown_and_the_earlier_results_stay(page):
    give(page, encoded(picture(11)), "good.png")
    page.wait(SHOWN)
    failed = "!document.getElementById('error').hidden && !document.body.classList.contains('busy')"
    give(page, b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "<b>drawing</b>.svg")
    page.wait(failed)
    line = "not a readable image (is damaged, or none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP)"
    assert texts(page, "#error") == [line]
    assert texts(page, "#name") == ["good.png"]
    give(page, bytes(100_001), "large.png")
    page.wait(f"{failed} && document.getElementById('error').textContent.includes('larger than 0.1 MB')")
    page.expected_errors.append("Failed to load resource: the server responded with a status of 400 (Bad Request)")


def test_a_task_that_diverged_is_no_map(page):
    give(page, encoded(picture(12), "PPM"), "room.ppm")
    page.wait(SHOWN)
    assert texts(page, ".diverged .title") == ["depth"]
    assert readouts(page)["depth"] == "diverged"
    assert texts(page, ".diverged .error")[0].startswith("Diverged: the prediction has a NaN or Inf")
    assert not layer(page, 2).any()
    assert layer(page, 1)[..., 3].all()


def test_an_example_is_predicted(page):
    page.run("document.querySelector('#examples button').click()")
    page.wait(SHOWN)
    assert texts(page, "#name") == ["Example 1"]


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_no_width_needs_sideways_scrolling(page, width):
    page.media(width=width, height=800, phone=width < 500)
    give(page, encoded(picture(13, 8, 48)), f"{'long' * 40}.png")
    page.wait(SHOWN)
    assert page.run("document.documentElement.scrollWidth") <= width
    columns = page.run("new Set([...document.querySelectorAll('#panels figure')].map((f) => f.offsetLeft)).size")
    assert columns == {360: 1, 768: 2, 1400: 4}[width]
