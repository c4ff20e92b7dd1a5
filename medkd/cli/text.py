"""Text from files, made safe to show."""

from __future__ import annotations


def visible(text: str) -> str:
    """Text in which nothing can act on the terminal or hide: control and direction characters become ``\\x1b``."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )
