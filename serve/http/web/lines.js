// A small line that grows to the right: the last minutes of one figure.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 48;
const SAMPLES = 120;

function drawn(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export class Line {
  /**
   * @param label what it shows
   * @param unit behind its figures
   * @param digits behind the point
   * @param least the smallest range of the vertical axis, so that noise looks like noise
   */
  constructor(label, { unit = "", digits = 0, least = 1 } = {}) {
    Object.assign(this, { label, unit, digits, least, samples: [], limit: null });
    this.area = drawn("path", { class: "area" });
    this.path = drawn("path", { class: "line", "vector-effect": "non-scaling-stroke" });
    this.limitPath = drawn("path", { class: "limit", "vector-effect": "non-scaling-stroke" });
    this.svg = drawn("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    });
    this.svg.append(this.area, this.limitPath, this.path);
    this.value = document.createElement("strong");
    const name = document.createElement("span");
    name.textContent = label;
    const head = document.createElement("div");
    head.className = "line-head";
    head.append(name, this.value);
    this.element = document.createElement("div");
    this.element.className = "live-line";
    this.element.append(head, this.svg);
  }

  /**
   * @param value now; null: not known, which leaves a gap
   * @param limit drawn across where it is known
   */
  push(value, limit = null) {
    const known = Number.isFinite(value) ? value : null;
    this.samples.push(known);
    if (this.samples.length > SAMPLES) this.samples.shift();
    this.limit = limit;
    const words = known === null ? "–" : `${known.toFixed(this.digits)}${this.unit && ` ${this.unit}`}`;
    this.value.textContent = words;
    this.svg.setAttribute("aria-label", `${this.label}: ${known === null ? "not known" : words}`);
    this.draw();
  }

  draw() {
    const known = this.samples.filter((each) => each !== null);
    if (this.limit !== null) known.push(this.limit);
    if (!known.length) return;
    const middle = (Math.max(...known) + Math.min(...known)) / 2;
    const half = Math.max(Math.max(...known) - middle, this.least / 2) * 1.15;
    // Nothing shown here is ever below nothing, but margins: those keep their own axis.
    const low = Math.min(...known) >= 0 ? Math.max(0, middle - half) : middle - half;
    const high = Math.max(middle + half, low + this.least);
    const x = (place) => WIDTH - (this.samples.length - 1 - place) * (WIDTH / (SAMPLES - 1));
    const y = (value) => HEIGHT - 2 - ((value - low) / (high - low)) * (HEIGHT - 4);
    let line = "";
    let area = "";
    let begun = null;
    const close = (place) => {
      if (begun !== null) area += `L${x(place).toFixed(1)} ${HEIGHT}L${x(begun).toFixed(1)} ${HEIGHT}Z`;
      begun = null;
    };
    this.samples.forEach((value, place) => {
      if (value === null) {
        close(place - 1);
        return;
      }
      const point = `${begun === null ? "M" : "L"}${x(place).toFixed(1)} ${y(value).toFixed(1)}`;
      begun ??= place;
      line += point;
      area += point;
    });
    close(this.samples.length - 1);
    this.path.setAttribute("d", line);
    this.area.setAttribute("d", area);
    this.limitPath.setAttribute(
      "d", this.limit === null ? "" : `M0 ${y(this.limit).toFixed(1)}H${WIDTH}`);
  }
}
