"""`fmscale submit` for a checkout: `python launch/submit.py …` takes the same arguments."""

import sys

from fmscale.cli import main

sys.exit(main(["submit", *sys.argv[1:]]))
