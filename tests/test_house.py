"""The house as CONTRIBUTING draws it: which wing may import which, through the front door only, and no circle."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import freqprune
from freqprune._moved import MOVED
from tests.conftest import ROOT

PACKAGE = ROOT / "freqprune"
# Lowest first: a wing imports from those before it.
WINGS = ("networks", "tagging", "attribution", "pruning", "reports", "training", "jobs")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "_moved.py"))


def imports(path: Path) -> list[tuple[str, str]]:
    """Module and name of everything of this package that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "freqprune"]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if (node.module or "").split(".")[0] == "freqprune":
                found += [(node.module or "", alias.name) for alias in node.names]
    return found


def handed_on(wing: str) -> set[str]:
    stub = ast.parse((PACKAGE / wing / "__init__.pyi").read_text())
    return {alias.name for node in ast.walk(stub) if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_runs_back_up_and_all_go_through_the_front_door(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0]
    for module, name in imports(path):
        if module in ("freqprune.errors", "freqprune.memory", "freqprune.processes"):
            continue
        assert here in WINGS, f"{path.name} stands below the wings and imports {module}"
        wing, _, inside = module.removeprefix("freqprune.").partition(".")
        assert WINGS.index(wing) <= WINGS.index(here), f"{here} imports {module}, which stands above it"
        if wing != here:
            assert not inside, f"{here} reaches into {module}; import {name} from freqprune.{wing}"
            assert name in handed_on(wing), f"freqprune.{wing} does not hand on {name}"


@pytest.mark.parametrize("wing", WINGS)
def test_no_circle_in_a_wing(wing: str) -> None:
    graph = {}
    for path in (PACKAGE / wing).glob("*.py"):
        prefix = f"freqprune.{wing}."
        inside = [module.removeprefix(prefix) for module, _ in imports(path) if module.startswith(prefix)]
        beside = [name for module, name in imports(path) if module == f"freqprune.{wing}"]
        assert not set(beside) - {p.stem for p in (PACKAGE / wing).glob("*.py")}, f"{path} asks its own front door"
        graph[path.stem] = {*inside, *beside}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_says_what_comes_in_and_what_goes_out(wing: str) -> None:
    doc = importlib.import_module(f"freqprune.{wing}").__doc__ or ""
    assert re.search(r"\bcomes? in\b.*\bgo(es)? out\b", doc, re.DOTALL), doc
    assert doc.strip().count(". ") == 0


@pytest.mark.parametrize("wing", WINGS[:-1])
def test_what_a_wing_hands_on_is_there(wing: str) -> None:
    module = importlib.import_module(f"freqprune.{wing}")
    assert handed_on(wing) == set(module.__all__)
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_names_are_what_they_say_however_they_are_imported() -> None:
    """A file that has the name of something it holds would stand in its place once it is imported."""
    for wing in WINGS[:-1]:
        stub = (PACKAGE / wing / "__init__.pyi").read_text()
        files = {path.stem for path in (PACKAGE / wing).glob("*.py")}
        assert {name for name in handed_on(wing) & files if f"from . import {name} " not in stub} == set()


@pytest.mark.parametrize("old", MOVED)
def test_old_module_names_go_on_working(old: str) -> None:
    sys.modules.pop(f"freqprune.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"freqprune.{old} is now"):
        module = importlib.import_module(f"freqprune.{old}")
    for new in MOVED[old]:
        place = importlib.import_module(f"freqprune.{new}")
        for name in [name for name in vars(place) if not name.startswith("_")]:
            assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="it is now"):
        module.no_such_name  # noqa: B018


@pytest.mark.slow
def test_old_names_are_found_although_their_folders_lie_about(tmp_path: Path) -> None:
    (tmp_path / "freqprune" / "data" / "__pycache__").mkdir(parents=True)
    code = f"import freqprune; freqprune.__path__.append({str(tmp_path / 'freqprune')!r})\n"
    code += "from freqprune.data import CIFAR10Data; print(CIFAR10Data.__name__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "CIFAR10Data", done.stderr


@pytest.mark.slow
def test_sweeps_are_gathered_by_the_old_command_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "freqprune.sweeps", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a folder" in done.stderr


def test_importing_the_package_takes_no_time() -> None:
    code = "import time; start = time.process_time(); import freqprune; print(time.process_time() - start)"
    code += "; import sys; assert 'torch' not in sys.modules"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.1
    assert freqprune.tag is not None


def test_a_setting_is_a_field_of_its_class_and_a_line_of_its_yaml() -> None:
    from freqprune.jobs.config import Common
    from freqprune.jobs.settings import SECTIONS, _names

    common = OmegaConf.load(ROOT / "conf" / "common.yaml")
    there = {
        "tagging": OmegaConf.load(ROOT / "conf" / "tagging" / "halves.yaml"),
        "tag_loss": OmegaConf.load(ROOT / "conf" / "tag_loss" / "none.yaml"),
        "importance": OmegaConf.load(ROOT / "conf" / "importance" / "common.yaml"),
        "pruning": OmegaConf.load(ROOT / "conf" / "pruning" / "filters.yaml"),
        **{name: common[name] for name in ("optimizer", "finetune", "latency", "export")},
    }
    assert set(there) == set(SECTIONS)
    for section, classes in SECTIONS.items():
        said_by_choice = {"criterion"} if section == "importance" else set()
        assert {name for cls in classes for name in _names(cls)} == set(there[section]) | said_by_choice, section
    assert set(_names(Common)) == {key for key in common if key not in (*SECTIONS, "callbacks")}

    from freqprune.jobs.explain_settings import CLASSES

    explaining = OmegaConf.load(ROOT / "conf" / "explain.yaml")
    assert {name for cls in CLASSES for name in _names(cls)} == {*explaining} - {"defaults", "hydra"}


def test_defaults_of_the_commands_are_those_of_the_classes() -> None:
    from freqprune.jobs.settings import _names
    from freqprune.jobs.values import plain
    from freqprune.networks import Exports, Latency
    from freqprune.pruning import Reconstruction
    from freqprune.tagging import Readout, Stimulus, TagLoss

    common = OmegaConf.load(ROOT / "conf" / "common.yaml")
    n_compared = 0
    for cls, said in (
        (Stimulus, OmegaConf.load(ROOT / "conf" / "tagging" / "halves.yaml")),
        (Readout, OmegaConf.load(ROOT / "conf" / "tagging" / "halves.yaml")),
        (TagLoss, OmegaConf.load(ROOT / "conf" / "tag_loss" / "none.yaml")),
        (Reconstruction, OmegaConf.load(ROOT / "conf" / "pruning" / "filters.yaml")),
        (Latency, common.latency),
        (Exports, common.export),
    ):
        default = cls()
        for name in _names(cls):
            value = getattr(default, name)
            given = said[name]
            given = plain(given) if OmegaConf.is_config(given) else given
            assert given == (list(value) if isinstance(value, tuple) else value), (cls.__name__, name)
            n_compared += 1
    assert n_compared > 25
    explaining = OmegaConf.load(ROOT / "conf" / "explain.yaml")
    arguments = inspect.signature(freqprune.attribute).parameters
    shared = arguments.keys() & {*explaining}
    assert {"grid", "forwards", "steepness", "overlap", "score", "baseline"} <= shared
    for name in shared - {"images", "mean", "std"}:
        assert explaining[name] == arguments[name].default, name


@pytest.mark.parametrize("name", ["models", "data", "config", "callbacks"])
def test_modules_of_a_user_keep_their_names(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("MINE = 1\n")
    code = f"import freqprune; from {name} import MINE; assert MINE == 1"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
