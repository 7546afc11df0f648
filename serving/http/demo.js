"use strict";
// Labels, names and messages are untrusted: they are set as text, never as markup.

const APPLIED = {
  "exif-orientation": "Turned upright, as its EXIF data says",
  "alpha-on-background": "Its transparent parts on a plain background",
  "icc-ignored": "Its colour profile ignored",
  "icc-to-srgb": "Its colours converted to sRGB",
  "16-bit-scaled": "Its deep samples scaled to 8 bits",
  "float-scaled": "Its float samples scaled to 8 bits",
  "first-frame": "Only its first frame",
};
const ERRORS = {
  "no-image": "This file is empty",
  "not-an-image": "This is not an image",
  "unsupported-format": "This kind of image is not read here",
  "broken-image": "This image is damaged",
  "too-large": "This image is too large",
  "overloaded": "Very busy just now",
  "deadline-exceeded": "That took too long",
  "not-ready": "No model is served just now",
  "unauthorized": "A key is needed",
  "unreachable": "The service can’t be reached",
  "unreadable": "This file can’t be read",
  "link": "That was a link, not a file",
};
const SEEN = {
  "whole": "The model looks at the whole photo.",
  "crop": "The model looks at the framed square.",
  "squish": "The model looks at the whole photo, squeezed into a square.",
  "pad": "The model looks at the whole photo, within a square of plain colour.",
};
const POLL_MS = 3000; // between two checks of readiness

let key = "";
let photo, preview, timer;
let model, provider; // the model that is served, and its provider
let preprocess; // how the model's photos become squares
let threshold; // least probability of a confident answer
let pending = false; // send the photo once there is a model or a key
let request = new AbortController();

