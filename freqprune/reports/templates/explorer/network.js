// The network as a column of layers, their filters as dots, on a canvas that draws what is in view only.

// Cividis, readable with every common form of colour blindness; the reports' colours of parts and flags.
const RAMP = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const PART_COLOURS = ["#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#882255", "#999933", "#332288"];
const MIXED = "#0072b2";

const mix = (a, b, share) =>
  "#" + [1, 3, 5].map((i) => Math.round(parseInt(a.slice(i, i + 2), 16) * (1 - share) + parseInt(b.slice(i, i + 2), 16) * share)
    .toString(16).padStart(2, "0")).join("");

function ramp(share) {
  const place = Math.min(1, Math.max(0, share)) * (RAMP.length - 1), low = Math.min(RAMP.length - 2, Math.floor(place));
  return mix(RAMP[low], RAMP[low + 1], place - low);
}

const STEPS = Array.from({ length: 65 }, (_, i) => ramp(i / 64));

/** A column's colour of every value, and what its legend says. Null: undefined, or not kept: an empty ring. */
function colouring(name, values) {
  const { scale } = about(name);
  if (scale === "flag") {
    const words = name === "important" ? ["yes", "no"] : ["kept", "removed"];
    return { of: (v) => (v === 1 ? MIXED : null), swatches: [[MIXED, words[0]], [null, `${words[1]}, or not asked`]] };
  }
  if (scale === "part")
    return { of: (v) => PART_COLOURS[v % PART_COLOURS.length] ?? null, swatches: data.parts.map((part, i) => [PART_COLOURS[i % PART_COLOURS.length], part.name]) };
  if (scale === "diverging") {
    const ends = data.parts.map((part) => part.name);
    const of = (v) => (Number.isNaN(v) ? null : mix("#b9b9b9", PART_COLOURS[v > 0 ? 0 : 1], Math.min(1, Math.abs(v))));
    return { of, gradient: [-1, -0.5, 0, 0.5, 1].map(of), low: `${ends[1]} only`, high: `${ends[0]} only` };
  }
  const sorted = values.filter((v) => !Number.isNaN(v)).sort();
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))] ?? 0;
  // A few extreme filters would take the colours of all others.
  const low = at(0.01), high = at(0.99), logarithmic = scale !== "linear" && low > 0 && high > 10 * low;
  const place = logarithmic ? (v) => Math.log(Math.max(v, low) / low) / Math.log(high / low) : (v) => (v - low) / (high - low || 1);
  const of = (v) => (Number.isNaN(v) ? null : STEPS[Math.round(64 * Math.min(1, Math.max(0, place(v))))]);
  return { of, gradient: [0, 0.25, 0.5, 0.75, 1].map(ramp), low: number(low), high: `${number(high)}${logarithmic ? " (log)" : ""}` };
}

