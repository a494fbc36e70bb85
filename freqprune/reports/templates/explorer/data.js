// The data of the page, unpacked; every filter has one number over all layers.

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);

function bytes(text) {
  const raw = atob(text), found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found.buffer;
}

/** Upper halves of float32. */
function halves(text) {
  const upper = new Uint16Array(bytes(text)), found = new Uint32Array(upper.length);
  for (let i = 0; i < upper.length; i++) found[i] = upper[i] << 16;
  return new Float32Array(found.buffer);
}

/** Make a value when it is first asked for. */
function once(make) {
  let found;
  return () => (found ??= make());
}

let total = 0;
for (const [number, layer] of data.layers.entries()) {
  Object.assign(layer, { number, start: total });
  total += layer.n;
}
const layerOf = new Int32Array(total);
for (const layer of data.layers) layerOf.fill(layer.number, layer.start, layer.start + layer.n);

for (const time of data.times) {
  const spectra = once(() => halves(time.spectra));
  for (const [name, text] of Object.entries(time.columns)) time.columns[name] = new Float32Array(bytes(text));
  time.spectrum = (filter) => spectra().subarray(filter * time.freqs.length, (filter + 1) * time.freqs.length);
}
if (data.trial) {
  for (const [name, found] of Object.entries(data.trial.scores))
    data.trial.scores[name] = found.map((text) => text && new Float64Array(bytes(text)));
}

const KNOWN = {
  snr: { label: "SNR", scale: "log" },
  amplitude: { label: "amplitude", scale: "log" },
  preference: { label: "driving part", scale: "diverging" },
  part: { label: "driving part", scale: "part" },
  integration: { label: "integration", scale: "linear" },
  important: { label: "important", scale: "flag" },
  kept: { label: "kept by this run", scale: "flag" },
  trial: { label: "kept by the cut below", scale: "flag" },
};

function about(name) {
  return KNOWN[name] ?? { label: `score (${name.replace("score_", "")})`, scale: "auto" };
}

function columnNames() {
  const names = new Set(data.times.flatMap((time) => Object.keys(time.columns)));
  if (data.trial) names.add("trial");
  return [...names];
}

const nameOf = (filter) => `${data.layers[layerOf[filter]].name} filter ${filter - data.layers[layerOf[filter]].start}`;

/** A value in words. */
function told(name, value) {
  if (value === undefined || Number.isNaN(value)) return about(name).scale === "flag" || name.startsWith("score_") ? "not asked" : "undefined";
  if (about(name).scale === "flag") return value ? "yes" : "no";
  if (about(name).scale === "part") return data.parts[value].name;
  return number(value);
}

function number(value) {
  const size = Math.abs(value);
  if (size && (size < 0.001 || size >= 1e5)) return value.toExponential(2);
  return size >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

/** Place of a filter from the highest value down, in its layer and in the network. */
function rank(values, filter) {
  const layer = data.layers[layerOf[filter]], place = { layer: 1, of: 0, network: 1, all: 0 };
  if (Number.isNaN(values[filter])) return null;
  for (let i = 0; i < total; i++) {
    if (Number.isNaN(values[i])) continue;
    const inside = i >= layer.start && i < layer.start + layer.n, higher = values[i] > values[filter];
    place.all++;
    place.network += higher;
    if (inside) {
      place.of++;
      place.layer += higher;
    }
  }
  return place;
}
