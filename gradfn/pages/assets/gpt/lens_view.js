// The logit lens: what each layer would predict at the chosen position.
import { element } from "gradfn/core/dom.js";
import { logitLens } from "gradfn/gpt/lens.js";
import { names } from "gradfn/gpt/tokenizer.js";
import { most } from "gradfn/gpt/next.js";
import { percent, quoted, visible } from "gradfn/gpt/names.js";

const ALL = 6; // blocks, up to which the table has a row after each block's attention, too

export function makeLens(find, model) {
  const body = find("lens"), heading = find("lens-target");

  function show(now, { position }) {
    const layers = logitLens(model, now.pass, position)
      .filter(({ site }) => model.config.n_layers <= ALL || !site.endsWith("_mid"));
    const follows = now.targets[position];
    const end = layers[layers.length - 1].probabilities;
    const target = follows >= 0 ? follows : most(end, 1)[0];
    const [name] = names(model, Int32Array.of(target));
    heading.replaceChildren(quoted(name), element("small", {}, follows >= 0 ? " (follows)" : " (its prediction)"));
    body.replaceChildren(
      ...layers.map(({ site, probabilities }) => {
        const top = most(probabilities, 3);
        const cells = names(model, Int32Array.from(top)).map((token, i) => {
          const cell = element("td", { class: top[i] === target ? "guess target" : "guess" });
          cell.append(element("b", {}, visible(token)), " ", element("small", {}, percent(probabilities[top[i]])));
          return cell;
        });
        const share = element("td", { class: "reached" }, element("span", { class: "share" }, element("i")),
          percent(probabilities[target]));
        share.firstChild.style.setProperty("--share", probabilities[target]);
        return element("tr", {}, element("th", { scope: "row" }, layerOf(model, site)), ...cells, share);
      }),
    );
  }

  return { show };
}

// What a site of the residual stream comes after, in words.
export function layerOf({ config }, site) {
  if (site === "embedded") return "embedding";
  const block = `block ${site.startsWith("blocks/") ? site.split("/")[1] : 0}`;
  if (!config.feed) return block; // of attention alone
  return `${block} ${site.endsWith("_mid") ? "attention" : "feed-forward"}`;
}
