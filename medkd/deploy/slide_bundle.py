"""How a bundle says that it is for slides: the entry ``slide`` of its metadata.json.

``{"task": "classification", "size": 96, "mpp": 0.5, "mean": [0.7, 0.55, 0.7], "std": [0.2, 0.2, 0.2],
"classes": ["normal", "tumor"]}``, and where wanted ``"overlap": 0`` and ``"activation": "softmax"``.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from medkd.errors import ConfigError
from medkd.wsi.prediction import TileTask

if TYPE_CHECKING:
    from pathlib import Path

    from medkd.deploy.bundle import LoadedBundle

_REQUIRED = ("task", "size", "mpp", "mean", "std", "classes")
_KNOWN = tuple(field.name for field in fields(TileTask))


def slide_task(bundle: LoadedBundle) -> TileTask:
    """What a bundle's network expects of a tile and what its outputs mean.

    Raises:
        ConfigError: the bundle's metadata has no valid entry ``slide``.
    """
    return read_slide_entry(bundle.metadata, bundle.path / "configs" / "metadata.json")


def read_slide_entry(metadata: dict[str, Any], file: Path) -> TileTask:
    """The same from the content of a metadata.json.

    Args:
        metadata: its content.
        file: its name, for messages.

    Raises:
        ConfigError: there is no valid entry ``slide``.
    """
    entry = metadata.get("slide")
    if not isinstance(entry, dict):
        raise ConfigError(file, "has no entry 'slide', so this bundle is not for slides", f"add one with {_REQUIRED}")
    for name in entry:
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, 1)
            remedy = f"did you mean '{near[0]}'?" if near else f"the known ones are {', '.join(_KNOWN)}"
            raise ConfigError(f"{file}: slide", f"{name!r} is unknown", remedy)
    missing = [name for name in _REQUIRED if name not in entry]
    if missing:
        raise ConfigError(f"{file}: slide", f"{', '.join(missing)} is missing", "add it")
    where = f"{file}: slide"
    try:
        return TileTask(
            task=entry["task"],
            size=_whole(entry, "size", where),
            mpp=_number(entry["mpp"], "mpp", where),
            mean=_numbers(entry, "mean", where),
            std=_numbers(entry, "std", where),
            classes=_names(entry, where),
            overlap=_whole(entry, "overlap", where) if "overlap" in entry else 0,
            activation=entry.get("activation", "softmax"),
        )
    except ConfigError as error:
        if error.where.startswith(str(file)):
            raise
        raise ConfigError(f"{file}: {error.where}", error.problem, error.remedy) from error


def _whole(entry: dict[str, Any], name: str, where: str) -> int:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: {name}", f"{value!r} is not a whole number", "give pixels")
    return value


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {name}", f"{value!r} is not a number", "give a number")
    return float(value)


def _numbers(entry: dict[str, Any], name: str, where: str) -> tuple[float, float, float]:
    values = entry[name]
    if not isinstance(values, list) or len(values) != 3:
        raise ConfigError(f"{where}: {name}", f"{values!r} is not a list of three numbers", "give one per RGB channel")
    red, green, blue = (_number(value, name, where) for value in values)
    return (red, green, blue)


def _names(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    names = entry["classes"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: classes", f"{names!r} is not a list of names", "name the network's outputs")
    return tuple(names)
