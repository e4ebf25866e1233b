// Panels side by side: the input and the result of each task over it, with the value at one position marked on all.

import {css, element, fixed, percent} from "./elements.js";

const MOST_ELONGATED = 6;  // more elongated images are drawn stretched, or a panel would be a line

/** Colours of a PNG: ImageData. */
export async function pixels(png) {
  const bitmap = await createImageBitmap(new Blob([png], {type: "image/png"}), {colorSpaceConversion: "none"});
  const canvas = element("canvas", {width: bitmap.width, height: bitmap.height});
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** A titled image with a marker and a line for the value there; `stage` takes the pointer and the keyboard. */
export class Panel {
  constructor(title, size, {smooth = true} = {}) {
    const [height, width] = size;
    this.title = title;
    this.base = element("canvas", {width, height});
    this.layer = element("canvas", {width, height, className: smooth ? "layer" : "layer crisp"});
    this.marker = element("span", {className: "marker", "aria-hidden": "true"});
    this.stage = element("div", {
      className: "stage", tabIndex: 0, role: "img",
      "aria-label": `${title}: arrow keys move the position whose values are shown`,
    }, this.base, this.layer, this.marker);
    const ratio = Math.min(Math.max(width / height, 1 / MOST_ELONGATED), MOST_ELONGATED);
    this.stage.style.setProperty("--ratio", ratio);
    this.readout = element("p", {className: "readout"}, "\u00a0");
    this.head = element("figcaption", {}, element("span", {className: "title"}, title));
    this.key = element("div", {className: "key"});
    this.figure = element("figure", {className: "panel"}, this.head, this.stage, this.readout, this.key);
  }

  drawBase(image) { this.base.getContext("2d").putImageData(image, 0, 0); }
  drawLayer(image) { this.layer.getContext("2d").putImageData(image, 0, 0); }
}

/** A position shared by panels of one image: the pointer or the arrow keys on any of them move it on all. */
export class Position {
  constructor([height, width], changed) {
    Object.assign(this, {height, width, changed, panels: [], x: Math.floor(width / 2), y: Math.floor(height / 2)});
  }

  add(panel) {
    this.panels.push(panel);
    const follow = (event) => {
      const box = panel.stage.getBoundingClientRect();
      const x = Math.floor((event.clientX - box.left) / box.width * this.width);
      const y = Math.floor((event.clientY - box.top) / box.height * this.height);
      this.moveTo(x, y);
    };
    panel.stage.addEventListener("pointermove", follow);
    panel.stage.addEventListener("pointerdown", follow);
    panel.stage.addEventListener("keydown", (event) => this.#key(event));
    this.#mark(panel);
  }

  remove(panels) { this.panels = this.panels.filter((panel) => !panels.includes(panel)); }

  moveTo(x, y, {spoken = false} = {}) {
    this.x = Math.min(Math.max(x, 0), this.width - 1);
    this.y = Math.min(Math.max(y, 0), this.height - 1);
    this.panels.forEach((panel) => this.#mark(panel));
    this.changed(spoken);
  }

  #mark(panel) {
    panel.marker.style.left = `${(this.x + 0.5) / this.width * 100}%`;
    panel.marker.style.top = `${(this.y + 0.5) / this.height * 100}%`;
  }

  #key(event) {
    const step = event.shiftKey ? 10 : 1;
    const [dx, dy] = {
      ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step],
    }[event.key] ?? [0, 0];
    if (!dx && !dy) return;
    event.preventDefault();
    this.moveTo(this.x + dx, this.y + dy, {spoken: true});
  }
}

const READERS = {
  classes: (task, data, at) => task.classes[data[at]],
  probability: (task, data, at) => `p = ${fixed(data[at], 3)}`,
  normals: (task, data, at) => {
    const [x, y, z] = data.subarray(3 * at, 3 * at + 3);
    const angle = Math.acos(Math.min(Math.max(-z, -1), 1)) * 180 / Math.PI;
    return `(${fixed(x, 3)}, ${fixed(y, 3)}, ${fixed(z, 3)}) · ${fixed(angle, 1)}°`;
  },
};

const unitOf = (task) => task.unit ? ` ${task.unit}` : "";

/** The value of a task at pixel number `at`, in words. */
export function valueAt(task, {shape, data}, at) {
  const reader = READERS[task.kind];
  if (reader) return reader(task, data, at);
  const channels = shape[2] ?? 1;
  const components = Array.from(data.subarray(channels * at, channels * (at + 1)), (number) => fixed(number, 3));
  return (channels === 1 ? components[0] : `(${components.join(", ")})`) + unitOf(task);
}

/** Fills a panel with a task's result: colours, and the key with its switches. */
export function fill(panel, task, colours, values, key) {
  panel.drawLayer(colours);
  if (task.classes) panel.key.append(...classSwitches(panel, task, colours, values.data, key.shares));
  else if (key.bar) panel.key.append(...bar(task, key));
  else if (key.key) panel.key.append(element("img", {src: key.key, alt: "colour key", className: "drawn"}));
  if (task.legend) {
    const entries = task.legend.map(([name, colour]) => element("li", {}, swatch(colour), name));
    panel.key.append(element("ul", {className: "legend"}, ...entries));
  }
  if (task.caption) panel.key.append(element("p", {className: "faint"}, task.caption));
}

export function swatch(colour) {
  const built = element("span", {className: "swatch"});
  built.style.backgroundColor = css(colour);
  return built;
}

/** Legend of the classes that are present, largest first; each entry switches the pixels of its class on and off. */
function classSwitches(panel, task, colours, ids, shares) {
  const hidden = new Set();
  const draw = () => {
    const shown = new ImageData(new Uint8ClampedArray(colours.data), colours.width, colours.height);
    for (let at = 0; at < ids.length; at++) if (hidden.has(ids[at])) shown.data[4 * at + 3] = 0;
    panel.drawLayer(shown);
  };
  const present = shares.map((share, id) => ({share, id})).filter(({share}) => share > 0);
  present.sort((a, b) => b.share - a.share);
  const buttons = present.map(({share, id}) => {
    const name = element("span", {className: "class"}, task.classes[id]);
    const button = element("button", {type: "button", "aria-pressed": "true"}, swatch(task.colours[id]), name,
                           element("span", {className: "share"}, percent(share)));
    button.addEventListener("click", () => set([button], hidden.has(id)));
    button.dataset.id = id;
    return button;
  });
  const set = (of, on) => {
    for (const button of of) {
      hidden[on ? "delete" : "add"](Number(button.dataset.id));
      button.setAttribute("aria-pressed", on);
    }
    draw();
  };
  const all = element("button", {type: "button", className: "plain"}, "all on");
  const none = element("button", {type: "button", className: "plain"}, "all off");
  all.addEventListener("click", () => set(buttons, true));
  none.addEventListener("click", () => set(buttons, false));
  return [element("div", {className: "classes", role: "group", "aria-label": `${task.title}: classes`}, ...buttons), element("p", {}, all, none)];
}

/** Colour bar with the values at its ends, and the smallest and the largest value. */
function bar(task, {limits, minimum, maximum, bar: colours}) {
  const text = (value) => `${fixed(value, 2)}${unitOf(task)}`;
  return [
    element("img", {src: colours, alt: "", className: "bar"}),
    element("p", {className: "ticks"}, element("span", {}, text(limits[0])), element("span", {}, text(limits[1]))),
    element("p", {className: "range"}, `min ${text(minimum)}, max ${text(maximum)}`),
  ];
}
