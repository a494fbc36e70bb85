"""Coarse-to-fine maps against networks whose answer is known."""

import pytest
import torch
from torch import Tensor, nn

from freqprune.attribution.images import attribute
from freqprune.attribution.refining import attribute_fine, split
from freqprune.errors import InputError
from tests.attribution.test_attribution import IMAGES, OfTiles, tiles_of


def test_split_by_hand() -> None:
    parts = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, -1], [2, 2, -1, -1]])
    # One of four parts is split; a part of one pixel stays whole.
    assert split(parts, [1, 0, 2, 3], 4).tolist() == [[0, 0, 1, 4], [0, 0, 5, 6], [2, 2, 3, -1], [2, 2, -1, -1]]
    assert torch.equal(split(parts, [3, 0, 1, 2], 4), parts)
    wide = torch.tensor([[0, 0, 0, 1]])
    assert split(wide, [0, 1], 2).tolist() == [[0, 0, 2, 1]]


def test_what_matters_is_seen_finely() -> None:
    """Of 4 x 4 tiles two matter; from 2 x 2 tiles on, the quarter with the larger one is split."""
    net = OfTiles(lambda tiles: 5 * tiles[:, 13] + tiles[:, 2])
    images = IMAGES.clone()
    images[:] = 1.0
    black = torch.zeros(3, 16, 16)
    found = attribute_fine(net, images, 0, refine=1, grid=2, forwards=64, baseline=black)
    assert found.forwards == 16 + 28
    assert found.part_names == [f"part {number}" for number in range(7)]
    expected = torch.zeros(16, 16, dtype=torch.float64)
    expected[12:, 4:8] = 5  # tile 13, alone
    expected[:8, 8:] = 1  # the quarter with tile 2, as a whole
    torch.testing.assert_close(found.maps, expected.expand(3, -1, -1), rtol=1e-3, atol=1e-4)
    whole = attribute_fine(net, IMAGES, 0, refine=0, grid=4, forwards=64, baseline=black)
    assert torch.equal(whole.effects, attribute(net, IMAGES, 0, grid=4, forwards=64, baseline=black).effects)


def test_every_image_has_parts_of_its_own() -> None:
    net = OfTiles(lambda tiles: tiles.square().sum(1))
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, :4, :4], images[1, :, 12:, 12:] = 1, 1
    found = attribute_fine(net, images, refine=1, grid=2, forwards=256, baseline=torch.zeros(3, 16, 16))
    assert not torch.equal(found.parts[0], found.parts[1])
    for image, tile in ((0, 0), (1, 15)):
        best = found.maps[image] == found.maps[image].max()
        assert torch.equal(tiles_of(best.float().expand(1, 3, -1, -1))[0], (torch.arange(16) == tile).float())


def test_the_last_recordings_end_with_the_error_asked_for() -> None:
    """A linear model leaves no error: one recording of 4 parts, one of the 7 that they become."""
    net = OfTiles(lambda tiles: 5 * tiles[:, 13] + tiles[:, 2])
    assert attribute_fine(net, IMAGES, 0, refine=1, grid=2, forwards=256, until=0.01).forwards == 16 + 28
    assert attribute_fine(net, IMAGES, 0, refine=1, grid=2, forwards=256).forwards == 16 + 8 * 28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refine": -1}, "refine must be at least 0, got -1"),
        ({"parts": "channels"}, "refine splits parts of the image, which channels are not"),
        ({"grid": 4, "forwards": 60}, "refine = 1: 28 parts need 112 frames, after 64 for coarser ones"),
        (
            {"grid": 4, "forwards": 128},
            "28 parts need 112 frames, after 64 .* must be at least 176",
        ),
    ],
)
def test_refining_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attribute_fine(OfTiles(lambda tiles: tiles[:, 0]), IMAGES, **arguments)


def test_masks_that_differ_from_image_to_image_need_what_they_have() -> None:
    """Not all images have all numbers: fewer parts are split than of a grid of as many."""
    segments = torch.arange(12).view(3, 2, 2).repeat_interleave(8, 1).repeat_interleave(8, 2)
    found = attribute_fine(OfTiles(lambda tiles: tiles[:, 0]), IMAGES, segments=segments, refine=1, forwards=112)
    assert found.forwards == 48 + 4 * len(found.part_names) <= 112


def test_too_few_forwards_are_refused_before_any_recording() -> None:
    class Counted(nn.Module):
        seen = 0

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            Counted.seen += len(x)
            return self.conv(x).mean((2, 3))  # type: ignore[no-any-return]

    with pytest.raises(InputError, match=r"112 parts need 448 frames, after 256 .* at least 704, got 512"):
        attribute_fine(Counted(), torch.rand(5, 3, 32, 32), refine=1, grid=8, forwards=512)
    assert Counted.seen == 0
    with pytest.raises(InputError, match="until must be a standard error above 0, got 0"):
        attribute_fine(Counted(), torch.rand(5, 3, 32, 32), refine=1, grid=4, forwards=512, until=0)
    # Of parts of any shape it is known that they do not become fewer.
    segments = torch.arange(64).view(8, 8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    with pytest.raises(InputError, match=r"64 parts need 256 frames, after 256 .* at least 512, got 500"):
        attribute_fine(Counted(), torch.rand(5, 3, 32, 32), refine=1, segments=segments, forwards=500)
    assert Counted.seen == 0


def test_too_few_forwards_for_patches_are_refused_before_any_recording() -> None:
    seen: list[int] = []
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with pytest.raises(InputError, match=r"112 parts need 448 frames, after 256 .* at least 704, got 512"):
        attribute_fine(net, torch.rand(5, 3, 32, 32), refine=1, parts="patches", forwards=512)
    assert sum(seen) < 64
