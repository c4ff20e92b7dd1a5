"""Which ``$`` expressions a configuration may use without being trusted by its hash.

MONAI evaluates every string that begins with ``$``. Here its syntax tree is walked, nothing is evaluated, and every
form, name, attribute and method that is not listed is refused. Attributes and methods are listed for all objects alike,
since what a reference holds is only known once it is built: an innocent object may lead to a module, and a module to
everything.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from medkd.deploy.allowlist import (
    FORBIDDEN_MODULES,
    MODULES,
    Refused,
    check_component_name,
    sensitive_parameters,
    words,
)

_IMPORTABLE = frozenset({"glob", "math", "os", "os.path", "pathlib", "numpy"})
_DEFAULT_ALIASES = {"monai": "monai", "torch": "torch", "np": "numpy", "numpy": "numpy"}
_BUILTINS = words(
    "abs all any bool dict enumerate float int len list max min next iter range reversed round set sorted str"
    " sum tuple zip"
)
_BUILTIN_KEYWORDS = frozenset({"default", "ndigits", "reverse", "start", "strict"})
_METHODS = words(
    "as_posix attach copy count cpu cuda endswith eval exists float get half index is_dir is_file items item"
    " joinpath keys load_state_dict lower lstrip named_parameters numel parameters replace requires_grad_"
    " role_parameters rstrip run section set_epoch size split startswith state_dict strip to tolist train upper"
    " values with_name with_suffix join"
)
_ATTRIBUTES = words(
    "assistant batch best_metric best_metric_epoch critics deployed device domains dtype ema epoch finished"
    " generators i2i iteration label_names labels max_epochs metrics name ndim network num_classes optimizer"
    " optimizers output parent roles shape state stem streams student suffix teacher test training unlabeled"
    " validation"
)
_ENVIRONMENT = frozenset({"LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"})
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
REFERENCES = "__local_refs"  # what MONAI turns "@id" into before it evaluates an expression


def parse_import(text: str) -> dict[str, str] | None:
    """The alias → full name that MONAI would bind for an import statement; None if ``text`` is not one.

    MONAI runs only the first statement, and of it only the first name.

    Raises:
        Refused: If the module is not on the allow-list or the alias hides another name.
        SyntaxError: If ``text`` is not Python.
    """
    statements = ast.parse(text).body
    if not statements or not isinstance(statements[0], ast.Import | ast.ImportFrom):
        return None
    statement = statements[0]
    if len(statements) > 1 or len(statement.names) > 1:
        raise Refused("more than one import in one expression")
    imported = statement.names[0]
    if isinstance(statement, ast.ImportFrom):
        if statement.level or not statement.module:
            raise Refused("a relative import")
        full, alias = f"{statement.module}.{imported.name}", imported.asname or imported.name
        if not _is_module_name(full):
            check_component_name(full)
    else:
        full, alias = imported.name, imported.asname or imported.name
        if not _is_module_name(full):
            raise Refused(f"importing '{full}'")
    if hasattr(builtins, alias) or _DEFAULT_ALIASES.get(alias, full) != full or alias.startswith("_"):
        raise Refused(f"'{alias}' would hide another name")
    return {alias: full} if "." not in alias else {}


def _is_module_name(full: str) -> bool:
    if full in _IMPORTABLE or full in {"ignite", "medkd", "monai", "torch", "torch.distributed", "torch.utils.data"}:
        return True
    if any(full == module or full.startswith(f"{module}.") for module in FORBIDDEN_MODULES):
        return False
    if any(full == module or module.startswith(f"{full}.") for module in MODULES):
        return True
    inside = any(full.startswith(f"{module}.") for module in MODULES)
    plain = all(part.isidentifier() and not part.startswith("_") for part in full.split("."))
    return inside and plain and _is_importable(full)


def _is_importable(full: str) -> bool:
    try:
        return importlib.util.find_spec(full) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def check_expression(text: str, aliases: Mapping[str, str], module_ids: frozenset[str]) -> None:
    """Check the text of one ``$`` expression, after MONAI's replacement of ``@id``.

    Args:
        text: the Python expression.
        aliases: what the configuration's imports bind, alias → full name.
        module_ids: ids of items that are imports, and so hold modules.

    Raises:
        Refused: naming the part that is not on the allow-list.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Refused("not a Python expression") from None
    _Checker({**_DEFAULT_ALIASES, **aliases}, module_ids).check(tree.body, frozenset())


