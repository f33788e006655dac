"""Mixtures: made of two images and nothing else, in the shares that they state, the same in all sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afds.mixing import mix, paste


@given(seed=st.integers(0, 10_000), height=st.integers(1, 40), width=st.integers(1, 40), batch=st.integers(2, 5))
def test_a_paste_holds_pixels_of_both_in_the_share_it_states(seed: int, height: int, width: int, batch: int) -> None:
    torch.manual_seed(seed)
    x_BCHW = torch.arange(batch, dtype=torch.float).reshape(-1, 1, 1, 1).expand(batch, 3, height, width)
    before = x_BCHW.clone()
    (mixed_BCHW,), other_B, share = paste([x_BCHW], 1.0)
    assert torch.equal(x_BCHW, before), "the images themselves stay as they are"
    assert 0 <= share <= 1
    for i in range(batch):
        first, second = float(i), float(other_B[i])
        assert set(mixed_BCHW[i].unique().tolist()) <= {first, second}
        if first != second:
            assert (mixed_BCHW[i] == first).float().mean().item() == pytest.approx(share, abs=1e-6)


def test_a_paste_is_at_the_same_place_in_all_sizes() -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        large = torch.zeros(2, 3, 128, 128)
        large[1] = 1
        small = large[:, :, ::8, ::8].contiguous()
        (large_mixed, small_mixed), _, share = paste([large, small], 1.0)
        averaged = torch.nn.functional.avg_pool2d(large_mixed, 8)
        assert (averaged - small_mixed).abs().mean() < 0.1, "they differ by the rounding of the edges only"
        inside = (averaged - averaged.round()).abs() < 1e-6
        assert (averaged.round() == small_mixed)[inside].float().mean() > 0.9
        assert (
            abs((1 - share) - (small_mixed[0] != 0).float().mean().item()) < 1e-6
            or share == 1
            or (torch.equal(large_mixed, large))
        )


@pytest.mark.parametrize("how", [mix, paste])
def test_mixing_repeats_with_the_seed(how) -> None:  # type: ignore[no-untyped-def]
    x_BCHW = torch.randn(4, 3, 9, 7)
    torch.manual_seed(3)
    first = how([x_BCHW], 1.0)
    torch.manual_seed(3)
    second = how([x_BCHW], 1.0)
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]
