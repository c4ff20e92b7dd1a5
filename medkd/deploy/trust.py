"""What code a bundle would run, and whether it may.

A configuration whose targets and expressions are all on the allow-list (:mod:`medkd.deploy.allowlist`,
:mod:`medkd.deploy.expressions`) runs as it is.
Anything else runs only when the caller passes the SHA-256 over all files of the bundle, which is the caller's word
for having read them.
"""

from __future__ import annotations

import configparser
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from monai.bundle.config_item import ComponentLocator, ConfigExpression
from monai.bundle.config_parser import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver

from medkd.deploy import allowlist, expressions
from medkd.deploy.allowlist import Refused
from medkd.deploy.written_paths import check_written_path
from medkd.errors import ConfigError

_MAX_CONFIG_BYTES = 8 * 2**20
_CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
_CONSOLES = ("(sys.stdout,)", "(sys.stderr,)")
_CODE_FILES = {
    ".py": "Python",
    ".pyc": "compiled Python",
    ".so": "a native library",
    ".pyd": "a native library",
    ".dll": "a native library",
    ".sh": "a shell script",
    ".ts": "a TorchScript program",
    ".pt2": "an exported program",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".joblib": "a pickle",
    ".plan": "a TensorRT engine",
}


@dataclass(frozen=True)
class Code:
    """One piece of code that a bundle would run.

    Attributes:
        where: file, and the id inside it.
        kind: ``target``, ``expression``, ``import``, ``setting`` or ``file``.
        text: the name, the expression or what the file is.
        problem: why it needs trust; ``None`` when it is on the allow-list.
    """

    where: str
    kind: str
    text: str
    problem: str | None = None


def read_config(*files: str | Path) -> dict[str, Any]:
    """Merge configuration files the way ``python -m monai.bundle`` does; nothing is evaluated.

    Raises:
        ConfigError: naming the file that is missing, too large, not JSON or YAML, or not a mapping.
    """
    for file in files:
        _check_config_file(Path(file))
    try:
        merged = ConfigParser.load_config_files([str(file) for file in files])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(files[-1], f"cannot be read ({error})", "correct the file") from None
    return dict(merged)


def inspect_config(config: Mapping[str, Any], source: str) -> list[Code]:
    """List the code that MONAI would run for a configuration.

    The configuration is looked at as it is written and after MONAI's own resolution of relative ids and macros,
    which can put together expressions that stand nowhere in the file.

    Args:
        config: the merged configuration, unevaluated.
        source: how to name it, usually its file.
    """
    found: dict[tuple[str, str, str], Code] = {}
    parser = ConfigParser(deepcopy(dict(config)), globals=False)
    for _ in range(8):
        current = deepcopy(parser.get())
        for code in _inspect_once(current, source):
            found.setdefault((code.where, code.kind, code.text), code)
        if any(code.kind == "setting" and code.problem for code in found.values()):
            break  # resolving would read other files or follow names that hide expressions
        try:
            parser.resolve_macro_and_relative_ids()
        except Exception as error:
            code = Code(source, "setting", "references", f"cannot be resolved ({error})")
            found[code.where, code.kind, code.text] = code
            break
        if parser.get() == current:
            break
    else:
        found[source, "setting", "macros"] = Code(source, "setting", "macros", "they never settle")
    return list(found.values())


def list_code(bundle: str | Path) -> list[Code]:
    """Every piece of code in a bundle folder: targets and expressions of all configurations, and program files."""
    root = Path(bundle)
    codes: list[Code] = []
    for file in _files(root):
        name = file.relative_to(root).as_posix()
        if file.is_symlink() and not _links_to_neighbor(file):
            codes.append(Code(name, "file", f"link to {os.readlink(file)}", "a link can point outside the bundle"))
        elif name == "configs/logging.conf":
            codes.append(Code(name, "file", "logging settings", _logging_problem(file)))
        elif file.suffix.lower() in _CODE_FILES:
            codes.append(Code(name, "file", _CODE_FILES[file.suffix.lower()], "a program, which no list can vouch for"))
        elif file.suffix.lower() in _CONFIG_SUFFIXES and file.parent == root / "configs":
            codes += _inspect_file(file, name)
    return codes


def bundle_sha256(bundle: str | Path) -> str:
    """SHA-256 over the names and contents of all files of a bundle, in the order of their names.

    Raises:
        ConfigError: If the folder does not exist or holds a link, whose content could change under the hash.
    """
    root = Path(bundle)
    if not root.is_dir():
        raise ConfigError(root, "is not a folder", "name a bundle folder")
    total = hashlib.sha256()
    for file in _files(root):
        name = file.relative_to(root).as_posix()
        if file.is_symlink() and not _links_to_neighbor(file):
            raise ConfigError(
                file, "is a link out of its folder, which a hash cannot cover", "replace it by the file it points to"
            )
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{len(name)}:{name}:{digest}\n".encode())
    return total.hexdigest()


