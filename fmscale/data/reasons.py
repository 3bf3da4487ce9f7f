"""Why an image of a source cannot be used: few phrases, so that counting them says something; what differs is apart."""

from __future__ import annotations

# the file, or its place in the source
NO_IMAGE = "not one image"  # none, or several of one key
SAME_KEY = "key comes twice"
UNREADABLE = "unreadable file"
DAMAGED_TAR = "damaged tar"  # what follows the damage is lost, so one of these may stand for many images
TOO_MANY_BYTES = "too many bytes"
# what is said of it
NO_CAPTION = "no caption"
BAD_CAPTION = "caption is no text"
BAD_JSON = "json is no object"
# its pixels
NOT_AN_IMAGE = "not an image"
TRUNCATED = "truncated image"
BROKEN = "broken image"
TOO_MANY_PIXELS = "too many pixels"
UNKNOWN_RANGE = "pixels of unknown range"
# what the networks make of them
NOT_FINITE = "latents or text features are not finite"
# what the filters refuse; those for scores add `FIELD out of range` and `no FIELD`
TOO_SMALL = "too small"
TOO_LONG = "too long a shape"


class ImageError(Exception):
    """An image that cannot be used.

    Attributes:
        reason: a phrase of this file.
        detail: what is special about this one; may be empty.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail.replace("\n", " ")

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
