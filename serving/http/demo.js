"use strict";
// Labels, names and messages come from elsewhere: they are set as text, never as markup.

const APPLIED = {
  "exif-orientation": "Turned upright, as its EXIF data says",
  "alpha-on-background": "Its transparent parts laid on a plain background",
  "icc-to-srgb": "Its colours converted from their own profile to sRGB",
  "16-bit-scaled": "Its deep samples scaled to 8 bits",
  "float-scaled": "Its floating-point samples scaled to 8 bits",
  "first-frame": "Only its first frame looked at",
};
const TROUBLE = {
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
const AGAIN = 3000; // ms until the service is asked again whether it is ready

let key = "";
let photo, preview, timer;
let model, provider; // what is served, and on what
let threshold; // from which an answer counts as confident
let waits = false; // the photo, for a model or a key
let asking = new AbortController();

const $ = (id) => document.getElementById(id);
const show = (id, on = true) => { $(id).hidden = !on; };
const write = (id, text) => { $(id).textContent = text; show(id, text !== ""); };
const clear = (id) => {
  $(id).replaceChildren();
  return $(id);
};
const on = (id, event, react) => $(id).addEventListener(event, react);
const add = (parent, name, text = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
};
const percent = (p) => {
  if (p > 0 && p < 0.001) return "< 0.1 %";
  return p > 0.999 && p < 1 ? "> 99.9 %" : `${(100 * p).toFixed(1)} %`;
};
const size = (n) => n < 1e6 ? `${Math.ceil(n / 1e3)} kB` : `${(n / 1e6).toFixed(1)} MB`;
const quoted = (text) => /^[\w@%+:./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
const views = () => Number(document.querySelector("[name=tta]:checked")?.value ?? 0);
const path = () => views() > 1 ? `predict?tta=${views()}` : "predict";

function call(where, options) {
  // A header holds bytes: those of the key in UTF-8, as the service reads it.
  const bytes = String.fromCharCode(...new TextEncoder().encode(key));
  return fetch(where, { ...options, headers: key ? { authorization: `Bearer ${bytes}` } : {} });
}

async function problem(response) {
  const { code, detail } = Object(await response.json().catch(() => 0));
  const said = String(detail || `The answer was ${response.status} ${response.statusText}`);
  return { code, detail: said, id: response.headers.get("x-request-id") };
}

// What is served, if anything is.

async function meet() {
  clearTimeout(timer);
  try {
    const ready = await call("readyz");
    if (!ready.ok) return wait((await problem(ready)).detail);
    introduce(await ready.json());
    const manifest = await call("model");
    if (manifest.status === 401) return knock();
    if (!manifest.ok) return wait((await problem(manifest)).detail);
    describe(await manifest.json());
  } catch {
    return wait("the service can’t be reached");
  }
  show("door", false);
  if (waits) ask();
}

function wait(why) {
  clearTimeout(timer);
  write("waiting", `Not ready: ${why}. This page asks again every few seconds.`);
  timer = setTimeout(meet, AGAIN);
}

function knock() {
  if (key) write("hint", "The service does not know this key. Try another.");
  show("door");
  shell();
  $("key").focus();
  $("key").select();
}

function introduce(served) {
  model = served.model;
  provider = served.provider.replace("ExecutionProvider", "");
  const cut = model.lastIndexOf(":");
  write("name", model.slice(0, cut));
  write("version", model.slice(cut + 1));
  write("about", `${served.precision} on ${provider}`);
  document.title = `${model} · Fledge`;
  show("waiting", false);
}

function describe({ labels, arch, precisions, serving, thresholds, views: { length: count } }) {
  const { accuracy } = precisions[serving.precision];
  const about = [`${labels.length} classes`, arch, `${serving.precision} on ${provider}`];
  if (accuracy) about.push(`right on ${percent(accuracy)} of its held-out photos`);
  write("about", about.join(" · "));
  const more = labels.length > 50 ? `, and ${labels.length - 50} more` : "";
  write("known", `It knows ${labels.slice(0, 50).join(", ")}${more}.`);
  threshold = thresholds.confident;
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
  shell();
}

// A photo, and what is said of it.

function take(files) {
  if (!files.length) return;
  photo = files[0];
  URL.revokeObjectURL(preview);
  preview = URL.createObjectURL(photo);
  $("preview").alt = `Your photo: ${photo.name}`;
  $("preview").src = preview;
  $("stage").classList.add("full");
  show("invite", false);
  show("unseen", false);
  const first = files.length > 1 ? ` · the first of ${files.length} files` : "";
  write("caption", `${photo.name} · ${size(photo.size)}${first}`);
  ask();
}

function busy(on) {
  document.body.classList.toggle("busy", on);
  $("result").ariaBusy = on;
}

function shell() {
  $("copy").textContent = "Copy";
  const header = key || !$("door").hidden ? ' -H "Authorization: Bearer $KEY"' : "";
  const file = quoted(`@${photo?.name ?? "photo.jpg"}`);
  const url = quoted(new URL(path(), location).href);
  write("curl", `curl --data-binary ${file}${header} ${url}`);
}

async function ask() {
  shell();
  if (!photo) return;
  asking.abort(); // an answer to what was asked before must not come after this one
  const { signal } = (asking = new AbortController());
  waits = false;
  busy(true);
  const started = performance.now();
  let tell, told;
  try {
    const response = await call(path(), { method: "POST", body: photo, signal });
    tell = response.ok ? answered : refused;
    told = await (response.ok ? response.json() : problem(response));
  } catch {
    tell = refused;
    told = await photo.slice(0, 1).arrayBuffer().then(
      () => ({ code: "unreachable", detail: "It may have stopped, or the file is far too large." }),
      () => ({ code: "unreadable", detail: "It may be a folder, or have changed meanwhile." }),
    );
  }
  if (signal.aborted) return;
  busy(false);
  tell(told, performance.now() - started);
}

function panel(name) {
  for (const id of ["empty", "answer", "trouble"]) show(id, id === name);
  $("result").scrollIntoView({ block: "nearest" });
}

function answered(answer, took) {
  const from = threshold ? `; confident ones begin at ${percent(threshold)}` : "";
  const sure = { true: "A confident answer.", false: `Not a confident answer${from}.` };
  write("sure", sure[answer.confident] ?? "");
  $("sure").className = answer.confident ? "yes" : "";
  show("strange", answer.out_of_distribution === true);
  const said = [];
  const bars = clear("bars");
  for (const { label, probability } of answer.predictions) {
    said.push(`${label}, ${percent(probability)}`);
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
  show("changes", answer.applied.length > 0);
  const facts = clear("facts");
  const time = took < 1e3 ? `${Math.ceil(took)} ms` : `${(took / 1e3).toFixed(1)} s`;
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
  write("said", `${said.join("; ")}. ${$("sure").textContent}`);
  if (answer.model !== model) meet(); // another one is served by now
}

function refused({ code, detail, id }) {
  const title = TROUBLE[code] ?? "That did not work";
  write("wrong", title);
  write("detail", detail[0].toUpperCase() + detail.slice(1).replace(/[^.]$/, "$&."));
  write("request", id ? `Request ${id}` : "");
  show("again", /overloaded|deadline|slow|unreachable|failed|internal|undefined/.test(code));
  panel("trouble");
  write("said", `${title}. ${detail}`);
  waits = code === "not-ready" || code === "unauthorized";
  if (code === "not-ready") wait("it may be restarting");
  if (code === "unauthorized") knock();
}

// How photos come in.

for (const id of ["file", "camera"]) {
  on(id, "change", ({ target }) => {
    take([...target.files]);
    target.value = ""; // so that the same file can be chosen again
  });
}
const carries = ({ dataTransfer: { types } }) => /Files|uri-list/.test(types.join());
const over = (on) => document.body.classList.toggle("over", on);
addEventListener("dragover", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  over(true);
});
addEventListener("dragleave", ({ relatedTarget }) => { if (!relatedTarget) over(false); });
addEventListener("drop", (event) => {
  over(false);
  if (!carries(event)) return;
  event.preventDefault();
  const { files } = event.dataTransfer;
  if (files.length) return take(files);
  asking.abort();
  busy(false);
  refused({ code: "link", detail: "Save the image first, then drop the file." });
});
addEventListener("paste", ({ clipboardData }) => take(clipboardData.files));
on("preview", "load", ({ target }) => {
  $("caption").textContent += ` · ${target.naturalWidth} × ${target.naturalHeight}`;
  show("preview");
});
on("preview", "error", () => {
  show("preview", false);
  show("unseen");
});
on("choices", "change", ask);
on("again", "click", ask);
on("door", "submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  meet();
});
on("copy", "click", async ({ target }) => {
  await navigator.clipboard.writeText($("curl").textContent);
  target.textContent = "Copied";
});
show("copy", navigator.clipboard !== undefined);
shell();
meet();