def require_trust(
    bundle: str | Path, config: Mapping[str, Any], *, source: str, trust: str | None = None, extra: Sequence[Code] = ()
) -> bool:
    """Refuse a configuration beyond the allow-list unless the bundle's hash was given.

    Args:
        bundle: the bundle's folder.
        config: the merged configuration about to run.
        source: how to name it in the error.
        trust: the hash of all files of the bundle, as printed by ``medkd bundle check``.
        extra: further code about to run, a TorchScript file for example.

    Returns:
        Whether the bundle is trusted by its hash.

    Raises:
        ConfigError: If something needs trust and none was given, or the hash is another one.
    """
    if trust is not None:
        if trust.strip().lower() != bundle_sha256(bundle):
            raise ConfigError(
                "--trust",
                f"is not the hash of the files in {bundle}",
                "review them with `medkd bundle check`, which prints it",
            )
        return True
    refused = [code for code in [*inspect_config(config, source), *extra] if code.problem]
    if refused:
        others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ConfigError(
            refused[0].where,
            f"would run code beyond the allow-list: {refused[0].problem}{others}",
            f"review it with `medkd bundle check {bundle}`, then pass --trust with the hash it prints",
        )
    return False


def _links_to_neighbor(link: Path) -> bool:
    """Whether a link leads to a file beside it, which is listed and hashed itself; ``last.pt`` of a run does."""
    name = os.readlink(link)
    target = link.parent / name
    return os.sep not in name and target.is_file() and not target.is_symlink()


def _logging_problem(file: Path) -> str | None:
    """Why MONAI's commands should not apply these logging settings; None if they only print to the console."""
    settings = configparser.RawConfigParser()
    try:
        settings.read_string(file.read_text(encoding="utf-8"))
    except (configparser.Error, ValueError) as error:
        return f"MONAI would apply it, and it cannot be read ({type(error).__name__})"
    for title in settings.sections():
        section = settings[title]
        handler = title.startswith("handler_")
        prints = (
            section.get("class") == "StreamHandler" and section.get("args") in _CONSOLES and "kwargs" not in section
        )
        if (handler and not prints) or (not handler and not {"class", "args", "kwargs"}.isdisjoint(section)):
            return f"MONAI would apply it, and [{title}] does more than print to the console"
    return None


def _check_config_file(file: Path) -> None:
    if not file.is_file():
        raise ConfigError(file, "does not exist", "name a bundle folder with configs/")
    if file.suffix.lower() not in _CONFIG_SUFFIXES:
        raise ConfigError(file, "is neither JSON nor YAML", "use a .json file")
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise ConfigError(file, "is larger than any configuration", "check that this is the right file")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix.lower() == ".json":
            content = json.loads(text)
        else:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
                raise ConfigError(file, "uses YAML aliases", "write the values out")
            content = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(file, f"cannot be read ({str(error).splitlines()[0]})", "correct the file") from None
    if not isinstance(content, dict):
        raise ConfigError(file, "is not a mapping of ids", "check that this is a bundle configuration")


