"""The methods that the benchmark writes itself against answers that are known, and its figures of several runs."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_what_a_benchmark_imports_is_there(name: str, benchmark: Callable[[str], ModuleType]) -> None:
    benchmark(name)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of the benchmarks, whose folder is no package."""
    folder = str(ROOT / "benchmarks")
    before = set(sys.modules)
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if folder in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


class Linear:
    """Stands for a network and an image: the probability of class 1 is a sum of open tiles with weights."""

    number, target = 0, 1

    def __init__(self) -> None:
        self.weights = torch.rand(64, generator=torch.Generator().manual_seed(0)) / 64

    def probability(self, design: Tensor) -> Tensor:
        return design @ self.weights

    def masked(self, n_masks: int, skip: int) -> tuple[Tensor, Tensor]:
        masks = torch.rand(n_masks + skip, 64, generator=torch.Generator().manual_seed(1)).round()[skip:]
        return masks, torch.stack([-torch.logit(self.probability(masks)), torch.zeros(n_masks)], 1)


def test_rise_is_the_mean_of_the_masks_that_show_a_tile(benchmark: Callable[[str], ModuleType]) -> None:
    found, judge = benchmark("maps").rise(Linear(), 100_000, 0), Linear()
    # Half of all weights, and the other half of a tile's own.
    expected = judge.weights.sum() / 2 + judge.weights / 2
    torch.testing.assert_close(found, expected, rtol=0, atol=8e-4)
    assert float(torch.corrcoef(torch.stack([found, judge.weights]))[0, 1]) > 0.99


def test_sobol_indices_of_a_sum(benchmark: Callable[[str], ModuleType]) -> None:
    found, judge = benchmark("maps").sobol(Linear(), 66 * 2048, 0), Linear()
    expected = judge.weights.square() / judge.weights.square().sum()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=2e-4)


def test_sobol_indices_are_those_of_salib(benchmark: Callable[[str], ModuleType]) -> None:
    """With tiles that work together, by SALib's own estimator from its own points."""
    sample, analyze = pytest.importorskip("SALib.sample.sobol"), pytest.importorskip("SALib.analyze.sobol")

    class Together(Linear):
        def probability(self, design: Tensor) -> Tensor:
            return design @ self.weights + 0.3 * design[:, 3] * design[:, 40]

    judge = Together()
    problem = {"num_vars": 64, "names": [str(i) for i in range(64)], "bounds": [[0, 1]] * 64}
    points = sample.sample(problem, 1024, calc_second_order=False, seed=0)
    answers = judge.probability(torch.from_numpy(points).float()).numpy()
    expected = analyze.analyze(problem, answers, calc_second_order=False, seed=0)["ST"]
    found = benchmark("maps").sobol(judge, 66 * 2048, 0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0.15, atol=1e-3)
    assert set(found.argsort(descending=True)[:2].tolist()) == {3, 40}


def test_runs_over_different_images_as_one(benchmark: Callable[[str], ModuleType]) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.random(7), rng.random(12)]

    def run(values: Any, name: str = "cifar") -> dict[str, Any]:
        mean, error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
        row = {"insertion": mean, "deletion": 0.0, "difference": mean, "se": error, "fidelity": [mean, error]}
        return {"images": len(values), f"{name}.a.1": row, f"{name}: a over b": [mean, error], "torch": "2"}

    found, whole = benchmark("scoring").pooled([run(part) for part in parts]), run(np.concatenate(parts))
    assert found["images"] == {"cifar": 19}
    assert set(found) == {"images", "cifar.a.1", "cifar: a over b"}
    for name, value in whole["cifar.a.1"].items():
        assert found["cifar.a.1"][name] == pytest.approx(value, abs=1e-4), name
    assert found["cifar: a over b"] == pytest.approx(whole["cifar: a over b"], abs=1e-4)
    both = benchmark("scoring").pooled([run(parts[0]), run(parts[1], "imagenet")])
    assert both["images"] == {"cifar": 7, "imagenet": 12}
    assert both["imagenet.a.1"]["insertion"] == pytest.approx(parts[1].mean(), abs=1e-4)


def test_a_row_of_the_coverage(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    coverage = benchmark("coverage")
    row = coverage.cut("torchvision/squeezenet1_1", 0.3)
    assert row["result"] == "ok"
    assert row["reachable"] > 0.9
    for share, result, done in ((0.3, "ok", True), (0.5, "ok", False), (0.3, "crash: E", False)):
        coverage.file_of(str(tmp_path), "a/b").write_text(json.dumps({"share": share, "result": result}))
        assert coverage.is_done(str(tmp_path), "a/b", 0.3) is done
