"""The command line's entry: runs a command and turns every error into one line and an exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from medkd.cli.exits import INTERRUPTED, USAGE, print_error, report_error

__all__ = ["main", "report_error"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``medkd``; by default those of this process.

    Returns:
        The exit code: 0 done, 1 some cases failed or findings, 2 usage or input, 3 fault, 4 training stopped,
        75 training paused, 130 interrupted.
    """
    from medkd.cli.app import command

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = command().main(words, prog_name="medkd", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        return _report(error, words)
    if result == INTERRUPTED:  # typer turns Ctrl-C into this result
        return print_error("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _report(error: BaseException, words: Sequence[str]) -> int:
    """Report an error of the command line itself; any other like every process of medkd does."""
    import typer

    usage_error = typer.BadParameter.__mro__[1]
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        return 0  # the reader, `head` say, has seen enough
    if isinstance(error, typer.Abort):
        return print_error("interrupted", INTERRUPTED)
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if type(error).__name__ == "NoArgsIsHelpError":  # `medkd` or `medkd data` alone
        print(error.format_message())  # type: ignore[attr-defined]
        return 0
    if isinstance(error, usage_error):
        return print_error(_usage_line(error), USAGE)
    return report_error(error, words)


def _usage_line(error: BaseException) -> str:
    """A usage error as ``<option or argument>: <what is wrong>; <what to do>``."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "medkd"
    remedy = f"see `{path} --help`"
    name = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities"):
        known = [option for parameter in context.command.params for option in parameter.opts] if context else []
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        return f"{name}: is no option of `{path}`; {f'did you mean {near[0]}?' if near else remedy}"
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    unknown = re.match(r"No such command '([^']*)'", message)
    if unknown:
        known = list(getattr(context.command, "commands", {})) if context else []
        near = get_close_matches(unknown[1], known, n=1, cutoff=0.5)
        return f"{unknown[1]}: is no command of `{path}`; {f'did you mean {near[0]}?' if near else remedy}"
    missing = re.match(r"Missing (argument|option|parameter):? '?([^'.]*)'?\.?", message)
    if missing:
        return f"{missing[2].strip() or missing[1]}: is missing; {remedy}"
    invalid = re.match(r"Invalid value for '?([^:]*?)'?: (.*)", message)
    if invalid:
        return f"{invalid[1].split(' / ')[-1]}: {invalid[2].rstrip('.')}; {remedy}"
    return f"{path}: {message.rstrip('.')}; {remedy}"


if __name__ == "__main__":
    sys.exit(main())
