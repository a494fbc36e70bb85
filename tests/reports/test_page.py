"""The report, opened in a browser: nothing missing, nothing from elsewhere, no sideways scrolling."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from freqprune.reports import run_figures
from freqprune.reports.drawing import save
from freqprune.reports.page import SweepPage, write_page
from freqprune.reports.record import read_json, write_json

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

# Put into a copy of the page: what a reader would see, as JSON in an attribute.
PROBE = """<script>addEventListener("load", () => document.body.dataset.seen = JSON.stringify({
  images: [...document.images].map(i => i.complete && i.naturalWidth > 0),
  wide: document.documentElement.scrollWidth - innerWidth, title: document.title,
  command: document.querySelector("pre.command")?.textContent }))</script>"""


def in_a_browser(page: Path, width: int) -> tuple[dict[str, Any], str]:
    """What a reader sees of a page in a window of that width, and what the browser says."""
    assert BROWSER is not None
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},900", "--enable-logging=stderr", "--v=0", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found: dict[str, Any] = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))  # type: ignore[index]
    return found, done.stderr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    settings = {
        "seed": 3,
        "model": {"name": None},
        "importance": {"criterion": "snr"},
        "finetune": {"epochs": 1},
        "data": {"root": "<b>&"},
        "tagging": {
            "tag_freqs": [6.0, 7.5],
            "parts": "halves",
            "n_frames": 240,
            "frame_rate": 120.0,
            "noise_std": 0.02,
            "n_images": 4,
        },
    }
    machine = {"system": "Linux", "processor": "x86_64", "cores": 2}
    write_json(
        tmp_path / "run.json",
        {
            "command": "python prune.py data.root='<b>&'",
            "settings": settings,
            "versions": {"torch": "2"},
            "machine": machine,
        },
    )
    sizes = {"file_bytes": 1000, "memory_bytes": {"64": 2e6}, "latency_ms": {"1": 1.0, "64": 5.0}}
    dense, pruned = (
        {"test_accuracy": 0.9, "macs": 200, "params": 100, **sizes},
        {"test_accuracy": 0.1, "macs": 100, "params": 50, **sizes},
    )
    stages = {"dense": dense, "pruned": pruned, "finetuned": {"test_accuracy": 0.8}}
    write_json(tmp_path / "metrics.json", {"network": "resnet8", **stages, "remarks": ["1 of 3 layers <is> whole"]})
    save(run_figures.kept_per_layer({"a": 3, "b": 4}, {"a": 6, "b": 8}), tmp_path / "figures" / "kept_per_layer.png")
    save(run_figures.kept_per_layer({"a": 3, "b": 4}, {"a": 6, "b": 8}), tmp_path / "figures" / "spectra_layer1.png")
    return tmp_path


def test_page_tells_what_was_done(run: Path) -> None:
    text = write_page(run).read_text()
    assert "<title>resnet8, filters kept by snr, 50.0 % of the MACs cut, seed 3 · freqprune</title>" in text
    assert (
        "50.0 % of the MACs were cut. Filters were kept by snr. The smaller network was fine-tuned for 1 epoch." in text
    )
    assert "It was tagged at 6 and 7.5 Hz (halves), 240 frames at 120 frames/s, pixel noise sd 0.02, 4 images." in text
    assert "python prune.py data.root=&#39;&lt;b&gt;&amp;&#39;" in text
    assert "1 of 3 layers &lt;is&gt; whole" in text
    assert text.count("<img ") == 2
    # Self-contained: no address but those inside the file.
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert "http" not in text
    assert "<script" not in text


def test_the_page_tells_the_epochs_that_were_trained(run: Path) -> None:
    """A callback may end a training earlier than its settings say."""
    metrics = read_json(run / "metrics.json")
    metrics["finetuned"]["epochs"] = 7
    write_json(run / "metrics.json", metrics)
    assert "The smaller network was fine-tuned for 7 epochs." in write_page(run).read_text()


def test_the_page_tells_the_accuracy_of_each_kind_of_images(run: Path) -> None:
    accuracies = {"val_accuracy": 0.75, "test_accuracy": 0.5, "test_top5": 0.875}
    write_json(run / "training.json", {"epochs": 2, "seconds": 3.0, **accuracies})
    cells = re.findall(r"<td[^>]*>(.*?)</td>", write_page(run).read_text())
    place = cells.index("validation")
    expected = ["validation", "75.00", "test", "50.00", "test, among five", "87.50"]
    assert cells[place : place + 6] == expected


@pytest.mark.parametrize(("tagged", "told"), [({"tagged_images": 2}, "2 images"), ({}, "4 images")])
def test_the_page_counts_the_images_that_were_there_to_tag(run: Path, tagged: dict[str, int], told: str) -> None:
    """Settings may ask for more than there are; older runs did not say."""
    write_json(run / "metrics.json", {**json.loads((run / "metrics.json").read_text()), **tagged})
    assert f"pixel noise sd 0.02, {told}." in write_page(run).read_text()


def sweep_of(run: Path) -> SweepPage:
    """A sweep whose only job with a folder is a run."""
    save(run_figures.kept_over_depth({"snr": {"a": 0.5, "b": 0.25}}), run / "figures" / "kept_over_depth.png")
    rows = [["snr", "2", *["81.00 ± 1.41"] * 7], ["group_l2", "2", *["80.00 ± 1.41"] * 7]]
    missing = [["2", "failed", "importance=l2, seed=0", "pruning.macs_cut cannot be reached " * 5]]
    commands = ["python prune.py -m importance=snr,group_l2"]
    return SweepPage(
        ["multirun/prune/x"],
        5,
        ["importance", "seeds", *["dense, %"] * 7],
        rows,
        missing,
        commands,
        [("importance=snr, seed=3", run)],
    )


def test_page_of_a_sweep(run: Path, tmp_path: Path) -> None:
    sweep = sweep_of(run)
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("again"))
    other = json.loads((again / "run.json").read_text())
    other["settings"].update(seed=4, importance={"criterion": "l2"})
    other["versions"]["torch"] = "3"
    write_json(again / "run.json", other)
    text = write_page(run, replace(sweep, finished=[*sweep.finished, ("importance=l2, seed=4", again)])).read_text()
    # What the jobs share is told, what they differ in is not.
    assert "4 of 5 jobs are in the table. Network: resnet8. It was tagged at 6 and 7.5 Hz (halves)" in text
    assert "50.0 % of the MACs were cut. The smaller network was fine-tuned for 1 epoch." in text
    assert "Filters were kept by" not in text
    assert "<h2>To repeat this sweep</h2>" in text
    assert "torch 2 / 3. Linux," in text
    assert "Seeds 3 and 4." in text
    assert "criterion: snr" in text
    assert f"(Job {run.name}: importance=snr, seed=3.)" in text
    assert text.count("<img ") == 2
    assert "<script" not in text
    # No job finished: the command is all there is to tell.
    lost = write_page(run, replace(sweep, finished=[], rows=[])).read_text()
    assert "python prune.py -m importance=snr,group_l2" in lost
    assert "All settings" not in lost


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
@pytest.mark.parametrize(("kind", "width"), [("run", 500), ("sweep", 500), ("run", 1280)])
def test_page_in_a_browser(run: Path, kind: str, width: int) -> None:
    seen, said = in_a_browser(write_page(run, sweep_of(run) if kind == "sweep" else None), width)
    assert seen["images"] == [True, True]
    assert seen["wide"] <= 0
    assert seen["title"].endswith("· freqprune")
    assert seen["command"] == (
        "python prune.py data.root='<b>&'" if kind == "run" else "python prune.py -m importance=snr,group_l2"
    )
    assert "CONSOLE" not in said
