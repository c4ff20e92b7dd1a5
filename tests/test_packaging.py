"""The wheel holds all that a user needs who never sees the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLUTTER = shutil.ignore_patterns("__pycache__", "*.pyc")


def files_below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without network from a copy, so that the checkout gets no build folder and lends none to the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("medkd", "bundles", "data_manifests"):
        shutil.copytree(ROOT / name, source / name, ignore=CLUTTER)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("medkd-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel's content, as an installation lays it out."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def dist_info(installed: Path) -> Path:
    (folder,) = installed.glob("medkd-*.dist-info")
    return folder


def test_wheel_has_the_command(installed):
    assert "medkd = medkd.__main__:main" in (dist_info(installed) / "entry_points.txt").read_text()


def test_wheel_has_all_of_the_package_and_nothing_else(installed):
    expected = {f"medkd/{name}" for name in files_below(ROOT / "medkd")}
    expected |= {
        f"medkd/{folder}/{name}" for folder in ("bundles", "data_manifests") for name in files_below(ROOT / folder)
    }
    info = dist_info(installed).name
    assert {name for name in files_below(installed) if not name.startswith(info)} == expected
    for name in ("py.typed", "report/templates/report.html.j2", "data_manifests/acdc.yaml"):
        assert f"medkd/{name}" in expected
    assert any(name.startswith("medkd/bundles/act_net_brain_segmentation/configs/") for name in expected)


def test_wheel_has_the_licence(installed):
    assert (dist_info(installed) / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_an_installation_works_outside_the_source_tree(installed, tmp_path):
    code = (
        "import medkd, sys\n"
        "from medkd.__main__ import main\n"
        "assert main(['bundle', 'list', '--json']) == 0 and main(['data', 'list', '--json']) == 0\n"
        f"assert main(['bundle', 'copy', 'act_net_brain_segmentation', {str(tmp_path / 'copy')!r}, '--quiet']) == 0\n"
        "from medkd.deploy.metadata import license_text\n"
        "assert 'Apache License' in license_text()\n"
        "sys.exit(0 if medkd.__file__.startswith(sys.argv[1]) else f'{medkd.__file__} was tested')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("act_net_brain_segmentation", "act_net_cardiac_segmentation", "acdc", "mni152_demo"):
        assert name in done.stdout
    assert (tmp_path / "copy" / "configs" / "train.json").is_file()
