"""Downloading a public dataset: the only module of medkd that touches the network, and only when asked.

A download continues where it was cut, is checked against the card's checksum before it gets its name, and is refused
without one. The server is trusted with nothing else.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import logging
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from medkd import __version__
from medkd.data.archives import unpack_archive
from medkd.data.atomic import atomic_write, sync_folder
from medkd.data.cards import Card, CardFile
from medkd.errors import InputError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, bytes so far, and bytes in all if the server says."""

_TIMEOUT_S = 60.0
_WAIT_S = 2.0  # before trying again, growing with each failure
_MAX_FAILURES = 5  # in a row without a single new byte
_CHUNK_BYTES = 2**18
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}


def fetch_dataset(card: Card, root: str | Path, *, progress: Progress | None = None) -> list[Path]:
    """Download the files of a dataset into a folder and unpack its archives.

    What is already there and right is left alone, so the same call continues an interrupted one.

    Args:
        card: the dataset's card.
        root: the dataset's folder; made if absent.
        progress: told how far each file is.

    Returns:
        The files, or what their archives unpacked to.

    Raises:
        InputError: the licence or the lack of a checksum leaves the download to the user (the message says how);
            the connection fails again and again; the file differs from its checksum; the disk is full; an archive is
            damaged or hostile.
    """
    root = Path(root)
    files = [file for file in card.files if file.url]
    where = f"dataset {card.name}"
    if not card.download_allowed or not files:
        raise InputError(where, f"is not for medkd to download (licence: {card.licence})", card.how_to_get)
    for file in files:
        if file.sha256 is None and file.md5 is None:
            raise InputError(f"{where}: {file.path}", "has no checksum to verify a download by", card.how_to_get)
        _refuse_unsafe_url(str(file.url))
    root.mkdir(parents=True, exist_ok=True)
    return [_fetch_file(file, root, progress) for file in files]


