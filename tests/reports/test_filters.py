"""What the explorer shows of filters: columns by part and by epoch."""

from pathlib import Path

import numpy as np
import torch

from freqprune import Stimulus, build_model, tag
from freqprune.pruning import Evidence, judge, scores
from freqprune.reports import filters_of, filters_over_epochs, write_importance


def test_parts_are_told_by_their_number_whatever_their_frequencies(tmp_path: Path) -> None:
    net, pixels = build_model({"name": "resnet8", "stage_widths": [4, 4, 8]}), torch.rand(2, 3, 16, 16)
    swapped = Stimulus(tag_freqs=(7.5, 6.0), max_order=1)
    response = tag(net, pixels, swapped)
    expected = torch.cat([response.part_preference(layer) for layer in response.layers]).numpy()
    np.testing.assert_array_equal(filters_of(response).columns["preference"], expected)
    verdict = judge(response, by="threshold", threshold=2.0)
    table = scores("amplitude", Evidence(net, response), list(response.layers))
    write_importance(tmp_path / "importance.csv", 0, response, table, verdict)
    # One order holds no intermodulation.
    (epoch,) = filters_over_epochs(tmp_path / "importance.csv", swapped, "amplitude")
    np.testing.assert_allclose(epoch.columns["preference"], expected, atol=1e-3)
    assert np.nanmax(epoch.columns["integration"]) == 0
    four = Stimulus(parts="quadrants", tag_freqs=(20.5, 19.0, 15.5, 8.5), max_order=2)
    by_four = tag(net, pixels, four)
    amplitude = torch.cat([by_four.amplitude(layer, ["f1", "f2", "f3", "f4"]) for layer in by_four.layers])
    found = filters_of(by_four).columns["part"]
    answering = np.isfinite(found)
    assert answering.sum() > 30
    np.testing.assert_array_equal(found[answering], amplitude.argmax(-1).numpy()[answering])
