// The state of the page in its address, so that a finding is a link: #live-0/text=a%20b&head=3

// Keep the state of a section in the address. `set(state)` is called with texts by name: at the start where the address has a
// state, and when the address changes by a link. Call the returned function with a state after each change.
export function keepInAddress(section, set) {
  const prefix = `#${section.id}/`;
  let own = null; // the last one written here
  const read = () => {
    if (!location.hash.startsWith(prefix) || location.hash === own) return;
    set(Object.fromEntries(new URLSearchParams(location.hash.slice(prefix.length))));
  };
  addEventListener("hashchange", read);
  read();
  return (state) => {
    const known = Object.entries(state).filter(([, value]) => value !== null && value !== undefined && value !== "");
    own = prefix + new URLSearchParams(known);
    history.replaceState(null, "", own);
  };
}
