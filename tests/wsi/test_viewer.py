"""The viewer's server gives a browser on this computer the slide and its prediction, and gives nobody anything else."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from wsi.viewer_samples import HEIGHT, MPP, TILE, WIDTH, served, write_prediction, write_slide

from medkd.errors import ConfigError, InputError
from medkd.workflows import slide_view
from medkd.wsi.slides import Region, Slide
from medkd.wsi.viewer import DeepZoom, ViewerServer, deep_zoom, find_overlay
from medkd.wsi.viewer.deep_zoom import BoundedCache, striped
from medkd.wsi.viewer.overlay import TileTable, read_tile_table
from medkd.wsi.viewer.server import NotServed


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Iterator[Slide]:
    with Slide(write_slide(tmp_path_factory.mktemp("slides") / "case 7.tiff")) as opened:
        yield opened


@pytest.fixture(scope="module")
def prediction(slide, tmp_path_factory) -> Path:
    return write_prediction(tmp_path_factory.mktemp("prediction"), slide.name, slide.fingerprint)


@pytest.fixture(scope="module")
def server(slide, prediction) -> Iterator[ViewerServer]:
    with served(slide, find_overlay(prediction, slide)) as running:
        yield running


def ask(server: ViewerServer, target: str, *, method: str = "GET", host: str | None = None, secret: bool = True):
    """Status, headers and body of a request; the target is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, f"/{server.secret}/{target}" if secret else target, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{server.port}")
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), body


def picture(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


# ---- who may ask, and for what


def test_listens_on_this_computer_only(server):
    assert server.address.startswith("http://127.0.0.1:")
    assert server._http.socket.getsockname()[0] == "127.0.0.1"
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        with socket.socket() as client:
            client.settimeout(2)
            assert client.connect_ex((address, server.port)) != 0


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "[::1]", ""])
def test_a_request_for_another_host_is_refused(server, host):
    assert ask(server, "slide.json", host=host)[0] in (400, 403)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:9000"])
def test_this_computer_may_be_named_with_any_port_as_ssh_forwards_it(server, host):
    assert ask(server, "slide.json", host=host)[0] == 200


def test_two_hosts_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        head = f"GET /{server.secret}/ HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 403")


def test_nothing_is_given_without_the_secret(server):
    for target in ("/", "/slide.json", "/tiles/0/0/0.jpeg", f"/{server.secret[:-1]}/slide.json", f"/{server.secret}"):
        assert ask(server, target, secret=False)[0] == 404
    with served(server._slide) as another:
        assert another.secret != server.secret
        assert len(another.secret) >= 16


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "ANYTHING"])
def test_only_get_is_answered(server, method):
    status, headers, body = ask(server, "slide.json", method=method)
    assert (status, headers["Allow"]) == (405, "GET")
    assert b"case 7" not in body


@pytest.mark.parametrize(
    "target",
    [
        "../pyproject.toml", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc/passwd", "//etc/passwd",
        "tiles/../slide.json", "tiles/0/0/../0.jpeg", "static/viewer.js", "leaflet/leaflet.js", "leaflet-src.js",
        "viewer.js/", "viewer.css/../server.py", "case%207.csv", "case 7.json", "tiles/", "images/layers.png",
    ],
)  # fmt: skip
def test_no_other_file_can_be_had(server, target):
    status, _, body = ask(server, target.replace(" ", "%20"))
    assert status == 404
    assert body == b"404 Not Found\n"


@given(st.text(alphabet="./%2ef\\abtiles0159-+_jpg?#:[]", max_size=40))
def test_any_path_gives_the_page_a_tile_or_nothing(server, path):
    with suppress(NotServed):
        content_type = server.answer(f"/{server.secret}/{path}").content_type
        assert content_type == ("image/jpeg" if path.startswith("tiles/") else "text/html; charset=utf-8")


@pytest.mark.parametrize(
    "tile",
    [
        "3/6/0", "3/0/4", "3/9/9", "9/0/0", "99/0/0", "100/0/0", "-1/0/0", "0/-1/0", "0/0/0.5", "0/0/0x0", "0/0/１",
        "0/0/1e0", " 0/0/0", "0/0/999999", "0/0/9999999999", "0/0", "0/0/0/0", "a/b/c",
    ],
)  # fmt: skip
def test_a_tile_that_is_not_there_is_not_found(server, tile):
    assert ask(server, f"tiles/{quote(tile, safe='/-')}.jpeg")[0] == 404


