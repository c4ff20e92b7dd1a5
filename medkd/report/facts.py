"""What was run and where, found in config.json, environment.json and notes.json."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from medkd.report.run_folder import RunFolder

METHOD_PREFIX = "medkd.methods."
LABELS = {
    "method": "Method",
    "paper": "Paper",
    "bundle": "Bundle",
    "datalist": "Datalist",
    "dataset": "Dataset",
    "labeled": "Labeled patients",
    "unlabeled": "Unlabeled patients",
    "validation": "Validation patients",
    "test": "Test patients",
    "fold": "Fold",
    "seed": "Seed",
    "seeds": "Seeds",
    "max_epochs": "Epochs planned",
    "seconds": "Duration, s",
}
# What notes.json does not say is looked for under these ids of the configuration.
CONFIG_IDS = ("bundle", "datalist", "fold", "seed", "seeds", "max_epochs")


def run_facts(run: RunFolder) -> dict[str, str]:
    """Method, bundle, data and seeds as label → text; notes.json's ``run`` wins over the other files."""
    told = {key: value for key, value in run.datalist.items() if value is not None}
    told.update((run.notes or {}).get("run") or {})
    told.pop("command", None)
    config, environment = run.config or {}, run.environment or {}
    for key in CONFIG_IDS:
        value = _first(config, key) if key in _ids(config) else environment.get(key)
        if key not in told and value is not None:
            told[key] = PurePosixPath(str(value)).name if key in ("bundle", "datalist") else value
    if "seeds" in told:
        told.pop("seed", None)
    if "method" not in told and (methods := _methods(config)):
        told["method"] = ", ".join(dict.fromkeys(str(m["_target_"]).rpartition(".")[2] for m in methods))
    ordered = sorted(told, key=lambda key: (list(LABELS).index(key) if key in LABELS else len(LABELS), key))
    return {LABELS.get(key, key.replace("_", " ").capitalize()): _text(told[key]) for key in ordered}


def run_command(run: RunFolder) -> str:
    """The command line, from notes.json or environment.json; empty when neither says."""
    told = (run.notes or {}).get("run") or {}
    command = told.get("command") or (run.environment or {}).get("command")
    if isinstance(command, list):
        return shlex.join(str(word) for word in command)
    return str(command or "")


def method_settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every setting of the method objects in a configuration that is not a reference, as (name, value)."""
    methods = _methods(config)
    rows = []
    for method in methods:
        name = str(method["_target_"]).rpartition(".")[2]
        for key, value in method.items():
            if not key.startswith("_") and not str(value).startswith("@"):  # references say nothing by themselves
                rows.append((key if len(methods) == 1 else f"{name} {key}", _text(value)))
    return list(dict.fromkeys(rows))


def environment_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """environment.json, flattened; the command stands elsewhere."""
    return [(key, value) for key, value in _flat(environment, "") if key != "command"]


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} · ")
        else:
            yield f"{prefix}{key}".replace("_", " "), _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping) and "_target_" in value:
        others = ", ".join(f"{k}={_text(v)}" for k, v in value.items() if not str(k).startswith("_"))
        return f"{str(value['_target_']).rpartition('.')[2]}({others})"
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(str(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _objects(config: Any) -> Iterator[Mapping[str, Any]]:
    """Every JSON object of a configuration, outer ones first."""
    waiting = [config]
    while waiting:
        content = waiting.pop(0)
        if isinstance(content, Mapping):
            yield content
            waiting.extend(content.values())
        elif isinstance(content, list):
            waiting.extend(content)


def _ids(config: Mapping[str, Any]) -> set[str]:
    return {key for content in _objects(config) for key in content}


def _first(config: Mapping[str, Any], key: str) -> Any:
    """The outermost plain value under ``key``; references and expressions to it do not count."""
    for content in _objects(config):
        value = content.get(key)
        if value is not None and not isinstance(value, Mapping) and not str(value).startswith(("@", "$", "%")):
            return value
    return None


def _methods(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods of the stages that run, or without stages all methods that a configuration defines."""
    run = str(config.get("run", ""))
    stages = [
        part["method"]
        for name, part in config.items()
        if isinstance(part, Mapping) and "method" in part and re.search(rf"@{re.escape(name)}(#|::)", run)
    ]
    found = [_referenced(config, method) if isinstance(method, str) else method for method in stages]
    return [c for c in found or _objects(config) if _is_method(c)]


def _referenced(config: Mapping[str, Any], reference: str) -> Any:
    value: Any = config
    for name in re.split("#|::", reference.removeprefix("@")):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_method(content: Any) -> bool:
    return isinstance(content, Mapping) and str(content.get("_target_", "")).startswith(METHOD_PREFIX)
