"""`fmscale reflow` for a checkout: `python tools/generate_reflow_pairs.py …` takes the same arguments."""

import sys

from fmscale.cli import main

sys.exit(main(["reflow", *sys.argv[1:]]))
