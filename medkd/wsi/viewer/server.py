"""Serves the page, the slide's tiles and the overlay to a browser on this computer, and to nobody else."""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import secrets
import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import xstatic.pkg.leaflet

import medkd
from medkd.errors import ConfigError, MedkdError
from medkd.wsi.slides import Slide
from medkd.wsi.viewer.deep_zoom import OVERLAP_PX, TILE_PX, DeepZoom
from medkd.wsi.viewer.overlay import Overlay, outlines_end

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
READERS = 4  # tiles decoded at a time, whatever a browser asks for
OVERVIEW_PX = 640
STRONGEST_TILES = 20
IDLE_SECONDS = 60
BLOCK_BYTES = 2**18
HEADERS = {
    # The page and all it shows come from this server: nothing is loaded from, or sent to, anywhere else.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",  # a patient's slide does not belong into a browser's cache on disk
}
OWN_FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
}
LEAFLET_FILES = {
    "leaflet.css": ("leaflet.css", "text/css; charset=utf-8"),
    "leaflet.js": ("leaflet.js", "text/javascript; charset=utf-8"),
}
JSON_TYPE = "application/json; charset=utf-8"
TILE_PATH = re.compile(r"tiles/([0-9]{1,2})/([0-9]{1,6})/([0-9]{1,6})\.jpeg", re.ASCII)
NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,6})?", re.ASCII)


class NotServed(Exception):  # noqa: N818 - an answer, not a fault
    """A request that gets a status and nothing else."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What goes back to the browser: bytes, or the beginning of a file, streamed, and bytes after it."""

    content_type: str
    body: bytes = b""
    file: Path | None = None
    file_bytes: int | None = None  # None: all of it


