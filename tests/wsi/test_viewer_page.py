"""The viewer's page in a real browser: it loads, zooms, and shows and hides what a model found."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image
from wsi.viewer_samples import HEIGHT, MPP, TILE, WIDTH, served, write_prediction, write_slide

from medkd.wsi.slides import Slide
from medkd.wsi.viewer import find_overlay

sync_api = pytest.importorskip("playwright.sync_api")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
READY = "body[data-state=ready][data-tiles=loaded]"
WINDOW = {"width": 1100, "height": 800}
BOUNDS_X, BOUNDS_Y = 100, 40  # where the sample slide says that its scanned area begins


@dataclass
class Shown:
    """The page, and everything that went wrong or was asked for while it was shown."""

    page: sync_api.Page
    address: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, hash_: str = "") -> None:
        self.page.goto("about:blank")
        self.page.goto(self.address + hash_)
        self.page.wait_for_selector(READY)
        self.settle()

    def settle(self) -> None:
        """Wait for the end of animations and loads."""
        self.page.wait_for_timeout(50)
        self.page.wait_for_selector(".leaflet-zoom-anim, .leaflet-pan-anim", state="detached")
        self.page.wait_for_timeout(300)
        self.page.wait_for_selector(READY)

    @property
    def zoom(self) -> float:
        return float(self.page.get_attribute("#map", "data-zoom"))

    @property
    def downsample(self) -> float:
        """Slide pixels per screen pixel; the sample's last zoom is 3."""
        return 2 ** (3 - self.zoom)

    def screen(self, x: float, y: float) -> tuple[float, float]:
        """Where on the screen a level-0 position of the slide must be, by the view in the address."""
        center_x, center_y, _ = map(float, self.page.evaluate("location.hash").lstrip("#").split(","))
        box = self.page.locator("#map").bounding_box()
        return (
            box["x"] + box["width"] / 2 + (x - center_x) / self.downsample,
            box["y"] + box["height"] / 2 + (y - center_y) / self.downsample,
        )

    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")).astype(int)

    def point_at(self, x: float, y: float) -> None:
        self.page.mouse.move(*self.screen(x, y))
        self.page.wait_for_timeout(250)

    def becomes(self, holds: Callable[[], bool]) -> bool:
        """Whether something holds soon; the browser of a busy machine draws and answers late."""
        for _ in range(100):
            if holds():
                return True
            self.page.wait_for_timeout(50)
        return False

    def shows(self, selector: str, text: str) -> bool:
        """Whether an element soon has this text, line by line."""
        return self.becomes(lambda: "\n".join(self.page.locator(selector).all_inner_texts()) == text)

    def set_opacity(self, percent: int) -> None:
        self.page.locator("#heatmap-opacity").fill(str(percent))


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium to drive ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Iterator[Slide]:
    with Slide(write_slide(tmp_path_factory.mktemp("slides") / "a & <b>b.tiff")) as opened:
        opened.bounds = (BOUNDS_X, BOUNDS_Y, WIDTH - BOUNDS_X, HEIGHT - BOUNDS_Y)
        yield opened


def watched(browser: sync_api.Browser, address: str) -> Shown:
    page = browser.new_page(viewport=WINDOW)
    page.set_default_timeout(20_000)
    shown = Shown(page, address)
    page.on("console", lambda message: shown.errors.append(message.text) if message.type != "info" else None)
    page.on("pageerror", lambda error: shown.errors.append(str(error)))
    page.on("requestfailed", lambda request: shown.errors.append(f"failed {request.url}"))
    page.on("request", lambda request: shown.requests.append(request.url))
    page.on("dialog", lambda dialog: shown.errors.append(f"dialog {dialog.message}"))
    return shown


@pytest.fixture(scope="module")
def shown(browser, slide, tmp_path_factory) -> Iterator[Shown]:
    folder = write_prediction(tmp_path_factory.mktemp("prediction"), slide.name, slide.fingerprint)
    with served(slide, find_overlay(folder, slide)) as server:
        view = watched(browser, server.address)
        yield view
        view.page.close()


