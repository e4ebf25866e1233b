// The page: takes an image, sends it to the server, and shows what comes back.

import {readArray, unzip} from "./archive.js";
import {element} from "./elements.js";
import {Gates} from "./gates.js";
import {fill, Panel, pixels, Position, valueAt} from "./panels.js";

const find = (id) => document.getElementById(id);
const WAIT = 700;  // ms between two questions for the place in the queue

let run = null;  // what the server says of its run
let gates = null;
let running = null;  // AbortController of the request that the page waits for
let links = [];  // object URLs of the results shown

async function start() {
  try {
    run = await (await fetch("run")).json();
  } catch {
    return fail(new Error("the server does not answer: is it still running?"));
  }
  gates = new Gates(run.weight_colours);
  find("file").accept = run.limits.formats.join(",");
  const titles = run.tasks.map((task) => task.title);
  find("intro").textContent = `Predicts ${list(titles)} from one image, and shows which experts each task uses where.`;
  showFacts();
  run.examples.forEach((path, index) => {
    const picture = element("img", {src: path, alt: ""});
    const button = element("button", {type: "button", "aria-label": `Example ${index + 1}: a rendered room`}, picture);
    button.addEventListener("click", async () => submit(await (await fetch(path)).blob(), `Example ${index + 1}`));
    find("examples").append(button);
  });
  find("examples").hidden = run.examples.length === 0;
  listen();
}

/** Names as a list in words. */
function list(names) {
  return names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names[0];
}

function listen() {
  find("choose").addEventListener("click", () => find("file").click());
  find("file").addEventListener("change", () => {
    take(find("file").files);
    find("file").value = "";  // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take(event.clipboardData.files);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files);
    else fail(new Error("that is not a file: save the image first, then drop the file"));
  });
  find("overlay").addEventListener("input", setOpacity);
}

function setOpacity() {
  find("results").style.setProperty("--opacity", find("overlay").value / 100);
}

function take(files) {
  submit(files[0], files[0].name, files.length > 1 ? `1 of ${files.length} files: one image at a time. ` : "");
}

/** Sends an image and shows its results; a request that is still waiting is given up. */
async function submit(file, name, note = "") {
  running?.abort();
  const mine = running = new AbortController();
  find("error").hidden = true;
  const ticket = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const said = (text) => { if (mine === running) find("status").textContent = `${note}${text}`; };
  let watch;
  try {
    if (file.size > run.limits.bytes) throw new Error(run.limits.refusal);
    find("results").setAttribute("aria-busy", "true");
    document.body.classList.add("busy");
    said(`Predicting ${name} ...`);
    watch = setInterval(async () => {
      const {ahead} = await (await fetch(`line/${ticket}`)).json().catch(() => ({}));
      if (ahead > 0) said(`${name} waits: ${ahead} image${ahead > 1 ? "s" : ""} before it ...`);
      else if (ahead === 0) said(`Predicting ${name} ...`);
    }, WAIT);
    const answer = await post(file, ticket, mine.signal);
    if (mine !== running) return;
    await show(answer, name);
    said(note ? "" : " ");
  } catch (error) {
    if (mine === running) fail(error);
  } finally {
    clearInterval(watch);
    if (mine === running) {
      find("results").removeAttribute("aria-busy");
      document.body.classList.remove("busy");
    }
  }
}

async function post(file, ticket, signal) {
  const headers = {"Content-Type": "application/octet-stream", "X-Ticket": ticket};
  let response;
  try {
    response = await fetch("predictions", {method: "POST", body: file, headers, signal});
    if (response.ok) return await response.arrayBuffer();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer, or the file cannot be read: is the server still running?");
  }
  const {error} = await response.json().catch(() => ({}));
  throw new Error(error ?? `the server answered with status ${response.status}`);
}

function fail(error) {
  find("status").textContent = " ";
  find("error").textContent = error.message;
  find("error").hidden = false;
}