class NetworkMap {
  constructor(box, { onHover, onPick }) {
    Object.assign(this, { box, canvas: box.querySelector("canvas"), spacer: box.querySelector(".spacer"), onHover, onPick });
    this.pitch = total < 3000 ? 14 : total < 40000 ? 9 : 7;
    this.current = null;
    this.pins = [];
    this.shown = data.layers;
    this.tops = [];
    this.labels = () => "";
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    this.canvas.addEventListener("pointermove", (event) => this.hover(this.at(event)));
    this.canvas.addEventListener("pointerleave", () => this.hover(null));
    this.canvas.addEventListener("click", (event) => this.onPick(this.at(event)));
    box.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => requestAnimationFrame(() => this.layout())).observe(box);
  }

  /** Where every shown layer begins. */
  layout() {
    this.width = this.box.clientWidth;
    this.columns = Math.max(1, Math.floor((this.width - 16) / this.pitch));
    this.tops = [];
    let top = 6;
    for (const layer of this.shown) {
      this.tops.push(top);
      top += 18 + Math.ceil(layer.n / this.columns) * this.pitch + 8;
    }
    this.spacer.style.height = `${top}px`;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = this.width * ratio;
    this.canvas.height = this.box.clientHeight * ratio;
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.box.clientHeight}px`;
    this.draw();
  }

  /** Number of the last shown layer that begins above a height. */
  layerAt(y) {
    let low = 0, high = this.tops.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.tops[middle] <= y) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  place(filter) {
    const position = this.shown.indexOf(data.layers[layerOf[filter]]);
    if (position < 0) return null;
    const i = filter - this.shown[position].start, half = this.pitch / 2;
    return [8 + (i % this.columns) * this.pitch + half, this.tops[position] + 18 + Math.floor(i / this.columns) * this.pitch + half];
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left - 8, y = event.clientY - box.top + this.box.scrollTop;
    if (!this.shown.length) return null;
    const position = this.layerAt(y), layer = this.shown[position];
    const column = Math.floor(x / this.pitch), row = Math.floor((y - this.tops[position] - 18) / this.pitch);
    const i = row * this.columns + column;
    return row >= 0 && column >= 0 && column < this.columns && i < layer.n ? layer.start + i : null;
  }

  hover(filter) {
    this.canvas.style.cursor = filter === null ? "default" : "pointer";
    if (filter === this.current || filter === null) return;
    this.current = filter;
    this.draw();
    this.onHover(filter);
  }

  key(event) {
    if (!this.shown.length) return;
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    // From the first that is shown, where the one before is hidden.
    const there = this.current !== null && this.current !== undefined && this.shown.includes(data.layers[layerOf[this.current]]);
    const now = there ? this.current : this.shown[0].start, layer = data.layers[layerOf[now]];
    const position = this.shown.indexOf(layer), i = now - layer.start;
    const to = (step) => {
      const other = this.shown[Math.min(this.shown.length - 1, Math.max(0, position + step))];
      return other.start + Math.min(i, other.n - 1);
    };
    const steps = {
      ArrowRight: () => Math.min(layer.start + layer.n - 1, now + 1), ArrowLeft: () => Math.max(layer.start, now - 1),
      ArrowDown: () => to(1), ArrowUp: () => to(-1), PageDown: () => to(5), PageUp: () => to(-5),
      Home: () => this.shown[0].start, End: () => this.shown.at(-1).start,
    };
    if (event.key === "Enter" || event.key === " ") this.onPick(now);
    else if (steps[event.key]) this.show(steps[event.key]());
    else return;
    event.preventDefault();
  }

  /** Make a filter the current one and bring it into view. */
  show(filter) {
    this.current = filter;
    const place = this.place(filter);
    if (place) {
      const y = place[1], { scrollTop, clientHeight } = this.box;
      if (y < scrollTop + 40 || y > scrollTop + clientHeight - 20) this.box.scrollTop = y - clientHeight / 2;
    }
    this.draw();
    this.onHover(filter);
  }

  draw() {
    const context = this.canvas.getContext("2d"), ratio = devicePixelRatio || 1, top = this.box.scrollTop;
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink"), soft = style.getPropertyValue("--soft");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.box.clientHeight);
    context.translate(0, -top);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "top";
    const radius = this.pitch * 0.4, dots = new Map();
    for (let l = this.tops.length ? this.layerAt(top) : 0; l < this.shown.length && this.tops[l] < top + this.box.clientHeight; l++) {
      const layer = this.shown[l];
      context.fillStyle = soft;
      context.fillText(`${layer.name} · ${layer.n}${this.labels(layer)}`, 8, this.tops[l] + 2, this.width - 16);
      for (let i = 0; i < layer.n; i++) {
        const y = this.tops[l] + 18 + Math.floor(i / this.columns) * this.pitch + this.pitch / 2;
        if (y < top - this.pitch || y > top + this.box.clientHeight + this.pitch) continue;
        const colour = this.colours.of(this.values[layer.start + i]);
        if (!dots.has(colour)) dots.set(colour, []);
        dots.get(colour).push(8 + (i % this.columns) * this.pitch + this.pitch / 2, y);
      }
    }
    // One path a colour: thousands of dots in a few milliseconds.
    for (const [colour, places] of dots) {
      context.beginPath();
      for (let i = 0; i < places.length; i += 2) {
        context.moveTo(places[i] + radius, places[i + 1]);
        context.arc(places[i], places[i + 1], radius, 0, 2 * Math.PI);
      }
      context.fillStyle = colour ?? "transparent";
      if (colour !== null) context.fill();
      // The darkest dots would be lost on a dark page without a rim.
      context.lineWidth = colour === null ? 1 : 0.5;
      context.strokeStyle = soft;
      context.stroke();
    }
    this.pins.forEach((filter, i) => this.ring(context, filter, ink, "AB"[i]));
    if (this.current !== null) this.ring(context, this.current, ink, "");
  }

  ring(context, filter, ink, letter) {
    const place = this.place(filter);
    if (!place) return;
    context.beginPath();
    context.arc(place[0], place[1], this.pitch * 0.4 + 3, 0, 2 * Math.PI);
    context.lineWidth = letter ? 2.5 : 1.5;
    context.strokeStyle = ink;
    context.stroke();
    if (letter) {
      context.font = "bold 12px system-ui, sans-serif";
      context.fillStyle = ink;
      context.fillText(letter, place[0] + this.pitch * 0.4 + 4, place[1] - this.pitch * 0.4 - 12);
    }
  }
}
