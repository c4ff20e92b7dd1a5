from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from medkd.deploy.trust import bundle_sha256
from medkd.errors import ConfigError
from medkd.workflows import bundles
from medkd.workflows.bundles import check_bundle, copy_bundle, list_bundles


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def bundle(shared_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(shared_bundle, tmp_path / "copy_segmentation"))


@pytest.fixture
def shipped(bundle, monkeypatch) -> Path:
    monkeypatch.setattr(bundles, "shipped_folder", lambda name: bundle.parent)
    return bundle


def states(report):
    return {check.name: check.state for check in report.checks}


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def test_good_bundle_passes_every_check_offline(bundle, no_network):
    report = check_bundle(bundle)
    assert states(report) == dict.fromkeys(["files", "metadata", "licence", "code", "network", "weights"], "ok")
    assert report.findings == []
    assert report.sha256 == bundle_sha256(bundle)
    assert {code.kind for code in report.code} == {"target", "expression", "import"}


def test_bundle_without_weights_is_noted(bundle):
    (bundle / "models" / "model.pt").unlink()
    assert states(check_bundle(bundle))["weights"] == "note"


@pytest.mark.parametrize(
    ("damage", "check", "words"),
    [
        (lambda b: (b / "LICENSE").unlink(), "licence", "missing"),
        (lambda b: (b / "docs" / "README.md").unlink(), "files", "docs/README.md"),
        (lambda b: edit(b / "configs" / "metadata.json", authors=["a"]), "metadata", "not of type 'string'"),
        (lambda b: (b / "models" / "model.pt").write_bytes(b"x"), "weights", "damaged"),
    ],
)
def test_damage_is_a_finding(bundle, damage, check, words):
    damage(bundle)
    report = check_bundle(bundle)
    assert [found.name for found in report.findings] == [check]
    assert words in report.findings[0].message


def test_network_that_differs_from_the_metadata_is_a_finding(bundle):
    file = bundle / "configs" / "metadata.json"
    content = json.loads(file.read_text())
    content["network_data_format"]["outputs"]["pred"]["num_channels"] = 5
    file.write_text(json.dumps(content))
    assert [found.name for found in check_bundle(bundle).findings] == ["network"]


def test_code_beyond_the_list_is_found_and_not_run(bundle, tmp_path):
    mark = tmp_path / "mark"
    edit(bundle / "configs" / "inference.json", network_def={"_target_": "os.system", "command": f"touch {mark}"})
    report = check_bundle(bundle)
    assert states(report)["code"] == "finding"
    assert states(report)["network"] == "note"
    assert [code.text for code in report.code if code.problem] == ["os.system"]
    assert not mark.exists()


def test_wrong_hash_is_refused(bundle):
    with pytest.raises(ConfigError, match="--trust"):
        check_bundle(bundle, trust="0" * 64)


def test_shipped_bundles_are_listed_and_copied(shipped, tmp_path):
    (found,) = list_bundles()
    assert found.name == "copy_segmentation"
    assert found.task == "Two structures"
    copy = copy_bundle("copy_segmentation", tmp_path / "mine")
    assert bundle_sha256(copy) == bundle_sha256(shipped)


def test_unknown_bundle_is_answered_with_the_nearest(shipped, tmp_path):
    with pytest.raises(ConfigError, match="did you mean copy_segmentation"):
        copy_bundle("copy_segmentatoin", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_copy_never_replaces_files(shipped, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        copy_bundle("copy_segmentation", tmp_path / "mine")
    assert (tmp_path / "mine" / "note.txt").read_text() == "keep"
