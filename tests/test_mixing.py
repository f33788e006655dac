"""Mixtures: made of two images and nothing else, in the shares that they state, the same in all sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afds.config import FitConfig, OptimConfig, RecoveryConfig, recovering
from afds.mixing import mix, mixture, paste


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


def test_a_step_is_mixed_as_often_as_the_options_say() -> None:
    x_BCHW = torch.arange(4.0).reshape(-1, 1, 1, 1).expand(4, 3, 8, 8)
    for options, expected in (({"mixup": 0.0}, 0.0), ({"mixup": 1.0, "mixup_share": 0.0}, 0.0),
                              ({"mixup": 1.0, "mixup_share": 0.25}, 0.25), ({"mixup": 1.0}, 1.0)):  # fmt: skip
        torch.manual_seed(0)
        mixed = [mixture([x_BCHW, x_BCHW[:, :, ::2, ::2]], OptimConfig(**options)) for _ in range(400)]
        assert sum(other is not None for _, other in mixed) / 400 == pytest.approx(expected, abs=0.06)
        for views, other in mixed[:20]:
            assert [tuple(v.shape[2:]) for v in views] == [(8, 8), (4, 4)]
            assert other is not None or torch.equal(views[0], x_BCHW)
    assert mixture([x_BCHW[:1]], OptimConfig(mixup=1.0))[1] is None, "one image has none to be mixed with"
    torch.manual_seed(0)
    flat = [mixture([x_BCHW], OptimConfig(mixup=1.0, cutmix=0.5))[0][0][0] for _ in range(200)]
    pasted = sum(bool((image == image.round()).all()) for image in flat)
    assert 70 < pasted < 140, "half of them are pasted, and hold whole numbers only"


def test_short_trainings_do_not_mix() -> None:
    def share(epochs: int, **changes: Any) -> float:
        return recovering(FitConfig(recovery=RecoveryConfig(**changes)), epochs).optim.mixup_share

    assert [share(epochs) for epochs in (1, 35, 36, 240)] == [0, 0, 0.5, 0.5]
    assert share(12, mixup_share=0.25) == share(120, mixup_share=0.25) == 0.25
