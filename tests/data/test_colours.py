"""Colours that vary, against torchvision's jitters one by one."""

from __future__ import annotations

import colorsys

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from afds.data.colours import Colours, vary


@pytest.fixture(name="x_3HW")
def photo() -> Tensor:
    return 0.35 + 0.2 * torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))  # far from what is clamped


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_strength_contrast_and_saturation_are_torchvisions(x_3HW: Tensor, factor: float) -> None:
    for name, of in (
        ("brightness", V.adjust_brightness),
        ("contrast", V.adjust_contrast),
        ("saturation", V.adjust_saturation),
    ):
        given = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, name: factor}
        assert torch.allclose(vary(x_3HW, **given, turn=0.0), of(x_3HW, factor), atol=1e-4), name


def test_all_at_once_is_one_after_the_other(x_3HW: Tensor) -> None:
    stepwise = V.adjust_contrast(V.adjust_brightness(V.adjust_saturation(x_3HW, 0.8), 1.1), 0.9)
    assert torch.allclose(vary(x_3HW, 1.1, 0.9, 0.8, 0.0), stepwise, atol=1e-4)


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1])
def test_hues_turn_as_far_as_in_hsv_and_grey_stays(turn: float) -> None:
    rng = torch.Generator().manual_seed(1)
    for start in torch.rand(20, generator=rng).tolist():
        pixel = torch.tensor(colorsys.hsv_to_rgb(start, 0.3, 0.6))[:, None, None]
        turned = vary(pixel, 1.0, 1.0, 1.0, turn)
        assert torch.allclose(V.rgb_to_grayscale(turned), V.rgb_to_grayscale(pixel), atol=2e-3)
        moved = colorsys.rgb_to_hsv(*turned.flatten().tolist())[0] - start
        assert abs((moved - turn + 0.5) % 1 - 0.5) < 0.06, (start, moved)
    grey = torch.full((3, 2, 2), 0.4)
    assert torch.allclose(vary(grey, 1.0, 1.0, 1.0, turn), grey, atol=1e-5)


def test_a_whole_turn_changes_nothing(x_3HW: Tensor) -> None:
    assert torch.allclose(vary(x_3HW, 1.0, 1.0, 1.0, 1.0), x_3HW, atol=1e-5)


def test_a_fifth_is_grey_at_strength_point_eight_and_values_stay_colours() -> None:
    torch.manual_seed(0)
    red = torch.tensor([0.8, 0.2, 0.2]).view(3, 1, 1)
    colours = Colours(0.8)
    drawn = torch.stack([colours(red).flatten() for _ in range(400)])
    grey = (drawn - drawn.mean(1, keepdim=True)).abs().amax(1) < 1e-4
    assert 50 < int(grey.sum()) < 115
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1
    green, blue = drawn[~grey, 1], drawn[~grey, 2]  # equal while no hue turns
    assert (green > blue + 0.02).any()
    assert (blue > green + 0.02).any()


def test_every_size_draws_as_much(x_3HW: Tensor) -> None:
    """As two views of one photo must see the same colours."""
    torch.manual_seed(3)
    Colours(0.4)(x_3HW)
    after = torch.rand(())
    torch.manual_seed(3)
    Colours(0.4)(x_3HW[:, :4, :4])
    assert torch.equal(after, torch.rand(()))
