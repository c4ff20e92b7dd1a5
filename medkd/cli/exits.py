"""How a process ends: one line for a person, an exit code for a program, a log for whoever mends it."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from medkd.errors import MedkdError

USAGE, FAULT, INTERRUPTED = 2, 3, 130
# What an operating system refuses because of where a user points, not because of a fault of ours.
_USER_ERRNO = {
    errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip


def report_error(error: BaseException, words: Sequence[str] = ()) -> int:
    """Print the one line an error deserves to stderr and return its exit code.

    Args:
        error: what ended the work.
        words: the command line, for the log of a fault.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAULT
    if isinstance(error, KeyboardInterrupt):
        return print_error("interrupted", INTERRUPTED)
    if isinstance(error, MedkdError):
        return print_error(str(error), error.exit_code)
    if _is_out_of_memory(error):
        remedy = "use a smaller batch_size, patch_size or roi_size, amp=bf16, or another --device"
        return print_error(f"memory: the work does not fit; {remedy}", USAGE)
    if isinstance(error, OSError) and error.errno in _USER_ERRNO and error.filename:
        remedy = "check the path, its permissions and the free space"
        return print_error(f"{error.filename}: {error.strerror}; {remedy}", USAGE)
    log = _write_log(error, words)
    return print_error(f"{type(error).__name__}: a fault in medkd, not in your input; the details are in {log}", FAULT)


def print_error(line: str, code: int) -> int:
    """Print ``error: <line>`` to stderr and return the code."""
    print(f"error: {visible(' '.join(line.split()))}", file=sys.stderr)
    return code


def visible(text: str) -> str:
    """Text in which nothing acts on the terminal or hides: control and direction characters are written out."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device ran out of memory; told by name, so that torch need not be imported."""
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
