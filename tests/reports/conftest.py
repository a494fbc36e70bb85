"""A small network, its response and what a cut of it would do."""

import pytest
import torch
from torch import nn

from freqprune import Amount, Plan, Stimulus, build_model, select, tag
from freqprune.pruning import Evidence, judge, scores
from freqprune.reports import filters_of, trial_of, with_cut
from freqprune.reports.filters import Filters
from freqprune.reports.trial import Trial
from freqprune.tagging import TagResponse

STIMULUS = Stimulus(tag_freqs=(6.0, 7.5))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return build_model({"name": "resnet8"}).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    coarse = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")


@pytest.fixture(scope="module")
def response(net: nn.Module, pixels: torch.Tensor) -> TagResponse:
    return tag(net, pixels, STIMULUS)


@pytest.fixture(scope="module")
def plan(net: nn.Module, pixels: torch.Tensor) -> Plan:
    return Plan(net, pixels[:1])


@pytest.fixture(scope="module")
def explored(response: TagResponse, plan: Plan) -> tuple[Filters, Trial]:
    """As `prune.py` writes it for a cut by SNR."""
    found = scores("snr", Evidence(plan.model, response), plan.layers)
    amount = Amount(macs_cut=0.4, scope="per_mac")
    kept = select(found, amount, plan.macs)
    filters = with_cut(filters_of(response, judge(response), "dense"), plan, "snr", found, kept)
    return filters, trial_of(plan, response, "snr", found, amount)
