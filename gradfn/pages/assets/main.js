// The page: its light or dark theme, its pictures and the running networks that it contains.
import { liveCurves } from "gradfn/core/curves.js";
import { livePictures } from "gradfn/core/pictures.js";
import { connectTerms } from "gradfn/core/terms.js";

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.style.colorScheme ? root.style.colorScheme === "dark" : dark.matches;
}

// The style sheet uses this attribute to invert pictures in dark mode, which colors alone cannot do.
function showTheme() {
  root.dataset.theme = isDark() ? "dark" : "light";
  root.dispatchEvent(new Event("theme"));
}

document.getElementById("theme").addEventListener("click", () => {
  root.style.colorScheme = isDark() ? "light" : "dark";
  showTheme();
});
dark.addEventListener("change", showTheme);
showTheme();

livePictures();

// What can be scrolled can be scrolled by keys.
const scrolled = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
for (const each of document.querySelectorAll(".scroll")) scrolled.observe(each);

liveCurves();

// The running networks. For tests, and for use in the browser's console: `gradfn` is the first, `gradfnAll` are all of
// them.
window.gradfnAll = [];
for (const section of document.querySelectorAll("section.live")) {
  const { start } = await import(`gradfn/${section.dataset.kind}/page.js`);
  const content = section.querySelector("script.content");
  gradfnAll.push(start(section, JSON.parse(content.textContent)));
}
connectTerms();
if (gradfnAll.length) window.gradfn = gradfnAll[0];
window.ready = true;
