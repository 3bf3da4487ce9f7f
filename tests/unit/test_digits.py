"""digits.py: the split, the pictures and the reader that the quickstart's figures rest on."""

import numpy as np
import pytest

from fmscale import digits


@pytest.fixture(scope="module")
def split() -> digits.DigitSplit:
    return digits.load_split()


def test_the_split_is_stratified_disjoint_and_the_same_every_time(split):
    assert (len(split.train_images), len(split.heldout_images)) == (1437, 360)
    shares = np.bincount(split.heldout_labels) / np.bincount(split.train_labels)
    assert np.allclose(shares, 0.25, atol=0.02)
    seen = {image.tobytes() for image in split.train_images}
    assert not any(image.tobytes() in seen for image in split.heldout_images)
    assert all(np.array_equal(first, second) for first, second in zip(split, digits.load_split(), strict=True))


def test_enlarged_digits_shrink_back_to_themselves(split):
    pictures = digits.enlarge(split.heldout_images[:50])
    assert pictures.shape == (50, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert np.abs(digits.shrink(pictures / 255) - split.heldout_images[:50]).mean() < 0.05


def test_the_classifier_reads_enlarged_held_out_digits(split):
    classifier = digits.fit_classifier(split.train_images, split.train_labels)
    pictures = digits.enlarge(split.heldout_images)
    read = digits.read_digits(classifier, pictures)
    assert (read == split.heldout_labels).mean() >= 0.98
    assert np.array_equal(read, digits.read_digits(classifier, pictures / 255))


def test_pairs_hold_both_pictures_where_the_caption_says():
    one, two = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 255, np.uint8)
    wide, tall = digits.side_by_side(one, two), digits.stacked(one, two)
    assert (wide.shape, tall.shape) == ((1, 64, 128, 3), (1, 128, 64, 3))
    assert (wide[:, :, :64] == 0).all()
    assert (wide[:, :, 64:] == 255).all()
    assert (tall[:, :64] == 0).all()
    assert (tall[:, 64:] == 255).all()


def test_captions():
    assert [digits.caption(label) for label in (0, 9)] == ["a handwritten zero", "a handwritten nine"]
    assert digits.side_by_side_caption(3, 5) == "a handwritten three to the left of a handwritten five"
    assert digits.stacked_caption(3, 5) == "a handwritten three above a handwritten five"
