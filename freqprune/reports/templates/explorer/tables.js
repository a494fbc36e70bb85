// Tables that sort by any column, are searched, and hand over which row was picked.

function make(tag, attributes = {}, ...children) {
  const found = Object.assign(document.createElement(tag), attributes);
  found.append(...children);
  return found;
}

class SortedTable {
  /**
   * @param host where it goes: holds an input.search, a table, a .pages with two buttons and a status.
   * @param columns of {label, of(row) -> value, told(row) -> text}
   */
  constructor(host, columns, { rows, name, onPick = null, size = 25 }) {
    Object.assign(this, { host, columns, rows, name, onPick, size, page: 0, by: null, down: true });
    this.search = host.querySelector("input");
    this.body = make("tbody");
    this.heads = columns.map((column, i) => {
      const button = make("button", { type: "button", textContent: column.label });
      button.addEventListener("click", () => this.sort(i));
      return make("th", { scope: "col" }, button);
    });
    host.querySelector("table").append(make("thead", {}, make("tr", {}, ...this.heads)), this.body);
    [this.back, this.on] = host.querySelectorAll(".pages button");
    this.back.addEventListener("click", () => this.turn(-1));
    this.on.addEventListener("click", () => this.turn(1));
    this.search.addEventListener("input", () => { this.page = 0; this.fill(); });
    this.fill();
  }

  sort(i) {
    this.down = this.by === i ? !this.down : true;
    this.by = i;
    this.page = 0;
    this.fill();
  }

  turn(step) {
    this.page += step;
    this.fill();
  }

  found() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = this.rows.filter((row) => { const name = this.name(row).toLowerCase(); return words.every((word) => name.includes(word)); });
    if (this.by === null) return rows;
    const sign = this.down ? -1 : 1, { of } = this.columns[this.by];
    const keys = new Map(rows.map((row) => [row, of(row)]));
    const missing = (v) => v === undefined || Number.isNaN(v);
    return rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      // What is undefined comes last either way.
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      return sign * (typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
    });
  }

  fill() {
    const rows = this.found(), pages = Math.max(1, Math.ceil(rows.length / this.size));
    this.page = Math.min(pages - 1, Math.max(0, this.page));
    this.heads.forEach((head, i) => head.setAttribute("aria-sort", this.by !== i ? "none" : this.down ? "descending" : "ascending"));
    this.body.replaceChildren(...rows.slice(this.page * this.size, (this.page + 1) * this.size).map((row) => {
      const cells = this.columns.map((column) => make("td", {}, column.told(row)));
      if (this.onPick) {
        const button = make("button", { type: "button", className: "pick", textContent: this.columns[0].told(row) });
        button.addEventListener("click", () => this.onPick(row));
        cells[0].replaceChildren(button);
      }
      return make("tr", {}, ...cells);
    }));
    this.host.querySelector(".status").textContent = `${rows.length.toLocaleString("en")} found, page ${this.page + 1} of ${pages}`;
    this.back.disabled = this.page === 0;
    this.on.disabled = this.page === pages - 1;
  }
}
