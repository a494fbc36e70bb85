"""The explorer: what goes into the page against NumPy and real cuts, what its script keeps against `select`, and the
page in a browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from freqprune import Amount, InputError, Plan, build_model, scores, select, tag
from freqprune.pruning import Evidence
from freqprune.reports import filters_of, trial_of, write_explorer
from freqprune.reports.explorer import SCRIPTS
from freqprune.reports.filters import Filters
from freqprune.reports.trial import Trial, TriedUnit
from freqprune.tagging import TagResponse
from tests.conftest import ROOT
from tests.reports.conftest import STIMULUS
from tests.reports.test_page import BROWSER

CUT = ROOT / "freqprune" / "reports" / "templates" / "explorer" / "cut.js"


NODE = shutil.which("node")


def test_what_cannot_be_tried_or_shown_is_said(
    plan: Plan, response: TagResponse, explored: tuple[Filters, Trial], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no score of its filters is known"):
        trial_of(plan, None)
    with pytest.raises(InputError, match="no layer of the network may lose filters"):
        trial_of(plan, response, "snr", {})
    with pytest.raises(InputError, match="there are no filters to explore"):
        write_explorer(tmp_path, "nothing", [], STIMULUS)
    found = trial_of(plan, response, components=["f1"]).scores["amplitude"]
    expected = scores("amplitude", Evidence(plan.model, response, ["f1"], graph=plan.graph), list(plan.layers))
    for name, values in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), values)
    other = filters_of(tag(plan.model, plan.example, STIMULUS, layers=["conv1"]))
    with pytest.raises(InputError, match="the layers at all times have to be the same"):
        write_explorer(tmp_path, "two", [other, explored[0]], STIMULUS)


def test_the_page_holds_all_it_needs(explored: tuple[Filters, Trial], tmp_path: Path) -> None:
    filters, trial = explored
    odd = Filters("now", {"</script><b>": 2}, {"snr": np.ones(2)}, np.arange(3.0), np.ones((2, 3)))
    text = write_explorer(tmp_path, "<i>&", [odd], STIMULUS).read_text()
    assert "</script><b>" not in text
    assert "<title>Filters of &lt;i&gt;&amp; · freqprune</title>" in text
    text = write_explorer(tmp_path, "resnet8", [filters], STIMULUS, trial).read_text()
    assert f"{sum(filters.widths.values())} filters of {len(filters.widths)} layers" in text
    assert "left at 6 Hz and right at 7.5 Hz" in text
    assert "default-src 'none'" in text
    assert set(re.findall(r"""\b(?:src|href)=["']([^"']*)""", text)) == {"data:,", "report.html"}
    assert not re.findall(r"fetch\(|XMLHttpRequest|import\(|url\(", text)
    assert text.count("<script") == len(SCRIPTS) + 1


def test_a_resnet32_with_its_training_takes_less_than_five_megabytes(tmp_path: Path) -> None:
    net, rng = build_model({"name": "resnet32"}), np.random.default_rng(0)
    widths = {name: len(m.weight) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    n_filters = sum(widths.values())
    names = ("snr", "amplitude", "preference", "integration", "important", "score_snr", "kept")
    columns = {name: rng.random(n_filters) for name in names}
    epochs = [
        Filters(f"epoch {i}", widths, columns, np.arange(20.0), rng.lognormal(size=(n_filters, 20))) for i in range(24)
    ]
    last = Filters("dense network", widths, columns, np.arange(67) / 2, rng.lognormal(size=(n_filters, 67)))
    assert write_explorer(tmp_path, "resnet32", [*epochs, last], STIMULUS).stat().st_size < 5e6


AMOUNTS = [
    Amount(macs_cut=0.3),
    Amount(macs_cut=0.6, scope="per_mac"),
    Amount(macs_cut=0.5, scope="layer"),
    Amount(macs_cut=0.4, normalize=True, min_filters=3),
    Amount(macs_cut=0.5, scope="per_mac", multiple_of=4),
    Amount(threshold=0.5),
    Amount(threshold=0.9, multiple_of=8, min_filters=2),
]


@pytest.mark.skipif(NODE is None, reason="no node on the path")
@pytest.mark.parametrize("streams", [False, True])
def test_the_script_keeps_what_select_keeps(plan: Plan, streams: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    found = {
        name: torch.rand(plan.unit(name).n_filters, generator=generator, dtype=torch.float64)
        for name in plan.choose(streams=streams)
    }
    asked = [trial_of(plan, None, "random", found, amount).packed() for amount in AMOUNTS]
    code = f"""{CUT.read_text()}
    const doubles = (text) => new Float64Array(new Uint8Array(Buffer.from(text, "base64")).buffer);
    const asked = JSON.parse(require("fs").readFileSync(0));
    console.log(JSON.stringify(asked.map((trial) => {{
      const scores = trial.scores.random.map(doubles), {{ amount }} = trial;
      const found = amount.macs_cut === null ? aboveThreshold(trial, scores, amount, amount.threshold)
        : toMacs(trial, scores, amount, amount.macs_cut);
      return {{ kept: found.kept.map((flags) => [...flags]), macs: found.macs }};
    }})));"""
    assert NODE is not None
    done = subprocess.run([NODE, "-e", code], input=json.dumps(asked), capture_output=True, text=True, check=True)
    for amount, answer in zip(AMOUNTS, json.loads(done.stdout), strict=True):
        kept = select(found, amount, plan.macs)
        for name, flags in zip(found, answer["kept"], strict=True):
            assert np.flatnonzero(flags).tolist() == kept[name].tolist(), (amount, name)
        assert answer["macs"] == pytest.approx(plan.macs({name: len(one) for name, one in kept.items()}), rel=1e-9)


# Does what a person would, and leaves what they would see in an attribute.
VISITOR = """<script>addEventListener("load", async () => {
  const seen = {}, pause = (ms) => new Promise((done) => setTimeout(done, ms));
  while (!document.body.dataset.ready) await pause(10);
  const pixels = element("network").querySelector("canvas").getContext("2d").getImageData(0, 0, 300, 60).data;
  seen.painted = new Set(pixels).size > 10;
  const box = element("network"), canvas = box.querySelector("canvas");
  const point = (filter, kind) => {
    const [x, y] = map.place(filter), at = canvas.getBoundingClientRect();
    const where = { clientX: at.left + x, clientY: at.top + y - box.scrollTop, bubbles: true };
    canvas.dispatchEvent(kind === "click" ? new MouseEvent(kind, where) : new PointerEvent(kind, where));
  };
  const titles = () => [...document.querySelectorAll("#filters h3")].map((title) => title.textContent);
  const change = (id, value, kind) => {
    element(id).value = value;
    element(id).dispatchEvent(new Event(kind, { bubbles: true }));
  };
  point(3, "pointermove");
  seen.hovered = titles();
  seen.said = element("live").textContent;
  seen.plots = document.querySelectorAll("#filters .plot canvas").length;
  seen.peak = document.querySelector("#filters details tbody tr").textContent;
  point(3, "click"); point(7, "pointermove"); point(7, "click"); point(9, "pointermove");
  seen.pinned = titles();
  document.querySelector("#filters button").click();
  seen.after = titles();
  const press = (key) => box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  press("Home"); press("ArrowDown"); press("ArrowRight");
  seen.arrows = element("live").textContent;
  press("Enter");
  seen.entered = element("live").textContent;
  if (data.trial) {
    seen.start = JSON.parse(element("outcome").dataset.kept);
    change("share", 70, "input");
    seen.cut = element("outcome").textContent;
    seen.macs = Number(element("outcome").dataset.macs);
    change("by", "threshold", "change");
    change("threshold", 1e9, "input");
    seen.least = JSON.parse(element("outcome").dataset.kept);
    seen.cards = [...document.querySelectorAll("#filters article")].map((one) => one.textContent);
  }
  const table = element("filter-table"), second = () => [...table.querySelectorAll("tbody td:nth-child(2)")];
  const cells = () => second().map((cell) => Number(cell.textContent));
  table.querySelectorAll("th button")[1].click();
  seen.sorted = cells();
  table.querySelectorAll("th button")[1].click();
  seen.rising = cells();
  const search = table.querySelector("input");
  search.value = "layer1.0.conv1 filter 2"; search.dispatchEvent(new Event("input"));
  seen.found = [...table.querySelectorAll("button.pick")].map((one) => one.textContent);
  change("layers", "layer2", "input");
  seen.layers = map.shown.map((layer) => layer.name);
  if (element("time")) {
    change("colour", "snr", "change");
    change("time", 0, "input");
    seen.time = element("time-now").textContent;
    seen.values = [...map.values.subarray(0, 3)];
  }
  for (let i = 0; i < 20; i++) point(map.shown[0].start + i % 16, "pointermove");
  seen.alive = uPlot.sync("spectra").plots.length;
  seen.same = valuesOf("kept") === valuesOf("kept");
  seen.below = colouring("score_z", Float32Array.from({ length: 1000 }, (_, i) => i - 1)).of(-1);
  seen.colours = new Set([0, 1, 2, 3, 4].map((part) => colouring("part", Float32Array.of(0)).of(part))).size;
  seen.wide = document.documentElement.scrollWidth - innerWidth;
  const controls = [...document.querySelectorAll("input, select, button")];
  seen.nameless = controls.filter((one) => !one.labels?.length && !one.textContent).length;
  document.body.dataset.seen = JSON.stringify(seen);
})</script>"""


def visited(page: Path, width: int) -> dict[str, Any]:
    """What a visitor saw."""
    visit = page.with_name("visited.html")
    visit.write_text(page.read_text().replace("</body>", VISITOR + "</body>"))
    # Time runs on while nothing happens, so that all the visitor does is done.
    text = opened(visit, width, "--virtual-time-budget=8000")
    found: dict[str, Any] = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', text)[1]))  # type: ignore[index]
    return found


def opened(page: Path, width: int, *more: str) -> str:
    """The page as it stands in the browser, whose console has to stay silent."""
    assert BROWSER is not None
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", profile, f"--window-size={width},900", *more]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" not in done.stderr, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
@pytest.mark.parametrize("width", [1280, 500])
def test_page_in_a_browser(
    explored: tuple[Filters, Trial], plan: Plan, response: TagResponse, tmp_path: Path, width: int
) -> None:
    filters, trial = explored
    earlier = Filters(
        "epoch 1",
        filters.widths,
        {"snr": 2 * filters.columns["snr"]},
        np.array([c.freq for c in STIMULUS.components]),
        np.ones((len(filters.spectra), len(STIMULUS.components))),
    )
    seen = visited(write_explorer(tmp_path, "resnet8", [earlier, filters], STIMULUS, trial), width)
    snr = filters.columns["snr"]
    assert seen["painted"]
    assert seen["hovered"] == ["conv1 filter 3"]
    assert seen["said"].startswith("conv1 filter 3: SNR ")
    assert f"{1 + int((snr[:16] > snr[3]).sum())} of 16 in its layer" in seen["said"]
    assert seen["plots"] == 1
    assert re.match(r"f[12](6|7\.5)harmonic of (left|right)", seen["peak"])
    assert seen["pinned"] == ["A: conv1 filter 3", "B: conv1 filter 7"]
    assert seen["after"] == ["A: conv1 filter 7", "conv1 filter 9"]
    assert seen["arrows"].startswith("layer1.0.conv1 filter 1: SNR")
    assert seen["entered"].startswith("layer1.0.conv1 filter 1 pinned as B")
    found = trial.scores["snr"]
    assert seen["start"] == [len(one) for one in select(found, trial.amount, plan.macs).values()]
    kept = select(found, Amount(macs_cut=0.7, scope="per_mac"), plan.macs)
    assert seen["macs"] == pytest.approx(plan.macs({name: len(one) for name, one in kept.items()}), rel=1e-9)
    assert f"{sum(map(len, kept.values()))} of {sum(map(len, found.values()))} filters kept" in seen["cut"]
    assert seen["least"] == [1] * len(trial.units)
    # The pinned filters say at once whether that cut keeps them, and keep their rank.
    best = int(found["layer1.0.conv1"].argmax())
    [card] = [one for one in seen["cards"] if "layer1.0.conv1 filter 1" in one]
    assert f"kept by the cut below{'yes' if best == 1 else 'no'}" in card
    assert "rank by SNR" in card
    assert seen["sorted"] == pytest.approx(np.sort(snr[np.isfinite(snr)])[::-1][:25], rel=6e-3)
    assert seen["rising"] == pytest.approx(np.sort(snr[np.isfinite(snr)])[:25], rel=6e-3)
    assert sorted(seen["found"]) == ["layer1.0.conv1 filter 12", "layer1.0.conv1 filter 2"]
    assert seen["layers"] == [layer for layer in filters.widths if "layer2" in layer]
    assert seen["time"] == "epoch 1"
    assert seen["values"] == pytest.approx(2 * snr[:3], rel=1e-6)
    # Plots that are shown no more are gone, what a time lacks is one array, the lowest scores have a colour.
    assert seen["alive"] <= 2
    assert seen["same"]
    assert re.match("#[0-9a-f]{6}", seen["below"])
    assert seen["colours"] == 5
    assert seen["wide"] <= 0
    assert seen["nameless"] == 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
def test_twenty_two_thousand_filters_are_there_in_two_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    widths = {f"layer{i}": 440 for i in range(50)}
    spectra = rng.lognormal(size=(22_000, 67))
    epochs = [Filters(name, widths, {"snr": spectra[:, 12]}, np.arange(67) / 2, spectra) for name in ("1", "2")]
    units = [TriedUnit(name, (name,), 440, (), shares={name: (0.0, 1 / 440)}) for name in widths]
    scores = {"snr": {name: torch.from_numpy(rng.random(440)) for name in widths}}
    trial = Trial(dict.fromkeys(widths, 10**8), units, scores)
    page = write_explorer(tmp_path, "wide", epochs, STIMULUS, trial)
    text = opened(page, 1280, "--blink-settings=preferredColorScheme=0")
    painted = re.search(r'data-painted="(\d+)"', text)
    assert painted
    assert int(painted[1]) < 2000
