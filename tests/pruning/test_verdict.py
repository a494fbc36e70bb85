"""Which filters count as important, on a network whose responses are known."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from freqprune.errors import InputError
from freqprune.pruning.verdict import judge
from freqprune.tagging.measurement import tag
from tests.tagging.test_measurement import WHITE, Affine


def test_significance_finds_the_filters_that_answer() -> None:
    response = tag(Affine(), WHITE.expand(20, -1, -1, -1))
    verdict = judge(response)
    assert verdict.important["conv"].tolist() == [True, True, True, False]
    assert verdict.counts == {"conv": 3}
    assert repr(verdict) == "Verdict(3 of 4 filters important, by layer: {'conv': 3})"
    assert judge(response, ["f1"]).important["conv"].tolist() == [True, False, True, False]


def test_threshold_is_on_the_mean_snr() -> None:
    response = tag(Affine(), WHITE.expand(20, -1, -1, -1))
    snr = response.snr("conv").nan_to_num(0).mean(-1)
    cut = snr.sort().values[2].item()
    assert judge(response, by="threshold", threshold=cut).important["conv"].tolist() == (snr > cut).tolist()
    assert judge(response, by="threshold", threshold=cut).counts == {"conv": 1}


def test_noise_alone_is_rarely_important() -> None:
    # Filters that see a part without light: their answer is noise. At a false discovery rate of 5 % no more than a few
    # of 400 may pass.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 400, 16, bias=False, dtype=torch.float64))
    response = tag(net, WHITE * 0, noise_std=0.02)
    assert judge(response, "all", alpha=0.05).counts["0"] <= 3


def test_false_discoveries_are_a_share_over_all_layers() -> None:
    net = nn.Sequential(nn.Conv2d(1, 30, 16), nn.Conv2d(30, 4, 1)).double()
    response = tag(net, WHITE * 0, noise_std=0.02)
    raw = {layer: response.p_values(layer).numpy() for layer in ("0", "1")}
    adjusted = stats.false_discovery_control(np.concatenate([p.ravel() for p in raw.values()]))
    expected = np.split(adjusted, [raw["0"].size])
    found = judge(response).p_values
    assert found is not None
    for (layer, p), values in zip(raw.items(), expected, strict=True):
        np.testing.assert_allclose(found[layer], values.reshape(p.shape).min(1), rtol=1e-12)


def test_without_noise_there_is_no_verdict() -> None:
    with pytest.raises(InputError, match="tag with noise_std above 0"):
        judge(tag(Affine(), WHITE, noise_std=0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "p"}, "important_by must be one of significance, threshold"),
        ({"alpha": 0.0}, "alpha must lie between"),
        ({"by": "threshold"}, "threshold must be a positive SNR"),
        ({"by": "threshold", "threshold": -1.0}, "threshold must be a positive SNR"),
    ],
)
def test_judge_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge(tag(Affine(), WHITE), **settings)  # type: ignore[arg-type]
