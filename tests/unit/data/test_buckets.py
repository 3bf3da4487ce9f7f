from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmscale.data.buckets import assign, make_buckets
from fmscale.errors import UserError


@given(st.sampled_from([256, 512, 1024]), st.sampled_from([16, 32, 64]), st.floats(1, 4))
def test_buckets_have_nearly_one_area(resolution_px: int, step_px: int, max_aspect: float) -> None:
    buckets = make_buckets(resolution_px, step_px, max_aspect)
    assert (resolution_px, resolution_px) in buckets
    assert buckets == sorted(set(buckets))
    for height, width in buckets:
        assert height % step_px == width % step_px == 0
        assert max(height / width, width / height) <= max_aspect
        assert (width, height) in buckets
        assert abs(height * width - resolution_px**2) <= min(height, width) * step_px / 2


def test_max_aspect_one_is_the_square() -> None:
    assert make_buckets(512, 64, 1) == [(512, 512)]


@pytest.mark.parametrize("wrong", [(500, 64, 2), (0, 64, 2), (512, 0, 2), (32, 64, 2), (512, 64, 0.5)])
def test_impossible_buckets_are_the_users_error(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(UserError, match=r"bucket_step_px|max_aspect"):
        make_buckets(*wrong)


def test_assign_takes_the_nearest_shape() -> None:
    buckets = make_buckets(512, 64, 2)
    assert assign(1000, 1000, buckets) == (512, 512)
    assert assign(10, 1000, buckets) == min(buckets, key=lambda size: size[0] / size[1])
    assert assign(9, 4, [(2, 1), (3, 1)]) == (2, 1)
    assert assign(3, 2, [(200, 100), (900, 800), (2, 1)]) == (900, 800)


def test_of_equal_shapes_the_larger_wins() -> None:
    assert assign(3, 3, [(8, 8), (64, 64), (16, 16)]) == (64, 64)
