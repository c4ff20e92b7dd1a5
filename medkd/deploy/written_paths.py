"""Where a configuration may write: inside the bundle's own folder, wherever that is."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from monai.bundle.reference_resolver import ReferenceResolver

from medkd.deploy.allowlist import Refused
from medkd.deploy.expressions import REFERENCES

_ROOTS = frozenset({"bundle_root"})  # set by whoever runs the bundle


def check_written_path(name: str, value: Any, items: Mapping[str, Any]) -> None:
    """Check an argument that names a file or folder to write.

    Allowed are relative paths and paths that begin with a reference, as in ``$@bundle_root + '/eval'``, when all they
    are put together from is allowed too.

    Args:
        name: the argument, for the message.
        value: its value, unevaluated.
        items: id → unevaluated value, for following references.

    Raises:
        Refused: If the path can leave the bundle's folder or cannot be told from the configuration.
    """
    if not _stays_inside(value, items, set()):
        raise Refused(f"'{name}' can lead outside the bundle's folder")


def _stays_inside(value: Any, items: Mapping[str, Any], seen: set[str]) -> bool:
    if not isinstance(value, str):
        return not isinstance(value, list)  # a component of its own is checked where it stands
    references = ReferenceResolver.match_refs_pattern(value)
    if value.startswith("$"):
        if not _expression_stays_inside(value, references):
            return False
    elif not references and not _is_relative(value):
        return False
    return all(
        reference in _ROOTS or reference in seen or _stays_inside(items.get(reference), items, seen | {reference})
        for reference in references
    )


def _expression_stays_inside(value: str, references: Mapping[str, int]) -> bool:
    text = ReferenceResolver.update_refs_pattern(value, dict.fromkeys(references))[1:]
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return all(_is_tame(text) for text in texts) and _begins_inside(tree.body)


def _begins_inside(node: ast.AST) -> bool:
    """Whether the leftmost part of a path expression is a reference or a relative path."""
    if isinstance(node, ast.Constant):
        return node.value is None or (isinstance(node.value, str) and _is_relative(node.value))
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name) and node.value.id == REFERENCES
    if isinstance(node, ast.BinOp):
        pathlib_style = isinstance(node.op, ast.Div)  # a / "/b" is "/b"
        return _begins_inside(node.left) and (_begins_inside(node.right) if pathlib_style else True)
    if isinstance(node, ast.IfExp):
        return _begins_inside(node.body) and _begins_inside(node.orelse)
    if isinstance(node, ast.JoinedStr):
        return bool(node.values) and _begins_inside(node.values[0])
    if isinstance(node, ast.FormattedValue):
        return _begins_inside(node.value)
    if isinstance(node, ast.Call) and not node.keywords and node.args:
        function = ast.unparse(node.func)
        if function in ("str", "Path", "pathlib.Path", "os.path.join", "path.join"):
            return all(_begins_inside(argument) for argument in node.args)  # join(a, "/b") is "/b"
    return False


def _is_relative(text: str) -> bool:
    return _is_tame(text) and not text.startswith(("/", "\\"))


def _is_tame(text: str) -> bool:
    parts = re.split(r"[/\\]", text)
    return ".." not in parts and not text.startswith("~") and not re.match(r"[A-Za-z]:|\w+://", text)