class _Checker:
    """Walks one expression; every form that is not handled is refused."""

    def __init__(self, aliases: Mapping[str, str], module_ids: frozenset[str]) -> None:
        self.aliases = aliases
        self.module_ids = module_ids

    def check(self, node: ast.AST, local: frozenset[str]) -> None:
        handler = getattr(self, f"_{type(node).__name__}", None)
        if handler is None:
            raise Refused(f"{_describe(node)} is not allowed")
        handler(node, local)

    def _all(self, nodes: list[Any], local: frozenset[str]) -> None:
        for node in nodes:
            self.check(node, local)

    def _Constant(self, node: ast.Constant, local: frozenset[str]) -> None:  # noqa: N802
        return

    def _JoinedStr(self, node: ast.JoinedStr, local: frozenset[str]) -> None:  # noqa: N802
        self._all(node.values, local)

    def _FormattedValue(self, node: ast.FormattedValue, local: frozenset[str]) -> None:  # noqa: N802
        self._all([node.value, *([node.format_spec] if node.format_spec else [])], local)

    def _List(self, node: ast.List | ast.Tuple | ast.Set, local: frozenset[str]) -> None:  # noqa: N802
        self._all(node.elts, local)

    _Tuple = _Set = _List

    def _Dict(self, node: ast.Dict, local: frozenset[str]) -> None:  # noqa: N802
        if None in node.keys:
            raise Refused("unpacking is not allowed")
        self._all([*node.keys, *node.values], local)

    def _BinOp(self, node: ast.BinOp, local: frozenset[str]) -> None:  # noqa: N802
        small_power = isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant | ast.UnaryOp)
        if not isinstance(node.op, _OPERATORS) and not small_power:
            raise Refused(f"{_describe(node.op)} is not allowed")
        self._all([node.left, node.right], local)

    def _UnaryOp(self, node: ast.UnaryOp, local: frozenset[str]) -> None:  # noqa: N802
        self.check(node.operand, local)

    def _BoolOp(self, node: ast.BoolOp, local: frozenset[str]) -> None:  # noqa: N802
        self._all(node.values, local)

    def _Compare(self, node: ast.Compare, local: frozenset[str]) -> None:  # noqa: N802
        self._all([node.left, *node.comparators], local)

    def _IfExp(self, node: ast.IfExp, local: frozenset[str]) -> None:  # noqa: N802
        self._all([node.test, node.body, node.orelse], local)

    def _Slice(self, node: ast.Slice, local: frozenset[str]) -> None:  # noqa: N802
        self._all([part for part in (node.lower, node.upper, node.step) if part is not None], local)

    def _Subscript(self, node: ast.Subscript, local: frozenset[str]) -> None:  # noqa: N802
        if isinstance(node.value, ast.Name) and node.value.id == REFERENCES:
            if not (isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)):
                raise Refused("a computed reference is not allowed")
            if node.slice.value in self.module_ids:
                raise Refused(f"'@{node.slice.value}' is an imported module")
            return
        if self._dotted(node.value, local) == "os.environ":
            self._environment(node.slice)
            return
        self._all([node.value, node.slice], local)

    def _Name(self, node: ast.Name, local: frozenset[str]) -> None:  # noqa: N802
        if node.id in local:
            return
        if node.id in self.aliases:
            self._value(self.aliases[node.id])
        elif node.id not in _BUILTINS:
            raise Refused(f"the name '{node.id}' is not allowed")

    def _Attribute(self, node: ast.Attribute, local: frozenset[str]) -> None:  # noqa: N802
        dotted = self._dotted(node, local)
        if dotted is not None:
            self._value(dotted)
        elif node.attr not in _ATTRIBUTES:
            raise Refused(f"the attribute '.{node.attr}' is not allowed")
        else:
            self.check(node.value, local)

    def _Call(self, node: ast.Call, local: frozenset[str]) -> None:  # noqa: N802
        if self._is_cudnn_switch(node, local):
            return
        if any(keyword.arg is None for keyword in node.keywords):
            raise Refused("unpacking is not allowed")
        names = {str(keyword.arg) for keyword in node.keywords}
        dotted = self._dotted(node.func, local)
        if dotted == "os.environ.get":
            self._environment(node.args[0] if node.args else node)
        elif dotted is not None:
            self._call_by_name(dotted, node, names)
        elif isinstance(node.func, ast.Name):
            if node.func.id in local or node.func.id not in _BUILTINS:
                raise Refused(f"calling '{node.func.id}' is not allowed")
            if names - _BUILTIN_KEYWORDS and node.func.id != "dict":
                raise Refused(f"this use of '{node.func.id}' is not allowed")
        elif isinstance(node.func, ast.Attribute):
            if node.func.attr not in _METHODS:
                raise Refused(f"the method '.{node.func.attr}()' is not allowed")
            self.check(node.func.value, local)
        else:
            raise Refused("calling the result of an expression is not allowed")
        self._all([*node.args, *(keyword.value for keyword in node.keywords)], local)

    def _call_by_name(self, dotted: str, node: ast.Call, names: set[str]) -> None:
        component = self._value(dotted)
        if not callable(component):
            raise Refused(f"'{dotted}' is not callable")
        if dotted == "torch.distributed.init_process_group":
            constant = all(isinstance(keyword.value, ast.Constant | ast.IfExp) for keyword in node.keywords)
            if node.args or names - {"backend", "timeout"} or not constant:
                raise Refused("'init_process_group' may only be given a backend")

    def _ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp, local: frozenset[str]) -> None:  # noqa: N802
        self.check(node.elt, self._comprehension(node.generators, local))

    _SetComp = _GeneratorExp = _ListComp

    def _DictComp(self, node: ast.DictComp, local: frozenset[str]) -> None:  # noqa: N802
        self._all([node.key, node.value], self._comprehension(node.generators, local))

    def _comprehension(self, generators: list[ast.comprehension], local: frozenset[str]) -> frozenset[str]:
        for generator in generators:
            self.check(generator.iter, local)
            bound = {name.id for name in ast.walk(generator.target) if isinstance(name, ast.Name)}
            if not all(isinstance(part, ast.Name | ast.Tuple | ast.Store) for part in ast.walk(generator.target)):
                raise Refused("this loop variable is not allowed")
            if any(name in self.aliases or name.startswith("_") or hasattr(builtins, name) for name in bound):
                raise Refused("a loop variable hides another name")
            local = local | bound
            self._all(generator.ifs, local)
        return local

    def _dotted(self, node: ast.AST, local: frozenset[str]) -> str | None:
        """The full name of an attribute chain that starts at a module or an imported name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in local or node.id not in self.aliases:
            return None
        return ".".join([self.aliases[node.id], *reversed(parts)])

    def _value(self, dotted: str) -> Any:
        value = check_component_name(dotted)
        if callable(value) and sensitive_parameters(value):
            raise Refused(f"'{dotted}' may only be a `_target_`, where its arguments can be checked")
        return value

    def _environment(self, key: ast.AST) -> None:
        if not (isinstance(key, ast.Constant) and key.value in _ENVIRONMENT):
            raise Refused("of the environment only the rank variables may be read")

    def _is_cudnn_switch(self, node: ast.Call, local: frozenset[str]) -> bool:
        """Exactly ``setattr(torch.backends.cudnn, "benchmark", True)``, which many model-zoo bundles begin with."""
        return (
            isinstance(node.func, ast.Name)
            and node.func.id == "setattr"
            and len(node.args) == 3
            and not node.keywords
            and self._dotted(node.args[0], local) == "torch.backends.cudnn"
            and isinstance(node.args[1], ast.Constant)
            and node.args[1].value in ("allow_tf32", "benchmark", "deterministic", "enabled")
            and isinstance(node.args[2], ast.Constant)
            and isinstance(node.args[2].value, bool)
        )


def _describe(node: ast.AST) -> str:
    return f"'{re.sub(r'(?<!^)(?=[A-Z])', ' ', type(node).__name__).lower()}'"
