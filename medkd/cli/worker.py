"""One of several training processes, started by ``medkd train --devices``; not a command of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    """Run the configuration of the run folder named in the arguments; only the first process reports errors."""
    from medkd.cli import output
    from medkd.cli.exits import report_error
    from medkd.workflows.train import run_process

    first = os.environ.get("RANK", "0") == "0"
    output.start_logging(quiet=not first)
    run_dir, mode = Path(sys.argv[1]), sys.argv[2]
    try:
        run_process(run_dir, resume=mode == "resume")
    except BaseException as error:
        return report_error(error) if first else int(getattr(error, "exit_code", 3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
