// State of the page, and what changes it.

const state = { time: data.times.length - 1, colour: null, pins: [], hovered: null, tables: false };
const time = () => data.times[state.time];
const tried = new Float32Array(total).fill(NaN);
const unknown = new Float32Array(total).fill(NaN);
const valuesOf = (name) => (name === "trial" ? tried : time().columns[name] ?? unknown);

const map = new NetworkMap(element("network"), { onHover: (filter) => { state.hovered = filter; showFilters(); say(filter); }, onPick: pin });

function colour() {
  map.values = valuesOf(state.colour);
  map.colours = colouring(state.colour, map.values);
  const flags = about(state.colour).scale === "flag";
  map.labels = (layer) => {
    if (!flags) return "";
    const of = map.values.subarray(layer.start, layer.start + layer.n);
    return Number.isNaN(of[0]) ? ", not asked" : `, ${of.reduce((sum, v) => sum + v, 0)} ${state.colour === "important" ? "important" : "kept"}`;
  };
  const { swatches, gradient, low, high } = map.colours, legend = element("legend");
  const bar = gradient && make("span", { className: "bar" });
  if (bar) bar.style.background = `linear-gradient(to right, ${gradient.join(", ")})`;
  legend.replaceChildren(...(gradient ? [low, bar, high] : swatches.map(([shade, word]) => {
    const dot = make("span", { className: "dot" });
    dot.style.background = shade ?? "transparent";
    return make("span", { className: "swatch" }, dot, word);
  })));
  map.draw();
}

function pin(filter) {
  if (filter === null) return;
  const place = state.pins.indexOf(filter);
  if (place >= 0) state.pins.splice(place, 1);
  else state.pins = [...state.pins.slice(state.pins.length > 1 ? 1 : 0), filter];
  map.pins = state.pins;
  map.draw();
  showFilters();
  element("live").textContent = place >= 0 ? `${nameOf(filter)} let go` : `${nameOf(filter)} pinned as ${"AB"[state.pins.indexOf(filter)]}`;
}

const say = (filter) => { element("live").textContent = `${nameOf(filter)}: ${facts(filter).map(([name, value]) => `${name} ${value}`).join(", ")}`; };

function facts(filter) {
  const found = columnNames().map((name) => [about(name).label, told(name, valuesOf(name)[filter])]);
  // Among flags and parts there is no rank: the first reading, SNR or amplitude, stands for them.
  const ranked = ["flag", "part"].includes(about(state.colour).scale) ? columnNames()[0] : state.colour;
  const place = rank(valuesOf(ranked), filter), shown = about(ranked).label;
  return place ? [...found, [`rank by ${shown}`, `${place.layer} of ${place.of} in its layer, ${place.network.toLocaleString("en")} of ${place.all.toLocaleString("en")}`]] : found;
}

let plots = [];

/** The pinned filters and the hovered one beside or below each other, on the same axis. */
function showFilters() {
  // A plot holds on to its canvas, and listens, until it is told.
  for (const plot of plots) plot?.destroy();
  const shown = state.pins.map((filter, i) => ["AB"[i], filter]);
  if (state.hovered !== null && !state.pins.includes(state.hovered) && shown.length < 2) shown.push(["", state.hovered]);
  const host = element("filters"), range = limits(time(), shown.map(([, filter]) => filter));
  element("hint").hidden = shown.length > 0;
  // What was open or had the focus still is and has it.
  const before = [...host.children].map((article) => ({ filter: article.dataset.filter, open: article.querySelector("details").open,
    focused: article.querySelector("button") === document.activeElement }));
  host.replaceChildren(...shown.map(([letter, filter]) => {
    const button = make("button", { type: "button", textContent: letter ? "let go" : "pin" });
    button.addEventListener("click", () => pin(filter));
    const layer = data.layers[layerOf[filter]];
    const head = make("div", { className: "head" }, make("h3", { textContent: `${letter ? `${letter}: ` : ""}${nameOf(filter)}` }), button);
    const list = make("dl", {}, ...facts(filter).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
    const rows = peaks(time(), filter).map((c) => make("tr", {}, make("td", {}, c.name), make("td", {}, `${+c.freq.toPrecision(6)}`),
      make("td", {}, c.part === null ? "intermodulation" : `harmonic of ${data.parts[c.part].name}`), make("td", {}, told("snr", c.value))));
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...["component", "Hz", "kind", data.reading].map((word) => make("th", { scope: "col" }, word)))),
      make("tbody", {}, ...rows));
    const more = make("details", {}, make("summary", {}, `${data.reading} at all ${rows.length} components`), make("div", { className: "scroll" }, table));
    const was = before.find((one) => one.filter === `${filter}`);
    more.open = was?.open ?? false;
    const article = make("article", {}, head, make("p", { className: "soft", textContent: layer.at ? `read at ${layer.at}` : "" }), make("div", { className: "plot" }), list, more);
    article.dataset.filter = filter;
    return article;
  }));
  const focused = before.find((one) => one.focused)?.filter;
  if (focused !== undefined) host.querySelector(`[data-filter="${focused}"] button`)?.focus({ preventScroll: true });
  plots = [...host.querySelectorAll(".plot")].map((plot, i) => drawSpectrum(plot, time(), shown[i][1], range, shown.length > 1 ? 210 : 260));
}

