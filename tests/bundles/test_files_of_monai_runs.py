"""What MONAI's commands put or use beside the configurations: logging settings, and links to the last checkpoint."""

from __future__ import annotations

import pytest
from bundle_copies import BUNDLES, NAMES

from medkd.deploy.trust import bundle_sha256, list_code
from medkd.errors import ConfigError

SHIPPED = (BUNDLES / NAMES[0] / "configs" / "logging.conf").read_text(encoding="utf-8")


def problems(folder, text: str) -> list[str | None]:
    (folder / "configs").mkdir()
    (folder / "configs" / "logging.conf").write_text(text, encoding="utf-8")
    return [code.problem for code in list_code(folder)]


def test_settings_that_print_to_the_console_need_no_trust(tmp_path):
    assert problems(tmp_path, SHIPPED) == [None]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("class=StreamHandler", "class=FileHandler"),
        ("class=StreamHandler", "class=handlers.SocketHandler"),
        ("class=StreamHandler\n", ""),
        ("args=(sys.stdout,)", "args=('run.log',)"),
        ("args=(sys.stdout,)", "args=(__import__('os').system('true'),)"),
        ("args=(sys.stdout,)", "args=%(keys)s"),
        ("args=(sys.stdout,)", "args=(sys.stdout,)\nkwargs={'stream': 1}"),
        ("[formatter_fullFormatter]", "[formatter_fullFormatter]\nclass=os.Popen"),
        ("[loggers]", "[DEFAULT]\nclass=FileHandler\n[loggers]"),
        ("[loggers]", "loggers"),
    ],
)
def test_settings_that_do_more_need_trust(tmp_path, before, after):
    assert before in SHIPPED
    (problem,) = problems(tmp_path, SHIPPED.replace(before, after))
    assert problem is not None
    assert "MONAI would apply it" in problem


def test_link_to_a_neighbor_is_hashed_through_and_needs_no_trust(tmp_path):
    (tmp_path / "step-1.pt").write_bytes(b"weights")
    (tmp_path / "last.pt").symlink_to("step-1.pt")
    assert [code for code in list_code(tmp_path) if code.problem] == []
    before = bundle_sha256(tmp_path)
    (tmp_path / "step-1.pt").write_bytes(b"others")
    assert bundle_sha256(tmp_path) != before


def test_link_to_a_neighbor_is_read_as_what_it_is_called(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "harmless.txt").write_text('{"run": "$__import__(\'os\').getcwd()"}')
    (tmp_path / "configs" / "inference.json").symlink_to("harmless.txt")
    assert [code for code in list_code(tmp_path) if code.problem] != []


@pytest.mark.parametrize("target", ["../outside.pt", "absent.pt", ".", "second.pt", "/etc/hostname"])
def test_other_links_need_trust_and_have_no_hash(tmp_path, target):
    (tmp_path / "outside.pt").write_bytes(b"x")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "step-1.pt").write_bytes(b"weights")
    (bundle / "second.pt").symlink_to("step-1.pt")
    (bundle / "last.pt").symlink_to(target)
    assert [code.where for code in list_code(bundle) if code.problem] == ["last.pt"]
    with pytest.raises(ConfigError, match="link"):
        bundle_sha256(bundle)
