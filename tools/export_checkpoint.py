"""`fmscale export` for a checkout: `python tools/export_checkpoint.py …` takes the same arguments."""

from fmscale.__main__ import main

if __name__ == "__main__":  # processes that it starts read this file too
    main("export")
