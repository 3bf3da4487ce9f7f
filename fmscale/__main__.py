"""`python -m fmscale COMMAND` is the same as `fmscale COMMAND`."""

import sys


def main() -> None:
    """Entry point of the installed command."""
    from fmscale.cli import main as run
    from fmscale.distributed import end

    end(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
