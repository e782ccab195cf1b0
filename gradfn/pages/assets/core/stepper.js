// How many steps of a backward pass are shown, and the buttons of core/stepper.html that change it.

// `count()` is the number of steps. `draw()` is called when another number is shown, and `revealed()` after a click.
export function makeStepper(find, count, draw, revealed) {
  const buttons = ["next", "every", "previous"].map(find);
  const [next, every, previous] = buttons;
  let shown = 1;

  function reveal(n) {
    shown = Math.min(Math.max(n, 0), count());
    draw();
  }

  function click(n) {
    reveal(n);
    revealed();
  }
  next.addEventListener("click", () => click(shown + 1));
  previous.addEventListener("click", () => click(shown - 1));
  every.addEventListener("click", () => click(count()));

  return {
    reveal,
    next: () => click(shown + 1),
    shown: () => shown,
    // Call this after the steps were drawn.
    update() {
      const focused = document.activeElement;
      next.disabled = every.disabled = shown === count();
      previous.disabled = shown === 0;
      // A button that can no longer be pressed passes the keyboard's focus on.
      if (buttons.includes(focused) && focused.disabled) buttons.find((each) => !each.disabled).focus();
    },
  };
}