@pytest.fixture(autouse=True)
def _no_errors(request) -> Iterator[None]:
    yield
    if "shown" in request.fixturenames:
        assert request.getfixturevalue("shown").errors == []


def assert_slide_is_where_it_should_be(shown: Shown) -> None:
    """The sample's red tells x and its green y, so a screenshot tells what lies where."""
    seen = shown.pixels()
    for x, y in ((300, 300), (650, 450), (900, 700), (1250, 850), (40, 30)):
        left, top = shown.screen(x, y)
        if shown.page.locator("#map").bounding_box()["x"] < left < WINDOW["width"] - 80 and 80 < top < 700:
            found = seen[round(top), round(left)]
            assert abs(found[0] - x * 255 / WIDTH) < 4, (x, y)
            assert abs(found[1] - y * 255 / HEIGHT) < 4, (x, y)


def test_page_loads_from_its_own_server_only(shown, slide):
    shown.open()
    assert shown.page.title() == "a & <b>b.tiff · medkd"
    assert shown.page.inner_text("h1") == slide.path.name  # as text, not as HTML
    assert "0.5 µm/px" in shown.page.inner_text("#facts")
    assert "0.65 × 0.45 mm" in shown.page.inner_text("#facts")
    assert shown.page.is_hidden("#failure")
    assert all(url.startswith((shown.address, "data:", "about:")) for url in shown.requests)
    assert any("/tiles/" in url for url in shown.requests)


def test_slide_stays_in_place_at_every_zoom(shown):
    shown.open()
    for toggle in ("#heatmap-on", "#contours-on"):
        shown.page.locator(toggle).uncheck(force=True)
    shown.page.mouse.move(5, 5)
    assert_slide_is_where_it_should_be(shown)
    for _ in range(2):
        before = shown.zoom
        shown.page.click(".leaflet-control-zoom-in")
        shown.settle()
        assert shown.zoom == pytest.approx(before + 1)
        assert_slide_is_where_it_should_be(shown)
    shown.page.click("#fit")
    shown.settle()
    assert_slide_is_where_it_should_be(shown)


def test_tiles_meet_without_a_seam_between_the_steps_of_the_zoom(shown):
    for view in ("#641,443,2.50", "#633,441,3.25"):
        shown.open(view)
        for toggle in ("#heatmap-on", "#contours-on"):
            shown.page.locator(toggle).uncheck(force=True)
        shown.page.mouse.move(5, 5)
        left, top = (round(value) for value in shown.screen(150, 150))
        right, bottom = (round(value) for value in shown.screen(1150, 750))
        seen = shown.pixels()[max(top, 90) : min(bottom, 700), max(left, 310) : min(right, 1000)]
        assert np.abs(seen[..., 2] - 128).max() <= 6  # the sample's blue is the same everywhere, the page's is not


def test_scale_bar_is_as_long_as_it_says(shown):
    lengths = set()
    for view in ("#650,450,1.00", "#650,450,2.75", "#650,450,4.00"):
        shown.open(view)
        text = shown.page.inner_text("#scale-text")
        number, unit = text.split()
        micrometers = float(number) * {"µm": 1, "mm": 1000}[unit]
        # Between two places on the slide that are that far apart lie as many pixels of the screen.
        first, second = shown.screen(0, 0)[0], shown.screen(micrometers / MPP, 0)[0]
        drawn = shown.page.locator("#scale-bar").bounding_box()["width"]
        assert drawn == pytest.approx(second - first, abs=0.6)
        assert 40 <= drawn <= 150
        lengths.add(text)
    assert len(lengths) == 3


def test_magnification_follows_the_resolution(shown):
    shown.open()
    shown.page.locator("#magnifications button", has_text="10×").click()
    shown.settle()
    assert shown.page.inner_text("#magnification") == "10×"
    assert shown.downsample == pytest.approx(10 / MPP / 10)  # 20× is one pixel per 0.5 µm
    assert shown.page.locator("#magnifications button", has_text="40×").count() == 0  # more than was scanned


