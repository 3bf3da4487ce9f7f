"""`fmscale export` for a checkout: `python tools/export_checkpoint.py …` takes the same arguments."""

import sys

from fmscale.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
