"""Two processes share the work of a cut and come to what one comes to."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from freqprune.attribution.images import attribute
from freqprune.errors import InputError
from freqprune.networks.registry import build_model
from freqprune.networks.trace import equal_batches
from freqprune.processes import added_up, from_first, own_share, rank_and_size, shared_work
from freqprune.pruning.amount import Amount
from freqprune.pruning.cutting import Material, Recipe, cut
from freqprune.pruning.depth import block_scores
from freqprune.pruning.moments import input_moments, output_gradients
from freqprune.pruning.recipe import Reconstruction
from freqprune.tagging.stimulus import Stimulus
from tests.forked import in_two_processes


def network() -> nn.Module:
    torch.manual_seed(0)
    net = build_model({"name": "resnet8"})
    for _ in range(3):
        net(torch.rand(16, 3, 16, 16))
    return net.eval()


def pixels() -> Tensor:
    return torch.rand(96, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def done(criterion: str, compensation: str, macs_cut: float, blocks: bool = False) -> dict[str, Any]:
    material = Material(
        pixels()[:5].clamp(0.1, 0.9), lambda p: (p - 0.5) / 0.3, [0.5] * 3, [0.3] * 3, calibration=pixels()
    )
    recipe = Recipe(
        Amount(macs_cut=macs_cut, scope="per_mac"), criterion, compensation=compensation, calibrate_on="both",
        reconstruction=Reconstruction(rounds=2), measured_images=64, blocks=blocks,
    )  # fmt: skip
    found = cut(network(), material, recipe, Stimulus())
    return {"kept": found.kept, "state": found.net.state_dict(), "scores": found.scores, "dropped": found.dropped}


CUTS: dict[str, tuple[Any, ...]] = {
    "at once": ("snr", "least_squares", 0.4),
    "in sequence": ("logit_error", "sequential", 0.7, True),
}


def parts() -> dict[str, Any]:
    """What is summed, on its own."""
    batches = equal_batches(pixels().split(32), 32)
    return {
        "moments": input_moments(network(), ["layer2.0.conv2", "layer3.0.conv2"], batches),
        "gradients": output_gradients(network(), ["layer2.0.conv2"], batches),
        "blocks": block_scores(network(), batches),
    }


def everything() -> dict[str, Any]:
    told = attribute(network(), pixels()[:3], grid=2, forwards=32, until=1e-3)
    shared = {"effects": told.effects, "pairs": told.interactions, "forwards": told.forwards}
    return {name: done(*how) for name, how in CUTS.items()} | {"parts": parts(), "attribution": shared}


def _refused() -> None:
    raise InputError("no cut")


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert rank_and_size() == (0, 1)
    with shared_work():
        assert rank_and_size() == (rank, 2)
        assert [number for number, _ in own_share("abc")] == ([0, 2] if rank == 0 else [1])
        with pytest.raises(InputError, match=r"2 processes cannot share 1 batches .*use fewer \(trainer\.devices\)"):
            own_share("a")
        assert float(added_up(torch.tensor(1.0 + rank))) == 3
        assert own_share("a", or_none=True) == ([(0, "a")] if rank == 0 else [])
        assert from_first(int, rank + 5) == 5
        # What fails in the first fails in all.
        with pytest.raises(InputError, match="no cut"):
            from_first(_refused)
        with pytest.raises(ValueError if rank == 0 else RuntimeError, match="invalid literal"):
            from_first(int, "five")
        assert from_first(int, 6) == 6
        torch.save(everything(), f"{folder}/{rank}.pt")
    # Outside everyone is on his own again.
    assert float(added_up(torch.tensor(1.0 + rank))) == 1 + rank
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_come_to_what_one_does(tmp_path: Path) -> None:
    in_two_processes(one_process, str(tmp_path))
    alone = everything()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["parts"], alone["parts"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["attribution"], alone["attribution"], rtol=1e-6, atol=1e-9)
        for name in CUTS:
            one, other = found[name], alone[name]
            assert one["dropped"] == other["dropped"]
            assert {layer: kept.tolist() for layer, kept in one["kept"].items()} == {
                layer: kept.tolist() for layer, kept in other["kept"].items()
            }, name
            torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(one["state"], other["state"], rtol=1e-6, atol=1e-6)
    assert alone["in sequence"]["dropped"]
