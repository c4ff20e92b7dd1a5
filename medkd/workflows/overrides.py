"""KEY=VALUE overrides of a configuration: an unknown key is an error, not a new key."""

from __future__ import annotations

import difflib
import inspect
import pydoc
from collections.abc import Iterator, Mapping
from typing import Any

from medkd.errors import ConfigError

SEPARATOR = "::"


def apply_overrides(config: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set values in a configuration in place, by MONAI ids (``train::trainer::max_epochs``).

    A key must exist already, or be an argument of the component it belongs to.

    Args:
        config: the merged configuration, unevaluated.
        overrides: id → value; ``#`` may stand for ``::``.

    Raises:
        ConfigError: For an unknown key, naming the nearest known one.
    """
    for key, value in overrides.items():
        path = key.replace("#", SEPARATOR).split(SEPARATOR)
        parent = _walk(config, path[:-1])
        if not _accepts(parent, path[-1]):
            near = nearest_key(config, key)
            raise ConfigError(
                key, "is not in this configuration", f"did you mean {near}?" if near else "see configs/train.json"
            )
        if isinstance(parent, list):
            parent[int(path[-1])] = value
        else:
            parent[path[-1]] = value


def nearest_key(config: Mapping[str, Any], key: str) -> str | None:
    """The id in ``config`` most like ``key``, by whole id or by last part."""
    known = list(_ids(config))
    leaves: dict[str, str] = {}
    for name in sorted(known, key=lambda name: not name.startswith(f"train{SEPARATOR}")):  # the main stage first
        leaves.setdefault(name.rsplit(SEPARATOR, 1)[-1], name)
    wanted = key.lstrip("-").replace("-", "_").replace("#", SEPARATOR)
    leaf = wanted.rsplit(SEPARATOR, 1)[-1]
    whole = difflib.get_close_matches(wanted, known, 1, 0.75)
    if whole:
        return whole[0]
    containing = sorted((name for name in leaves if leaf and leaf in name), key=len)
    close = difflib.get_close_matches(leaf, list(leaves), 1, 0.5)
    # "epoch" is nearer to what a user means by max_epochs of the trainer than to other keys with epoch in them.
    preferred = [name for name in containing if name.startswith(("max_", "num_", "batch_"))]
    found = [*preferred, *close, *containing]
    return leaves[found[0]] if found else None


def _walk(config: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(config, Mapping) and part in config:
            config = config[part]
        elif isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        else:
            return None
    return config


def _accepts(parent: Any, name: str) -> bool:
    if isinstance(parent, list):
        return name.isdigit() and int(name) < len(parent)
    if not isinstance(parent, Mapping):
        return False
    target = parent.get("_target_")
    if name in parent or not isinstance(target, str):
        return name in parent
    component = pydoc.locate(target)
    try:
        parameters = inspect.signature(component).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def _ids(value: Any, prefix: str = "") -> Iterator[str]:
    entries: Any = ()
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for name, item in entries:
        identity = f"{prefix}{SEPARATOR}{name}" if prefix else str(name)
        yield identity
        yield from _ids(item, identity)
