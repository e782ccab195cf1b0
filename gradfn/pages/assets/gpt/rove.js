// Many buttons, of which one is in the order of the tab key: the arrow keys move among them.

// Let keys move the focus in a container: `step` maps a key to a change of the index, `pick(i)` is called with the new
// one.
export function rove(container, buttons, steps, pick) {
  container.addEventListener("keydown", (event) => {
    const all = buttons(), at = all.indexOf(event.target.closest("button"));
    const last = all.length - 1;
    const moves = { Home: -at, End: last - at, ...steps() };
    if (at < 0 || event.altKey || event.ctrlKey || event.metaKey || moves[event.key] === undefined) return;
    event.preventDefault();
    const to = Math.min(Math.max(at + moves[event.key], 0), last);
    if (to === at) return;
    pick(to);
    buttons()[to].focus();
  });
}

// Put only one of the buttons in the order of the tab key.
export function only(buttons, at) {
  buttons.forEach((button, i) => (button.tabIndex = i === at ? 0 : -1));
}
