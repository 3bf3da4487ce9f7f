"""Real images that need no download: the handwritten digits of scikit-learn, their captions, and a reader of them.

The quickstart trains on them, and because the classifier can read what a model painted, its result can be checked:
a generator that ignores its prompt is right one time in ten.

Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI; 1,797 test images of 8 x 8 pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from sklearn.svm import SVC

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT_TEMPLATE = "a handwritten {}"
SIDE_PX = 64  # of an enlarged digit
GRID_PX = 8  # of a digit as scikit-learn has it
HELDOUT_SHARE = 0.2


class DigitSplit(NamedTuple):
    """The digits in two parts, each image (8, 8) float32 in [0, 1] with 1 for ink, each label 0..9."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    heldout_images: NDArray[np.float32]
    heldout_labels: NDArray[np.int64]


def load_split() -> DigitSplit:
    """The digits in a training and a held-out part: the same ones at every call, each digit equally often in both.

    Returns:
        1,437 training and 360 held-out images, with their labels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    labels = digits.target.astype(np.int64)
    train, heldout = train_test_split(np.arange(len(labels)), test_size=HELDOUT_SHARE, stratify=labels, random_state=0)
    return DigitSplit(images[train], labels[train], images[heldout], labels[heldout])


def enlarge(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Digits as smooth white-on-black pictures, which pooled over 8 x 8 areas give nearly the digits back.

    Args:
        images: shape (N, 8, 8), in [0, 1].

    Returns:
        Shape (N, 64, 64, 3), three equal channels.
    """
    size = (SIDE_PX, SIDE_PX)
    pictures = [Image.fromarray(image.astype(np.float32)).resize(size, Image.Resampling.LANCZOS) for image in images]
    gray = np.stack([np.asarray(picture) for picture in pictures]).clip(0, 1)
    return np.repeat(np.rint(gray * 255).astype(np.uint8)[..., None], 3, axis=-1)


def side_by_side(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures (N, H, W, 3) beside one another: (N, H, 2W, 3)."""
    return np.concatenate([left, right], axis=2)


def stacked(above: NDArray[np.uint8], below: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures (N, H, W, 3) on top of one another: (N, 2H, W, 3)."""
    return np.concatenate([above, below], axis=1)


def caption(label: int) -> str:
    """What a single digit's picture shows: "a handwritten three"."""
    return PROMPT_TEMPLATE.format(WORDS[label])


def side_by_side_caption(left: int, right: int) -> str:
    """What a wide picture shows: "a handwritten three to the left of a handwritten five"."""
    return f"{caption(left)} to the left of {caption(right)}"


def stacked_caption(above: int, below: int) -> str:
    """What a tall picture shows: "a handwritten three above a handwritten five"."""
    return f"{caption(above)} above {caption(below)}"


def fit_classifier(images: NDArray[np.floating], labels: NDArray[np.integer]) -> SVC:
    """A classifier that reads about 99 % of held-out digits rightly, fitted in a fraction of a second.

    Args:
        images: shape (N, 8, 8), in [0, 1].
        labels: shape (N,), 0..9.

    Returns:
        A support vector machine with a Gaussian kernel, over pixels in [-1, 1].
    """
    from sklearn.svm import SVC

    return SVC(gamma=0.064, C=10).fit(_pixels(images), labels)


def read_digits(classifier: SVC, images: NDArray[np.uint8] | NDArray[np.floating]) -> NDArray[np.int64]:
    """Which digit each picture shows, in the eyes of `classifier`.

    Args:
        classifier: from `fit_classifier`.
        images: shape (N, 64, 64, 3), uint8, or floating point in [0, 1].

    Returns:
        Labels 0..9, shape (N,).
    """
    unit = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    return classifier.predict(_pixels(shrink(unit)))


def shrink(images: NDArray[np.floating]) -> NDArray[np.floating]:
    """Pictures (N, 64, 64, 3) as gray means over areas of 8 x 8 pixels: (N, 8, 8)."""
    area_px = SIDE_PX // GRID_PX
    return images.reshape(-1, GRID_PX, area_px, GRID_PX, area_px, 3).mean(axis=(2, 4, 5))


def _pixels(images: NDArray[np.floating]) -> NDArray[np.floating]:
    return images.reshape(len(images), -1) * 2 - 1
