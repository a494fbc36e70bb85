"""The page of an explanation: what it tells, and how it looks in a browser."""

import html
from pathlib import Path

import pytest
import torch

from freqprune.attribution.effects import Attribution
from freqprune.attribution.images import attribute
from freqprune.reports import ExplainPage, save, write_explain_page
from freqprune.reports.record import write_json
from tests.attribution.test_attribution import IMAGES, OfTiles
from tests.reports.test_page import BROWSER, in_a_browser


def written(
    folder: Path, found: Attribution, n_pairs: int = 2, overlap: float = 0.0, until: float | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    machine = {"system": "Linux", "processor": "x86_64", "cores": 2}
    write_json(
        folder / "run.json",
        {
            "command": "freqprune explain images='<i>'",
            "settings": {"grid": 4, "until": until},
            "versions": {},
            "machine": machine,
        },
    )
    names = ["1_one & <b>", "2_two"]
    for number, name in enumerate(names):
        save(found.plot(number, IMAGES[number]), folder / "maps" / f"{name}.png")
    page = ExplainPage(names, None, "log_odds", 0.05, n_rows=3, n_pairs=n_pairs, overlap=overlap)
    return write_explain_page(folder, found, page)


@pytest.fixture(scope="module")
def found() -> Attribution:
    net = OfTiles(lambda tiles: 2 * tiles[:, 4] + 9 * (tiles[:, 2] - 0.5) * (tiles[:, 9] - 0.5))
    return attribute(net, torch.ones(2, 3, 16, 16), 0, grid=4, forwards=512, baseline=torch.zeros(3, 16, 16))


def test_the_page_tells_what_was_found(found: Attribution, tmp_path: Path) -> None:
    page = written(tmp_path, found).read_text()
    assert '<h2 id="1_one &amp; &lt;b&gt;">1_one &amp; &lt;b&gt;</h2>' in page
    assert "Class 0: log-odds" in page
    assert "1 of 16 parts are significant" in page
    # 2 * 1 + 9 * 0.5 * 0.5 of ones, 2 * 0 + 9 * 0.5 * 0.5 of zeros.
    assert page.count("log-odds 4.25 of the whole image, 2.25\nwith every part at its baseline") == 2
    # The part that matters first, numbered, surely.
    error, p = found.standard_error[0, 4], float(found.adjusted[0, 4])
    sure = f"<td>{error:.2g}</td><td>{'< 0.0001' if p < 1e-4 else f'{p:.2g}'}</td>"
    assert f"<tr><td>1</td><td>row 2, column 1</td><td>+2</td>{sure}" in html.unescape(page)
    assert page.count("<td>row 1, column 3</td><td>row 3, column 2</td><td>+9</td>") == 2
    assert page.count("The other 13 parts") == 2
    assert "freqprune explain images=&#39;&lt;i&gt;&#39;" in page
    assert page.count("of the variance\nover the frames is due to parts alone") == 2
    assert "16 parts,\n512 frames of an image" in page
    # Some images may have been sure before.
    assert "16 parts,\nat most 512 frames" in written(tmp_path / "until", found, until=0.3).read_text()
    # Parts that open together are not told apart in that.
    assert "due to parts alone" not in written(tmp_path / "overlapping", found, overlap=0.7).read_text()


def test_nothing_is_due_to_anything_where_no_score_varies(tmp_path: Path) -> None:
    net = OfTiles(lambda tiles: tiles[:, 0] * 0 + 0.3)
    page = written(tmp_path, attribute(net, IMAGES[:2], 0, grid=4, forwards=64)).read_text()
    assert page.count("0 of 16 parts are significant.</p>") == 2


def test_a_page_without_pairs_or_of_channels(tmp_path: Path) -> None:
    net = OfTiles(lambda tiles: tiles[:, 0])
    page = written(tmp_path / "a", attribute(net, IMAGES[:2], 0, grid=4, forwards=64)).read_text()
    assert page.count("No interaction of two parts is significant.") == 2
    page = written(tmp_path / "b", attribute(net, IMAGES[:2], 0, parts="channels", forwards=64), 0).read_text()
    assert "No interaction" not in page
    assert "whiskers: one standard error" in page
    assert "<td>channel 2</td>" in page
    assert "The other" not in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_in_a_browser(found: Attribution, tmp_path: Path, width: int) -> None:
    seen, said = in_a_browser(written(tmp_path, found), width)
    assert seen["images"] == [True, True]
    assert seen["wide"] <= 0
    assert seen["title"] == "What 2 answers hang on · freqprune"
    assert seen["command"] == "freqprune explain images='<i>'"
    assert "CONSOLE" not in said
