"""The rules that keep the tree a map, proved from the source alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "medkd"
# Highest first. A package imports from its own level and from those below it, never from one above.
LEVELS = (
    ("cli", "__main__"), ("workflows",), ("deploy", "report"), ("methods", "wsi"), ("engine",), ("data", "metrics"),
    ("nets", "losses"), ("schedules", "errors"),
)  # fmt: skip
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}
MATHS = ("methods", "losses", "nets")
HEAVY = {"albumentations", "ignite", "matplotlib", "monai", "nibabel", "numpy", "pydantic", "scipy", "sklearn", "torch"}
SAYS_NOTHING = {"base", "common", "core", "helper", "helpers", "misc", "util", "utils"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The package or module directly below medkd that a file belongs to; medkd itself for ``medkd/__init__.py``."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "medkd" if first == "__init__" else first


def imports(path: Path, *, only_at_top: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of whatever a file imports, in functions too, but not for type checking alone."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes.extend(node.orelse)
        elif not (only_at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            nodes.extend(ast.iter_child_nodes(node))


def is_in(name: str, *modules: str) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def offenders(paths: list[Path], *modules: str) -> list[str]:
    """Where any of the modules is imported, as ``file:line name``."""
    return [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in paths
        for line, name in imports(path)
        if is_in(name, *modules)
    ]


def outside(*names: str) -> list[Path]:
    return [path for path in SOURCES if part(path) not in names]


def inside(*names: str) -> list[Path]:
    return [path for path in SOURCES if part(path) in names]


def test_the_reader_of_imports_sees_them_all(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport a.b as c, d\nfrom e import f\ndef g():\n    from h import i\n"
        "if TYPE_CHECKING:\n    import j\nelse:\n    import k\nclass L:\n    def m(self):\n        import n\n"
    )
    assert {name for _, name in imports(file)} == {"typing.TYPE_CHECKING", "a.b", "d", "e.f", "h.i", "k", "n"}
    assert {name for _, name in imports(file, only_at_top=True)} == {"typing.TYPE_CHECKING", "a.b", "d", "e.f", "k"}
    assert is_in("monai.engines.utils", "monai.engines")
    assert not is_in("monai.engines_of_others", "monai.engines")


def test_every_part_has_a_level():
    assert {part(path) for path in SOURCES} - {"medkd"} <= LEVEL.keys()


def test_imports_point_downwards():
    upwards = []
    for path in outside("medkd"):
        for line, name in imports(path):
            words = name.split(".")
            if words[0] == "medkd" and len(words) > 1 and LEVEL.get(words[1], LEVEL[part(path)]) < LEVEL[part(path)]:
                upwards.append(f"{path.relative_to(ROOT)}:{line} {name}")
    assert not upwards


def test_methods_and_slides_do_not_know_of_each_other():
    assert not offenders(inside("methods"), "medkd.wsi")
    assert not offenders(inside("wsi"), "medkd.methods")


def test_papers_do_not_import_papers():
    papers = [path for path in inside("methods") if path.name != "__init__.py"]
    assert len(papers) >= 4
    assert not offenders(papers, "medkd.methods")


def test_the_maths_knows_nothing_of_data_or_engines():
    assert not offenders(inside(*MATHS), "medkd.data", "ignite", "monai.engines", "monai.bundle", "monai.data")


def test_only_the_engine_imports_ignite_and_monai_engines():
    assert not offenders(outside("engine"), "ignite", "monai.engines")
    assert offenders(inside("engine"), "ignite"), "the rule must be able to find something"


def test_only_deploy_and_workflows_import_monai_bundle():
    assert not offenders(outside("deploy", "workflows"), "monai.bundle")


def test_nothing_imports_torchvision():
    everything = SOURCES + [path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    assert not offenders(everything, "torchvision")
    assert not [path for path in (ROOT / "bundles").rglob("*.json") if "torchvision" in path.read_text()]


def test_only_the_command_line_prints():
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in outside("cli", "__main__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


def test_every_file_has_a_name_that_says_something():
    named = [path for folder in ("medkd", "tests", "benchmarks") for path in (ROOT / folder).rglob("*")]
    assert not [path for path in named if path.stem in SAYS_NOTHING and path.suffix in ("", ".py")]


def test_every_test_file_has_a_name_of_its_own():
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("path", inside("cli", "__main__"), ids=lambda path: path.name)
def test_command_line_modules_import_only_light_things_at_the_top(path):
    light = {*sys.stdlib_module_names, "typer", "rich"}
    heavy = [
        name
        for _, name in imports(path, only_at_top=True)
        if name.split(".")[0] not in light and not is_in(name, "medkd.cli", "medkd.errors", "medkd.__version__")
    ]
    assert not heavy


def test_help_loads_none_of_the_heavy_libraries():
    modules = [f"medkd.cli.{path.stem}" for path in inside("cli") if path.name != "__init__.py"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "from medkd.__main__ import main\n"
        "assert main(['--help']) == 0\n"
        f"sys.exit(', '.join(set({sorted(HEAVY)}) & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: medkd")
