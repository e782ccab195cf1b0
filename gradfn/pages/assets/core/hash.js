// The state of the page in its address, so that a finding is a link: #live-0/text=a%20b&head=3

// Milliseconds between two changes of the address at least: browsers refuse more than some per second.
const PAUSE = 300;

// Keep the state of a section in the address. `set(state)` is called with texts by name: at the start where the address
// has a state, and when the address changes by a link. Call the returned function with a state after each change.
export function keepInAddress(section, set) {
  const prefix = `#${section.id}/`;
  let own = null; // the last one written here
  let pending = null, timer = 0, last = -Infinity;
  const read = () => {
    if (!location.hash.startsWith(prefix) || location.hash === own) return;
    clearTimeout(timer);
    set(Object.fromEntries(new URLSearchParams(location.hash.slice(prefix.length))));
    requestAnimationFrame(() => section.scrollIntoView({ behavior: "instant" }));
  };
  const write = () => {
    own = pending;
    last = performance.now();
    history.replaceState(null, "", own);
  };
  addEventListener("hashchange", read);
  read();
  return (state) => {
    const known = Object.entries(state).filter(([, value]) => value !== null && value !== undefined && value !== "");
    pending = prefix + String(new URLSearchParams(known)).replaceAll("%2C", ",").replaceAll("%3A", ":");
    clearTimeout(timer);
    const wait = last + PAUSE - performance.now();
    if (wait <= 0) write();
    else timer = setTimeout(write, wait);
  };
}