def verify_checksum(path: Path, file: CardFile) -> str:
    """Compare a file with its card.

    Returns:
        The SHA-256 of the file.

    Raises:
        InputError: it differs.
    """
    with open(path, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() if file.md5 else None
    for kind, found, expected in (("SHA-256", sha256, file.sha256), ("MD5", md5, file.md5)):
        if expected is not None and found != expected:
            raise InputError(path, f"has the {kind} {found}, the card says {expected}", "delete it and fetch it again")
    return sha256


def _fetch_file(file: CardFile, root: Path, progress: Progress | None) -> Path:
    target = root / file.path
    unpacked = root / file.unpacks_to if file.unpacks_to else None
    if unpacked is not None and unpacked.exists():
        logger.info("%s is already there", unpacked)
        return unpacked
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as partial:
        if not target.exists():
            _download(str(file.url), partial, file, progress)
            try:
                sha256 = verify_checksum(partial, file)
            except InputError as error:
                partial.unlink()
                remedy = "try again later; if it stays so, the provider's file has changed"
                raise InputError(str(file.url), f"gave a file that {error.problem}", remedy) from None
            os.replace(partial, target)
            sync_folder(target.parent)
            logger.info("%s is complete (SHA-256 %s)", target, sha256)
        else:
            verify_checksum(target, file)
        if file.unpack is not None and unpacked is not None:
            unpack_archive(target, root, file.unpack)
            if not unpacked.exists():
                raise InputError(target, f"did not hold {file.unpacks_to}", "report this: the card is wrong")
            return unpacked
    return target


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """The file a download grows in, held against a second process."""
    partial = target.with_name(f"{target.name}.partial")
    with open(partial, "ab") as held:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(target, "is being fetched by another process", "wait for it") from None
        try:
            yield partial
        finally:
            if not partial.exists() or partial.stat().st_size == 0:
                partial.unlink(missing_ok=True)
                _validator_path(partial).unlink(missing_ok=True)


def _download(url: str, partial: Path, file: CardFile, progress: Progress | None) -> None:
    """Grow ``partial`` until it is complete, over as many connections as it takes."""
    failures = 0
    while True:
        before = partial.stat().st_size
        try:
            if _continue(url, partial, file, progress):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in _RETRIED_STATUS:
                raise InputError(
                    url, f"answered {error.code} {error.reason}", "see the home page on the card"
                ) from None
            reason = f"it answered {error.code}"
        except (http.client.HTTPException, OSError) as error:  # also URLError, resets, timeouts, TLS
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        failures = 0 if partial.stat().st_size > before else failures + 1
        if failures >= _MAX_FAILURES:
            have = partial.stat().st_size
            raise InputError(url, f"fails ({reason}) after {have} bytes", "run the same command again to continue")
        logger.warning("%s: %s at %d bytes; trying again", url, reason, partial.stat().st_size)
        time.sleep(_WAIT_S * failures)


def _continue(url: str, partial: Path, file: CardFile, progress: Progress | None) -> bool:
    """One connection. True when the file is complete, False when the connection ended before."""
    have = partial.stat().st_size
    headers = {"User-Agent": f"medkd/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator := _read_validator(partial, url):
            headers["If-Range"] = validator  # a file that changed meanwhile is sent from its start
    try:
        response = _OPENER.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        complete = error.headers.get("Content-Range", "") == f"bytes */{have}"
        if not complete:
            os.truncate(partial, 0)
        return complete
    with response:
        start, total = _place(response, have)
        _refuse_wrong_size(url, partial, file, start, total)
        if start != have:
            os.truncate(partial, 0)  # the server ignores ranges, or the file changed
        _write_validator(partial, url, response)
        return _receive(response, partial, start, total, lambda done: progress and progress(file.path, done, total))


def _receive(
    response: IO[bytes], partial: Path, start: int, total: int | None, report: Callable[[int], object]
) -> bool:
    done = start
    with open(partial, "ab") as stream:
        try:
            while chunk := response.read(_CHUNK_BYTES):
                try:
                    stream.write(chunk)
                    stream.flush()
                except OSError as error:
                    raise InputError(partial, f"cannot be written ({error.strerror})", "free some space") from None
                done += len(chunk)
                report(done)
                if total is not None and done > total:
                    raise InputError(partial, "is longer than the server said", "delete it and fetch it again")
        finally:
            os.fsync(stream.fileno())
    return total is None or done == total


def _place(response: Any, have: int) -> tuple[int, int | None]:
    """Where in the file the answer starts, and how long the file is."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != have:
            raise http.client.HTTPException(f"an answer that does not start at byte {have}")
        return have, None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdecimal() else None


def _refuse_wrong_size(url: str, partial: Path, file: CardFile, start: int, total: int | None) -> None:
    if total is None:
        return
    if file.size_bytes is not None and total != file.size_bytes:
        raise InputError(url, f"offers {total} bytes, the card says {file.size_bytes}", "see the home page on the card")
    free = shutil.disk_usage(partial.parent).free
    if total - start > free:
        problem = f"needs {total - start} bytes, but {partial.parent} has {free} free"
        raise InputError(url, problem, "free some space or choose another folder")


def _validator_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_validator(partial: Path, url: str) -> str | None:
    """What the server called this version of the file when the download began."""
    try:
        known = json.loads(_validator_path(partial).read_text(encoding="utf-8"))
        return str(known["validator"]) if known["url"] == url and known["validator"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_validator(partial: Path, url: str, response: Any) -> None:
    etag = response.headers.get("ETag", "")
    validator = response.headers.get("Last-Modified") if not etag or etag.startswith("W/") else etag
    with atomic_write(_validator_path(partial)) as stream:
        json.dump({"url": url, "validator": validator}, stream)


def _refuse_unsafe_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        return
    raise InputError(url, "is not an https address", "correct the card")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never to an address that would not have been asked in the first place."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _refuse_unsafe_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SafeRedirects)