@pytest.mark.parametrize(
    ("target", "content_type"),
    [
        ("", "text/html; charset=utf-8"),
        ("viewer.css", "text/css; charset=utf-8"),
        ("viewer.js", "text/javascript; charset=utf-8"),
        ("leaflet.css", "text/css; charset=utf-8"),
        ("leaflet.js", "text/javascript; charset=utf-8"),
        ("slide.json", "application/json; charset=utf-8"),
        ("tiles/0/0/0.jpeg", "image/jpeg"),
        ("overview.jpeg", "image/jpeg"),
        ("heatmap.png", "image/png"),
        ("contours.geojson", "application/geo+json; charset=utf-8"),
        ("tile.json?x=1&y=1", "application/json; charset=utf-8"),
        ("strongest.json?class=tumor", "application/json; charset=utf-8"),
        ("nothing", "text/plain; charset=utf-8"),
    ],
)
def test_every_answer_says_what_it_is_and_forbids_loads_from_elsewhere(server, target, content_type):
    _, headers, body = ask(server, target)
    assert headers["Content-Type"] == content_type
    assert int(headers["Content-Length"]) == len(body) > 0
    policy = dict(rule.strip().partition(" ")[::2] for rule in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert all(source in ("'self'", "'none'", "data:") for value in policy.values() for source in value.split())
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"
    assert "Python" not in headers["Server"]


def test_the_page_names_nothing_outside(server):
    for file in ("", "viewer.css", "viewer.js"):
        assert b"://" not in ask(server, file)[2]


def test_the_page_tells_no_path_and_no_property_of_the_file(server, slide):
    facts = ask(server, "slide.json")[2]
    assert str(slide.path.parent).encode() not in facts
    assert set(json.loads(facts)) == {
        "file", "width", "height", "mpp", "mpp_source", "objective_power", "vendor", "bounds", "tile_px", "overlap_px",
        "max_zoom", "version", "overlay",
    }  # fmt: skip


def test_a_request_that_is_not_http_is_refused_without_html(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"<script>alert(1)</script>\r\n\r\n")
        assert b"<" not in client.recv(1000)


def test_a_port_in_use_is_a_usage_error(server, slide):
    with pytest.raises(ConfigError, match=f"--port {server.port}"):
        ViewerServer(slide, port=server.port)
    with pytest.raises(ConfigError, match="--port 70000"):
        ViewerServer(slide, port=70000)


# ---- tiles


def test_tiles_of_the_last_zoom_are_the_slide_itself(server):
    body = ask(server, "tiles/3/2/1.jpeg")[2]
    pixels = picture(body).astype(int)
    assert pixels.shape == (258, 258, 3)  # two pixels more than its share, so that tiles meet at any zoom
    y, x = np.mgrid[256:514, 512:770]
    assert np.abs(pixels[..., 0] - x * 255 // WIDTH).max() <= 4
    assert np.abs(pixels[..., 1] - y * 255 // HEIGHT).max() <= 4


def test_tiles_at_the_border_are_cut_to_the_slide(slide):
    zoom = DeepZoom(slide)
    assert zoom.max_zoom == 3
    assert zoom.size_at(1) == (325, 225)
    assert picture(zoom.tile(3, 5, 3)).shape == (HEIGHT - 768, WIDTH - 1280, 3)
    assert picture(zoom.tile(1, 0, 0)).shape == (225, 258, 3)
    assert picture(zoom.tile(0, 0, 0)).shape == (113, 163, 3)


def test_every_zoom_shows_the_same_place(slide):
    zoom = DeepZoom(slide)
    for level in range(4):
        pixels = picture(zoom.tile(level, 0, 0)).astype(int)
        factor = 2 ** (3 - level)
        height, width = (min(side, 100) for side in pixels.shape[:2])
        y, x = (np.mgrid[:height, :width] + 0.5) * factor
        assert np.abs(pixels[:height, :width, 0] - x * 255 / WIDTH).max() < 5
        assert np.abs(pixels[:height, :width, 1] - y * 255 / HEIGHT).max() < 5


def test_a_tile_put_together_from_smaller_ones_looks_like_one_read_at_once(slide, monkeypatch):
    at_once = picture(DeepZoom(slide).tile(0, 0, 0)).astype(int)
    monkeypatch.setattr(deep_zoom, "MAX_SOURCE_PX", 512 * 512)
    sizes = []
    read_region = slide.read_region
    monkeypatch.setattr(slide, "read_region", lambda *a, **k: sizes.append(k["mpp"]) or read_region(*a, **k))
    composed = picture(DeepZoom(slide).tile(0, 0, 0)).astype(int)
    assert max(sizes) <= 2 * MPP  # no read covered more than 512 px of the slide
    assert composed.shape == at_once.shape
    assert np.abs(composed - at_once).max() <= 10  # the last pixel lies half outside


def test_the_first_zooms_of_a_huge_slide_are_put_together(slide, monkeypatch):
    monkeypatch.setattr(deep_zoom, "MAX_FACTOR", 2)
    factors = []
    read_region = slide.read_region
    monkeypatch.setattr(slide, "read_region", lambda *a, **k: factors.append(k["mpp"] / MPP) or read_region(*a, **k))
    assert picture(DeepZoom(slide).tile(0, 0, 0)).shape == (113, 163, 3)
    assert set(factors) == {2}
    at_once = picture(DeepZoom(slide).tile(2, 1, 0)).astype(int)
    monkeypatch.setattr(deep_zoom, "MAX_FACTOR", 1)
    composed = picture(DeepZoom(slide).tile(2, 1, 0)).astype(int)
    assert composed.shape == at_once.shape == (258, 258, 3)
    assert np.abs(composed - at_once).max() <= 6
    assert picture(DeepZoom(slide).overview(100)).shape == (69, 100, 3)


def test_pixels_that_could_not_be_read_are_striped(slide, monkeypatch):
    valid = np.ones((258, 258), dtype=bool)
    valid[:100, :100] = False
    white = np.full((258, 258, 3), 255, dtype=np.uint8)
    monkeypatch.setattr(slide, "read_region", lambda *a, **k: Region(white, valid))
    pixels = picture(DeepZoom(slide).tile(3, 0, 0))
    assert pixels[128:, 128:].min() == 255
    assert pixels[:90, :90, 1].max() < 245
    assert (striped(white, valid)[valid] == 255).all()


def test_the_tile_cache_is_bounded():
    cache: BoundedCache[int, bytes] = BoundedCache(100)
    for key in range(50):
        cache.put(key, b"x" * 30, 30)
        assert cache.held_bytes <= 100
    assert cache.get(49) is not None
    assert cache.get(0) is None
    cache.put(49, b"", 0)
    assert cache.held_bytes == 60


def test_many_browsers_get_the_same_tiles(server):
    wanted = [f"tiles/3/{column}/{row}.jpeg" for column in range(6) for row in range(4)] * 2
    answers: dict[str, set[bytes]] = {target: set() for target in wanted}

    def browse(targets: list[str]) -> None:
        for target in targets:
            answers[target].add(ask(server, target)[2])

    threads = [threading.Thread(target=browse, args=(wanted[start::6],)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(bodies) == 1 for bodies in answers.values())


def test_a_slide_without_resolution_is_shown_without_lengths(tmp_path):
    with Slide(write_slide(tmp_path / "plain.tiff", mpp=None)) as plain, served(plain) as running:
        facts = json.loads(ask(running, "slide.json")[2])
        assert facts["mpp"] is None
        assert picture(ask(running, "tiles/3/0/0.jpeg")[2]).shape == (258, 258, 3)


@pytest.mark.parametrize("error", [InputError("slide.tiff", "vanished", "bring it back"), ZeroDivisionError()])
def test_a_fault_is_logged_and_not_shown(slide, monkeypatch, caplog, error):
    def fail(*_: object) -> None:
        raise error

    with served(slide) as running:
        monkeypatch.setattr(running.deep_zoom, "tile", fail)
        assert ask(running, "tiles/0/0/0.jpeg")[::2] == (500, b"500 Internal Server Error\n")
        assert running.secret not in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, ZeroDivisionError)
    assert ("vanished" in caplog.text) == isinstance(error, InputError)


# ---- the prediction


def test_the_tile_under_a_position_is_found(server):
    tile = json.loads(ask(server, "tile.json?x=300.5&y=127.9")[2])
    assert {name: tile[name] for name in ("x", "y", "width", "height")} == {
        "x": 256,
        "y": 0,
        "width": 128,
        "height": 128,
    }
    assert tile["probabilities"] == {"normal": pytest.approx(0.8), "tumor": pytest.approx(0.2)}
    assert json.loads(ask(server, "tile.json?x=300&y=256")[2]) is None
    assert json.loads(ask(server, "tile.json?x=-1&y=1")[2]) is None


def test_a_failed_tile_has_no_probabilities(server):
    tile = json.loads(ask(server, "tile.json?x=1&y=200")[2])
    assert tile["probabilities"] == {"normal": None, "tumor": None}


@pytest.mark.parametrize("query", ["", "?x=1", "?x=nan&y=1", "?x=inf&y=1", "?x=1&y=1e9", "?x=0x1&y=1", "?x=1&y=%00"])
def test_a_position_that_is_no_number_is_refused(server, query):
    assert ask(server, f"tile.json{query}")[0] == 400


def test_the_strongest_tiles_come_first_and_are_no_neighbors(server):
    tiles = json.loads(ask(server, "strongest.json?class=tumor")[2])
    assert [tile["x"] for tile in tiles] == [x * TILE for x in (9, 7, 5, 3, 1)]
    assert ask(server, "strongest.json?class=unknown")[0] == 404


def test_of_overlapping_tiles_the_nearest_center_wins(tmp_path):
    table = tmp_path / "tiles.csv"
    table.write_text("x,y,width,height,prob_a\n0,0,100,100,0.1\n50,0,100,100,0.2\n0,50,100,100,0.3\n")
    tiles = read_tile_table(table)
    assert tiles.at(60, 20).probabilities == {"a": 0.1}
    assert tiles.at(80, 20).probabilities == {"a": 0.2}
    assert tiles.at(20, 80).probabilities == {"a": 0.3}
    assert tiles.at(200, 20) is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, unique=True), st.data())
def test_lookup_agrees_with_a_search_of_every_tile(places, data):
    geometry = np.array([(x * 10, y * 10, 25, 25) for x, y in places], dtype=float)
    table = TileTable(geometry, np.zeros((len(places), 1)), ("a",))
    x, y = data.draw(st.tuples(st.integers(-10, 240), st.integers(-10, 240)))
    over = [g for g in geometry if g[0] <= x < g[0] + 25 and g[1] <= y < g[1] + 25]
    found = table.at(x, y)
    assert (found is None) == (not over)
    if found is not None:
        nearest = min(np.hypot(g[0] + 12.5 - x, g[1] + 12.5 - y) for g in over)
        assert np.hypot(found.x + 12.5 - x, found.y + 12.5 - y) == pytest.approx(nearest)


@pytest.mark.parametrize("outlines", [0, 1, 3])
@pytest.mark.parametrize("tiles", [0, 2])
def test_outlines_are_sent_without_the_tiles_after_them(tmp_path, slide, outlines, tiles):
    folder = write_prediction(tmp_path, slide.name, slide.fingerprint)
    kinds = ["annotation"] * outlines + ["tile"] * tiles
    lines = [json.dumps({"properties": {"objectType": kind}}, separators=(",", ":")) for kind in kinds]
    content = '{"type":"FeatureCollection","features":[' + ",".join(f"\n{line}" for line in lines) + "\n]}\n"
    (folder / f"{slide.name}.geojson").write_text(content)
    with served(slide, find_overlay(folder, slide)) as running:
        sent = json.loads(ask(running, "contours.geojson")[2])
        assert [feature["properties"]["objectType"] for feature in sent["features"]] == ["annotation"] * outlines


def test_a_geojson_of_another_program_is_sent_as_it_is(tmp_path, slide):
    folder = write_prediction(tmp_path, slide.name, slide.fingerprint)
    for indent in (None, 2):
        content = json.dumps({"features": [{"properties": {"objectType": "tile"}}] * 3}, indent=indent)
        (folder / f"{slide.name}.geojson").write_text(content)
        with served(slide, find_overlay(folder, slide)) as running:
            assert ask(running, "contours.geojson")[2].decode() == content


def test_an_empty_prediction_is_shown(tmp_path, slide):
    (tmp_path / f"{slide.name}.csv").write_text("x,y,width,height,prob_normal,prob_tumor\n")
    (tmp_path / f"{slide.name}.json").write_text(json.dumps({"fingerprint": slide.fingerprint, "overlay": None}))
    with served(slide, find_overlay(tmp_path, slide)) as running:
        facts = json.loads(ask(running, "slide.json")[2])["overlay"]
        assert (facts["tiles"], facts["heatmap"], facts["contours_bytes"]) == (0, None, None)
        assert json.loads(ask(running, "tile.json?x=1&y=1")[2]) is None
        assert json.loads(ask(running, "strongest.json?class=tumor")[2]) == []
        assert ask(running, "heatmap.png")[0] == 404
        assert ask(running, "contours.geojson")[0] == 404


def test_without_a_prediction_there_is_none_to_be_had(slide):
    with served(slide) as running:
        assert json.loads(ask(running, "slide.json")[2])["overlay"] is None
        for target in ("heatmap.png", "contours.geojson", "tile.json?x=1&y=1", "strongest.json?class=tumor"):
            assert ask(running, target)[0] == 404


def test_a_prediction_under_another_name_is_known_by_its_fingerprint(tmp_path, slide):
    folder = write_prediction(tmp_path, "slide-0001", slide.fingerprint)
    (folder / "failures.json").write_text("[]")
    assert find_overlay(folder, slide).name == "slide-0001"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, name: [file.unlink() for file in folder.iterdir()], "holds no prediction"),
        (lambda folder, name: (folder / f"{name}.json").write_text('{"fingerprint": "0"}'), "another file"),
        (lambda folder, name: (folder / f"{name}.json").write_text("{"), "JSON"),
        (lambda folder, name: (folder / f"{name}.csv").write_text("x,y,width,prob_a\n"), "no column height"),
        (lambda folder, name: (folder / f"{name}.csv").write_text("x,y,width,height\n"), "starts with prob_"),
        (lambda folder, name: (folder / f"{name}.csv").write_text("x,y,width,height,prob_a\n1,2,x,4,5\n"), "line 2"),
        (lambda folder, name: (folder / f"{name}.csv").write_text("x,y,width,height,prob_a\n1,2\n"), "line 2"),
        (lambda folder, name: (folder / f"{name}.csv").write_text("x,y,width,height,prob_a\nnan,1,2,3,4\n"), "line 2"),
    ],
)
def test_a_prediction_that_does_not_fit_is_refused(tmp_path, slide, spoil, message):
    folder = write_prediction(tmp_path / "prediction", slide.name, slide.fingerprint)
    spoil(folder, slide.name)
    with pytest.raises(InputError, match=message):
        find_overlay(folder, slide)


