"""`python -m fmscale COMMAND` is the same as `fmscale COMMAND`."""

import sys
import traceback
from typing import NoReturn


def main(*command: str) -> NoReturn:
    """Entry point of the installed command, and with its name that of a script for one command."""
    from fmscale.cli import main as run
    from fmscale.distributed import end

    try:
        code = run([*command, *sys.argv[1:]])
    except Exception:  # the interpreter would show it too, but it ends a rank with its own teardown
        traceback.print_exc()
        code = 1
    end(code)


if __name__ == "__main__":
    main()
