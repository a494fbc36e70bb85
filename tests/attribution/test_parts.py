"""Parts of every kind, what they fade to, and precision: against networks whose answer is known."""

import sys

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from freqprune.attribution.baselines import find_baseline
from freqprune.attribution.images import attribute
from freqprune.attribution.parts import find_parts, patches_of
from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from tests.attribution.test_attribution import IMAGES, OfTiles, tiles_of


class Weighted(nn.Module):
    """Sum of the pixels times weights of their shape."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        value = (x * self.weights).sum((1, 2, 3))
        return torch.stack([value, -value], 1)


def test_colour_channels() -> None:
    net = Weighted(torch.tensor([1.0, 0.0, -2.0])[:, None, None].expand(3, 16, 16) / 256)
    found = attribute(net, IMAGES, 0, parts="channels", forwards=64, baseline="grey")
    expected = torch.tensor([1.0, 0.0, -2.0]) * (IMAGES.mean((2, 3)) - 0.5)
    torch.testing.assert_close(found.effects, expected.double(), rtol=1e-3, atol=1e-5)
    assert found.part_names == ["channel 1", "channel 2", "channel 3"]
    assert found.maps.shape == found.for_captum().shape == IMAGES.shape
    torch.testing.assert_close(found.maps[1, 2], found.effects[1, 2].expand(16, 16), rtol=1e-3, atol=1e-5)
    assert found.for_grad_cam().shape == (3, 16, 16)
    bars = found.plot(0, IMAGES[0]).axes[1].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(found.effects[0].tolist())


def test_patches_of_a_network_of_tokens() -> None:
    torch.manual_seed(0)
    net = VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3
    ).eval()
    nn.init.normal_(net.heads.head.weight)
    row, column = patches_of(net, IMAGES[:1])
    assert row.tolist() == column.tolist() == [0] * 8 + [1] * 8
    found, tiles = (
        attribute(net, IMAGES, forwards=32, **more) for more in ({"parts": "patches"}, {"parts": "grid", "grid": 2})
    )
    assert torch.equal(found.effects, tiles.effects)
    assert found.effects.abs().min() > 0
    # Overlapping windows are no patches.
    with pytest.raises(InputError, match="no convolution of CifarResNet cuts its images into patches"):
        attribute(build_model({"name": "resnet8"}), IMAGES, parts="patches")


def test_what_is_beside_the_patches_is_in_none() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    row, column = patches_of(stem, torch.rand(1, 3, 30, 32))
    assert row.tolist() == [pixel // 4 for pixel in range(28)] + [-1, -1]
    assert column.tolist() == [pixel // 4 for pixel in range(32)]
    found = attribute(stem, torch.rand(1, 3, 30, 32), 0, parts="patches", forwards=256)
    assert len(found.part_names) == 56
    assert (found.parts[0, 28:] == -1).all()
    assert found.parts[0, 27, 31] == 55


def test_patches_begin_in_the_padding() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 4, 4, padding=(2, 0)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    row, column = patches_of(stem, torch.rand(1, 3, 32, 32))
    assert row.tolist() == [(pixel + 2) // 4 for pixel in range(32)]
    assert column.tolist() == [pixel // 4 for pixel in range(32)]


def test_superpixels() -> None:
    slic = pytest.importorskip("skimage.segmentation").slic
    # Quarters of one colour each.
    images = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(2)).repeat_interleave(8, 2)
    images = images.repeat_interleave(8, 3)
    weights = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3)) / 256
    found = attribute(Weighted(weights), images, 0, parts="slic", n_segments=4, forwards=64, baseline="grey")
    for number, image in enumerate(images):
        mask = torch.from_numpy(slic(image.permute(1, 2, 0).numpy(), 4, start_label=0))
        assert torch.equal(found.parts[number], mask)
        for part in range(int(mask.max()) + 1):
            expected = ((image - 0.5) * weights)[:, mask == part].sum()
            assert float(found.effects[number, part]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def test_a_part_that_an_image_lacks_does_nothing_to_it() -> None:
    net = OfTiles(lambda tiles: tiles[:, 0] + 2 * tiles[:, 5] * tiles[:, 1])
    segments = torch.full((3, 16, 16), -1)
    segments[:, :4, :4], segments[:, 4:8, 4:8] = 0, 2
    segments[1:, :4, 4:8] = 1
    found = attribute(net, IMAGES, 0, segments=segments, forwards=64, baseline="grey")
    assert found.effects.shape == (3, 3)
    assert (found.effects[0, 1], found.standard_error[0, 1], found.p_values[0, 1]) == (0, 0, 1)
    assert found.interactions[0, 1].abs().max() == 0
    alone = attribute(net, IMAGES[:1], 0, segments=segments[0].clamp(max=1), forwards=64, baseline="grey")
    torch.testing.assert_close(found.effects[0, [0, 2]], alone.effects[0], rtol=1e-3, atol=1e-5)
    assert found.interactions[1, 1, 2].abs() > 0
    # It counts neither as a part of that image nor among those tested there.
    assert found.present.tolist() == [[True, False, True], [True] * 3, [True] * 3]
    torch.testing.assert_close(found.adjusted[0, [0, 2]], alone.adjusted[0])
    assert found.ranked(0) == [[0, 2][place] for place in alone.ranked(0)]
    assert [pair[:2] for pair in found.strongest_pairs(0, 9)] == [(0, 2)]
    assert len(found.strongest_pairs(1, 9)) == 3


def test_numbers_of_a_mask_may_have_gaps() -> None:
    net = OfTiles(lambda tiles: tiles[:, 0] + 2 * tiles[:, 5])
    segments = torch.full((16, 16), -1, dtype=torch.int16)
    segments[:4, :4], segments[4:8, 4:8] = 300, 7
    found = attribute(net, IMAGES, 0, segments=segments, forwards=8, baseline="grey")
    assert found.part_names == ["segment 7", "segment 300"]
    tiles = nn.functional.avg_pool2d(IMAGES.mean(1, keepdim=True), 4).flatten(1)
    expected = torch.tensor([2.0, 1.0]) * (tiles[:, [5, 0]] - 0.5)
    torch.testing.assert_close(found.effects, expected.double(), rtol=1e-3, atol=1e-5)
    assert found.maps[0, 0, 0] == found.smoothed[0, 1]


def test_the_parts_fade_to_what_is_asked_for() -> None:
    weights = torch.randn(16, generator=torch.Generator().manual_seed(1))
    net = OfTiles(lambda tiles: tiles @ weights)
    blurred = torch.stack([
        torch.from_numpy(gaussian_filter(channel.numpy(), 1.0, mode="mirror", radius=2))
        for image in IMAGES for channel in image
    ]).view(IMAGES.shape)  # fmt: skip
    own = torch.rand(IMAGES.shape, generator=torch.Generator().manual_seed(5))
    mean = IMAGES.mean((2, 3), keepdim=True).expand(IMAGES.shape)
    for baseline, expected in (("mean", mean), ("blur", blurred), (own, own), ("grey", torch.full_like(IMAGES, 0.5))):
        found = attribute(net, IMAGES, 0, grid=4, forwards=64, baseline=baseline)
        torch.testing.assert_close(
            found.effects, (weights * (tiles_of(IMAGES) - tiles_of(expected))).double(), rtol=1e-3, atol=1e-5
        )
        torch.testing.assert_close(found.baseline, tiles_of(expected) @ weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 48), (48, 16)])
def test_the_blur_of_an_oblong_image_follows_its_shorter_side(size: tuple[int, int]) -> None:
    pixels = torch.rand(1, 1, *size, dtype=torch.float64)
    blurred = gaussian_filter(pixels[0, 0].numpy(), 16 / 16, mode="mirror", radius=2)
    torch.testing.assert_close(find_baseline(pixels, "blur")[0, 0], torch.from_numpy(blurred))


def test_a_grid_has_rows_along_the_height_and_columns_along_the_width() -> None:
    numbers, names = find_parts(nn.Identity(), IMAGES, grid=(2, 4))
    expected = torch.arange(8).view(2, 4).repeat_interleave(8, 0).repeat_interleave(4, 1)
    assert torch.equal(numbers, expected.expand(3, -1, -1))
    assert names[1] == "row 1, column 2"
    assert names[-1] == "row 2, column 4"


def test_half_precision_where_told() -> None:
    seen = set()
    net = build_model({"name": "resnet8"}).eval()
    net.conv1.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    full = attribute(net, IMAGES, grid=2, forwards=32)
    assert seen == {torch.float32}
    seen.clear()
    half = attribute(net, IMAGES, full.target, grid=2, forwards=32, half="bfloat16")
    # The check that the network answers the same twice runs as it is.
    assert seen == {torch.float32, torch.bfloat16}
    scale = full.effects.abs().max()
    assert ((half.effects - full.effects) / scale).abs().max() < 0.1
    assert half.effects.dtype == torch.float64


def test_normalised_frames_are_frames_of_normalised_images() -> None:
    """A network that undoes the normalisation sees the pixels."""
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.2]
    weights = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3)) / 256

    class Undoes(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)).square()

    class Squares(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    there = attribute(Undoes(weights), IMAGES, 0, grid=2, forwards=32, mean=mean, std=std)
    plain = attribute(Squares(weights), IMAGES, 0, grid=2, forwards=32)
    torch.testing.assert_close(there.effects, plain.effects, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(there.whole, plain.whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": "tiles"}, "parts must be one of grid, patches, channels, slic, got 'tiles'"),
        ({"parts": "slic", "segments": torch.zeros(16, 16, dtype=torch.long)}, "leave one of them out"),
        ({"parts": "slic", "n_segments": 0}, "n_segments must be at least 1"),
        ({"segments": torch.full((16, 16), -1)}, "segments hold no part: every pixel is -1"),
        ({"half": "float8"}, "half must be one of float16, bfloat16, got 'float8'"),
    ],
)
def test_parts_refuse(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attribute(OfTiles(lambda tiles: tiles[:, 0]), IMAGES, **arguments)


def test_superpixels_need_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(InputError, match=r"parts = slic needs scikit-image: pip install 'freqprune\[segments\]'"):
        attribute(OfTiles(lambda tiles: tiles[:, 0]), IMAGES, parts="slic")


def test_a_boolean_mask_is_not_taken_for_two_parts() -> None:
    with pytest.raises(InputError, match=r"segments must be integers .* of a mask write mask\.long\(\) - 1"):
        attribute(build_model({"name": "resnet8"}).eval(), torch.rand(1, 3, 16, 16), segments=torch.ones(16, 16) > 0)


def test_a_score_of_another_length_is_refused() -> None:
    net = build_model({"name": "resnet8"}).eval()
    with pytest.raises(InputError, match=r"score must return one number an image, \(1,\), got \(10,\)"):
        attribute(net, torch.rand(1, 3, 16, 16), grid=2, forwards=32, score=lambda output: output[0])


def test_superpixels_of_grey_images_follow_what_they_show() -> None:
    pytest.importorskip("skimage")
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    disc = ((rows - 14) ** 2 + (columns - 14) ** 2 < 64).float()[None, None]
    numbers, _ = find_parts(nn.Identity(), disc, "slic", n_segments=16)
    for part in numbers.unique():
        assert len(disc[0, 0][numbers[0] == part].unique()) == 1
    with pytest.raises(InputError, match="parts = slic takes images of one or three channels, got 2"):
        find_parts(nn.Identity(), torch.rand(1, 2, 8, 8), "slic")


def test_images_need_not_be_square() -> None:
    image, weights = torch.rand(2, 3, 12, 24, generator=torch.Generator().manual_seed(1)).unbind()
    image = image[None]
    found = attribute(Weighted(weights), image, 0, grid=(2, 3), forwards=24, baseline="grey")
    assert (found.parts[0, 11, 0], found.parts[0, 0, 23]) == (3, 2)
    tiles = ((image[0] - 0.5) * weights).sum(0).reshape(2, 6, 3, 8).sum((1, 3)).flatten()
    torch.testing.assert_close(found.effects[0], tiles.double(), rtol=1e-4, atol=1e-4)
    drawn = found.plot(0, image[0]).axes[0].get_images()[0].get_array()
    assert drawn is not None
    assert drawn.shape[:2] == (12, 24)