const layerTable = once(() => new SortedTable(element("layer-table"), [
  { label: "layer", of: (layer) => layer.number, told: (layer) => layer.name },
  { label: "filters", of: (layer) => layer.n, told: (layer) => `${layer.n}` },
  ...(data.trial ? [{ label: "MACs, M", of: macsOf, told: (layer) => told("snr", macsOf(layer)) }] : []),
  ...["snr", "integration"].filter((name) => columnNames().includes(name)).map((name) => ({
    label: `median ${about(name).label}`, of: (layer) => median(name, layer), told: (layer) => told(name, median(name, layer)) })),
  ...(data.trial ? [{ label: "kept by the cut", of: (layer) => keptIn(layer) / layer.n, told: (layer) => (Number.isNaN(keptIn(layer)) ? "not asked" : `${keptIn(layer)} of ${layer.n}`) }] : []),
], { rows: [...data.layers], name: (layer) => layer.name, onPick: (layer) => map.show(layer.start), size: 12 }));

const filterTable = once(() => new SortedTable(element("filter-table"), [
  { label: "filter", of: (filter) => filter, told: nameOf },
  ...columnNames().map((name) => ({ label: about(name).label, of: (filter) => valuesOf(name)[filter], told: (filter) => told(name, valuesOf(name)[filter]) })),
], { rows: Array.from({ length: total }, (_, i) => i), name: nameOf, onPick: (filter) => { map.show(filter); pin(filter); } }));

function macsOf(layer) {
  const place = data.trial.layers.indexOf(layer.name);
  return place < 0 ? NaN : data.trial.macs[place] / 1e6;
}