def test_heatmap_lies_on_its_tiles_and_can_be_hidden_and_faded(shown):
    shown.open()
    box = shown.page.locator("img.heatmap").bounding_box()
    left, top = shown.screen(0, 0)
    right, bottom = shown.screen(10 * TILE, 2 * TILE)
    assert (box["x"], box["y"]) == pytest.approx((left, top), abs=1)
    assert (box["width"], box["height"]) == pytest.approx((right - left, bottom - top), abs=1)

    x, y = (round(value) for value in shown.screen(64, 192))
    shades = []
    for percent in (0, 40, 90):
        shown.set_opacity(percent)
        assert shown.page.inner_text("#heatmap-percent") == f"{percent} %"
        shown.page.wait_for_timeout(100)
        shades.append(shown.pixels()[y, x, 0])
    assert shades[0] < shades[1] - 20 < shades[2] - 40
    shown.page.keyboard.press("Tab")
    shown.page.keyboard.press("h")
    assert shown.page.locator("img.heatmap").count() == 0
    assert not shown.page.is_checked("#heatmap-on")
    assert shown.becomes(lambda: abs(shown.pixels()[y, x, 0] - shades[0]) <= 3)
    shown.page.locator("#heatmap-on").check(force=True)
    assert shown.page.locator("img.heatmap").count() == 1


def red_share(shown: Shown, x: float, y: float) -> float:
    """How much of a small square of the screen around a place has the color of the sample's contour."""
    left, top = (round(value) for value in shown.screen(x, y))
    square = shown.pixels()[top - 3 : top + 4, left - 3 : left + 4]
    return float((np.abs(square - (200, 0, 0)).max(axis=-1) < 40).mean())


def test_contours_are_drawn_from_the_corner_of_the_scanned_area_and_can_be_hidden(shown):
    shown.open()
    shown.page.locator("#heatmap-on").uncheck(force=True)
    shown.page.mouse.move(5, 5)
    shown.page.wait_for_selector("#contours-control[data-loaded='1']")
    on_ring = [(640, 100), (1280, 200), (900, 256)]
    places = [(x + BOUNDS_X, y + BOUNDS_Y) for x, y in on_ring if x + BOUNDS_X < WIDTH]
    shown.page.wait_for_timeout(200)
    assert shown.becomes(lambda: all(red_share(shown, *place) > 0.2 for place in places))
    assert red_share(shown, 640, 100) == 0  # without the offset
    assert shown.page.inner_text("#classes").split() == ["tumor", "1"]
    shown.page.locator("#classes input").uncheck()
    assert shown.becomes(lambda: all(red_share(shown, *place) == 0 for place in places))
    shown.page.locator("#classes input").check()
    assert shown.becomes(lambda: all(red_share(shown, *place) > 0.2 for place in places))
    shown.page.locator("#contours-on").uncheck(force=True)
    assert shown.becomes(lambda: all(red_share(shown, *place) == 0 for place in places))


def test_pointer_reads_the_probabilities_of_the_tile_below_it(shown):
    shown.open()
    shown.point_at(5 * TILE + 60, 60)
    assert shown.shows("#tile", "normal\n50 %\ntumor\n50 %")
    shown.point_at(7 * TILE + 60, TILE + 60)
    assert shown.shows("#tile", "normal\n30 %\ntumor\n70 %")
    assert shown.shows(".verdict", "tumor 70 %")
    box = shown.page.locator("path.tile-outline").bounding_box()
    assert (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) == pytest.approx(
        shown.screen(7.5 * TILE, 1.5 * TILE), abs=2
    )
    x, y = (int(part.split()[1]) for part in shown.page.inner_text("#position").removesuffix(" px").split(","))
    assert abs(x - (7 * TILE + 60)) <= 2 * shown.downsample
    assert abs(y - (TILE + 60)) <= 2 * shown.downsample
    shown.point_at(60, TILE + 60)  # the tile that failed
    assert shown.shows(".verdict", "not read")
    shown.point_at(650, 700)  # no tile there
    assert shown.shows("#tile", "normal\n–\ntumor\n–")
    assert shown.shows(".verdict", "")


