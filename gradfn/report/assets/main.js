// The page: its light or dark theme, its pictures and, if it contains one, the running network.
import { liveCurves } from "gradfn/curves.js";
import { live } from "gradfn/live.js";

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

// Show a picture in its original size.
const large = document.getElementById("large");
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    large.querySelector(".scroll").replaceChildren(button.firstElementChild.cloneNode());
    large.showModal();
  });
}
large.addEventListener("click", (event) => {
  if (event.target === large || event.target.tagName === "IMG") large.close();
});

liveCurves();

const content = document.getElementById("net");
if (content) window.gradfn = live(JSON.parse(content.textContent));
