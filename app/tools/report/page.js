"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const selected = { x: "tokens", y: "usual", theme: "auto" };
  const hidden = new Set();
  const views = new Map();
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

  const theme = () => (selected.theme === "auto" ? (systemIsDark.matches ? "dark" : "light") : selected.theme);

  // The wheel alone scrolls the page; with Ctrl it zooms the chart.
  const zoom = {
    name: "zoom",
    select: {
      type: "interval",
      encodings: ["x"],
      translate: "[mousedown, window:mouseup] > window:mousemove!",
      zoom: "wheel![event.ctrlKey]",
    },
    bind: "scales",
  };

  function specOf(key) {
    const { spec, fullY } = data.charts[key];
    // A narrow legend has one column.
    const isNarrow = innerWidth <= 620;
    const shown = JSON.parse(JSON.stringify(spec, (name, value) => (isNarrow && name === "columns" ? undefined : value)));
    if (shown.layer) {
      shown.encoding.x = structuredClone(data.axes[selected.x]);
      shown.layer[0].params = [...(shown.layer[0].params ?? []), zoom];
    }
    if (fullY && selected.y !== "usual") {
      const isLog = selected.y === "log" && fullY[0] > 0;
      shown.encoding.y.scale = { domain: fullY, nice: false, type: isLog ? "log" : "linear" };
    }
    const isVisible = { filter: { not: { field: "run", oneOf: [...hidden] } } };
    shown.transform = [...(shown.transform ?? []), ...(hidden.size ? [isVisible] : [])];
    shown.width = "container";
    shown.height = key === "time" ? 34 * (data.runs.length - hidden.size) : key.endsWith("loss") ? 340 : 170;
    return shown;
  }

  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  tip.hidden = true;
  function showTip(_handler, event, _item, value) {
    tip.hidden = !value;
    if (!value) return;
    const entries = Object.entries(value).filter(([, text]) => !["undefined", "null", "NaN"].includes(String(text)));
    const longest = Math.max(...entries.map(([name]) => name.length));
    tip.textContent = entries.map(([name, text]) => `${name}${" ".repeat(longest - name.length)}  ${text}`).join("\n");
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8))}px`;
  }

  async function drawAll() {
    const name = theme();
    document.documentElement.dataset.theme = name;
    const colors = data.themes[name].range.category;
    const config = structuredClone(data.themes[name]);
    if (innerWidth <= 620) {
      Object.assign(config.legend, { columns: 1, labelLimit: innerWidth - 160 });
      config.axisY.labelLimit = innerWidth / 4;
    }
    for (const label of document.querySelectorAll(".runs label")) {
      const at = data.runs.indexOf(label.querySelector("input").value);
      const dot = label.querySelector(".dot");
      dot.hidden = at < 0;
      dot.style.background = colors[at % colors.length];
    }
    const options = { actions: false, config, defaultStyle: false, renderer: "canvas", tooltip: showTip };
    for (const key of Object.keys(data.charts)) {
      const embedded = await vegaEmbed(`#chart-${key}`, specOf(key), options);
      const before = views.get(key);
      const { field } = data.axes[selected.x] ?? {};
      const zoomed = before && data.charts[key].spec.layer && before.view.signal("zoom")[field];
      if (zoomed) await embedded.view.signal(`zoom_${field}`, zoomed).runAsync();
      before?.finalize();
      views.set(key, embedded);
    }
    document.body.dataset.drawn = JSON.stringify({ ...selected, hidden: [...hidden], runs: data.runs });
  }

  // Drawings run one after the other, however quickly the view changes.
  let drawing = Promise.resolve();
  // One that fails is no reason for the next not to be tried.
  const afterDrawing = (work) => (drawing = drawing.then(work).catch(console.error));
  const draw = () => afterDrawing(drawAll);

  for (const group of document.querySelectorAll("[data-choice]")) {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      selected[group.dataset.choice] = button.value;
      for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      draw();
    });
  }
  document.querySelector("nav").addEventListener("change", ({ target }) => {
    if (data.live) {
      choose(target.value, target.checked);
      return;
    }
    hidden[target.checked ? "delete" : "add"](target.value);
    draw();
  });

  function connectSliders() {
    for (const group of document.querySelectorAll(".samples")) {
      const articles = [...group.querySelectorAll("article")];
      const slider = group.querySelector("input");
      if (!slider) continue;
      const show = () => articles.forEach((article, at) => { article.hidden = at !== slider.valueAsNumber; });
      slider.addEventListener("input", show);
      show();
    }
  }

  // The page of a server is fetched again while runs train.
  const POLL_MS = 5000;
  const query = () => data.live.chosen.map((name) => `run=${encodeURIComponent(name)}`).join("&") || "run=";

  function choose(name, isChosen) {
    const others = data.live.chosen.filter((other) => other !== name);
    data.live.chosen = isChosen ? [...others, name] : others;
    history.replaceState(null, "", `/?${query()}`);
    afterDrawing(refresh);
  }

  async function refresh() {
    const asked = query();
    let answer = null;
    let html = "";
    try {
      answer = await fetch(`/?${asked}`, { headers: { "If-None-Match": data.live.version } });
      html = await answer.text();
    } catch { answer = null; }
    document.getElementById("lost").hidden = Boolean(answer && (answer.ok || answer.status === 304));
    // What was chosen meanwhile is asked for next.
    if (!answer?.ok || asked !== query()) return;
    replace(new DOMParser().parseFromString(html, "text/html"));
    await drawAll();
  }

  async function poll() {
    if (!document.hidden) await afterDrawing(refresh);
    setTimeout(poll, POLL_MS);
  }

  function replace(fresh) {
    const all = (root, selector) => [...root.querySelectorAll(selector)];
    const names = (root) => all(root, ".runs input").map((box) => box.value).join("\n");
    const opened = new Map(all(document, "details").map((it) => [it.textContent.trim().split("\n")[0], it.open]));
    const sliders = new Map(all(document, ".samples input").map((it) => [it.ariaLabel, it]));
    Object.assign(data, JSON.parse(fresh.getElementById("data").textContent));
    // Charts stay until they are drawn again.
    for (const chart of all(fresh, ".chart")) {
      const shown = document.getElementById(chart.id);
      if (shown) chart.replaceWith(shown);
    }
    for (const it of all(fresh, "details")) it.open = opened.get(it.textContent.trim().split("\n")[0]) ?? it.open;
    for (const it of all(fresh, ".samples input")) {
      const before = sliders.get(it.ariaLabel);
      if (before && before.value !== before.max) it.value = before.value;
    }
    const parts = ["header", "main", "footer", ...(names(fresh) === names(document) ? [] : [".runs"])];
    for (const part of parts) document.querySelector(part).replaceWith(fresh.querySelector(part));
    document.title = fresh.title;
    for (const [key, shown] of views) {
      if (key in data.charts) continue;
      shown.finalize();
      views.delete(key);
    }
    connectSliders();
  }

  systemIsDark.addEventListener("change", draw);
  connectSliders();
  draw();
  if (data.live) {
    setTimeout(poll, POLL_MS);
    document.addEventListener("visibilitychange", () => document.hidden || afterDrawing(refresh));
  }
})();
