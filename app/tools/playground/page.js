"use strict";

const part = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "max_tokens", "seed"];
const ENDS = {
  end_of_text: "The model ended the document",
  max_tokens: "All tokens are drawn",
  closing: "The playground is closing",
};

let checkpoints = [];
let loaded = false;
let running = null; // the AbortController of the request under way

function say(state, words) {
  part("status").dataset.state = state;
  part("said").textContent = words;
}

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, words]) => new Option(words, value)));
  if (pairs.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

function showSteps(chosen) {
  const found = checkpoints.find(({ run }) => run === part("run").value);
  const pairs = (found ? found.steps : []).map(({ step, val_loss }) => [
    step,
    val_loss === null ? `${step}` : `${step} · held-out ${val_loss.toFixed(3)}`,
  ]);
  options(part("step"), pairs, chosen);
}

async function load() {
  const latest = part("step").selectedIndex <= 0;
  let state;
  try {
    state = await (await fetch("/api/state")).json();
  } catch {
    say("wrong", "The playground does not answer; is it still running?");
    return;
  }
  checkpoints = state.checkpoints;
  const run = loaded ? part("run").value : state.run;
  options(part("run"), checkpoints.map((one) => [one.run, one.run]), run);
  // Who looks at the latest checkpoint of a run in training goes on with the latest.
  showSteps(latest ? null : part("step").value);
  part("device").textContent = state.device;
  if (!loaded) {
    part("prompt").value = state.defaults.prompt;
    for (const name of NUMBERS) setNumber(name, state.defaults[name]);
    loaded = true;
  }
  if (!running) part("generate").disabled = !checkpoints.length;
  if (!checkpoints.length) say("wrong", "There is no checkpoint yet: train first");
}

function setNumber(name, value) {
  part(name).value = value;
  moveSlider(name);
}

function moveSlider(name) {
  const slider = document.querySelector(`[data-for=${name}]`);
  slider.value = part(name).value;
  const filled = (slider.value - slider.min) / (slider.max - slider.min);
  slider.style.setProperty("--filled", `${100 * filled}%`);
}

function wanted() {
  // What is no number goes as null, and the server says what is wrong.
  const numbers = NUMBERS.map((name) => [name, part(name).valueAsNumber]);
  return {
    run: part("run").value,
    step: Number(part("step").value),
    prompt: part("prompt").value,
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

function show(message, drawn) {
  if (message.text !== undefined) {
    const page = part("page");
    const follows = page.scrollHeight - page.scrollTop - page.clientHeight < 40;
    drawn.appendData(message.text);
    if (follows) page.scrollTop = page.scrollHeight;
    const rate = message.tokens / message.seconds;
    part("figures").textContent =
      `${message.tokens} tokens · ${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`;
  } else if (message.error !== undefined) {
    say("wrong", message.fix ? `${message.error}: ${message.fix}` : message.error);
  } else if (message.note !== undefined) {
    part("figures").textContent = message.note;
  } else if (message.state === "ended") {
    say("done", ENDS[message.why]);
  } else {
    const words = { waiting: "Waiting for another text to end", loading: "Loading the model", writing: "Writing" };
    say("busy", words[message.state]);
  }
}

function busy(isBusy) {
  part("generate").disabled = isBusy;
  part("stop").hidden = !isBusy;
  document.body.classList.toggle("writing", isBusy);
  part("page").setAttribute("aria-busy", isBusy);
  const hasText = part("drawn").textContent !== "";
  for (const id of ["copy", "continue"]) part(id).disabled = isBusy || !hasText;
}

async function generate() {
  if (running || part("generate").disabled) return;
  const request = wanted();
  const drawn = document.createTextNode("");
  running = new AbortController();
  part("empty").hidden = true;
  part("text").hidden = false;
  part("begun").textContent = request.prompt;
  part("drawn").replaceChildren(drawn);
  part("figures").textContent = "";
  say("busy", "Asking");
  busy(true);
  try {
    const response = await fetch("/api/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
      signal: running.signal,
    });
    if (!response.ok) {
      show(await response.json(), drawn);
      return;
    }
    let last = {};
    for await (const message of messages(response)) {
      show(message, drawn);
      last = message;
    }
    if (last.why === undefined && last.error === undefined) {
      say("wrong", "The playground has gone in the middle of the text");
    }
  } catch (error) {
    if (error.name === "AbortError") say("done", "Stopped");
    else say("wrong", "The playground does not answer; is it still running?");
  } finally {
    running = null;
    busy(false);
  }
}

function stop() {
  if (running) running.abort();
}

part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
part("stop").addEventListener("click", stop);
part("run").addEventListener("change", () => showSteps(null));

for (const slider of document.querySelectorAll("[data-for]")) {
  const name = slider.dataset.for;
  slider.addEventListener("input", () => setNumber(name, slider.value));
  part(name).addEventListener("input", () => moveSlider(name));
}

part("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(part("text").textContent);
  say("done", "Copied");
});
part("continue").addEventListener("click", () => {
  part("prompt").value = part("text").textContent;
  generate();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    stop();
  }
});

// A training may have written a new checkpoint meanwhile.
window.addEventListener("focus", () => { if (!running) load(); });
load();
