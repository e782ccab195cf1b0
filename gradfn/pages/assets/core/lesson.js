// The lesson of a network: some steps, each with what you see, one thing to do, and what happened.
import { element } from "gradfn/core/dom.js";

const QUIET = 700; // milliseconds without a change, before a screen reader is announced what happened
const MARGIN = 12; // pixels around what is shown

const still = matchMedia("(prefers-reduced-motion: reduce)");
const asText = (part) => (typeof part === "function" ? part() : part) || "";
let closeOther = () => {}; // closes the lesson that is open; one page may have several

// Fill <div id="...-lesson"> of a section. A step is { see, act, done, happened, at, start }:
//   see, act    HTML (or functions that return it): what there is to see, and the one thing to do
//   done()      whether it was done; without it there is nothing to do
//   happened()  HTML: what happened, with the actual numbers
//   at()        the element to outline, to which the page scrolls
//   start()     called when the step starts
// Call update() of what is returned after each change.
export function makeLesson(section, steps) {
  const root = document.getElementById(`${section.id}-lesson`), id = `${root.id}-panel`;
  const finished = new Set();
  let now = 0, target = null, telling = 0, shown = "";

  const opener = button("small lesson-open", `Lesson, ${steps.length} steps`, () => (panel.hidden ? open() : close()));
  opener.setAttribute("aria-expanded", "false");
  opener.setAttribute("aria-controls", id);
  const place = element("p", { class: "lesson-place", id: `${id}-place`, tabindex: "-1" });
  const see = element("p", { class: "lesson-see" }), act = element("p", { class: "lesson-act" });
  const happened = element("p", { class: "lesson-happened" });
  // Both are read out when they change; what happened only after a pause, as a drawing changes at every stroke.
  const text = element("div", { class: "lesson-text", "aria-live": "polite" }, see, act);
  const announced = element("p", { class: "unseen", role: "status" });
  const back = button("small", "Back", () => go(now - 1));
  const next = button("small lesson-next", "Next", () => (now + 1 < steps.length ? go(now + 1) : close()));
  const there = button("small lesson-there", "Go to it", toTarget);
  there.title = "Moves the keyboard's focus to what is outlined; F6 brings it back";
  const shut = button("quiet lesson-close", "✕", () => close());
  shut.setAttribute("aria-label", "Close the lesson");
  const panel = element(
    "div",
    { class: "lesson-panel", id, role: "region", "aria-label": "Lesson", hidden: "" },
    element("div", { class: "lesson-bar", "aria-hidden": "true" }, element("i")),
    element("div", { class: "lesson-head" }, place, shut),
    element("div", { class: "lesson-body" }, text, happened, announced),
    element("div", { class: "lesson-buttons" }, back, next, there),
  );
  root.append(opener, panel);

  // The page ends below the panel, so that it can be scrolled away from under it.
  new ResizeObserver(() => {
    if (!panel.hidden) document.documentElement.style.setProperty("--lesson", `${panel.offsetHeight}px`);
  }).observe(panel);

  document.addEventListener("keydown", (event) => {
    if (panel.hidden || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") close();
    else if (event.key === "F6") panel.contains(document.activeElement) ? toTarget() : next.focus();
    else return;
    event.preventDefault();
  });

  function open(at = now) {
    closeOther();
    closeOther = close;
    panel.hidden = false;
    opener.setAttribute("aria-expanded", "true");
    go(at);
    place.focus({ preventScroll: true });
  }

  function close() {
    const inside = panel.contains(document.activeElement);
    closeOther = () => {};
    panel.hidden = true;
    opener.setAttribute("aria-expanded", "false");
    document.documentElement.style.removeProperty("--lesson");
    clearTimeout(telling);
    outline(null);
    if (inside) opener.focus();
  }

  function go(to) {
    now = Math.min(Math.max(to, 0), steps.length - 1);
    const step = steps[now], focused = document.activeElement;
    if (step.start) step.start();
    place.textContent = `Step ${now + 1} of ${steps.length}`;
    panel.querySelector(".lesson-bar i").style.width = `${(100 * (now + 1)) / steps.length}%`;
    see.innerHTML = asText(step.see);
    act.innerHTML = asText(step.act);
    act.hidden = !act.innerHTML;
    happened.innerHTML = announced.textContent = shown = "";
    back.disabled = now === 0;
    next.textContent = now + 1 < steps.length ? "Next" : "Finish";
    if (back.disabled && focused === back) next.focus();
    update();
    there.hidden = !target;
    if (target) bringIntoView(target);
  }

  function update() {
    if (panel.hidden) return;
    const step = steps[now], isDone = !step.done || step.done();
    outline(step.at ? step.at() : null);
    if (isDone) finished.add(now);
    panel.classList.toggle("done", finished.has(now));
    if (!isDone || !step.happened) return;
    const html = step.happened();
    if (html === shown) return;
    happened.innerHTML = shown = html;
    clearTimeout(telling);
    telling = setTimeout(() => (announced.textContent = happened.textContent), QUIET);
  }

  function outline(element) {
    if (target === element) return;
    if (target) target.classList.remove("lesson-target");
    if (element) element.classList.add("lesson-target");
    target = element;
  }

  // The keyboard's focus goes to the first control of what is outlined.
  function toTarget() {
    if (!target) return;
    const focusable = 'button:not(:disabled), input:not(:disabled), select, textarea, a[href], summary, [tabindex="0"]';
    const control = target.matches(focusable) ? target : target.querySelector(focusable);
    const pressed = target.querySelector('[aria-pressed="true"]:not([tabindex="-1"]), input:checked');
    if (!control) target.tabIndex = -1;
    (pressed || control || target).focus({ preventScroll: true });
    bringIntoView(target);
  }

  // Scroll so that an element is between the top of the window and the panel; not at all where it is there already.
  function bringIntoView(element) {
    const box = element.getBoundingClientRect(), free = panel.getBoundingClientRect().top;
    if (box.top >= MARGIN && box.bottom <= free - MARGIN) return;
    const by = box.height > free - 2 * MARGIN ? box.top - MARGIN : (box.top + box.bottom - free) / 2;
    scrollBy({ top: by, behavior: still.matches ? "instant" : "smooth" });
  }

  return { update, open, close, step: () => now };
}

function button(kind, text, clicked) {
  return element("button", { type: "button", class: kind, onclick: clicked }, text);
}
