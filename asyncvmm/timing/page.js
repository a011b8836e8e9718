"use strict";
(() => {
  const tip = document.getElementById("tip");
  const small = matchMedia("(max-width: 40rem)");

  function lines(row) {
    const data = row.dataset;
    const span = data.to ? `${data.from} to ${data.to}` : `at ${data.from}`;
    const took = data.took ? `${data.took}, ${data.share} of the total` : null;
    return [took, span, data.more].filter(Boolean);
  }

  function show(row, x, y) {
    const name = document.createElement("b");
    name.textContent = row.dataset.name;
    const rest = lines(row).map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    });
    tip.replaceChildren(name, ...rest);
    tip.hidden = false;
    if (small.matches) {
      tip.style.removeProperty("left");
      tip.style.removeProperty("top");
      return;
    }
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 10) : y + 18}px`;
  }

  const hide = () => { tip.hidden = true; };
  const rowOf = (event) => event.target instanceof Element && event.target.closest(".row");

  document.addEventListener("pointermove", (event) => {
    const row = rowOf(event);
    if (row) show(row, event.clientX, event.clientY);
    else if (!document.activeElement || !document.activeElement.matches(".row:focus-visible")) hide();
  });
  document.addEventListener("focusin", (event) => {
    const row = rowOf(event);
    if (!row) return hide();
    const box = row.getBoundingClientRect();
    show(row, box.left + box.width / 3, box.bottom - 12);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => { if (!small.matches) hide(); }, { passive: true });

  const percent = (text) => parseFloat(text) / 100;

  function text(ns) {
    const size = Math.abs(ns);
    if (size >= 1e6) return `${+(ns / 1e6).toPrecision(4)} ms`;
    if (size >= 1e3) return `${+(ns / 1e3).toPrecision(4)} µs`;
    return size ? `${+ns.toPrecision(3)} ns` : "0";
  }

  // Every mark keeps the place it was drawn at; zooming shows the part of the axis from `first` to `last` of it.
  function zoom(chart, first, last) {
    const whole = first === 0 && last === 1;
    const span = Number(chart.dataset.span);
    const place = (element, name) => {
      element.dataset[name] ??= element.getAttribute(name);
      element.setAttribute(name, `${(percent(element.dataset[name]) - first) / (last - first) * 100}%`);
    };
    for (const rect of chart.querySelectorAll(".bar rect")) {
      place(rect, "x");
      rect.dataset.width ??= rect.getAttribute("width");
      rect.setAttribute("width", `${percent(rect.dataset.width) / (last - first) * 100}%`);
    }
    for (const mark of chart.querySelectorAll(".bar svg.mark")) place(mark, "x");
    const ticks = [...chart.querySelectorAll(".ticks text")];
    for (const tick of ticks) {
      const at = percent(tick.getAttribute("x"));
      tick.dataset.label ??= tick.textContent;
      tick.textContent = whole ? tick.dataset.label : text((first + at * (last - first)) * span);
    }
    let button = chart.querySelector(".whole");
    if (whole) return button && button.remove();
    if (!button) {
      button = document.createElement("button");
      button.className = "whole";
      button.type = "button";
      button.textContent = "Show the whole boot";
      button.addEventListener("click", () => zoom(chart, 0, 1));
      chart.prepend(button);
    }
  }

  function zoomTo(row) {
    const chart = row.closest(".waterfall");
    const span = Number(chart.dataset.span);
    const first = Number(row.dataset.s) / span, last = Number(row.dataset.e) / span;
    const margin = Math.max((last - first) * 0.1, 1e-7);
    if (first <= 1) zoom(chart, Math.max(0, first - margin), Math.min(1, last + margin));
  }

  document.addEventListener("dblclick", (event) => {
    const row = rowOf(event);
    if (row) zoomTo(row);
  });
  document.addEventListener("keydown", (event) => {
    const row = rowOf(event);
    if (event.key === "Enter" && row) zoomTo(row);
    if (event.key !== "Escape") return;
    hide();
    for (const chart of document.querySelectorAll(".waterfall")) zoom(chart, 0, 1);
  });
})();