function median(name, layer) {
  const sorted = valuesOf(name).slice(layer.start, layer.start + layer.n).filter((v) => !Number.isNaN(v)).sort();
  return sorted.length ? (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2 : NaN;
}

const keptIn = (layer) => tried.subarray(layer.start, layer.start + layer.n).reduce((sum, v) => sum + v, 0);

function chooseTime(number) {
  state.time = number;
  element("time-now").textContent = time().label;
  colour();
  showFilters();
  layerTable().fill();
  filterTable().fill();
}

/** The cut as the settings stand. */
function tryCut() {
  const { trial } = data, scores = trial.scores[element("criterion").value], byMacs = element("by").value === "macs";
  const { min_filters, multiple_of } = trial.amount, floor = Math.ceil(min_filters / multiple_of) * multiple_of;
  const unordered = byMacs && element("scope").value === "per_mac" && scores.some((found) => found?.some((v) => v < 0));
  const amount = { ...trial.amount, scope: unordered ? "global" : element("scope").value };
  element("macs-row").hidden = element("scope-row").hidden = !byMacs;
  element("threshold-row").hidden = byMacs;
  // A field that was emptied asks for nothing.
  if (element("threshold").value === "") element("threshold").value = thresholdAt(element("quantile").value);
  const asked = Number(element("share").value) / 100, threshold = Number(element("threshold").value);
  const found = byMacs ? toMacs(trial, scores, amount, asked) : aboveThreshold(trial, scores, amount, threshold);
  const cut = 1 - found.macs / found.whole;
  tried.fill(NaN);
  trial.units.forEach((unit, u) => {
    if (!scores[u]) return;
    // A filter's channels lie together, but for attention heads, whose queries, keys and values are parts of their own.
    const each = unit.width / unit.parts;
    const channels = Float32Array.from({ length: unit.n * unit.width }, (_, i) => found.kept[u][Math.floor((i % (unit.n * each)) / each)]);
    for (const layer of data.layers) if (unit.members.includes(layer.name) && layer.n === channels.length) tried.set(channels, layer.start);
  });
  const ranked = trial.units.filter((_, u) => scores[u]).length < trial.units.length ? "layer that this ranks" : "layer";
  const all = trial.units.reduce((sum, unit) => sum + unit.n, 0), kept = found.counts.reduce((sum, count) => sum + count, 0);
  element("share-now").textContent = `${(100 * asked).toFixed(1)} %`;
  element("outcome").textContent = `${kept.toLocaleString("en")} of ${all.toLocaleString("en")} filters kept; ` +
    `${(found.macs / 1e6).toFixed(2)} of ${(found.whole / 1e6).toFixed(2)} M MACs left, ${(100 * cut).toFixed(1)} % cut` +
    (byMacs && cut < asked - ROUNDING ? `. More cannot go: every ${ranked} keeps ${floor}${trial.units.some((unit) => unit.n < floor) ? ", or all that it has" : ""}.` : ".") +
    (unordered ? " Scores below 0 have no order per MAC: filters of all layers are ranked together." : "");
  element("outcome").dataset.kept = JSON.stringify(found.counts);
  element("outcome").dataset.macs = found.macs;
  if (state.colour === "trial") colour();
  // Once the page is there, the tables and the filters that are shown say what this cut keeps of them.
  if (state.tables) {
    layerTable().fill();
    filterTable().fill();
    if (state.hovered !== null || state.pins.length) showFilters();
  }
}

/** A slider over the scores: its thousand places are quantiles, so that it moves evenly however the scores lie. */
function thresholdAt(place) {
  const sorted = Float64Array.from(data.trial.scores[element("criterion").value].flatMap((s) => (s ? [...s] : []))).sort();
  return sorted[Math.round((place / 1000) * (sorted.length - 1))];
}

function setUpTrial() {
  const { trial } = data, on = (id, kind, act) => element(id).addEventListener(kind, act);
  element("criterion").append(...Object.keys(trial.scores).map((name) => new Option(name, name)));
  element("criterion").value = trial.criterion;
  element("scope").value = trial.amount.scope;
  if (trial.amount.macs_cut !== null) element("share").value = 100 * trial.amount.macs_cut;
  if (trial.amount.threshold !== null) element("by").value = "threshold";
  element("threshold").value = trial.amount.threshold ?? thresholdAt(300);
  for (const id of ["by", "scope"]) on(id, "change", tryCut);
  on("criterion", "change", () => {
    const own = element("criterion").value === trial.criterion ? trial.amount.threshold : null;
    element("threshold").value = own ?? thresholdAt(element("quantile").value);
    tryCut();
  });
  // Moving the cut shows it.
  const shown = () => { element("colour").value = state.colour = "trial"; tryCut(); };
  on("share", "input", shown);
  on("threshold", "input", () => { if (element("threshold").value !== "") shown(); });
  on("quantile", "input", () => { element("threshold").value = thresholdAt(element("quantile").value); shown(); });
  tryCut();
}

function start() {
  const chooser = element("colour"), names = columnNames();
  chooser.append(...names.map((name) => new Option(about(name).label, name)));
  state.colour = chooser.value = names[0];
  chooser.addEventListener("change", () => { state.colour = chooser.value; colour(); if (state.hovered !== null || state.pins.length) showFilters(); });
  element("layers").addEventListener("input", (event) => {
    map.shown = data.layers.filter((layer) => layer.name.toLowerCase().includes(event.target.value.toLowerCase()));
    map.layout();
  });
  colour();
  map.layout();
  if (data.trial) setUpTrial();
  const slider = element("time");
  if (slider) slider.addEventListener("input", () => chooseTime(Number(slider.value)));
  const again = () => { colour(); showFilters(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  let width = innerWidth;
  addEventListener("resize", () => { if (width !== innerWidth) { width = innerWidth; showFilters(); } });
  // The map is there at once; the tables of thousands of filters follow.
  document.body.dataset.painted = Math.round(performance.now());
  requestAnimationFrame(() => setTimeout(() => { layerTable(); filterTable(); state.tables = true; document.body.dataset.ready = "yes"; }));
}

start();
