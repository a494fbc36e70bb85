"""The docs site: built without a warning, whole, and every piece of code on it runs (the guide's in `tests/jobs`)."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from freqprune.jobs.settings import read
from freqprune.reports.sweep_jobs import planned
from tests.conftest import ROOT
from tests.test_house import WINGS

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "how").glob("*.md"))]


@pytest.mark.filterwarnings("ignore:.*tensorboardX.*")
@pytest.mark.parametrize("page", PAGES)
def test_every_piece_of_code_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    scope = {"__name__": "page"}
    for block in blocks:
        # As much with fewer pixels.
        exec(compile(block.replace("torch.rand(4, 3, 64, 64)", "torch.rand(1, 3, 32, 32)"), page, "exec"), scope)


def test_commands_of_the_first_page_are_made_of_settings_that_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    jobs = []
    for line in re.sub(r"<[\w-]+>", "x", blocks).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"] and words[1] in ("train.py", "prune.py"):
            jobs += [(words[1][:-3], one) for one in planned([word for word in words[2:] if word != "-m"])]
    assert len(jobs) > 15
    for program, overrides in jobs:
        given = [f"{key}={value}" for key, value in overrides.items()]
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            read(compose(program, [*given, "output_dir=x"]))


def test_the_first_page_gives_the_defaults_of_a_fine_tuning() -> None:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        finetune = compose("prune", ["output_dir=x"]).finetune
    said = f"({finetune.epochs} epochs, 0 for none; {finetune.name}, {finetune.lr}, {finetune.schedule},"
    assert said in (ROOT / "README.md").read_text()


def test_choices_that_the_first_page_names_are_there() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    groups = [(group, said) for group, said in rows if (ROOT / "conf" / group).is_dir()]
    assert len(groups) > 5
    for group, said in groups:
        there = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert there - {"common", "common_listed"} <= {*re.findall(r"\w+", said)}, group


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return out


class Page(HTMLParser):
    """What a page loads, where it leads, and what can be led to on it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.names.add(found.get("id", ""))
        if tag in ("script", "img", "iframe") and "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loads.append(found["href"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 12
    for path, page in pages.items():
        assert not [one for one in page.loads if "//" in one and not one.startswith("data:")], path.name
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            where, _, name = link.partition("#")
            target = (path.parent / where).resolve() if where not in ("", ".") else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            assert not name or target not in pages or name in pages[target].names, f"{path.name}: {link}"


@pytest.mark.parametrize("wing", WINGS[:-1])
def test_the_reference_tells_all_that_a_wing_hands_on(site: Path, wing: str) -> None:
    names = Page(site / "reference" / f"{wing}.html").names
    told = {name.rsplit(".", 1)[-1] for name in names if name.startswith(f"freqprune.{wing}.")}
    assert set(importlib.import_module(f"freqprune.{wing}").__all__) <= told


def test_formulas_are_drawn(site: Path) -> None:
    for page in [*(site / "how").glob("*.html"), site / "explain.html"]:
        text = page.read_text()
        assert text.count("<math") > 5
        assert "$" not in re.sub(r"<(script|code|pre)\b.*?</\1>", "", text, flags=re.DOTALL)