class ViewerServer:
    """A server for one slide, on 127.0.0.1 only.

    The address holds a secret, so that other users of this computer cannot look at the slide either. Requests must
    name this computer as their host, which keeps out pages that rebind their own name to 127.0.0.1.

    Args:
        slide: an open slide; it stays the caller's to close.
        overlay: what to show over it.
        port: 0 takes any free one.

    Raises:
        ConfigError: the port is taken or not allowed.
    """

    def __init__(self, slide: Slide, overlay: Overlay | None = None, port: int = 0) -> None:
        self.secret = secrets.token_urlsafe(12)
        self.deep_zoom = DeepZoom(slide)
        self.overlay = overlay
        self._readers = threading.BoundedSemaphore(READERS)
        self._slide = slide
        try:
            self._http = _HttpServer((HOST, port), self)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ConfigError(f"--port {port}", f"cannot be used ({reason})", "take another, or 0 for any") from error

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._http.server_address[1])

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.port}/{self.secret}/"

    def serve_forever(self) -> None:
        """Answer requests until `close` or an interrupt."""
        self._http.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Stop listening. Call it when `serve_forever` has returned, or from another thread."""
        self._http.server_close()
        self.deep_zoom.close()

    def stop(self) -> None:
        """Make `serve_forever`, which runs in another thread, return."""
        self._http.shutdown()

    def answer(self, target: str) -> Answer:
        """What the path and query of a GET request ask for.

        Raises:
            NotServed: nothing, or nothing that may be had.
        """
        whole_path, _, query = target.partition("?")
        secret, slash, path = whole_path.removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(secret.encode(), self.secret.encode()):
            raise NotServed(HTTPStatus.NOT_FOUND)
        if path in OWN_FILES:
            name, content_type = OWN_FILES[path]
            return Answer(content_type, resources.files(__package__).joinpath("static", name).read_bytes())
        if path in LEAFLET_FILES:
            name, content_type = LEAFLET_FILES[path]
            return Answer(content_type, file=Path(xstatic.pkg.leaflet.BASE_DIR, name))
        tile = TILE_PATH.fullmatch(path)
        if tile:
            return self._tile(*map(int, tile.groups()))
        routes: dict[str, Callable[[dict[str, str]], Answer]] = {
            "slide.json": self._slide_json,
            "overview.jpeg": self._overview,
            "heatmap.png": self._heatmap,
            "contours.geojson": self._contours,
            "tile.json": self._tile_json,
            "strongest.json": self._strongest_json,
        }
        if path not in routes:
            raise NotServed(HTTPStatus.NOT_FOUND)
        return routes[path]({name: values[-1] for name, values in parse_qs(query).items()})

    def _tile(self, zoom: int, column: int, row: int) -> Answer:
        try:
            with self._readers:
                return Answer("image/jpeg", self.deep_zoom.tile(zoom, column, row))
        except KeyError:
            raise NotServed(HTTPStatus.NOT_FOUND) from None

    def _overview(self, _: dict[str, str]) -> Answer:
        with self._readers:
            return Answer("image/jpeg", self.deep_zoom.overview(OVERVIEW_PX))

    def _slide_json(self, _: dict[str, str]) -> Answer:
        zoom, slide, overlay = self.deep_zoom, self._slide, self.overlay
        facts = {
            "file": slide.path.name,
            "width": zoom.width,
            "height": zoom.height,
            "mpp": zoom.mpp,
            "mpp_source": slide.mpp_source if zoom.mpp is not None else None,
            "objective_power": slide.objective_power,
            "vendor": slide.vendor,
            "bounds": slide.bounds,
            "tile_px": TILE_PX,
            "overlap_px": OVERLAP_PX,
            "max_zoom": zoom.max_zoom,
            "version": medkd.__version__,
            "overlay": None if overlay is None else _overlay_facts(overlay),
        }
        return _json(facts)

    def _heatmap(self, _: dict[str, str]) -> Answer:
        if self.overlay is None or self.overlay.heatmap is None:
            raise NotServed(HTTPStatus.NOT_FOUND)
        return Answer("image/png", file=self.overlay.heatmap.path)

    def _contours(self, _: dict[str, str]) -> Answer:
        if self.overlay is None or self.overlay.contours is None:
            raise NotServed(HTTPStatus.NOT_FOUND)
        try:
            length, ending = outlines_end(self.overlay.contours)
        except OSError:
            raise NotServed(HTTPStatus.NOT_FOUND) from None
        return Answer("application/geo+json; charset=utf-8", ending, self.overlay.contours, length)

    def _tile_json(self, query: dict[str, str]) -> Answer:
        if self.overlay is None or self.overlay.tiles is None:
            raise NotServed(HTTPStatus.NOT_FOUND)
        tile = self.overlay.tiles.at(_number(query, "x"), _number(query, "y"))
        return _json(None if tile is None else tile.as_json())

    def _strongest_json(self, query: dict[str, str]) -> Answer:
        if self.overlay is None or self.overlay.tiles is None:
            raise NotServed(HTTPStatus.NOT_FOUND)
        try:
            tiles = self.overlay.tiles.strongest(query.get("class", ""), STRONGEST_TILES)
        except KeyError:
            raise NotServed(HTTPStatus.NOT_FOUND) from None
        return _json([tile.as_json() for tile in tiles])


def _overlay_facts(overlay: Overlay) -> dict[str, Any]:
    return {
        "name": overlay.name,
        "classes": [] if overlay.tiles is None else overlay.tiles.classes,
        "tiles": 0 if overlay.tiles is None else len(overlay.tiles),
        "failed": overlay.failed,
        "colors": overlay.colors,
        "contours_bytes": _outline_bytes(overlay.contours),
        "heatmap": None if overlay.heatmap is None else overlay.heatmap.as_json(),
    }


def _outline_bytes(path: Path | None) -> int | None:
    """What the outlines weigh; None where there is no file, or none any more."""
    with suppress(OSError):
        return None if path is None else outlines_end(path)[0]
    return None


def _number(query: dict[str, str], name: str) -> float:
    text = query.get(name, "")
    if not NUMBER.fullmatch(text):
        raise NotServed(HTTPStatus.BAD_REQUEST)
    return float(text)


def _json(content: Any) -> Answer:
    return Answer(JSON_TYPE, json.dumps(content, allow_nan=False).encode())


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it would let two servers share a port

    def __init__(self, address: tuple[str, int], viewer: ViewerServer) -> None:
        self.viewer = viewer
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server for this computer's name, as the parent class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection and remember it."""
        connection, client = super().get_request()
        self._connections.add(connection)
        return connection, client

    def shutdown_request(self, request: Any) -> None:
        """End a connection and forget it."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening and end the connections that browsers keep open."""
        super().server_close()
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"  # one connection for many tiles
    server_version = "medkd"
    sys_version = ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d\n"  # of requests that are not HTTP
    timeout = IDLE_SECONDS
    _has_answered = False

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            self._require_local_host()
            answer = self.server.viewer.answer(self.path)
            self._send(answer)
        except NotServed as refusal:
            self._refuse(refusal.status)
        except ConnectionError:
            self.close_connection = True  # the browser moved on
        except MedkdError as error:  # the slide vanished, for one
            logger.warning("%s", error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)
        except Exception:
            logger.warning("%s could not be served", self._path_without_secret(), exc_info=True)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)

    def parse_request(self) -> bool:
        """Read the request's head; whatever is not a GET is refused here."""
        self._has_answered = False
        if not super().parse_request():
            return False
        if self.command != "GET":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED)
            return False
        return True

    def _require_local_host(self) -> None:
        """Only the name counts, not the port: ``ssh -L`` may have changed that."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].partition(":")[0] not in (HOST, "localhost"):
            raise NotServed(HTTPStatus.FORBIDDEN)

    def _send(self, answer: Answer) -> None:
        if answer.file is None:
            self._send_head(HTTPStatus.OK, answer.content_type, len(answer.body))
        else:
            self._send_file(answer.file, answer)
        self.wfile.write(answer.body)

    def _send_file(self, path: Path, answer: Answer) -> None:
        try:
            file = path.open("rb")
        except OSError:
            raise NotServed(HTTPStatus.NOT_FOUND) from None
        with file:
            left = os.fstat(file.fileno()).st_size if answer.file_bytes is None else answer.file_bytes
            self._send_head(HTTPStatus.OK, answer.content_type, left + len(answer.body))
            while left and (block := file.read(min(left, BLOCK_BYTES))):
                self.wfile.write(block)
                left -= len(block)
        if left:
            raise ConnectionAbortedError(f"{path.name} became shorter while it was sent")

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # a body that was not read must not be taken for the next request
        if self._has_answered:
            return
        body = f"{status.value} {status.phrase}\n".encode()
        try:
            self._send_head(status, "text/plain; charset=utf-8", len(body))
            if self.command != "HEAD":
                self.wfile.write(body)
        except ConnectionError:
            pass

    def _send_head(self, status: HTTPStatus, content_type: str, length: int) -> None:
        self._has_answered = True
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _path_without_secret(self) -> str:
        return self.path.partition("?")[0].replace(self.server.viewer.secret, "…")

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s %s", self.command, self._path_without_secret())
