// The norm of the gradient as a map: a row for each site in the order of depth, a column for each position.
import { element, number } from "gradfn/core/dom.js";
import { quoted } from "gradfn/gpt/names.js";
import { roving } from "gradfn/gpt/strip.js";

const DECADES = 4; // of the colors

// Make it; `reveal(step)` shows a step, counted from 1. The first step is the last row.
export function makeMap(find, steps, reveal) {
  const rows = steps.map(({ site }, i) => {
    const button = element("button", { type: "button", onclick: () => reveal(i + 1) }, site);
    return { site, step: i + 1, button, cells: element("span", { class: "cells" }) };
  });
  find("back-map").append(...[...rows].reverse().flatMap(({ button, cells }) => [button, cells]));
  roving(find("back-map"), () => 1)();

  // Show the norms by site up to a step.
  function show(norms, names, shown) {
    const known = rows.slice(0, shown).flatMap(({ site }) => [...norms[site]]).filter((value) => value > 0);
    const [low, high] = bounds(known);
    for (const { site, step, button, cells } of rows) {
      const values = norms[site], isKnown = step <= shown;
      const text = isKnown ? `norm ${number(Math.hypot(...values))}` : "not yet computed, show its step";
      button.setAttribute("aria-pressed", step === shown);
      button.setAttribute("aria-label", `${site}: ${text}`);
      cells.replaceChildren(...Array.from(values, (value, t) => {
        if (!isKnown) return element("i", { class: "unknown" });
        const title = `${site}, position ${t}, ${quoted(names[t])}: ${number(value)}`;
        const cell = element("i", { title, class: value > 0 ? "" : "none" });
        if (value > 0) cell.style.setProperty("--p", `${Math.round(8 + 92 * level(value, low, high))}%`);
        return cell;
      }));
    }
    find("back-low").textContent = number(low);
    find("back-high").textContent = `${number(high)} nats per unit`;
  }

  return { show };
}

function bounds(values) {
  const high = values.length ? Math.max(...values) : 1;
  return [Math.max(Math.min(...values, high), high / 10 ** DECADES), high];
}

function level(value, low, high) {
  return high === low ? 1 : Math.min(Math.max(Math.log(value / low) / Math.log(high / low), 0), 1);
}
