import { MAGMA_GRADIENT } from "./paint.mjs";
import { Strip } from "./strip.mjs";
import { make } from "./dom.mjs";
import { texts } from "./texts.mjs";

/**
 * What is below the picture: sliders, strips, and a bar of buttons around the status line.
 *
 * @typedef {object} Actions
 * @property {(value: number) => void} setOpacity
 * @property {(value: number) => void} setThreshold
 * @property {(places: number[]) => void} chooseLayers
 * @property {(places: number[]) => void} chooseSteps
 * @property {(by: number) => void} turn
 * @property {() => void} reset
 * @property {() => void} copy
 */
export class Controls {
  /** @param {Actions} actions */
  constructor(actions) {
    this.opacity = slider(texts.opacity, actions.setOpacity);
    this.threshold = slider(texts.threshold, actions.setThreshold);
    this.layers = new Strip(texts.layers, actions.chooseLayers);
    this.steps = new Strip(texts.steps, actions.chooseSteps);
    this.plain = make("div", { className: "plain", textContent: texts.plain, hidden: true });
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
      button("‹", () => actions.turn(-1), { ariaLabel: texts.previous }),
      this.page,
      button("›", () => actions.turn(1), { ariaLabel: texts.next }),
    );
    this.low = make("span");
    this.high = make("span");
    const gradient = make("i");
    gradient.style.background = MAGMA_GRADIENT;
    this.scale = make("span", { className: "scale", hidden: true }, this.low, gradient, this.high);
    this.status = make("span", { className: "status", role: "status" });
    this.reset = button(texts.reset, actions.reset, { title: texts.resetHint, hidden: true });
    this.copy = button(texts.copy, actions.copy, { title: texts.copyHint });
    this.bar = make("div", { className: "bar" }, this.pager, this.scale, this.status, this.reset, this.copy);
  }

  /** @param {{threshold: number, opacity: number}} settings */
  set({ threshold, opacity }) {
    this.opacity.input.valueAsNumber = opacity;
    this.threshold.input.valueAsNumber = threshold;
    this.opacity.output.textContent = opacity.toFixed(2);
  }

  /** Which image, layers and steps; none of a run that goes on. @param {import("./selection.mjs").Selection | null} selection */
  show(selection) {
    this.pager.hidden = !selection || selection.view.images.length < 2;
    this.layers.element.hidden = !selection || selection.view.layers.length < 2;
    this.steps.element.hidden = !selection || selection.everyStep.length < 2;
    this.reset.hidden = !selection || selection.isGiven;
    this.plain.hidden = this.reset.hidden || selection?.view.grounding === "paper";
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

/** @param {string} text @param {() => void} onClick @param {Partial<HTMLButtonElement>} properties */
function button(text, onClick, properties) {
  const element = make("button", { type: "button", textContent: text, ...properties });
  element.addEventListener("click", onClick);
  return element;
}

/** @param {string} name @param {(value: number) => void} onInput */
function slider(name, onInput) {
  const input = make("input", { type: "range", min: "0", max: "1", step: "0.01", ariaLabel: name });
  const output = make("output");
  const row = make("label", { className: "row" }, make("span", { textContent: name }), output, input);
  input.addEventListener("input", () => onInput(input.valueAsNumber));
  return { input, output, row };
}
