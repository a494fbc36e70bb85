"""What a cut has taken stays gone while it is made up for, and little is held meanwhile."""

import pytest
import torch
from torch import Tensor, nn

from freqprune.networks.registry import build_model
from freqprune.pruning.equations import Sums
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.reconstruction import _walked, reconstruct
from freqprune.pruning.surgery import Plan


def images(n_images: int = 24, size: int = 12) -> Tensor:
    return torch.rand(n_images, 3, size, size, generator=torch.Generator().manual_seed(0))


def chain() -> nn.Sequential:
    """Each layer feeds the next one alone, so that Gauss-Newton steps move layers that have lost inputs themselves."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    ).eval()  # fmt: skip


def test_steps_do_not_bring_back_what_was_cut() -> None:
    net, x = chain(), images()
    plan = Plan(net, x)
    kept = {"0": torch.tensor([0, 2, 3, 7]), "2": torch.tensor([1, 2, 5])}
    silenced = plan.silenced(kept)
    before = net.get_parameter("2.weight").clone()
    twin, remarks = reconstruct(net, silenced, [x], Reconstruction(rounds=3))
    assert not remarks
    for name in ("2", "4"):
        assert not twin.get_parameter(f"{name}.weight")[:, silenced[name]].any()
    torch.testing.assert_close(plan.apply(kept, weights=twin)(x), twin(x))
    assert torch.equal(net.get_parameter("2.weight"), before)


def test_steps_still_help_in_a_chain() -> None:
    net, x = chain(), images()
    plan = Plan(net, x)
    kept = {"0": torch.arange(4), "2": torch.arange(4)}
    errors = []
    with torch.no_grad():
        for rounds in (0, 3):
            twin, _ = reconstruct(net, plan.silenced(kept), [x], Reconstruction(rounds=rounds))
            errors.append(float((plan.apply(kept, weights=twin)(x) - net(x)).square().mean()))
    assert errors[1] < 0.95 * errors[0]


def test_norms_by_the_statistics_of_the_batch_are_no_fixed_scale() -> None:
    torch.manual_seed(0)

    def block(n_in: int, n_out: int) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, bias=False), nn.BatchNorm2d(n_out, track_running_stats=False), nn.ReLU()]

    net = nn.Sequential(
        *block(3, 8), *block(8, 8), *block(8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
    plan, kept, x = Plan(net, images()), {"0": torch.arange(4), "3": torch.arange(4)}, images()
    with torch.no_grad():
        twin, _ = reconstruct(net, plan.silenced(kept), [x], Reconstruction(rounds=3))
        cut, made_up = ((plan.apply(kept, weights=weights)(x) - net(x)).square().mean() for weights in (None, twin))
    assert made_up < cut


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("blocks", [[], ["layer2.1"]])
def test_streams_through_shortcuts_stay_cut(shortcut: str, blocks: list[str]) -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet14", "stage_widths": [6, 8, 12], "shortcut": shortcut}).eval()
    x = images()
    plan = Plan(net, x, blocks=True)
    none = torch.tensor([], dtype=torch.long)
    kept = {"conv1": torch.tensor([0, 1, 4, 5]), "layer1.0.conv1": torch.tensor([0, 2, 3]),
            **dict.fromkeys(blocks, none)}  # fmt: skip
    assert plan.sensible(kept).keys() == kept.keys()
    # Proves what it does.
    bare = plan.apply(kept)
    with torch.no_grad():
        walk, muted = _walked(net, plan.silenced(kept), [x], Reconstruction(rounds=1), None, blocks)
        small = plan.apply(kept, weights=walk.twin_net)
        torch.testing.assert_close(small(x), walk.twin[walk.trace.exit][0], rtol=1e-3, atol=1e-4)
        # What nothing was made up for in is the plain cut.
        error = float((bare(x) - net(x)).double().square().mean())
        assert walk.error_of(muted) == pytest.approx(error, rel=1e-3)


def test_little_is_held_at_the_end() -> None:
    net, x = chain(), images()
    silenced = Plan(net, x).silenced({"0": torch.arange(4), "2": torch.arange(4)})
    with torch.no_grad():
        walk, _ = _walked(net, silenced, [x], Reconstruction(rounds=2), None, [])
    assert set(walk.twin) == {walk.trace.exit}
    assert set(walk.dense) == {walk.trace.exit}


def test_sums_of_a_process_without_samples_lie_where_the_others_do() -> None:
    origin = torch.zeros(3, device="meta"), torch.zeros(2, device="meta")
    sums = Sums(1, origin)
    assert {getattr(sums, name).device.type for name in ("xx", "xt", "x", "t", "tt")} == {"meta"}
