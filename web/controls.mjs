import { MAGMA_GRADIENT } from "./paint.mjs";
import { Strip } from "./strip.mjs";
import { make, makeButton } from "./dom.mjs";
import { texts } from "./texts.mjs";

/**
 * What is below the picture: sliders, strips, a bar of buttons, and a line that says what is shown.
 *
 * @typedef {object} Actions
 * @property {(value: number) => void} setOpacity
 * @property {(value: number) => void} setThreshold
 * @property {(places: number[]) => void} chooseLayers
 * @property {(places: number[]) => void} chooseSteps
 * @property {(by: number) => void} turn
 * @property {() => void} reset
 * @property {() => void} handOver
 * @property {() => void} copy
 * @property {(bare: boolean) => void} showBare
 * @property {() => void} toggleFullScreen
 */
export class Controls {
  /** @param {Actions} actions */
  constructor(actions) {
    this.opacity = slider(texts.opacity, actions.setOpacity);
    this.threshold = slider(texts.threshold, actions.setThreshold);
    this.layers = new Strip(texts.layers, actions.chooseLayers);
    this.steps = new Strip(texts.steps, actions.chooseSteps);
    this.plain = make("div", { className: "plain", hidden: true });
    this.element = make(
      "div",
      { className: "controls" },
      this.opacity.row,
      this.threshold.row,
      this.layers.element,
      this.steps.element,
      this.plain,
    );

    this.page = make("span");
    this.pager = make(
      "span",
      { className: "pager", hidden: true },
      makeButton({ textContent: "‹", ariaLabel: texts.previous }, () => actions.turn(-1)),
      this.page,
      makeButton({ textContent: "›", ariaLabel: texts.next }, () => actions.turn(1)),
    );
    this.low = make("span");
    this.high = make("span");
    const gradient = make("i");
    gradient.style.background = MAGMA_GRADIENT;
    this.scale = make("span", { className: "scale", hidden: true }, this.low, gradient, this.high);
    this.status = make("span", { className: "status", role: "status" });
    this.reset = makeButton(
      { textContent: texts.reset, title: texts.resetHint, hidden: true },
      actions.reset,
    );
    this.handOver = makeButton(
      { textContent: texts.handOver, title: texts.handOverHint, hidden: true },
      actions.handOver,
    );
    this.copy = makeButton({ textContent: texts.copy, title: texts.copyHint }, actions.copy);
    this.bare = iconButton("bare", texts.bare, () => {});
    this.bare.title = texts.bareHint;
    whileHeld(this.bare, actions.showBare);
    this.fullScreen = iconButton("full-screen", texts.fullScreen, actions.toggleFullScreen);
    this.fullScreen.hidden = !document.fullscreenEnabled;
    // What comes and goes is last, so that nothing moves away under the pointer.
    this.bar = make(
      "div",
      { className: "bar" },
      this.pager,
      this.copy,
      this.bare,
      this.fullScreen,
      this.reset,
      this.handOver,
    );
    // A line of its own: what is above stays where it is when these come and go.
    this.info = make("div", { className: "info" }, this.scale, this.status);
  }

  /** @param {{threshold: number, opacity: number}} settings */
  set({ threshold, opacity }) {
    this.opacity.input.valueAsNumber = opacity;
    this.threshold.input.valueAsNumber = threshold;
    this.opacity.output.textContent = opacity.toFixed(2);
  }

  /**
   * @param {import("./selection.mjs").Selection | null} selection none of a run that goes on
   * @param {boolean} canHandOver whether there is somewhere to set its layers and steps
   */
  show(selection, canHandOver) {
    this.pager.hidden = !selection || selection.view.images.length < 2;
    this.layers.element.hidden = !selection || selection.view.layers.length < 2;
    this.steps.element.hidden = !selection || selection.everyStep.length < 2;
    this.reset.hidden = !selection || selection.isGiven;
    this.handOver.hidden = !canHandOver;
    const averaged = selection?.view.average === "before softmax";
    this.plain.hidden = this.reset.hidden || (selection?.view.grounding === "paper" && !averaged);
    this.plain.textContent = averaged ? texts.averaged : texts.plain;
    if (!selection) return;
    const { view, image, layers, steps, everyStep, sigma } = selection;
    this.page.textContent = `${image + 1} / ${view.images.length}`;
    this.layers.show(view.layers, (layer) => layers.includes(layer));
    this.steps.show(everyStep, (step) => steps.includes(step));
    if (sigma !== null) this.steps.label.textContent += ` · σ ${sigma.toFixed(3)}`;
  }

  /**
   * @param {number} threshold
   * @param {{area: number, highest: number} | null} alone of the one concept that is shown: the share of the
   *   picture above the threshold, and the highest value on the scale of its colours
   */
  measure(threshold, alone) {
    const area = alone ? ` · ${(100 * alone.area).toFixed(0)} %` : "";
    this.threshold.output.textContent = threshold.toFixed(2) + area;
    this.scale.hidden = !alone;
    this.low.textContent = "0";
    this.high.textContent = alone?.highest.toFixed(2) ?? "";
  }
}

/** @param {string} icon in concept_viewer.css @param {string} name @param {() => void} onClick */
function iconButton(icon, name, onClick) {
  return makeButton({ className: "icon", title: name, ariaLabel: name }, onClick, make("i", { className: icon }));
}

/**
 * Call back when a button is pressed, by pointer or key, and when it is let go.
 * @param {HTMLButtonElement} button @param {(held: boolean) => void} onHold
 */
function whileHeld(button, onHold) {
  button.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    button.setPointerCapture(event.pointerId);
    onHold(true);
  });
  button.addEventListener("keydown", ({ key }) => (key === " " || key === "Enter") && onHold(true));
  for (const end of ["lostpointercapture", "keyup", "blur"]) button.addEventListener(end, () => onHold(false));
}

/** @param {string} name @param {(value: number) => void} onInput */
function slider(name, onInput) {
  const input = make("input", { type: "range", min: "0", max: "1", step: "0.01", ariaLabel: name });
  const output = make("output");
  const row = make("label", { className: "row" }, make("span", { textContent: name }), output, input);
  input.addEventListener("input", () => onInput(input.valueAsNumber));
  return { input, output, row };
}
