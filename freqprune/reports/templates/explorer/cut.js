// What a cut keeps: scores and MACs in, filters kept out, by the rules of freqprune.pruning.selection. No page needed.

// Shares of the MACs that differ by less are equal: a cut that is met exactly is met.
const ROUNDING = 1e-9;

/** MACs with gone[u] filters missing from unit u. */
function macsLeft(trial, gone) {
  const inputs = new Float64Array(trial.macs.length).fill(1), outputs = new Float64Array(trial.macs.length).fill(1);
  trial.units.forEach((unit, u) => {
    if (!gone[u]) return;
    for (const [layer, input, output] of unit.shares) {
      inputs[layer] -= gone[u] * input;
      outputs[layer] -= gone[u] * output;
    }
  });
  return trial.macs.reduce((sum, macs, layer) => sum + macs * inputs[layer] * outputs[layer], 0);
}

/** Places of values, lowest first; equal ones in their order. */
function ascending(values) {
  return Array.from(values, (_, i) => i).sort((a, b) => values[a] - values[b] || a - b);
}

/** MACs that go with one filter of each unit. */
function costs(trial, whole) {
  return trial.units.map((unit, u) => {
    if (unit.n < 2) return whole;
    const gone = new Array(trial.units.length).fill(0);
    gone[u] = 1;
    return whole - macsLeft(trial, gone);
  });
}

/** Blocks of filters (single ones, unless widths have to be multiples) in the order in which they go. */
function ranking(trial, scores, amount) {
  const whole = macsLeft(trial, []), step = amount.multiple_of, blocks = [];
  const cost = amount.scope === "per_mac" ? costs(trial, whole) : null;
  const least = cost && Math.max(1e-6 * Math.max(...cost), 1e-12);
  trial.units.forEach((unit, u) => {
    if (!scores[u]) return;
    let values = Array.from(scores[u]);
    if (amount.normalize) {
      const mean = values.reduce((sum, v) => sum + Math.abs(v), 0) / unit.n;
      if (mean > 0) values = values.map((v) => v / mean);
    }
    if (cost) values = values.map((v) => v / Math.max(cost[u], least));
    const order = ascending(values), floor = Math.ceil(amount.min_filters / step) * step;
    const widths = [unit.n];
    for (let w = Math.floor((unit.n - 1) / step) * step; w >= floor; w -= step) widths.push(w);
    for (let number = 0; number + 1 < widths.length; number++) {
      const filters = order.slice(unit.n - widths[number], unit.n - widths[number + 1]);
      const mean = filters.reduce((sum, f) => sum + values[f], 0) / filters.length;
      const key = amount.scope === "layer" ? (unit.n - widths[number + 1]) / unit.n : mean;
      blocks.push({ key, u, number, filters });
    }
  });
  return blocks.sort((a, b) => a.key - b.key || a.u - b.u || a.number - b.number);
}

function goneBy(trial, blocks) {
  const gone = new Array(trial.units.length).fill(0);
  for (const block of blocks) gone[block.u] += block.filters.length;
  return gone;
}

/** Fewest filters that remove a share of the MACs; all that can go, where that is not enough. */
function toMacs(trial, scores, amount, cut) {
  const blocks = ranking(trial, scores, amount), whole = macsLeft(trial, []);
  const share = (gone) => 1 - macsLeft(trial, gone) / whole;
  let low = 0, high = blocks.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (share(goneBy(trial, blocks.slice(0, middle))) >= cut - ROUNDING) high = middle;
    else low = middle + 1;
  }
  const removed = new Set(blocks.slice(0, low)), gone = goneBy(trial, removed), count = trial.units.map(() => 0);
  for (const block of removed) count[block.u]++;
  // The last block may overshoot; give back what the cut can spare, best filters first.
  for (const block of blocks.slice(0, Math.max(0, low - 1)).reverse()) {
    if (block.number !== count[block.u] - 1) continue;
    gone[block.u] -= block.filters.length;
    if (share(gone) >= cut - ROUNDING) {
      removed.delete(block);
      count[block.u]--;
    } else gone[block.u] += block.filters.length;
  }
  return without(trial, [...removed].map((block) => [block.u, block.filters]));
}

/** Filters that score above a threshold; every unit keeps its best. */
function aboveThreshold(trial, scores, amount, threshold) {
  const removed = [];
  trial.units.forEach((unit, u) => {
    if (!scores[u]) return;
    const best = Array.from(scores[u], (_, i) => i).sort((a, b) => scores[u][b] - scores[u][a] || a - b);
    const above = scores[u].reduce((sum, v) => sum + (v > threshold), 0);
    const count = Math.max(above, Math.min(amount.min_filters, unit.n));
    removed.push([u, best.slice(Math.ceil(count / amount.multiple_of) * amount.multiple_of)]);
  });
  return without(trial, removed);
}

function without(trial, removed) {
  const kept = trial.units.map((unit) => new Uint8Array(unit.n).fill(1));
  for (const [u, filters] of removed) for (const f of filters) kept[u][f] = 0;
  const counts = kept.map((flags) => flags.reduce((sum, flag) => sum + flag, 0));
  const macs = macsLeft(trial, counts.map((count, u) => trial.units[u].n - count));
  return { kept, counts, macs, whole: macsLeft(trial, []) };
}
