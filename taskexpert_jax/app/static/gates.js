// Gate maps: for one tap and task, the weight of each expert slot over the image, and the slot with the largest one.

import {element, fixed} from "./elements.js";
import {Panel, swatch} from "./panels.js";

const find = (id) => document.getElementById(id);

/** The section of the page; `position` is shared with the results. */
export class Gates {
  #panels = [];
  #weights = null;
  #facts = null;

  constructor(weightColours) {
    this.colours = weightColours;
    const scale = find("gate-scale").getContext("2d");
    const ramp = new ImageData(256, 1);
    weightColours.forEach((colour, index) => ramp.data.set([...colour, 255], 4 * index));
    scale.putImageData(ramp, 0, 0);
    find("gate-task").addEventListener("change", () => this.#draw());
    find("gate-tap").addEventListener("input", () => this.#draw());
  }

  /** Shows the gates of an image. facts: `gates` of answer.json; weights: (taps, tasks, h, w, slots); titles: by task. */
  show(facts, weights, input, titles, position) {
    const size = [input.height, input.width];
    const chosen = find("gate-task").value;
    Object.assign(this, {position});
    this.#facts = facts;
    this.#weights = weights;
    find("gates-diverged").hidden = !facts.diverged;
    find("gate-task").replaceChildren(
      ...facts.tasks.map((name) => element("option", {value: name, selected: name === chosen}, titles.get(name) ?? name)));
    find("gate-tap").max = weights.shape[0];
    const names = ["largest weight", ...facts.slots];
    this.#panels = names.map((name) => new Panel(name, size, {smooth: false}));
    for (const panel of this.#panels) {
      panel.drawBase(input);
      position.add(panel);
    }
    const legend = facts.slots.map((slot, index) => element("li", {}, swatch(facts.colours[index]), slot));
    this.#panels[0].key.append(element("ul", {className: "legend"}, ...legend));
    find("gate-maps").replaceChildren(...this.#panels.map((panel) => panel.figure));
    this.#draw();
  }

  /** Shows the weights at the position. */
  read() {
    if (!this.#facts || this.#facts.diverged) return;
    const [first, ...slots] = this.#panels;
    const here = this.#at(this.#facts.rows[this.position.y], this.#facts.columns[this.position.x]);
    slots.forEach((panel, slot) => { panel.readout.textContent = `${fixed(here[slot], 3)} · mean ${fixed(panel.mean, 3)}`; });
    first.readout.textContent = this.#facts.slots[largest(here)];
  }

  /** Weights of all slots at a token, for the chosen tap and task. */
  #at(row, column) {
    const [, tasks, height, width, slots] = this.#weights.shape;
    const tap = Number(find("gate-tap").value) - 1, task = find("gate-task").selectedIndex;
    const start = (((tap * tasks + task) * height + row) * width + column) * slots;
    return this.#weights.data.subarray(start, start + slots);
  }

  /** Mean weight of each slot over the pixels: tokens at the border have fewer of them. */
  #means() {
    const {rows, columns, slots} = this.#facts;
    const [, , height, width] = this.#weights.shape;
    const pixels = (of, length) => of.reduce((counts, index) => (counts[index]++, counts), new Array(length).fill(0));
    const heights = pixels(rows, height), widths = pixels(columns, width);
    const sums = new Array(slots.length).fill(0);
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        this.#at(row, column).forEach((weight, slot) => { sums[slot] += weight * heights[row] * widths[column]; });
      }
    }
    return sums.map((sum) => sum / (rows.length * columns.length));
  }

  /** Image in which each pixel has its token's colour; colour: weights of a token -> [red, green, blue]. */
  #map(colour) {
    const {rows, columns} = this.#facts;
    const [, , height, width] = this.#weights.shape;
    const tokens = Array.from({length: height * width}, (_, at) => colour(this.#at(Math.floor(at / width), at % width)));
    const image = new ImageData(columns.length, rows.length);
    for (let y = 0, at = 0; y < rows.length; y++) {
      for (let x = 0; x < columns.length; x++, at += 4) {
        const [red, green, blue] = tokens[rows[y] * width + columns[x]];
        image.data[at] = red;
        image.data[at + 1] = green;
        image.data[at + 2] = blue;
        image.data[at + 3] = 255;
      }
    }
    return image;
  }

  #draw() {
    const {colours, diverged} = this.#facts;
    find("gate-tap-said").textContent = `${find("gate-tap").value} of ${this.#weights.shape[0]}`;
    find("gate-maps").hidden = diverged;
    if (diverged) return;
    const means = this.#means();
    const winner = (here) => colours[largest(here)];
    const weight = (slot) => (here) => this.colours[Math.round(Math.min(Math.max(here[slot], 0), 1) * 255)];
    const [first, ...panels] = this.#panels;
    first.drawLayer(this.#map(winner));
    panels.forEach((panel, slot) => {
      panel.drawLayer(this.#map(weight(slot)));
      panel.mean = means[slot];
    });
    this.read();
  }
}

function largest(weights) {
  let best = 0;
  for (let slot = 1; slot < weights.length; slot++) if (weights[slot] > weights[best]) best = slot;
  return best;
}
