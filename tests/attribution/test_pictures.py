"""Maps as figures, and as the arrays that captum and pytorch-grad-cam take."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from freqprune.attribution.effects import Attribution
from freqprune.attribution.images import attribute
from freqprune.attribution.pictures import LOWERS, RAISES, bars, borders, centres
from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from tests.attribution.test_attribution import IMAGES, OfTiles

WEIGHTS = torch.tensor([0, 0, 0, 3.0, 0, -2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def found() -> Attribution:
    """Two tiles do something alone, two others only together."""
    net = OfTiles(lambda tiles: tiles @ WEIGHTS + 9 * (tiles[:, 2] - 0.5) * (tiles[:, 9] - 0.5))
    return attribute(net, torch.ones(2, 3, 16, 16), 0, grid=4, forwards=512, baseline=torch.zeros(3, 16, 16))


def test_a_figure_of_a_map(found: Attribution) -> None:
    alone = found.plot(0)
    assert alone.axes[0].get_images()[0].get_array().shape == (16, 16)
    assert float(alone.axes[0].get_images()[0].get_array()[1, 13]) == pytest.approx(float(found.smoothed[0, 3]))
    figure = found.plot(1, IMAGES[1], n_pairs=1, n_marked=2, title="a tile")
    beside, over, bar = figure.axes
    assert np.allclose(beside.get_images()[0].get_array(), IMAGES[1].permute(1, 2, 0))
    # The strongest pair: a white line below a red one, from the middle of tile 2 to that of tile 9.
    line = over.get_lines()[1]
    assert line.get_color() == RAISES
    assert np.asarray(line.get_xydata()).tolist() == [[9.5, 1.5], [5.5, 9.5]]
    assert [text.get_text() for text in over.texts] == ["1", "2"]
    # The largest effects of either sign: tile 3 raises the score, tile 5 lowers it.
    assert found.ranked(1, 2) == [3, 5]
    assert [text.get_position() for text in over.texts] == [(13.5, 1.5), (5.5, 5.5)]
    assert over.get_title("left") == "a tile"
    assert bar.get_ylabel() == "effect on the score, smoothed"
    # What is significant, and nothing else, is outlined: two tiles of 4 x 4 pixels with 16 lines each.
    (outline,) = [one for one in over.collections if isinstance(one, LineCollection)]
    assert found.significant(1).nonzero().flatten().tolist() == [3, 5]
    assert len(outline.get_segments()) == 32


@pytest.mark.parametrize(("alpha", "n_outlined"), [(0.01, 0), (0.05, 1), (0.1, 2)])
def test_parts_are_outlined_at_the_rate_that_is_asked_for(found: Attribution, alpha: float, n_outlined: int) -> None:
    p_values = torch.ones(2, 16, dtype=torch.float64)
    p_values[0, 3], p_values[0, 5] = 0.001, 0.01  # of 16 parts: 0.016 and 0.08
    (outline,) = replace(found, p_values=p_values).plot(0, alpha=alpha).axes[0].collections
    assert isinstance(outline, LineCollection)
    assert len(outline.get_segments()) == 16 * n_outlined


def test_bars_of_what_raises_the_score_are_red_and_sure_ones_in_full_colour() -> None:
    effects = torch.tensor([1.0, -2.0, 3.0])
    drawn = bars(effects, torch.ones(3), ["a", "b", "c"], torch.tensor([True, False, True])).axes[0].patches
    assert [to_hex(bar.get_facecolor()).upper() for bar in drawn] == [RAISES, LOWERS, RAISES]
    assert [bar.get_alpha() for bar in drawn] == [1, 0.35, 1]


def test_pairs_that_get_in_each_others_way_are_blue() -> None:
    net = OfTiles(lambda tiles: -(tiles[:, 2] - 0.5) * (tiles[:, 9] - 0.5))
    found = attribute(net, torch.ones(1, 3, 16, 16), 0, grid=4, forwards=512, baseline=torch.zeros(3, 16, 16))
    assert found.plot(0, n_pairs=1).axes[0].get_lines()[1].get_color() == LOWERS
    assert len(found.strongest_pairs(0, 1000)) == 16 * 15 / 2


def test_borders_and_centres() -> None:
    labels = np.array([[0, 0, 1], [-1, 2, 1]])
    lines = {tuple(line.flatten()) for line in borders(labels)}
    # Around the outside of the five labelled pixels, and between 0 and 1, 0 and 2, 2 and 1, 0 and none, 2 and none.
    outside = {(-0.5, -0.5, 0.5, -0.5), (0.5, -0.5, 1.5, -0.5), (1.5, -0.5, 2.5, -0.5), (-0.5, -0.5, -0.5, 0.5),
               (2.5, -0.5, 2.5, 0.5), (2.5, 0.5, 2.5, 1.5), (0.5, 1.5, 1.5, 1.5), (1.5, 1.5, 2.5, 1.5)}  # fmt: skip
    inside = {(1.5, -0.5, 1.5, 0.5), (0.5, 0.5, 1.5, 0.5), (1.5, 0.5, 1.5, 1.5), (-0.5, 0.5, 0.5, 0.5),
              (0.5, 0.5, 0.5, 1.5)}  # fmt: skip
    assert lines == outside | inside
    middles = centres(labels, 4)
    assert middles[:3].tolist() == [[0.5, 0], [2, 0.5], [1, 1]]
    assert np.isnan(middles[3]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": 2}, r"image must lie in \[0, 1\], got 2"),
        ({"image": -1}, r"image must lie in \[0, 1\], got -1"),
        ({"pixels": IMAGES}, r"pixels must be those of one image, \(n_channels, 16, 16\), got \(3, 3, 16, 16\)"),
        ({"pixels": IMAGES[0, :, :8]}, "pixels must be those of one image"),
    ],
)
def test_figures_refuse(found: Attribution, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        found.plot(**arguments)


def test_captum_takes_the_maps() -> None:
    captum_attr = pytest.importorskip("captum.attr")
    metrics = pytest.importorskip("captum.metrics")
    net = OfTiles(lambda tiles: tiles @ WEIGHTS)
    black = torch.zeros(3, 16, 16)
    found = attribute(net, IMAGES, 0, grid=4, forwards=64, baseline=black)
    given = found.for_captum()
    # Feature ablation leaves out the same tiles: the same for a linear model.
    own = captum_attr.FeatureAblation(net).attribute(
        IMAGES, baselines=black[None], target=0, feature_mask=found.parts[:, None].expand(-1, 3, -1, -1)
    )
    assert given.shape == own.shape == IMAGES.shape
    assert given.dtype == own.dtype
    torch.testing.assert_close(given, own, rtol=1e-3, atol=1e-5)
    figure, _ = captum_attr.visualization.visualize_image_attr(
        given[0].permute(1, 2, 0).numpy(), IMAGES[0].permute(1, 2, 0).numpy(), "blended_heat_map", "all",
        use_pyplot=False,
    )  # fmt: skip
    assert figure.axes

    def leave_out(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (torch.rand(len(inputs), 1, 4, 4) < 0.5).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
        # An attribution of a tile, spread over its 48 values, stands for leaving all of them out.
        return mask.expand_as(inputs) / 48, inputs * (1 - mask)

    assert metrics.infidelity(net, leave_out, IMAGES, given, target=0).max() < 1e-4


# pytorch-grad-cam hands tensors to NumPy functions.
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_pytorch_grad_cam_takes_the_maps() -> None:
    image = pytest.importorskip("pytorch_grad_cam.utils.image")
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    net = build_model({"name": "resnet8"}).eval()
    found = attribute(net, IMAGES, grid=4, forwards=64)
    cams = found.for_grad_cam()
    assert (cams.shape, cams.dtype) == ((3, 16, 16), np.float32)
    # As its own methods scale: what lowers the score is nothing, the largest is 1.
    own = image.scale_cam_image(np.maximum(found.maps.numpy(), 0))
    assert np.abs(cams - own).max() < 1e-4
    assert cams.max() == 1
    shown = image.show_cam_on_image(IMAGES[0].permute(1, 2, 0).numpy(), cams[0], use_rgb=True)
    assert shown.shape == (16, 16, 3)
    wanted = [targets.ClassifierOutputTarget(int(one)) for one in found.target if found.target is not None]
    scores = road.ROADMostRelevantFirst(percentile=50)(IMAGES, cams, wanted, net)
    assert np.isfinite(scores).all()
