"""`fmscale encode` for a checkout: `python tools/encode_latents.py …` takes the same arguments."""

import sys

from fmscale.cli import main

sys.exit(main(["encode", *sys.argv[1:]]))
