"""Where the folders that ship with medkd lie: in its package once installed, at the repository's root in a checkout."""

from __future__ import annotations

from pathlib import Path

from medkd.errors import ConfigError


def shipped_folder(name: str) -> Path:
    """The folder ``data_manifests`` or ``bundles``.

    pyproject maps both into the package, so that a wheel installs them as ``medkd/<name>``.

    Raises:
        ConfigError: the installation lacks it.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"medkd/{name}", "is missing from this installation", "install medkd again")
