// One filter's spectrum by uPlot: a line where every bin is known, a stem and a mark at every harmonic and intermodulation.

const MARKS = ["circle", "square", "diamond", "plus"];

/** Bin of each component among the frequencies of a time. */
function binsOf(time) {
  const step = time.freqs.length > 1 ? Math.min(...time.freqs.slice(1).map((f, i) => f - time.freqs[i])) : 1;
  return data.components.map((component) => {
    const bin = time.freqs.findIndex((freq) => Math.abs(freq - component.freq) < step / 2);
    return { ...component, bin, colour: component.part === null ? MIXED : PART_COLOURS[component.part % PART_COLOURS.length] };
  });
}

const isWhole = (time) => time.freqs.length > data.components.length;

function mark(context, component, x, y, size) {
  const kind = component.part === null ? "triangle" : MARKS[component.part % 4];
  context.beginPath();
  if (kind === "circle") context.arc(x, y, size, 0, 2 * Math.PI);
  if (kind === "square") context.rect(x - size, y - size, 2 * size, 2 * size);
  const corners = { diamond: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]], triangle: [[0, -1.2], [1.2, 0.9], [-1.2, 0.9]],
    plus: [[-0.4, -1.3], [0.4, -1.3], [0.4, 1.3], [-0.4, 1.3]] }[kind];
  corners?.forEach(([dx, dy], i) => context[i ? "lineTo" : "moveTo"](x + dx * size, y + dy * size));
  context.fill();
}

/** Lowest and highest value that the axis of some filters has to hold, on a logarithmic scale. */
function limits(time, filters) {
  const values = filters.flatMap((filter) => [...time.spectrum(filter)].slice(isWhole(time) ? 1 : 0)).filter((v) => v > 0);
  if (!values.length) return [0.5, 10];
  const high = Math.max(...values);
  return data.reading === "SNR" ? [Math.min(0.5, Math.max(0.05, Math.min(...values))), Math.max(10, 3 * high)]
    : [Math.max(high * 1e-5, Math.min(...values)), 3 * high];
}

function drawSpectrum(host, time, filter, range, height) {
  host.replaceChildren();
  const values = Array.from(time.spectrum(filter), (v, i) => (v > 0 && (i || !isWhole(time)) ? Math.max(v, range[0]) : null));
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => style.getPropertyValue(name));
  if (!values.some((v) => v !== null)) {
    host.textContent = "This filter does not answer: its spectrum is undefined.";
    return null;
  }
  const stems = (plot) => {
    const { ctx } = plot, ratio = devicePixelRatio || 1, bottom = plot.bbox.top + plot.bbox.height;
    ctx.save();
    const one = plot.valToPos(1, "y", true);
    if (data.reading === "SNR" && one < bottom) {
      ctx.strokeStyle = soft;
      ctx.setLineDash([4 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(plot.bbox.left, one);
      ctx.lineTo(plot.bbox.left + plot.bbox.width, one);
      ctx.stroke();
      ctx.setLineDash([]);
    }
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    const named = binsOf(time).filter((c) => c.bin >= 0 && values[c.bin] !== null).sort((a, b) => values[b.bin] - values[a.bin]);
    const taken = [];
    named.forEach((component) => {
      const x = plot.valToPos(time.freqs[component.bin], "x", true), y = plot.valToPos(values[component.bin], "y", true);
      if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) return;
      ctx.strokeStyle = ctx.fillStyle = component.colour;
      ctx.lineWidth = 2 * ratio;
      ctx.beginPath();
      ctx.moveTo(x, bottom);
      ctx.lineTo(x, y);
      ctx.stroke();
      mark(ctx, component, x, y, 4 * ratio);
      // Names from the strongest down, as long as they do not overlap.
      const width = ctx.measureText(component.name).width;
      if (taken.some(([other, its]) => Math.abs(other - x) < (width + its) / 2 + 2 * ratio)) return;
      taken.push([x, width]);
      ctx.fillStyle = ink;
      ctx.fillText(component.name, x, Math.max(y - 8 * ratio, plot.bbox.top + 10 * ratio));
    });
    ctx.restore();
  };
  const axis = { stroke: soft, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "11px system-ui, sans-serif" };
  const name = (freq) => binsOf(time).find((c) => Math.abs(c.freq - freq) < 1e-6)?.name;
  return new uPlot(
    {
      width: host.clientWidth, height, padding: [14, 8, 0, 0],
      cursor: { sync: { key: "spectra" }, y: false },
      scales: { x: { time: false, range: [0, 1.03 * time.freqs.at(-1)] }, y: { distr: 3, range } },
      axes: [{ ...axis, label: "frequency (Hz)", labelSize: 18, size: 34 }, { ...axis, size: 46, values: (_, ticks) => ticks.map((v) => (v === null ? "" : `${+v.toPrecision(1)}`)) }],
      series: [
        { label: "Hz", value: (_, freq) => (freq == null ? "–" : `${+freq.toPrecision(6)}${name(freq) ? ` (${name(freq)})` : ""}`) },
        { label: data.reading, stroke: soft, width: isWhole(time) ? 1 : 0, points: { show: false }, value: (plot, v, series, bin) => (bin == null ? "–" : told("snr", bin || !isWhole(time) ? time.spectrum(filter)[bin] : NaN)) },
      ],
      hooks: { draw: [stems] },
    },
    [time.freqs, values],
    host,
  );
}

/** The values at all components, highest first. */
function peaks(time, filter) {
  const spectrum = time.spectrum(filter);
  return binsOf(time).filter((c) => c.bin >= 0).map((c) => ({ ...c, value: spectrum[c.bin] }))
    .sort((a, b) => (Number.isNaN(b.value) ? -1 : b.value) - (Number.isNaN(a.value) ? -1 : a.value));
}
