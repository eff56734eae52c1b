import { make } from "./dom.mjs";
import { texts } from "./texts.mjs";

/** The names of the concepts, to pick some of them. */
export class Chips {
  #key = "";
  /** @type {number[]} */
  #picked = [];

  /**
   * @param {(picked: number[]) => void} onPick none are all
   * @param {(concept: number | null) => void} onHover
   */
  constructor(onPick, onHover) {
    this.onPick = onPick;
    this.onHover = onHover;
    this.element = make("div", { className: "chips", role: "group", ariaLabel: texts.concepts });
    this.element.addEventListener("wheel", (event) => {
      if (this.element.scrollHeight > this.element.clientHeight) event.stopPropagation();
    });
  }

  /** @param {import("./stage.mjs").Scene} scene @param {number[]} picked */
  show({ concepts, colours, shown }, picked) {
    this.#picked = picked;
    const key = JSON.stringify([concepts, colours, shown]);
    if (key !== this.#key) {
      this.#key = key;
      this.element.replaceChildren(
        chip(texts.all, null, () => this.onPick([])),
        ...concepts.map((name, index) => this.#chip(name, colours[index], index, index >= shown)),
      );
    }
    [...this.element.children].forEach((button, index) => {
      button.ariaPressed = `${index === 0 ? !picked.length : picked.includes(index - 1)}`;
    });
  }

  /** @param {string} name @param {string} colour @param {number} index @param {boolean} background */
  #chip(name, colour, index, background) {
    const button = chip(name, colour, (event) => this.#pick(index, event));
    button.title = `${name}\n${texts.chip}`;
    button.classList.toggle("background", background);
    for (const type of ["pointerenter", "focus"]) button.addEventListener(type, () => this.onHover(index));
    for (const type of ["pointerleave", "blur"]) button.addEventListener(type, () => this.onHover(null));
    return button;
  }

  /**
   * This concept alone, or all if it was alone; with Ctrl or Shift it is added or taken away.
   * @param {number} concept @param {MouseEvent} event
   */
  #pick(concept, event) {
    const picked = this.#picked;
    const rest = picked.filter((other) => other !== concept);
    if (event.ctrlKey || event.metaKey || event.shiftKey) {
      this.onPick(rest.length < picked.length ? rest : [...picked, concept]);
    } else {
      this.onPick(picked.length === 1 && picked[0] === concept ? [] : [concept]);
    }
  }
}

/** @param {string} text @param {string | null} colour @param {(event: MouseEvent) => void} onClick */
function chip(text, colour, onClick) {
  const button = make("button", { type: "button", className: "chip" }, make("span", { textContent: text }));
  if (colour) button.style.setProperty("--colour", colour);
  button.addEventListener("click", onClick);
  return button;
}