@pytest.mark.parametrize("file", ["../secret.png", "/etc/passwd", "notes.txt", 7, None])
def test_a_prediction_cannot_name_a_picture_outside_of_its_folder(tmp_path, slide, file):
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = write_prediction(tmp_path / "prediction", slide.name, slide.fingerprint)
    place = {"file": file, "x": 0, "y": 0, "width": 1, "height": 1}
    (folder / f"{slide.name}.json").write_text(json.dumps({"fingerprint": slide.fingerprint, "overlay": place}))
    with pytest.raises(InputError, match="names no picture of its own folder"):
        find_overlay(folder, slide)


def test_a_file_that_vanishes_is_not_found(tmp_path, slide):
    folder = write_prediction(tmp_path / "prediction", slide.name, slide.fingerprint)
    with served(slide, find_overlay(folder, slide)) as running:
        (folder / f"{slide.name}_overlay.png").unlink()
        (folder / f"{slide.name}.geojson").unlink()
        assert ask(running, "heatmap.png")[0] == 404
        assert ask(running, "contours.geojson")[0] == 404
        assert ask(running, "slide.json")[0] == 200


# ---- the workflow


def test_view_slide_announces_its_address_serves_and_stops_when_interrupted(tmp_path, monkeypatch, caplog):
    answers = []

    def announce(address: str) -> None:
        def browse() -> None:
            port, secret = address.removeprefix("http://127.0.0.1:").strip("/").split("/")
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
            connection.request("GET", f"/{secret}/slide.json")
            answers.append((connection.getresponse().status, secret))
            connection.close()
            interrupted.set()

        threading.Thread(target=browse, daemon=True).start()

    interrupted = threading.Event()
    serve_forever = ViewerServer.serve_forever

    def serve_until_interrupted(self: ViewerServer) -> None:
        threading.Thread(target=lambda: (interrupted.wait(20), self.stop()), daemon=True).start()
        serve_forever(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(ViewerServer, "serve_forever", serve_until_interrupted)
    caplog.set_level("DEBUG")
    slide_view.view_slide(write_slide(tmp_path / "slide.tiff"), port=0, announce=announce)
    assert answers[0][0] == 200
    assert answers[0][1] not in caplog.text


def test_view_slide_uses_the_given_resolution(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ViewerServer, "serve_forever", lambda self: seen.append(self.deep_zoom.mpp))
    slide_view.view_slide(write_slide(tmp_path / "slide.tiff", mpp=None), port=0, mpp=0.25)
    assert seen == [0.25]
