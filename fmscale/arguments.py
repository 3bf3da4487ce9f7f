"""Numbers and names on a command line."""

from __future__ import annotations

import argparse
import math
import re


def positive(text: str) -> int:
    """A whole number above 0, on a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, given {text}")
    return int(text)


def port(text: str) -> int:
    """A TCP port, on a command line."""
    if (number := positive(text)) > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, given {text}")
    return number


def width(text: str) -> float:
    """A relative width of an average."""
    value = finite(text)
    if not 0 < value < 0.28:
        raise argparse.ArgumentTypeError(f"must be between 0 and 0.28, given {text}")
    return value


def finite(text: str) -> float:
    """A number, neither infinite nor none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, given {text}")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    if (value := finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, given {text}")
    return value


def licence(text: str) -> str:
    """The identifier of a licence, as SPDX and the Hugging Face hub have them."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"must be an identifier such as apache-2.0, given {text!r}")
    return text
