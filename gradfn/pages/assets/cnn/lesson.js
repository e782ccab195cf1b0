// The lesson of the convolutional network.
import { number, sub } from "gradfn/core/dom.js";
import { makeLesson } from "gradfn/core/lesson.js";
import { largest } from "gradfn/cnn/pictures.js";
import { percent } from "gradfn/cnn/outputs.js";

// `page` is { net, state, now(), without(), explained(), shown(), labels, first }; see page.js.
export function makeCnnLesson(section, find, page) {
  const { net, state } = page;
  const n = net.convs.length, nSteps = () => page.now().steps.length;
  const predicted = () => page.now().probabilities.indexOf(Math.max(...page.now().probabilities));
  const best = () => `${predicted()} with ${percent(page.now().probabilities[predicted()])}`;
  const loss = () => `${number(page.now().loss)} nats`;
  const draws = Boolean(find("pad"));
  const { nIn, window, nOut } = net.convs[0];
  let before = {}; // what was there when the step started
  const remember = () => {
    before = { ...state, at: [...state.at], off: state.off.size, loss: page.now().loss, shown: page.shown() };
  };
  const filter = () => `filter ${state.filter} of convolution ${state.layer + 1}`;

  return makeLesson(section, [
    {
      see: `An image of ${net.height} × ${net.width} pixels goes in, a probability for each of ${net.classes} labels
          comes out. In between are ${
        n === 1 ? "a convolution" : `${n} convolutions`} and dense layers.`,
      act: draws ? "Draw a 3. Without a pointer, pick a test digit." : "Pick another image.",
      start: remember,
      done: () => state.x !== before.x,
      happened: () => `The prediction is ${best()}.`,
      at: () => section.querySelector(draws ? ".drawing" : ".picking"),
    },
    {
      see: `Each <dfn data-term="filter">filter</dfn> is ${nIn > 1 ? `${nIn} windows` : "a window"} of ${window} ×
          ${window} weights. It slides over the image and gives a <dfn data-term="feature map">map</dfn>, which is
          strong where the image looks like its weights.`,
      act: "Click another filter of convolution 1.",
      start: remember,
      done: () => state.layer === 0 && state.filter !== before.filter,
      happened: () => `This is ${filter()}. Its largest activation here is ${
        number(largest(mapOf("a")))}. Its weights are below: it is most active where red ones meet large pixels and ` +
          `blue ones small pixels.`,
      at: () => section.querySelector(".maps-row"),
    },
    {
      see: "Each pixel of the map z is one sum: the pixels under the window, times the weights, plus the bias.",
      act: "Point at another pixel of the map z, or use its arrow keys.",
      start: remember,
      done: () => state.at.join() !== before.at.join(),
      happened: () => {
        const { sum, bias, z } = page.explained();
        return `Row ${state.at[0]}, column ${state.at[1]}: the products add up to ${number(sum)}, the bias is
          ${number(bias)}, so z = <b>${
          number(z)}</b>.`;
      },
      at: () => find("z"),
    },
    {
      see: `The <dfn data-term="activation">activation</dfn> ${net.activation} follows${
        net.activation === "relu" ? ": negative sums become 0" : ""}. Then <dfn data-term="pooling">pooling</dfn> ` +
          `keeps the largest of each 2 × 2 pixels.`,
      act: "Show all maps after pooling.",
      start: remember,
      done: () => state.kind === "p",
      happened: () => `The maps of convolution 1 shrink from ${net.height} × ${net.width} to ${net.height >> 1} × ${
        net.width >> 1} pixels. That is all that the next layer sees.`,
      at: () => find("kinds"),
    },
    n > 1
      ? {
        see: `A filter of convolution 2 sees all ${nOut} maps at once. It has a window of weights for each of these
          <dfn data-term="channel">channels</dfn>.`,
        act: "Click a filter of convolution 2.",
        start: remember,
        done: () => state.layer === 1,
        happened: () => {
          const sums = page.explained().channels.map(({ sum }) => sum), top = sums.map(Math.abs);
          const most = top.indexOf(Math.max(...top));
          return `At row ${state.at[0]}, column ${state.at[1]}, most comes from p1[${most}]: ${number(sums[most])} of
          z = ${number(page.explained().z)}.`;
        },
        at: () => section.querySelectorAll(".maps-row")[1],
      }
      : {
        see: `Around the image are zeros: the <dfn data-term="padding">padding</dfn>.`,
        act: "Move the pixel of the map z to row 0.",
        start: remember,
        done: () => state.at[0] === 0,
        happened: () => "A part of the window lies outside of the image. There its input is 0.",
        at: () => find("z"),
      },
    {
      see: "Which filters does the prediction need? Switching one off makes its map 0, and everything after it is " +
        "computed again.",
      act: "Switch the open filter off.",
      start: remember,
      done: () => state.off.size > before.off,
      happened: () => `Without ${filter()} the prediction is ${best()}. The loss goes from ${number(before.loss)} to
          <b>${loss()}</b>.`,
      at: () => find("off"),
    },
    {
      see: "Filters share their work: without one of them the loss often changes less than you would expect.",
      act: "Switch all filters on again.",
      start: remember,
      done: () => !state.off.size,
      happened: () => `The prediction is ${best()} again, the loss ${loss()}.`,
      at: () => find("restore"),
    },
    {
      see: `The <dfn data-term="loss">loss</dfn> is −log of the probability of the correct label, in
          <dfn data-term="nats">nats</dfn>. The backward pass finds what it comes from, starting at the end.`,
      act: "Choose another correct label.",
      start: remember,
      done: () => state.asked && state.label !== before.label,
      happened: () => `If ${state.label} were correct, its probability of
          ${percent(page.now().probabilities[state.label])} would cost <b>${
        loss()}</b>.`,
      at: () => section.querySelector(".correct"),
    },
    {
      see: `The first gradient is P − y: the probabilities minus the target. Each step takes it one layer further ` +
        `back.`,
      act: "Continue until the gradient has gone through a pooling: it reaches the largest pixel of each 2 × 2.",
      start: remember,
      done: () => page.shown() > page.now().steps.findIndex(({ name }) => name === `a${n}`),
      happened: () => `∂L/∂a${sub(n)} is 0 at three of four pixels: they were not the largest, so they did not matter.`,
      at: () => section.querySelector(".stepper"),
    },
    {
      see: "A filter is used at every pixel. So the gradient at its weights is a sum over all pixels of its map.",
      act: "Show all steps.",
      start: remember,
      done: () => page.shown() === nSteps(),
      happened: () => `The last picture is the gradient at the pixels; its largest magnitude is ` +
        `${number(largest(page.now().gradients.x))}. ${
        draws ? "More ink on" : "A larger value of"} a <b class="more">red</b> pixel increases the loss, ` +
          `${draws ? "on" : "of"} a <b class="less">blue</b> one decreases it.`,
      at: () => section.querySelector(".stepper"),
    },
  ]);

  function mapOf(kind) {
    const all = page.now().pass.values[`${kind}${state.layer + 1}`], size = all.length / net.convs[state.layer].nOut;
    return all.subarray(state.filter * size, (state.filter + 1) * size);
  }
}