/** Shows the results in an answer of the server. */
async function show(answer, name) {
  const files = unzip(answer);
  const facts = JSON.parse(new TextDecoder().decode(files.get("answer.json")));
  const input = await pixels(files.get("input.png"));
  const results = [];
  for (const task of run.tasks) {
    if (facts.diverged.includes(task.name)) results.push({task});
    else results.push({task, colours: await pixels(files.get(`${task.name}.png`)), values: readArray(files.get(`${task.name}.npy`))});
  }
  links.forEach((url) => URL.revokeObjectURL(url));
  links = [];
  const stem = name.replace(/\.[^.]*$/, "").replace(/[^\w-]+/g, "_").slice(0, 60) || "image";
  const link = (text, content, file, type) => {
    links.push(URL.createObjectURL(new Blob([content], {type})));
    return element("a", {href: links.at(-1), download: file}, text);
  };
  const arrayLink = (task) => link(`${task}.npy`, files.get(`${task}.npy`), `${stem}_${task}.npy`, "application/octet-stream");

  const panels = [];
  const position = new Position(facts.size, (spoken) => read(panels, input, position, spoken));
  const first = new Panel("input", facts.size);
  first.drawBase(input);
  panels.push({panel: first});
  for (const {task, colours, values} of results) {
    const panel = new Panel(task.title, facts.size, {smooth: task.smooth});
    panel.drawBase(input);
    panels.push({panel, task, values});
    if (!values) {
      panel.figure.classList.add("diverged");
      panel.key.append(element("p", {className: "error"}, "Diverged: the prediction has a NaN or Inf, so there is no map. Try another checkpoint."));
      continue;
    }
    fill(panel, task, colours, values, facts.tasks[task.name]);
    panel.key.append(element("p", {className: "download"}, arrayLink(task.name)));
  }
  panels.forEach(({panel}) => position.add(panel));
  find("name").textContent = name;
  find("panels").replaceChildren(...panels.map(({panel}) => panel.figure));
  find("downloads").replaceChildren(
    "Download ", link("all results", answer, `${stem}.zip`, "application/zip"), ", ",
    link("montage", files.get("montage.png"), `${stem}_montage.png`, "image/png"),
    ...(facts.gates ? [", ", arrayLink("gates")] : []));
  setOpacity();
  document.body.classList.remove("empty");
  find("results").hidden = false;
  const titles = new Map(run.tasks.map((task) => [task.name, task.title]));
  find("gates").hidden = !facts.gates;
  if (facts.gates) gates.show(facts.gates, readArray(files.get("gates.npy")), input, titles, position);
  showFacts(facts);
  read(panels, input, position, false);
}

/** Writes the values at the position below all panels; spoken: screen readers say them too. */
function read(panels, input, {x, y, width}, spoken) {
  const at = y * width + x;
  const texts = panels.map(({panel, task, values}) => {
    if (!task) {
      const [red, green, blue] = input.data.subarray(4 * at, 4 * at + 3);
      panel.readout.textContent = `x ${x}, y ${y} · RGB ${red} ${green} ${blue}`;
      return `x ${x}, y ${y}`;
    }
    panel.readout.textContent = values ? valueAt(task, values, at) : "diverged";
    return `${task.title}: ${panel.readout.textContent}`;
  });
  if (!find("gates").hidden) gates.read();
  if (spoken) find("spoken").textContent = texts.join("; ");
}

function showFacts(facts) {
  const pair = ([height, width]) => `${height} × ${width}`;
  const entries = {
    model: `${run.variant}, ${run.dataset}`,
    run: run.name,
    checkpoint: run.checkpoint,
    device: run.device,
    "model's size": pair(run.image_size),
  };
  if (facts) {
    const same = pair(facts.size) === pair(facts.original_size);
    entries.image = same ? pair(facts.size) : `${pair(facts.original_size)}, reduced to ${pair(facts.size)}`;
    entries["model alone"] = `${facts.milliseconds.toFixed(0)} ms`;
  }
  find("facts").replaceChildren(...Object.entries(entries).map(
    ([name, text]) => element("div", {}, element("dt", {}, name), element("dd", {}, text))));
}

start();
