// Elements, pointers and words: what every part of the page needs.

// Return a function that finds the elements of a section, whose ids start with the section's own: two networks on one
// page have the same parts.
export const within = (section) => (name) => document.getElementById(`${section.id}-${name}`);

// Make an element; attributes that start with "on" are listeners.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Call `started`, then `moved`, with the positions of a pointer pressed on an element: [x, y] as fractions of its width
// and height, for a mouse, a pen or a finger.
export function follow(target, started, moved) {
  const place = (event) => {
    const box = target.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  target.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    const listening = new AbortController();
    const listen = (kind, act) => {
      const ofThis = (later) => later.pointerId === event.pointerId && act(later);
      addEventListener(kind, ofThis, { signal: listening.signal });
    };
    listen("pointermove", (later) => {
      const all = later.getCoalescedEvents ? later.getCoalescedEvents() : [];
      (all.length ? all : [later]).map(place).forEach(moved);
    });
    listen("pointerup", () => listening.abort());
    listen("pointercancel", () => listening.abort());
    started(place(event));
  });
}

// Format a number with a few significant digits.
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 0.01 && size < 1000 ? value.toFixed(size < 10 ? 3 : 1) : value.toExponential(1);
  return text.replaceAll("-", "−");
}

// Formulas, as HTML.
// A probability or a share, in percent.
export const percent = (share) => {
  if (share >= 0.9995 || share === 0) return `${Math.round(100 * share)} %`;
  return share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
};

export const sub = (text) => `<sub>${text}</sub>`;
export const gradientOf = (name) => `<span class="whole">∂L/∂${name[0]}${name[1] ? sub(name.slice(1)) : ""}</span>`;

// The number of nodes per row, for n nodes.
export function perRow(n) {
  return n <= 12 ? Math.min(n, 5) : Math.ceil(Math.sqrt(n));
}

// Draw values as bars up and down, with their indices below if these are labels.
export function bars(values, labeled) {
  const largest = Math.max(...values.map(Math.abs)) || 1;
  const made = Array.from(values, (value, i) => {
    const bar = element("i", { class: value < 0 ? "negative" : "positive" });
    bar.style.setProperty("--level", Math.abs(value) / largest);
    return element("span", { title: `${i}: ${number(value)}` }, bar, element("small", {}, labeled ? `${i}` : ""));
  });
  return element("div", { class: "bars" }, ...made);
}
