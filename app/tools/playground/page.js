"use strict";

const element = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "num_samples", "max_tokens", "seed"];
const ENDS = {
  end_of_text: "The model ended the document",
  max_tokens: "Reached the token limit",
  closing: "The playground is closing",
};
const LOST = "The playground does not respond; is it still running?";
const UNTRAINED = "No checkpoint yet: train a model first";

let checkpoints = [];
let loaded = false;
let running = null; // AbortController of the current request

function showStatus(state, text) {
  element("status").dataset.state = state;
  element("status-text").textContent = text;
}

function setOptions(select, pairs, selected) {
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  if (pairs.some(([value]) => String(value) === String(selected))) select.value = selected;
}

function showSteps(selected) {
  const checkpoint = checkpoints.find(({ run }) => run === element("run").value);
  const pairs = (checkpoint ? checkpoint.steps : []).map(({ step, val_loss }) => [
    step,
    val_loss === null ? `${step}` : `${step} · held-out ${val_loss.toFixed(3)}`,
  ]);
  setOptions(element("step"), pairs, selected);
}

async function load() {
  const isLatest = element("step").selectedIndex <= 0;
  let state;
  try {
    state = await (await fetch("/api/state")).json();
  } catch {
    showStatus("wrong", LOST);
    return;
  }
  checkpoints = state.checkpoints;
  const selectedRun = loaded ? element("run").value : state.run;
  setOptions(element("run"), checkpoints.map(({ run }) => [run, run]), selectedRun);
  // While a run trains, its latest checkpoint stays selected.
  showSteps(isLatest ? null : element("step").value);
  element("device").textContent = state.device;
  if (!loaded) {
    element("prompt").value = state.defaults.prompt;
    for (const name of NUMBERS) setNumber(name, state.defaults[name]);
    loaded = true;
    if (state.problem) showStatus("wrong", state.problem);
  }
  if (!running) element("generate").disabled = !checkpoints.length;
  if (!checkpoints.length) showStatus("wrong", UNTRAINED);
  else if ([LOST, UNTRAINED].includes(element("status-text").textContent)) showStatus("", "Ready");
}

function setNumber(name, value) {
  element(name).value = value;
  moveSlider(name);
}

function moveSlider(name) {
  const slider = document.querySelector(`[data-for=${name}]`);
  slider.value = element(name).value;
  const filled = (slider.value - slider.min) / (slider.max - slider.min);
  slider.style.setProperty("--filled", `${100 * filled}%`);
}

function readRequest() {
  // An invalid number is sent as null, and the server explains what is wrong.
  const numbers = NUMBERS.map((name) => [name, element(name).valueAsNumber]);
  return {
    run: element("run").value,
    step: Number(element("step").value),
    prompt: element("prompt").value,
    ...Object.fromEntries(numbers),
  };
}

async function* messages(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function addSample(request) {
  const sample = element("sample").content.cloneNode(true).firstElementChild;
  const text = sample.querySelector("pre");
  sample.querySelector(".prompt").textContent = request.prompt;
  const copy = sample.querySelector(".copy");
  // Browsers offer the clipboard only to pages of this machine and over HTTPS.
  copy.hidden = !navigator.clipboard;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text.textContent);
    showStatus("done", "Copied");
  });
  sample.querySelector(".continue").addEventListener("click", () => {
    element("prompt").value = text.textContent;
    generate();
  });
  element("samples").append(sample);
}

function addPiece(piece, generated) {
  if (piece === null) {
    generated.classList.add("ended");
    return;
  }
  const token = document.createElement("span");
  token.textContent = piece.text;
  token.odds = piece.odds;
  generated.append(token);
}

function strike(prompt, seen) {
  const text = prompt.textContent;
  if (!text.endsWith(seen)) return;
  const cut = document.createElement("del");
  cut.textContent = text.slice(0, text.length - seen.length);
  prompt.replaceChildren(cut, seen);
}

function showOdds(token) {
  const box = element("odds");
  box.hidden = !token.odds;
  if (!token.odds) return;
  box.replaceChildren(...token.odds.map(([text, probability]) => {
    const row = document.createElement("div");
    const name = document.createElement("code");
    name.textContent = text.replaceAll(" ", "␣").replaceAll("\n", "⏎");
    row.append(name, `${(100 * probability).toFixed(1)}%`);
    row.style.setProperty("--filled", `${100 * probability}%`);
    return row;
  }));
  const { left, top, bottom } = token.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
  const isBelow = bottom + box.offsetHeight + 8 < innerHeight;
  box.style.top = `${isBelow ? bottom + 4 : top - box.offsetHeight - 4}px`;
}

function show(message) {
  if (message.pieces !== undefined) {
    const page = element("page");
    const isAtEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 40;
    const generated = document.querySelectorAll(".generated");
    message.pieces.forEach((piece, number) => addPiece(piece, generated[number]));
    if (isAtEnd) page.scrollTop = page.scrollHeight;
    const rate = message.tokens / message.seconds;
    element("figures").textContent =
      `${message.tokens} tokens · ${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`;
  } else if (message.error !== undefined) {
    showStatus("wrong", message.fix ? `${message.error}: ${message.fix}` : message.error);
  } else if (message.note !== undefined) {
    element("note").textContent = message.note;
    for (const prompt of document.querySelectorAll(".prompt")) strike(prompt, message.seen);
  } else if (message.state === "ended") {
    showStatus("done", ENDS[message.why]);
  } else {
    const texts = { waiting: "Waiting for another text to finish", loading: "Loading the model", writing: "Generating" };
    showStatus("busy", texts[message.state]);
  }
}

function setBusy(isBusy) {
  element("generate").disabled = isBusy;
  element("stop").hidden = !isBusy;
  document.body.classList.toggle("writing", isBusy);
  element("page").setAttribute("aria-busy", isBusy);
  for (const button of document.querySelectorAll(".sample button")) button.disabled = isBusy;
}

async function generate() {
  if (running || element("generate").disabled) return;
  const request = readRequest();
  running = new AbortController();
  element("odds").hidden = true;
  element("note").textContent = element("figures").textContent = "";
  showStatus("busy", "Connecting");
  setBusy(true);
  try {
    const response = await fetch("/api/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
      signal: running.signal,
    });
    if (!response.ok) {
      show(await response.json());
      return;
    }
    element("empty").hidden = true;
    element("samples").replaceChildren();
    for (let number = 0; number < request.num_samples; number++) addSample(request);
    let last = {};
    for await (const message of messages(response)) {
      show(message);
      last = message;
    }
    if (last.why === undefined && last.error === undefined) {
      showStatus("wrong", "The connection was lost before the end of the text");
    }
  } catch (error) {
    if (error.name === "AbortError") showStatus("done", "Stopped");
    else showStatus("wrong", LOST);
  } finally {
    running = null;
    setBusy(false);
  }
}

function stop() {
  if (running) running.abort();
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
element("stop").addEventListener("click", stop);
element("run").addEventListener("change", () => showSteps(null));

for (const slider of document.querySelectorAll("[data-for]")) {
  const name = slider.dataset.for;
  slider.addEventListener("input", () => setNumber(name, slider.value));
  element(name).addEventListener("input", () => moveSlider(name));
}

element("samples").addEventListener("pointerover", (event) => showOdds(event.target));
element("page").addEventListener("pointerleave", () => { element("odds").hidden = true; });
element("page").addEventListener("scroll", () => { element("odds").hidden = true; });

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    stop();
  }
});

// Training may have written a new checkpoint in the meantime.
window.addEventListener("focus", () => { if (!running) load(); });
load();
