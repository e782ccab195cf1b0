// The target that the loss compares the output with: a label, or one value per output.
import { element, sub } from "gradfn/core/dom.js";
import { nOutputs } from "gradfn/mlp/network.js";

const SHOWN = 32; // outputs that have a field

// Call `chosen(target)`.
export function makeTarget(find, net, chosen) {
  const root = find("target"), n = nOutputs(net);
  if (net.labels) {
    const select = element("select", { id: `${root.id}-label`, onchange: () => chosen(Number(select.value)) });
    for (let i = 0; i < n; i++) select.append(element("option", { value: i }, `${i}`));
    root.append(element("label", { for: select.id }, "The correct label is "), select);
    return { show: (target) => (select.value = `${target}`) };
  }
  let target = new Float64Array(n);
  root.append(element("span", {}, n > SHOWN ? `The target of the first ${SHOWN} outputs is ` : "The target is "));
  const fields = Array.from({ length: Math.min(n, SHOWN) }, (_, i) => {
    const field = element("input", { type: "number", step: "any", "aria-label": `Target of output ${i}` });
    field.addEventListener("input", () => {
      if (field.value === "" || !Number.isFinite(field.valueAsNumber)) return;
      chosen(target.map((value, j) => (i === j ? field.valueAsNumber : value)));
    });
    const label = element("span", { class: "target-name" });
    label.innerHTML = `y${sub(i)}`;
    root.append(element("span", { class: "target-field" }, label, field));
    return field;
  });
  return {
    show(wanted) {
      target = wanted;
      fields.forEach((field, i) => {
        if (document.activeElement !== field) field.value = Number(wanted[i].toPrecision(6));
      });
    },
  };
}