const $ = (id) => document.getElementById(id);
const show = (id, on = true) => { $(id).hidden = !on; };
const write = (id, text) => { $(id).textContent = text; show(id, text !== ""); };
const clear = (id) => {
  $(id).replaceChildren();
  return $(id);
};
const on = (id, event, handler) => $(id).addEventListener(event, handler);
const add = (parent, name, text = "") => {
  const element = document.createElement(name);
  element.textContent = text;
  parent.append(element);
  return element;
};
const percent = (p) => {
  if (p > 0 && p < 0.001) return "< 0.1 %";
  return p > 0.999 && p < 1 ? "> 99.9 %" : `${(100 * p).toFixed(1)} %`;
};
const size = (n) => n < 1e6 ? `${Math.ceil(n / 1e3)} kB` : `${(n / 1e6).toFixed(1)} MB`;
const quoted = (text) => /^[\w@%+:./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
const views = () => Number(document.querySelector("[name=tta]:checked")?.value ?? 0);
const path = () => views() > 1 ? `predict?tta=${views()}` : "predict";

function call(url, options) {
  // UTF-8: each byte becomes one character of the header value.
  const bytes = String.fromCharCode(...new TextEncoder().encode(key));
  return fetch(url, { ...options, headers: key ? { authorization: `Bearer ${bytes}` } : {} });
}

async function problem(response) {
  const { code, detail } = Object(await response.json().catch(() => 0));
  const text = String(detail || `The answer was ${response.status} ${response.statusText}`);
  return { code, detail: text, id: response.headers.get("x-request-id") };
}

// The model that is served.

async function refresh() {
  clearTimeout(timer);
  try {
    const ready = await call("readyz");
    if (!ready.ok) return showWaiting((await problem(ready)).detail);
    showModel(await ready.json());
    const manifest = await call("model");
    if (manifest.status === 401) return requestKey();
    if (!manifest.ok) return showWaiting((await problem(manifest)).detail);
    showManifest(await manifest.json());
  } catch {
    return showWaiting("the service can’t be reached");
  }
  show("key-form", false);
  if (pending) predict();
}

function showWaiting(reason) {
  clearTimeout(timer);
  write("waiting", `Not ready: ${reason}. This page asks again every few seconds.`);
  timer = setTimeout(refresh, POLL_MS);
}

function requestKey() {
  if (key) write("hint", "The service does not know this key. Try another.");
  show("key-form");
  showCommand();
  $("key").focus();
  $("key").select();
}

function showModel(served) {
  model = served.model;
  provider = served.provider.replace("ExecutionProvider", "");
  const colon = model.lastIndexOf(":");
  write("name", model.slice(0, colon));
  write("version", model.slice(colon + 1));
  write("about", `${served.precision} on ${provider}`);
  document.title = `${model} · Fledge`;
  show("waiting", false);
}

function showManifest(manifest) {
  const { labels, arch, precisions, serving, thresholds, views: { length: count } } = manifest;
  const { accuracy } = precisions[serving.precision];
  const about = [`${labels.length} classes`, arch, `${serving.precision} on ${provider}`];
  if (accuracy) about.push(`right on ${percent(accuracy)} of its held-out photos`);
  write("about", about.join(" · "));
  const more = labels.length > 50 ? `, and ${labels.length - 50} more` : "";
  write("labels", `It knows ${labels.slice(0, 50).join(", ")}${more}.`);
  threshold = thresholds.confident;
  preprocess = manifest.preprocess;
  showSeen();
  const choices = [[0, "Plain"]];
  if (count > 4) choices.push([4, "4 views"]);
  if (count > 1) choices.push([count, `All ${count}`]);
  const before = views();
  const row = clear("choices");
  for (const [tta, text] of choices) {
    const radio = add(row, "input");
    const id = `tta-${tta}`;
    Object.assign(radio, { type: "radio", name: "tta", id, value: tta, className: "hidden" });
    radio.checked = tta === 0 || tta === before;
    add(row, "label", text).htmlFor = id;
  }
  show("views", count > 1);
  showCommand();
}

// The photo and its answer.

function choose(files) {
  if (!files.length) return;
  photo = files[0];
  URL.revokeObjectURL(preview);
  preview = URL.createObjectURL(photo);
  $("preview").alt = `Your photo: ${photo.name}`;
  $("preview").src = $("square").src = preview;
  $("drop-area").classList.add("filled");
  for (const id of ["prompt", "no-preview", "fit"]) show(id, false);
  const first = files.length > 1 ? ` · the first of ${files.length} files` : "";
  write("caption", `${photo.name} · ${size(photo.size)}${first}`);
  predict();
}

// Draw what the model looks at in the plain view. Browsers show photos upright, as the model does.
function showSeen() {
  const { naturalWidth: width, naturalHeight: height } = $("preview");
  if (!preprocess || !width || $("stage").hidden) return;
  const { fit = "crop", crop, background } = preprocess;
  const side = crop * Math.min(width, height);
  for (const [name, value] of Object.entries({
    ratio: fit === "pad" ? 1 : width / height,
    wide: side / width,
    tall: side / height,
    background: `rgb(${background.join()})`, // also behind what is transparent
  })) $("stage").style.setProperty(`--${name}`, value);
  const seen = width === height && (fit !== "crop" || crop === 1) ? "whole" : fit;
  write("seen", SEEN[seen]);
  show("frame", seen === "crop");
  show("square", seen === "squish");
  show("fit");
}

function busy(on) {
  document.body.classList.toggle("busy", on);
  $("result").ariaBusy = on;
}

function showCommand() {
  $("copy").textContent = "Copy";
  const header = key || !$("key-form").hidden ? ' -H "Authorization: Bearer $KEY"' : "";
  const file = quoted(`@${photo?.name ?? "photo.jpg"}`);
  const url = quoted(new URL(path(), location).href);
  write("curl", `curl --data-binary ${file}${header} ${url}`);
}

async function predict() {
  showCommand();
  if (!photo) return;
  request.abort(); // a late answer must not replace the new one
  const { signal } = (request = new AbortController());
  pending = false;
  busy(true);
  const started = performance.now();
  let display, result;
  try {
    const response = await call(path(), { method: "POST", body: photo, signal });
    display = response.ok ? showAnswer : showError;
    result = await (response.ok ? response.json() : problem(response));
  } catch {
    display = showError;
    result = await photo.slice(0, 1).arrayBuffer().then(
      () => ({ code: "unreachable", detail: "It may have stopped, or the file is far too large." }),
      () => ({ code: "unreadable", detail: "It may be a folder, or have changed meanwhile." }),
    );
  }
  if (signal.aborted) return;
  busy(false);
  display(result, performance.now() - started);
}

function panel(name) {
  for (const id of ["empty", "answer", "error"]) show(id, id === name);
  $("result").scrollIntoView({ block: "nearest" });
}

function showAnswer(answer, ms) {
  const from = threshold ? `; confident ones begin at ${percent(threshold)}` : "";
  const texts = { true: "A confident answer.", false: `Not a confident answer${from}.` };
  write("confidence", texts[answer.confident] ?? "");
  $("confidence").className = answer.confident ? "yes" : "";
  show("unfamiliar", answer.out_of_distribution === true);
  const spoken = [];
  const bars = clear("bars");
  for (const { label, probability } of answer.predictions) {
    spoken.push(`${label}, ${percent(probability)}`);
    const item = add(bars, "li");
    add(item, "span", label).dir = "auto";
    add(item, "span", percent(probability));
    add(item, "i").style.setProperty("--share", probability);
  }
  const applied = clear("applied");
  for (const name of answer.applied) {
    const mode = name.match(/(.+)-to-rgb$/)?.[1].toUpperCase();
    const converted = mode ? `Its ${mode} colours converted to RGB` : name;
    add(applied, "li", APPLIED[name] ?? converted);
  }
  show("conversions", answer.applied.length > 0);
  const facts = clear("facts");
  const time = ms < 1e3 ? `${Math.ceil(ms)} ms` : `${(ms / 1e3).toFixed(1)} s`;
  for (const [name, value] of [
    ["Time", `${time}, there and back`],
    ["Views", answer.views > 1 ? `${answer.views}, averaged` : "the plain one"],
    ["Model", answer.model],
    ["Runs as", provider ? `${answer.precision} on ${provider}` : answer.precision],
  ]) {
    add(facts, "dt", name);
    add(facts, "dd", value);
  }
  panel("answer");
  write("status", `${spoken.join("; ")}. ${$("confidence").textContent}`);
  if (answer.model !== model) refresh(); // a new version is served
}

function showError({ code, detail, id }) {
  const title = ERRORS[code] ?? "That did not work";
  write("error-title", title);
  write("detail", detail[0].toUpperCase() + detail.slice(1).replace(/[^.]$/, "$&."));
  write("request", id ? `Request ${id}` : "");
  show("retry", /overloaded|deadline|slow|unreachable|failed|internal|undefined/.test(code));
  panel("error");
  write("status", `${title}. ${detail}`);
  pending = code === "not-ready" || code === "unauthorized";
  if (code === "not-ready") showWaiting("it may be restarting");
  if (code === "unauthorized") requestKey();
}

// Input: file, camera, drop, paste.

for (const id of ["file", "camera"]) {
  on(id, "change", ({ target }) => {
    choose([...target.files]);
    target.value = ""; // so that the same file can be chosen again
  });
}
const hasFiles = ({ dataTransfer: { types } }) => /Files|uri-list/.test(types.join());
const dragging = (on) => document.body.classList.toggle("dragging", on);
addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  dragging(true);
});
addEventListener("dragleave", ({ relatedTarget }) => { if (!relatedTarget) dragging(false); });
addEventListener("drop", (event) => {
  dragging(false);
  if (!hasFiles(event)) return;
  event.preventDefault();
  const { files } = event.dataTransfer;
  if (files.length) return choose(files);
  request.abort();
  busy(false);
  showError({ code: "link", detail: "Save the image first, then drop the file." });
});
addEventListener("paste", ({ clipboardData }) => choose(clipboardData.files));
on("preview", "load", ({ target }) => {
  $("caption").textContent += ` · ${target.naturalWidth} × ${target.naturalHeight}`;
  target.parentElement.style.setProperty("--ratio", target.naturalWidth / target.naturalHeight);
  show("stage");
  showSeen();
});
on("preview", "error", () => {
  show("stage", false);
  show("no-preview");
});
on("choices", "change", predict);
on("retry", "click", predict);
on("key-form", "submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  refresh();
});
on("copy", "click", async ({ target }) => {
  await navigator.clipboard.writeText($("curl").textContent);
  target.textContent = "Copied";
});
show("copy", navigator.clipboard !== undefined);
showCommand();
refresh();
