// The curves: the legend shows the values at the pointer's step instead of the last ones.

export function liveCurves() {
  for (const chart of document.querySelectorAll(".chart")) {
    const { left, right, last, unit } = chart.dataset;
    const svg = chart.querySelector("svg"), here = chart.querySelector(".here"), step = chart.querySelector("small");
    const lines = [...chart.querySelectorAll("[data-points]")].map((item) => {
      const shown = item.querySelector("b");
      return { points: JSON.parse(item.dataset.points), shown, end: shown.textContent };
    });
    const format = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 }) + unit;
    const nearer = (x) => (a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    const nearest = (points, x) => points.reduce(nearer(x));

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const across = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const x = Math.min(Math.max((across - left) / (right - left), 0), 1) * last;
      const found = lines.map(({ points }) => nearest(points, x));
      const at = nearest(found, x)[0];
      lines.forEach(({ shown }, i) => (shown.textContent = format(found[i][1])));
      step.textContent = `at step ${at.toLocaleString("en")}`;
      here.setAttribute("x1", +left + ((right - left) * at) / (last || 1));
      here.setAttribute("x2", here.getAttribute("x1"));
      chart.classList.add("pointed");
    });
    svg.addEventListener("pointerleave", () => {
      lines.forEach(({ shown, end }) => (shown.textContent = end));
      step.textContent = "";
      chart.classList.remove("pointed");
    });
  }
}
