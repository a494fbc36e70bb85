"""The tutorials: run from a clean kernel, shipped with their pictures, and what their text says holds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from tests.conftest import ROOT

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
# Run in the tutorial's own kernel after its last cell.
HOLDS = {
    "reading_a_network": """
assert accuracy(net, val) > 0.9
trained = [float(response.integration(layer).nanmedian()) for layer in response.layers]
assert trained[-1] > 3 * trained[0]
assert trained[-1] > float(untrained.integration("layer3.0.conv2").nanmedian())
for layer in response.layers:
    one, other = response.part_preference(layer), swapped.part_preference(layer)
    both = one.isfinite() & other.isfinite()
    assert (one[both] - other[both]).abs().median() < 0.1
assert page.is_file()
""",
    "ten_lines": """
dense, small = count_macs(net, pixels[:1]), count_macs(done.net, pixels[:1])
assert 0.45 < small / dense <= 0.5
assert accuracy(net, val) > 90
assert points["sequential"][-1]["pruned"][0] > points["none"][-1]["pruned"][0] + 10
assert accuracy(tuned, test) > 90
""",
    "explaining": """
assert sum(named) > 1.5 * sum(chance)
assert found.significant(0).any()
assert empty.sum() > 50
assert alone < 0.1
assert together <= alone
""",
    "a_criterion": """
amplitudes = response.amplitude("layer2.0.conv1", ["f1", "f2"])
assert (ours["layer2.0.conv1"] == amplitudes.min(1).values).all()
assert points["redundancy"][-1]["pruned"][0] > points["random"][-1]["pruned"][0]
assert points["weaker_half"][-1]["pruned"][0] > points["random"][-1]["pruned"][0]
""",
    "a_sweep": """
assert len(jobs) == 10
assert (jobs["cut"] - jobs["asked"]).abs().max() < 5
assert cells["count"].loc["random"].tolist() == [3, 3]
assert cells["std"].loc[["l2", "redundancy"]].isna().all().all()
assert (mean.drop("random").iloc[:, -1] > mean.loc["random"].iloc[-1] + 10).all()
assert abs(mean.loc["l2"].iloc[0] - mean.loc["random"].iloc[0]) < 15
# The package's own table says the same.
own = table.set_index(["importance", "pruning.macs_cut"])["pruned_mean"]
for (name, asked), line in lines.iterrows():
    assert abs(own[name, asked / 100] - line["mean"]) < 0.01
""",
}


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    pytest.importorskip("nbclient", reason="notebooks need the extra docs")
    spec = importlib.util.spec_from_file_location("tutorials", ROOT / "docs" / "_site" / "tutorials.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_tutorial_has_claims_that_are_held() -> None:
    assert {path.stem for path in TUTORIALS} == {*HOLDS}


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_runs_from_a_clean_kernel_and_holds(path: Path, runner: ModuleType, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(HOLDS[path.stem]))
    held = tmp_path / path.name
    nbformat.write(notebook, held)
    runner.executed(held, str(tmp_path))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_is_shipped_with_its_pictures_and_nothing_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = path.read_text()
    assert not [word for word in ("/home/", "/root/", "/usr/", "site-packages", str(ROOT)) if word in text]
