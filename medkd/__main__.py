"""The command line's entry: runs a command and turns every error into one line and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from difflib import get_close_matches

from medkd.cli.text import visible
from medkd.errors import MedkdError

USAGE, FAULT, INTERRUPTED = 2, 3, 130
# What an operating system refuses because of where a user points, not because of a fault of ours.
_USER_ERRNO = {
    errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip


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
        return report_error(error, words)
    if result == INTERRUPTED:  # typer turns Ctrl-C into this result
        return _print("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def report_error(error: BaseException, words: Sequence[str] = ()) -> int:
    """Print the one line an error deserves to stderr and return its exit code."""
    import typer

    usage_error = typer.BadParameter.__mro__[1]
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, BrokenPipeError):
            return 0  # the reader, `head` say, has seen enough
        return error.code if isinstance(error.code, int) else FAULT
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _print("interrupted", INTERRUPTED)
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, MedkdError):
        return _print(str(error), error.exit_code)
    if type(error).__name__ == "NoArgsIsHelpError":  # `medkd` or `medkd data` alone
        print(error.format_message())  # type: ignore[attr-defined]
        return 0
    if isinstance(error, usage_error):
        return _print(_usage_line(error), USAGE)
    if _is_out_of_memory(error):
        remedy = "use a smaller batch_size, patch_size or roi_size, amp=bf16, or another --device"
        return _print(f"memory: the work does not fit; {remedy}", USAGE)
    if isinstance(error, OSError) and error.errno in _USER_ERRNO and error.filename:
        return _print(f"{error.filename}: {error.strerror}; check the path, its permissions and the free space", USAGE)
    log = _write_log(error, words)
    return _print(f"{type(error).__name__}: a fault in medkd, not in your input; the details are in {log}", FAULT)


def _print(line: str, code: int) -> int:
    print(f"error: {visible(' '.join(line.split()))}", file=sys.stderr)
    return code


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


def _is_out_of_memory(error: BaseException) -> bool:
    names = {type(error).__name__, type(error.__cause__).__name__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "not enough memory: you tried" in str(error)


def _write_log(error: BaseException, words: Sequence[str]) -> str:
    """Write the traceback to a file; under ``--deidentify`` without messages, which may name files."""
    if "--deidentify" in words:
        text = "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__
    else:
        text = f"medkd {' '.join(words)}\n\n" + "".join(traceback.format_exception(error))
    descriptor, path = tempfile.mkstemp(prefix="medkd-error-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
