"""Archives: good ones unpack whole, hostile or damaged ones leave nothing."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medkd.data import archives
from medkd.data.archives import unpack_archive
from medkd.errors import InputError


def tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def entry(name: str, content: bytes = b"x", **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def zipped(path: Path, *members: tuple[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_unpacks_whatever_its_compression(tmp_path: Path, mode: str) -> None:
    folder = entry("set", b"", type=tarfile.DIRTYPE)
    members = [folder, entry("set/a/1.nii.gz", b"one"), entry("./set/b.txt", b"two", mode=0o4777)]
    archive = tar(tmp_path / "set.tar", members, mode)
    assert unpack_archive(archive, tmp_path, "tar") == [tmp_path / "set"]
    assert (tmp_path / "set/a/1.nii.gz").read_bytes() == b"one"
    assert everything(tmp_path) == {"set.tar", "set", "set/a", "set/a/1.nii.gz", "set/b.txt"}
    assert not (tmp_path / "set/b.txt").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


def test_zip_and_gz_unpack(tmp_path: Path) -> None:
    unpack_archive(zipped(tmp_path / "s.zip", ("d/", b""), ("d/a.txt", b"a"), ("b.txt", b"b")), tmp_path, "zip")
    assert (tmp_path / "d/a.txt").read_bytes() == b"a"
    (tmp_path / "t.h5.gz").write_bytes(gzip.compress(b"table"))
    assert unpack_archive(tmp_path / "t.h5.gz", tmp_path, "gz") == [tmp_path / "t.h5"]
    assert (tmp_path / "t.h5").read_bytes() == b"table"


def zip_with_wrong_size(path: Path) -> Path:
    """A member that claims one byte and holds a megabyte."""
    zipped(path, ("a.txt", bytes(2**20)))
    content = path.read_bytes().replace((2**20).to_bytes(4, "little"), (1).to_bytes(4, "little"))
    path.write_bytes(content)
    return path


def pax_bomb(path: Path) -> Path:
    """A header that says it is 8 GiB long, all zeros, packed small."""
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XHDTYPE
    info.size = 8 * 2**30
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**20)))
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], Any, str]] = {
    "parent": (lambda p: tar(p, [entry("ok.txt"), entry("../evil.txt")]), "tar", "outside its folder"),
    "deep parent": (lambda p: tar(p, [entry("a/b/../../../evil.txt")]), "tar", "outside its folder"),
    "absolute": (lambda p: tar(p, [entry("/tmp/evil.txt")]), "tar", "outside its folder"),
    "drive": (lambda p: tar(p, [entry("C:/evil.txt")]), "tar", "outside its folder"),
    "backslash": (lambda p: tar(p, [entry("..\\evil.txt")]), "tar", "outside its folder"),
    "newline": (lambda p: tar(p, [entry("a\nb.txt")]), "tar", "outside its folder"),
    "symlink": (lambda p: tar(p, [entry("l", b"", type=tarfile.SYMTYPE, linkname="/etc")]), "tar", "link or device"),
    "hard link": (lambda p: tar(p, [entry("l", b"", type=tarfile.LNKTYPE, linkname="x")]), "tar", "link or device"),
    "device": (lambda p: tar(p, [entry("d", b"", type=tarfile.CHRTYPE)]), "tar", "link or device"),
    "fifo": (lambda p: tar(p, [entry("d", b"", type=tarfile.FIFOTYPE)]), "tar", "link or device"),
    "twice": (lambda p: tar(p, [entry("a"), entry("./a")]), "tar", "cannot be unpacked"),
    "file as folder": (lambda p: tar(p, [entry("a"), entry("a/b")]), "tar", "cannot be unpacked"),
    "tar bomb": (lambda p: tar(p, [entry("b", bytes(70 * 2**20))], "w:gz"), "tar", "as no image archive does"),
    "header bomb": (pax_bomb, "tar", "has a header of"),
    "no tar": (lambda p: p.write_bytes(b"<html>404</html>" * 99) and p, "tar", "is damaged"),
    "zip parent": (lambda p: zipped(p, ("../evil.txt", b"x")), "zip", "outside its folder"),
    "zip absolute": (lambda p: zipped(p, ("/tmp/evil.txt", b"x")), "zip", "outside its folder"),
    "zip link": (lambda p: zipped(p, ("l", b"/etc"), mode=stat.S_IFLNK | 0o777), "zip", "link or device"),
    "zip bomb": (lambda p: zipped(p, ("b", bytes(70 * 2**20))), "zip", "as no image archive does"),
    "zip that lies": (zip_with_wrong_size, "zip", "is damaged"),
    "no zip": (lambda p: p.write_bytes(b"PK\x03\x04") and p, "zip", "is damaged"),
    "gz bomb": (lambda p: p.write_bytes(gzip.compress(bytes(70 * 2**20))) and p, "gz", "as no image archive does"),
    "gz cut": (lambda p: p.write_bytes(gzip.compress(b"abc" * 99)[:-9]) and p, "gz", "is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_archive_leaves_nothing(tmp_path: Path, name: str) -> None:
    build, kind, message = HOSTILE[name]
    folder = tmp_path / "root"
    folder.mkdir()
    archive = build(tmp_path / "archive.gz")
    with pytest.raises(InputError, match=message) as caught:
        unpack_archive(archive, folder, kind)
    assert str(archive) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(tmp_path) == {"archive.gz", "root"}


def test_what_is_already_there_is_never_replaced(tmp_path: Path) -> None:
    archive = tar(tmp_path / "s.tar", [entry("new.txt"), entry("set/a.txt", b"theirs")])
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match="is already there"):
        unpack_archive(archive, tmp_path, "tar")
    assert everything(tmp_path) == {"s.tar", "set", "set/a.txt"}
    assert (tmp_path / "set/a.txt").read_bytes() == b"mine"


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    archive = tar(tmp_path / "s.tar", [entry("a.txt")])
    (tmp_path / ".s.tar.unpacking").mkdir()
    (tmp_path / ".s.tar.unpacking" / "half.txt").write_bytes(b"")
    unpack_archive(archive, tmp_path, "tar")
    assert everything(tmp_path) == {"s.tar", "a.txt"}


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar(tmp_path / "s.tar", [entry("a.txt", b"12345")])
    usage = type("Usage", (), {"free": 4})
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="free on the disk"):
        unpack_archive(archive, tmp_path, "tar")
    assert everything(tmp_path) == {"s.tar"}
