import { make, makeButton } from "./dom.mjs";
import { texts } from "./texts.mjs";

/** The names of the concepts, to pick some of them. */
export class Chips {
  #key = "";

  /**
   * @param {(concept: number | null, add: boolean) => void} onPick a concept, beside those picked before or
   *   instead of them; null for all
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
    const key = JSON.stringify([concepts, colours, shown]);
    if (key !== this.#key) {
      this.#key = key;
      this.element.replaceChildren(
        chip(texts.all, null, () => this.onPick(null, false)),
        ...concepts.map((name, index) => this.#chip(name, colours[index], index, index >= shown)),
      );
    }
    [...this.element.children].forEach((button, index) => {
      button.ariaPressed = `${index === 0 ? !picked.length : picked.includes(index - 1)}`;
    });
  }

  /** @param {string} name @param {string} colour @param {number} index @param {boolean} background */
  #chip(name, colour, index, background) {
    const button = chip(name, colour, (event) => this.onPick(index, adds(event)));
    button.title = `${name}\n${texts.chip}`;
    button.classList.toggle("background", background);
    for (const type of ["pointerenter", "focus"]) button.addEventListener(type, () => this.onHover(index));
    for (const type of ["pointerleave", "blur"]) button.addEventListener(type, () => this.onHover(null));
    return button;
  }
}

/** Whether a click or key adds to what was picked, or takes away. @param {MouseEvent | KeyboardEvent} event */
export function adds({ ctrlKey, metaKey, shiftKey }) {
  return ctrlKey || metaKey || shiftKey;
}

/** @param {string} text @param {string | null} colour @param {(event: MouseEvent) => void} onClick */
function chip(text, colour, onClick) {
  const button = makeButton({ className: "chip" }, onClick, make("span", { textContent: text }));
  if (colour) button.style.setProperty("--colour", colour);
  return button;
}
