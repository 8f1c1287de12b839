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
    const shown = structuredClone(spec);
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
    shown.height = key === "time" ? 34 * (data.runs - hidden.size) : key.endsWith("loss") ? 340 : 170;
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
    const config = data.themes[name];
    const colors = config.range.category;
    document.querySelectorAll(".dot").forEach((dot, at) => {
      dot.style.background = colors[at % colors.length];
    });
    const options = { actions: false, config, defaultStyle: false, renderer: "canvas", tooltip: showTip };
    for (const key of Object.keys(data.charts)) {
      const embedded = await vegaEmbed(`#chart-${key}`, specOf(key), options);
      views.get(key)?.finalize();
      views.set(key, embedded);
    }
    document.body.dataset.drawn = JSON.stringify({ ...selected, hidden: [...hidden] });
  }

  // Drawings run one after the other, however quickly the view changes.
  let drawing = Promise.resolve();
  const draw = () => { drawing = drawing.then(drawAll); };

  for (const group of document.querySelectorAll("[data-choice]")) {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      selected[group.dataset.choice] = button.value;
      for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      draw();
    });
  }
  for (const box of document.querySelectorAll(".runs input")) {
    box.addEventListener("change", () => {
      hidden[box.checked ? "delete" : "add"](box.value);
      draw();
    });
  }
  for (const group of document.querySelectorAll(".samples")) {
    const articles = [...group.querySelectorAll("article")];
    const slider = group.querySelector("input");
    if (!slider) continue;
    const show = () => articles.forEach((article, at) => { article.hidden = at !== slider.valueAsNumber; });
    slider.addEventListener("input", show);
    show();
  }
  systemIsDark.addEventListener("change", () => draw());
  draw();
})();
