// One node in detail: its inputs, weights and products, its sum, its activation, and their gradients.
import { element, gradientOf, number, sub } from "gradfn/core/dom.js";
import { gradients } from "gradfn/digits/mlp.js";

const ROWS = 12; // inputs in the table, those with the largest products

export function makeNodeTable(find, net) {
  const last = net.layers.length - 1;
  const cell = (html) => {
    const made = element("td");
    made.innerHTML = html;
    return made;
  };

  return {
    show(open) {
      const { layer, node, weights, input, bias, sum, z, a, squash, grads } = open;
      const own = `${sub(layer + 1)}[${node}]`, from = layer ? `a${sub(layer)}` : "x";
      find("node-title").textContent = layer === last ? `Output ${node}` : `Node ${node} of hidden layer ${layer + 1}`;
      const top = Array.from(weights, (weight, j) => [Math.abs(weight * input[j]), j]).sort((p, q) => q[0] - p[0])
        .slice(0, ROWS);
      const ofWeights = grads[`W${layer + 1}`].subarray(node * input.length, (node + 1) * input.length);
      find("node-inputs").replaceChildren(
        ...top.map(([, j]) => {
          const head = element("th", { scope: "row" });
          head.innerHTML = `${from}[${j}]`;
          const numbers = [input[j], weights[j], weights[j] * input[j], ofWeights[j]];
          return element("tr", {}, head, ...numbers.map((value) => cell(number(value))));
        }),
      );
      const more = input.length - top.length;
      find("node-more").hidden = !more;
      const rest = sum - top.reduce((total, [, j]) => total + weights[j] * input[j], 0);
      find("node-more").textContent = `… and ${more.toLocaleString("en")} inputs more, whose products add up to ` +
        `${number(rest)}.`;
      find("node-sum").innerHTML = `w · ${from} = <b>${number(sum)}</b>`;
      find("node-z").innerHTML = `z${own} = ${number(sum)} ${bias < 0 ? "−" : "+"} ${number(Math.abs(bias))} = ` +
        `<b>${number(z)}</b>`;
      find("node-a").hidden = squash === "none";
      find("node-a").innerHTML = `a${own} = ${squash}(z) = <b>${number(a)}</b>`;
      const names = squash === "none" ? [`z${layer + 1}`] : [`a${layer + 1}`, `z${layer + 1}`];
      const texts = names.map((name) => `${gradientOf(name)} = <b>${number(grads[name][node])}</b>`);
      find("node-gradients").innerHTML = `${texts.join(", ")} = ${gradientOf("b")}`;
    },
  };
}
