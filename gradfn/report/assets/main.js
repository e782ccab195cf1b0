// The page: its light or dark, its pictures and, where it holds a network, the network at work.
import { liveCurves } from "gradfn/curves.js";
import { live } from "gradfn/live.js";

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.style.colorScheme ? root.style.colorScheme === "dark" : dark.matches;
}

// What colors alone cannot do (exchange light and dark in a picture) the style sheet does by this attribute.
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

// A picture, as large as it is.
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

const told = document.getElementById("net");
if (told) window.gradfn = live(JSON.parse(told.textContent));
