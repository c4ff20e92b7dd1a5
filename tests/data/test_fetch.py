"""Downloads, from a server on loopback that cuts, lies, moves and changes its mind."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medkd.data import fetch
from medkd.data.cards import Card, CardFile
from medkd.data.fetch import fetch_dataset, verify_checksum
from medkd.errors import InputError

CONTENT = bytes(range(256)) * 4000  # about 1 MB


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; the switches say how badly."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag: str | None = '"v1"'
        self.cut_after: list[int] = []  # bytes of content to send on the next connections before closing
        self.statuses: list[int] = []  # answers to give first
        self.ignores_range = False
        self.lies_about_range = False
        self.redirect: str | None = None
        self.chunked = False
        self.requests: list[str | None] = []  # the Range of each

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        start = 0
        wanted = self.headers.get("Range")
        if wanted and not server.ignores_range and self.headers.get("If-Range") in (None, server.etag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            said = start + 7 if server.lies_about_range else start
            self.send_header("Content-Range", f"bytes {said}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if not server.chunked:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut_after.pop(0)] if server.cut_after else body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "_WAIT_S", 0.0)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def card_for(server: Server, **changes: Any) -> Card:
    file = {"path": "file.bin", "url": server.url, "sha256": hashlib.sha256(CONTENT).hexdigest()} | changes
    return Card(
        name="test_set",
        title="t",
        modality="m",
        task="segmentation",
        licence="CC0",
        licence_verified=False,
        citation="c",
        home_page="https://example.org",
        access="direct",
        how_to_get="ask the provider",
        download_allowed=True,
        files=[CardFile.model_validate({key: value for key, value in file.items() if value is not None})],
    )


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_arrives_whole_and_verified(server: Server, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    paths = fetch_dataset(card_for(server), tmp_path / "new" / "root", progress=lambda *a: told.append(a))
    assert paths == [tmp_path / "new" / "root" / "file.bin"]
    assert paths[0].read_bytes() == CONTENT
    assert names(tmp_path / "new" / "root") == ["file.bin"]
    assert told[-1] == ("file.bin", len(CONTENT), len(CONTENT))


def test_a_published_md5_is_enough(server: Server, tmp_path: Path) -> None:
    md5 = hashlib.md5(CONTENT).hexdigest()
    fetch_dataset(card_for(server, sha256=None, md5=md5, checksum_source="provider"), tmp_path)
    with pytest.raises(InputError, match="MD5"):
        fetch_dataset(card_for(server, sha256=None, md5="0" * 32, checksum_source="provider"), tmp_path)


def test_cut_connections_are_continued_where_they_ended(server: Server, tmp_path: Path) -> None:
    server.cut_after = [300_000, 1, 0, 200_000]
    fetch_dataset(card_for(server), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=300001-", "bytes=300001-", "bytes=500001-"]
    assert names(tmp_path) == ["file.bin"]


def test_a_later_run_continues_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    server.cut_after = [400_000, 0, 0, 0, 0, 0]
    with pytest.raises(InputError, match="after 400000 bytes; run the same command again to continue"):
        fetch_dataset(card_for(server), tmp_path)
    assert not (tmp_path / "file.bin").exists()
    server.requests.clear()
    fetch_dataset(card_for(server), tmp_path)
    assert server.requests == ["bytes=400000-"]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    server.ignores_range = True
    server.cut_after = [400_000]
    fetch_dataset(card_for(server), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_that_always_cuts_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ignores_range = True
    server.cut_after = [400_000] * 9
    with pytest.raises(InputError, match="connection was cut"):
        fetch_dataset(card_for(server), tmp_path)


def test_a_file_that_changed_meanwhile_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    server.content = bytes(len(CONTENT))
    server.cut_after = [400_000, 0, 0, 0, 0, 0]
    with pytest.raises(InputError):
        fetch_dataset(card_for(server), tmp_path)
    server.content, server.etag = CONTENT, '"v2"'
    fetch_dataset(card_for(server), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_range_that_starts_elsewhere_is_not_appended(server: Server, tmp_path: Path) -> None:
    server.cut_after = [400_000]
    server.lies_about_range = True
    with pytest.raises(InputError, match=r"does not start at byte 400000"):
        fetch_dataset(card_for(server), tmp_path)
    assert (tmp_path / "file.bin.partial").stat().st_size == 400_000


def test_a_complete_leftover_needs_no_more_bytes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.partial").write_bytes(CONTENT)
    fetch_dataset(card_for(server), tmp_path)
    assert names(tmp_path) == ["file.bin"]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_leftover_longer_than_the_file_is_started_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.partial").write_bytes(CONTENT + b"more")
    fetch_dataset(card_for(server), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_length_that_is_not_said_is_no_obstacle(server: Server, tmp_path: Path) -> None:
    server.chunked = True
    server.etag = None
    fetch_dataset(card_for(server), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(InputError, match="gave a file that has the SHA-256") as caught:
        fetch_dataset(card_for(server), tmp_path)
    assert server.url in str(caught.value)
    assert names(tmp_path) == []


def test_busy_servers_are_asked_again_and_missing_files_are_not(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    fetch_dataset(card_for(server), tmp_path)
    assert len(server.requests) == 3
    server.statuses = [404]
    with pytest.raises(InputError, match="answered 404"):
        fetch_dataset(card_for(server), tmp_path / "other")
    assert len(server.requests) == 4
    assert names(tmp_path) == ["file.bin", "other"]


def test_no_server_at_all_is_one_line(tmp_path: Path, server: Server) -> None:
    card = card_for(server, url="http://127.0.0.1:1/file.bin")
    with pytest.raises(InputError, match=r"fails .* after 0 bytes") as caught:
        fetch_dataset(card, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("elsewhere", ["http://example.org/x", "ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_redirects_to_other_kinds_of_address_are_refused(server: Server, tmp_path: Path, elsewhere: str) -> None:
    server.redirect = elsewhere
    with pytest.raises(InputError, match=r"is not an https address|answered 302"):
        fetch_dataset(card_for(server), tmp_path)
    assert names(tmp_path) == []


def test_plain_http_beyond_loopback_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an https address"):
        fetch_dataset(card_for(server, url="http://example.org/file.bin"), tmp_path / "root")
    assert names(tmp_path) == []


def test_without_a_checksum_the_user_is_told_what_to_do(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no checksum to verify a download by; ask the provider"):
        fetch_dataset(card_for(server, sha256=None), tmp_path / "root")
    assert server.requests == []
    assert names(tmp_path) == []


def test_a_dataset_that_is_not_for_download_says_how_to_get_it(server: Server, tmp_path: Path) -> None:
    card = card_for(server).model_copy(update={"download_allowed": False, "licence": "by application"})
    with pytest.raises(InputError, match=r"licence: by application.; ask the provider"):
        fetch_dataset(card, tmp_path)
    assert server.requests == []


def test_an_existing_file_is_verified_and_never_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match="has the SHA-256"):
        fetch_dataset(card_for(server), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    (tmp_path / "file.bin").write_bytes(CONTENT)
    fetch_dataset(card_for(server), tmp_path)
    assert server.requests == []


def test_a_size_other_than_the_cards_is_refused_before_it_is_read(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"offers {len(CONTENT)} bytes, the card says 5"):
        fetch_dataset(card_for(server, size_bytes=5), tmp_path)
    assert names(tmp_path) == []


def test_a_full_disk_is_told_before_anything_is_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="has 1000 free"):
        fetch_dataset(card_for(server), tmp_path)
    assert names(tmp_path) == []


def test_two_processes_do_not_fetch_one_file_together(server: Server, tmp_path: Path) -> None:
    with fetch._locked(tmp_path / "file.bin"), pytest.raises(InputError, match="by another process"):
        fetch_dataset(card_for(server), tmp_path)


def archive_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_an_archive_is_unpacked_once(server: Server, tmp_path: Path) -> None:
    server.content = archive_of(set__a=b"1")
    sha256 = hashlib.sha256(server.content).hexdigest()
    card = card_for(server, sha256=sha256, path="set.tar.gz", unpack="tar", unpacks_to="set")
    assert fetch_dataset(card, tmp_path) == [tmp_path / "set"]
    assert names(tmp_path) == ["set", "set.tar.gz", "set/a"]
    (tmp_path / "set.tar.gz").unlink()
    assert fetch_dataset(card, tmp_path) == [tmp_path / "set"]
    assert len(server.requests) == 1


def test_a_hostile_archive_lands_nowhere(server: Server, tmp_path: Path) -> None:
    server.content = archive_of(**{"set__a": b"1", "..__evil": b"2"})
    sha256 = hashlib.sha256(server.content).hexdigest()
    card = card_for(server, sha256=sha256, path="set.tar.gz", unpack="tar", unpacks_to="set")
    with pytest.raises(InputError, match="outside its folder"):
        fetch_dataset(card, tmp_path / "root")
    assert names(tmp_path) == ["root", "root/set.tar.gz"]


def test_an_archive_without_what_the_card_promises_is_reported(server: Server, tmp_path: Path) -> None:
    server.content = archive_of(other__a=b"1")
    sha256 = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(InputError, match="did not hold set"):
        fetch_dataset(card_for(server, sha256=sha256, path="s.tgz", unpack="tar", unpacks_to="set"), tmp_path)


def test_a_checksum_of_a_file_seen_can_be_compared_without_network(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    sha256 = hashlib.sha256(b"a").hexdigest()
    assert verify_checksum(tmp_path / "a", CardFile(path="a", sha256=sha256)) == sha256
