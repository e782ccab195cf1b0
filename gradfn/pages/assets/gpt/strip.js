// Texts as tokens that can be picked, and groups of buttons with one stop for the Tab key.
import { element } from "gradfn/core/dom.js";
import { spoken, visible } from "gradfn/gpt/names.js";
import { only, rove } from "gradfn/gpt/rove.js";

// Make the arrow keys move the focus between the buttons of a box, in rows of `columns()`. Call the returned function
// after the buttons have changed.
export function roving(box, columns) {
  const buttons = () => [...box.querySelectorAll("button")];
  const steps = () => ({ ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() });
  rove(box, buttons, steps, (i) => only(buttons(), i));
  box.addEventListener("focusin", (event) => {
    const i = buttons().indexOf(event.target);
    if (i >= 0) only(buttons(), i);
  });
  return () => {
    const all = buttons();
    if (all.filter((button) => button.tabIndex === 0).length !== 1) only(all, 0);
  };
}

// A text as buttons, one for each token. Their elements stay, so that the focus does, too.
export function makeStrip(box, label, picked) {
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", label);
  const buttons = [];
  const roved = roving(box, () => buttons.filter(({ offsetTop }) => offsetTop === buttons[0].offsetTop).length);
  return {
    // `look(i)` returns { title, share, level }: a color from -1 (blue) to 1 (red), and a bar's height from 0 to 1.
    show(names, look, selected, target) {
      while (buttons.length > names.length) buttons.pop().remove();
      while (buttons.length < names.length) {
        const i = buttons.length;
        buttons.push(element("button", { type: "button", onclick: () => picked(i) }, element("span"), element("i")));
        box.append(buttons[i]);
      }
      buttons.forEach((button, i) => {
        const { title, share = 0, level = null } = look(i);
        button.firstChild.textContent = visible(names[i]);
        button.title = title;
        button.setAttribute("aria-label", `${spoken(names[i])}, position ${i}, ${title}`);
        button.setAttribute("aria-pressed", i === selected);
        button.classList.toggle("target", i === target);
        button.style.setProperty("--color", share < 0 ? "var(--less)" : "var(--more)");
        button.style.setProperty("--share", `${Math.round(45 * Math.min(Math.abs(share), 1))}%`);
        button.lastChild.hidden = level === null;
        button.lastChild.style.setProperty("--level", level ?? 0);
      });
      roved();
    },
  };
}
