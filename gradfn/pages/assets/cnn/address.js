// The state of the page as short texts, for its address, and back. Layers count from 1 in them, as in Python's names.

// An index below n from a text, or null.
export const index = (text, n) => (/^\d{1,6}$/.test(text ?? "") && Number(text) < n ? Number(text) : null);

// A filter from "2.5", filter 5 of convolution 2: [1, 5]; or null.
export function filterFrom(text, net) {
  const [layer, filter] = (text ?? "").split("."), l = (index(layer, net.convs.length + 1) ?? 0) - 1;
  const i = l >= 0 ? index(filter, net.convs[l].nOut) : null;
  return i === null ? null : [l, i];
}

export const filterTo = (layer, filter) => `${layer + 1}.${filter}`;

// The filters that are off, as "1.3,2.5".
export const offTo = (off) => Array.from(off, (name) => filterTo(...name.split(".").map(Number))).join(",");
export const offFrom = (text, net) =>
  new Set((text ?? "").split(",").map((each) => filterFrom(each, net)).filter(Boolean).map((each) => each.join(".")));
