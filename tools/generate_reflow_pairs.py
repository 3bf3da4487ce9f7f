"""`fmscale reflow` for a checkout: `python tools/generate_reflow_pairs.py …` takes the same arguments."""

from fmscale.__main__ import main

if __name__ == "__main__":  # processes that it starts read this file too
    main("reflow")