def test_strongest_tiles_are_visited_in_order(shown):
    shown.open()
    seen = []
    for step in ("next", "next", "previous"):
        shown.page.click(f"#strongest-{step}")
        shown.settle()
        center = [round(float(value)) for value in shown.page.evaluate("location.hash").lstrip("#").split(",")[:2]]
        seen.append((shown.page.inner_text("#strongest-place"), center))
    first, second = [9 * TILE + TILE // 2, TILE // 2], [7 * TILE + TILE // 2, TILE // 2]
    assert seen == [("1 / 5", first), ("2 / 5", second), ("1 / 5", first)]


def test_overview_shows_where_and_goes_there(shown):
    shown.open("#650,450,4.00")
    box = shown.page.locator("#overview").bounding_box()
    frame = shown.page.locator("#frame").bounding_box()
    assert frame["x"] + frame["width"] / 2 == pytest.approx(box["x"] + box["width"] / 2, abs=2)
    shown.page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.75)
    shown.settle()
    x, y, zoom = map(float, shown.page.evaluate("location.hash").lstrip("#").split(","))
    assert (x, y) == pytest.approx((WIDTH * 0.25, HEIGHT * 0.75), abs=12)
    assert zoom == 4


def test_reloading_shows_the_same_place(shown):
    shown.open("#400,300,2.50")
    shown.page.reload()
    shown.page.wait_for_selector(READY)
    assert shown.page.evaluate("location.hash") == "#400,300,2.50"
    assert shown.zoom == 2.5


def test_without_a_prediction_there_are_no_controls_for_one(browser, slide):
    with served(slide) as server:
        view = watched(browser, server.address)
        view.open()
        assert view.page.is_hidden("#prediction")
        view.page.keyboard.press("h")
        view.point_at(650, 450)
        assert view.errors == []
        view.page.close()


def test_names_from_files_are_shown_as_text(browser, slide, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    folder = write_prediction(tmp_path, slide.name, slide.fingerprint)
    table = folder / f"{slide.name}.csv"
    table.write_text(table.read_text().replace("prob_tumor", f"prob_{name}"))
    contours = folder / f"{slide.name}.geojson"
    contours.write_text(contours.read_text().replace('"name": "tumor"', f'"name": "{name}"'))
    summary = json.loads((folder / f"{slide.name}.json").read_text())
    summary["overlay"]["class"] = name
    (folder / f"{slide.name}.json").write_text(json.dumps(summary))
    with served(slide, find_overlay(folder, slide)) as server:
        view = watched(browser, server.address)
        view.open()
        view.point_at(9 * TILE + 60, 60)
        assert view.shows(".verdict", f"{name} 90 %")
        assert name in view.page.inner_text("#classes")
        assert name in view.page.inner_text("#heatmap-class")
        assert view.errors == []
        view.page.close()


def test_a_server_that_is_gone_is_said_plainly(browser, slide):
    with served(slide) as server:
        view = watched(browser, server.address)
        view.open()
    view.page.click(".leaflet-control-zoom-in")
    view.page.wait_for_selector("#failure:not([hidden])")
    assert "still running" in view.page.inner_text("#failure")
    view.page.close()


def test_a_slide_without_resolution_has_a_bar_in_pixels(browser, tmp_path):
    with Slide(write_slide(tmp_path / "plain.tiff", mpp=None)) as plain, served(plain) as server:
        view = watched(browser, server.address)
        view.open("#650,450,3.00")
        assert view.page.inner_text("#scale-text") == "100 px"
        assert view.page.locator("#scale-bar").bounding_box()["width"] == pytest.approx(100, abs=0.6)
        assert view.page.inner_text("#magnification") == "1 : 1"
        assert "unknown" in view.page.inner_text("#facts")
        view.page.close()