def _files(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found += [Path(folder, name) for name in [*names, *links]]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _inspect_file(file: Path, name: str) -> list[Code]:
    """The code of one configuration; of an overlay, what it adds to the configuration it can be laid over."""
    try:
        return inspect_config(read_config(file), name)
    except ConfigError as error:
        problem = error.problem
    for base in (file.with_name("train.json"), file.with_name("inference.json")):
        try:
            merged, plain = read_config(base, file), read_config(base)
        except ConfigError:
            continue
        known = {(code.where, code.kind, code.text) for code in inspect_config(plain, name)}
        return [code for code in inspect_config(merged, name) if (code.where, code.kind, code.text) not in known]
    return [Code(name, "setting", "unreadable", problem)]


def _inspect_once(config: Any, source: str) -> Iterator[Code]:
    """Inspect a configuration as it stands, without resolving anything further."""
    items = dict(_walk(config, ""))
    module_ids = frozenset(item for item, value in items.items() if _starts_import(value))
    aliases: dict[str, str] = {}
    for item in module_ids:
        where = f"{source} {item}"
        text = items[item][1:]
        try:
            bound = expressions.parse_import(text) or {}
            for alias, full in bound.items():
                if aliases.setdefault(alias, full) != full:
                    raise Refused(f"'{alias}' is imported twice")
            yield Code(where, "import", text)
        except Refused as refusal:
            yield Code(where, "import", text, str(refusal))
    for item, value in items.items():
        yield from _inspect_key(item, source)
        where = f"{source} {item}" if item else source
        if isinstance(value, Mapping) and "_target_" in value:
            yield _inspect_component(value, where, items)
        elif isinstance(value, str) and value.startswith("$") and item not in module_ids:
            yield _inspect_expression(value, where, aliases, module_ids)
        elif isinstance(value, str) and value.startswith("%"):
            path, _ = ConfigParser.split_path_id(value[1:])
            if path:
                yield Code(where, "setting", value, "it includes another file")


def _walk(config: Any, item: str) -> Iterator[tuple[str, Any]]:
    yield item, config
    if isinstance(config, Mapping | list):
        for key, value in config.items() if isinstance(config, Mapping) else enumerate(config):
            yield from _walk(value, f"{item}::{key}" if item else str(key))


def _inspect_key(item: str, source: str) -> Iterator[Code]:
    key = item.rsplit("::", 1)[-1]
    if re.search(r"[@$%#:(){}\[\]'\"\\\n;]", key):
        # MONAI pastes keys into expressions that hold relative ids, where such a key would become code.
        yield Code(f"{source} {item}", "setting", key, f"the key {key!r} is not a plain name")


def _starts_import(value: Any) -> bool:
    if not (isinstance(value, str) and value.startswith("$") and "import" in value):
        return False
    try:
        return ConfigExpression.is_import_statement(value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _inspect_expression(value: str, where: str, aliases: Mapping[str, str], module_ids: frozenset[str]) -> Code:
    references = {reference: None for reference in ReferenceResolver.match_refs_pattern(value)}
    text = ReferenceResolver.update_refs_pattern(value, references)[1:]
    try:
        if _starts_import(f"${text}"):
            raise Refused("it becomes an import once its references are filled in")
        expressions.check_expression(text, aliases, module_ids)
    except Refused as refusal:
        return Code(where, "expression", value, str(refusal))
    return Code(where, "expression", value)


def _inspect_component(config: Mapping[str, Any], where: str, items: Mapping[str, Any]) -> Code:
    target = config["_target_"]
    try:
        for name in _full_names(target):
            component = allowlist.check_component_name(name)
            _check_arguments(config, component, items)
    except Refused as refusal:
        return Code(where, "target", str(target), str(refusal))
    return Code(where, "target", str(target))


def _full_names(target: Any) -> list[str]:
    if not isinstance(target, str) or target[:1] in "$@%":
        raise Refused("the target is computed")
    modules = _locator.get_component_module_name(target)
    if modules is not None:
        return [f"{module}.{target}" for module in ([modules] if isinstance(modules, str) else modules)]
    if "." not in target:
        raise Refused(f"'{target}' is not a MONAI component")
    return [target]


def _check_arguments(config: Mapping[str, Any], component: Any, items: Mapping[str, Any]) -> None:
    sensitive = allowlist.sensitive_parameters(component)
    mode = config.get("_mode_", "default")
    if mode not in ("default", "callable"):
        raise Refused(f"the mode {mode!r} opens a debugger")
    if config.get("_debug_", False) is not False:
        raise Refused("'_debug_' opens a debugger")
    if mode == "callable" and sensitive:
        raise Refused("it would be called later with arguments that cannot be checked")
    for name in sensitive & allowlist.DOWNLOAD_PARAMETERS:
        if name not in config and _default_downloads(component, name):
            raise Refused(f"'{name}' downloads unless set to false")
    for name, value in config.items():
        if name in allowlist.DOWNLOAD_PARAMETERS and value not in (False, None):
            raise Refused(f"'{name}' downloads or unpickles")
        if name in allowlist.CODE_PARAMETERS:
            _check_code_argument(str(name), value)
        if name in allowlist.WRITE_PARAMETERS:
            check_written_path(str(name), value, items)


def _default_downloads(component: Any, name: str) -> bool:
    default = inspect.signature(component).parameters[name].default
    return default is not False and default is not None


def _check_code_argument(name: str, value: Any) -> None:
    """Arguments that make a component import by name or unpickle."""
    if name in ("allow_pickle", "pickle_module"):
        if value is not False and value is not None:
            raise Refused(f"'{name}' allows pickles")
        return
    if name == "weights_only":
        if value is not True:
            raise Refused("'weights_only' must stay true")
        return
    allowed = {"reader": allowlist.READERS, "writer": allowlist.WRITERS, "merger_cls": allowlist.MERGERS}[name]
    for choice in value if isinstance(value, list) else [value]:
        if choice is None or (isinstance(choice, Mapping) and "_target_" in choice):
            continue  # a component of its own, checked where it stands
        if not isinstance(choice, str) or choice.startswith(("@", "%")):
            raise Refused(f"'{name}' is not written out")
        dotted = choice.removeprefix("$")
        simple = dotted.rsplit(".", 1)[-1]
        known = dotted == simple or dotted.startswith(("monai.", "medkd."))
        if simple not in allowed or not known or not re.fullmatch(r"[\w.]+", dotted):
            raise Refused(f"'{name}' names '{choice}'")


_locator = ComponentLocator()
