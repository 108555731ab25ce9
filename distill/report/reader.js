// The trace reader of the page: search, a filter by verdict, and keys. Without scripts all traces are shown.
"use strict";
(() => {
  const form = document.querySelector(".reader");
  if (!form) return;
  const traces = [...document.querySelectorAll(".traces > .trace")];
  const [search, verdict, output] = ["input", "select", "output"].map((name) => form.querySelector(name));
  const texts = traces.map((trace) => trace.textContent.toLowerCase());
  const shown = () => traces.filter((trace) => !trace.hidden);

  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    traces.forEach((trace, i) => {
      const wanted = !verdict.value || trace.dataset.verdict === verdict.value;
      trace.hidden = !(wanted && words.every((word) => texts[i].includes(word)));
    });
    output.textContent = `${shown().length} of ${traces.length}`;
  };

  const current = () => shown().findIndex((trace) => trace.contains(document.activeElement));
  const go = (step) => {
    const list = shown(), at = current();
    const next = list[Math.max(0, Math.min(list.length - 1, at < 0 ? 0 : at + step))];
    if (next) next.querySelector("summary").focus();
  };

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", update);
  verdict.addEventListener("change", update);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === search) { search.value = ""; update(); search.blur(); return; }
    if (event.target.matches("input, select, textarea")) return;
    const key = { "/": () => search.focus(), j: () => go(1), k: () => go(-1), r: () => {
      const trace = shown()[current()], reasoning = trace && trace.querySelector(".reasoning");
      if (reasoning) { trace.open = true; reasoning.open = !reasoning.open; }
    } }[event.key];
    if (key) { event.preventDefault(); key(); }
  });
  update();
})();
