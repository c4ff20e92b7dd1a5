"""Text from files, made safe to show."""

from __future__ import annotations


def visible(text: str) -> str:
    """Text in which nothing acts on the terminal or hides: control and direction characters are written out."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )
