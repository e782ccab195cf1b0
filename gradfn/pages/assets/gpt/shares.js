// How much each head and each feed-forward layer counts: an estimate by the backward pass, and the exact change.
import { element, number } from "gradfn/core/dom.js";
import { partName, shortName } from "gradfn/gpt/parts.js";
import { signed } from "gradfn/gpt/signed.js";

const ROWS = 8; // shown at first

// Make it: `toggle(part)` switches a part off or on, `exactly(part)` returns the change of the loss without it.
export function makeShares(find, toggle, exactly) {
  let shares = [], isOff = () => false;
  let every = false; // show all parts
  let timer = 0;

  find("back-more").addEventListener("click", () => {
    every = !every;
    draw();
    resume();
  });

  // Show parts, the most important first; `off(part)` says which are switched off.
  function show(newShares, off) {
    // Parts that are switched off count for nothing now; they stay on top, to be switched on again.
    shares = [...newShares.filter(({ part }) => off(part)), ...newShares.filter(({ part }) => !off(part))];
    isOff = off;
    const list = find("back-shares"), active = document.activeElement;
    const focused = list.contains(active) && active.dataset.part;
    draw();
    if (focused) list.querySelector(`[data-part="${focused}"]`)?.focus();
  }

  function draw() {
    const list = every ? shares : shares.slice(0, ROWS);
    for (const share of shares) share.row = null;
    find("back-shares").replaceChildren(...list.map((share) => (share.row = row(share))));
    drawBars();
    find("back-more").hidden = shares.length <= ROWS;
    find("back-more").textContent = every ? `Show only the first ${ROWS}` : `Show all ${shares.length}`;
  }

  function row({ part, norm }) {
    const size = element("small", {}, `gradient's norm ${number(norm)}`);
    const name = element("span", { class: "name" }, shortName(part), size);
    const said = { "aria-pressed": isOff(part), "aria-label": `Switch off ${partName(part)}`, "data-part": part };
    const button = element("button", { type: "button", class: "small", onclick: () => toggle(part), ...said }, "Off");
    return element("li", {}, name, element("span", { class: "both" }), button);
  }

  // All bars have one scale.
  function drawBars() {
    const most = Math.max(...shares.flatMap(({ estimate, exact }) => [Math.abs(estimate), Math.abs(exact ?? 0)])) || 1;
    for (const { row: own, estimate, exact } of shares) {
      if (own) own.querySelector(".both").replaceChildren(bar("estimate", estimate, most), bar("exact", exact, most));
    }
  }

  function bar(name, value, most) {
    const line = element("i", { class: value < 0 ? "less" : "more" });
    line.style.setProperty("--level", Math.abs(value ?? 0) / most);
    const text = value === null ? "…" : signed(value);
    const track = element("span", { class: "track" }, line);
    return element("span", { class: "share-line" }, element("small", {}, name), track, element("b", {}, text));
  }

  // Compute the exact changes of the parts that are shown, one after the other, so that the page stays responsive.
  function resume(delay = 0) {
    clearTimeout(timer);
    const next = shares.find(({ row: own, exact }) => own && exact === null);
    if (!next) return;
    timer = setTimeout(() => {
      next.exact = exactly(next.part);
      drawBars();
      resume();
    }, delay);
  }

  return { show, resume, pause: () => clearTimeout(timer) };
}
