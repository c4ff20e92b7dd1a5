"""``medkd methods``: every published method, found by walking the package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from difflib import get_close_matches

import medkd.methods
from medkd.engine.method import Method
from medkd.errors import ConfigError
from medkd.workflows.bundles import list_bundles


@dataclass(frozen=True)
class MethodCard:
    """What is known of a method.

    Attributes:
        name: its module, as on the page and in bundles.
        class_name: its class, as printed in the paper.
        paper: citation.
        task: what it trains.
        streams: the streams a batch must have.
        optional_streams: the streams it can use besides.
        roles: the networks it trains, one optimizer each.
        frozen: the networks it needs and never changes.
        summary: one line on what it does.
        differs: deviations from the paper, as the module states them.
        bundles: the bundles that come with it.
        page: its page in the documentation.
    """

    name: str
    class_name: str
    paper: str
    task: str
    streams: tuple[str, ...]
    optional_streams: tuple[str, ...]
    roles: tuple[str, ...]
    frozen: tuple[str, ...]
    summary: str
    differs: list[str]
    bundles: list[str]
    page: str


def list_methods() -> list[MethodCard]:
    """All methods, by module and in the order in which a module defines them."""
    shipped = [bundle.name for bundle in list_bundles()]
    cards = []
    for info in pkgutil.iter_modules(medkd.methods.__path__):
        module = importlib.import_module(f"medkd.methods.{info.name}")
        classes = [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
        ]
        documentation = inspect.getdoc(module) or ""
        for method in classes:
            cards.append(
                MethodCard(
                    name=info.name,
                    class_name=method.__name__,
                    paper=method.paper,
                    task=method.task,
                    streams=method.streams,
                    optional_streams=method.optional_streams,
                    roles=method.roles,
                    frozen=method.frozen,
                    summary=documentation.split("\n", 1)[0],
                    differs=_differs(documentation),
                    bundles=[name for name in shipped if name.startswith(f"{info.name}_")],
                    page=f"docs/methods/{info.name}.md",
                )
            )
    return cards


def find_method(name: str) -> list[MethodCard]:
    """The methods of one module, or one by its class name.

    Raises:
        ConfigError: There is none; the nearest is suggested.
    """
    cards = list_methods()
    wanted = name.casefold().replace("-", "_")
    found = [card for card in cards if wanted in (card.name.casefold(), card.class_name.casefold())]
    if not found:
        near = get_close_matches(wanted, {card.name for card in cards}, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else "`medkd methods` lists all"
        raise ConfigError(f"method {name}", "is unknown", remedy)
    return found


def _differs(documentation: str) -> list[str]:
    """The ``Differs:`` paragraphs of a module card, each in one line."""
    found: list[list[str]] = []
    reading = False
    for line in documentation.splitlines():
        if line.startswith("Differs:"):
            found.append([line.removeprefix("Differs:").strip()])
            reading = True
        elif reading and line.strip():
            found[-1].append(line.strip())
        else:
            reading = False
    return [" ".join(lines) for lines in found]
