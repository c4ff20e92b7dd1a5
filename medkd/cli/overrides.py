"""KEY=VALUE words."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from medkd.errors import ConfigError

_OPTIONS = (
    "--device", "--devices", "--fold", "--help", "--json", "--overwrite", "--quiet", "--resume", "--run-dir", "--seed",
    "--trust", "--verbose",
)  # fmt: skip


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Values by MONAI id; a value is JSON or a Python literal where it is one, text otherwise.

    An unknown ``--key`` ends up here too. What looks like a mistyped option is refused as one; any other keeps its
    dashes, so that the configuration it is not in can name the nearest key.

    Raises:
        ConfigError: a word that is no ``KEY=VALUE``, or a key given twice.
    """
    values: dict[str, Any] = {}
    waiting: str | None = None
    for word in words:
        if waiting is not None:
            key, text, waiting = waiting, word, None
        elif word.startswith("-"):
            key, given, text = word.partition("=")
            near = get_close_matches(key, _OPTIONS, n=1, cutoff=0.75)
            if near:
                raise ConfigError(key, "is no option of `medkd train`", f"did you mean {near[0]}?")
            if not given:
                waiting = key
                continue
        else:
            key, given, text = word.partition("=")
            if not given or not key:
                raise ConfigError(word, "is not KEY=VALUE", "write it as train::trainer::max_epochs=5")
        if key in values:
            raise ConfigError(key, "is given twice", "give it once")
        values[key] = parse_value(text)
    if waiting is not None:
        values[waiting] = True
    return values


def parse_value(text: str) -> Any:
    """A JSON value, else a Python literal, else the text itself."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


def _refuse(name: str) -> None:
    raise ValueError(name)
