"""The errors a user can meet: each is one line that names the thing, what is wrong with it and what to do."""

from __future__ import annotations

from pathlib import Path


class MedkdError(Exception):
    """Something the user can mend.

    Args:
        where: the file, option or object at fault.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    exit_code = 2

    def __init__(self, where: str | Path, problem: str, remedy: str) -> None:
        self.where = str(where)
        self.problem = problem
        self.remedy = remedy
        super().__init__(str(where), problem, remedy)

    def __str__(self) -> str:
        line = " ".join(f"{self.where}: {self.problem}; {self.remedy}".split())
        return line.encode(errors="backslashreplace").decode()  # a file name need not be text


class InputError(MedkdError):
    """A file, folder, volume or datalist that cannot be used as it is."""


class ConfigError(MedkdError):
    """A usage, configuration, bundle or trust problem."""


class CheckpointError(MedkdError):
    """A checkpoint that is damaged, incomplete or belongs to another run."""


class TrainingError(MedkdError):
    """Training stopped by itself; the last good checkpoint is kept."""

    exit_code = 4


class TrainingPaused(MedkdError):  # noqa: N818 - a pause is not an error
    """Training was asked to stop (SIGTERM, SIGUSR1), wrote a checkpoint, and continues with ``--resume``."""

    exit_code = 75
