import { make } from "./dom.mjs";
import { fill, texts } from "./texts.mjs";

/** A row of cells, one for each layer or step, of which the user picks a range. */
export class Strip {
  /** @type {number[]} */
  #numbers = [];
  /** @type {number[]} */
  #selected = [];
  #anchor = 0;

  /** @param {string} name @param {(indexes: number[]) => void} onChange */
  constructor(name, onChange) {
    this.name = name;
    this.onChange = onChange;
    this.label = make("output");
    this.cells = make("div", { className: "cells", role: "slider", tabIndex: 0, ariaLabel: name });
    this.cells.title = texts.strip;
    this.element = make(
      "div",
      { className: "row strip" },
      make("span", { textContent: name }),
      this.label,
      this.cells,
    );
    this.cells.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.cells.setPointerCapture(event.pointerId);
      this.#anchor = event.shiftKey ? this.#selected[0] : this.#at(event);
      this.#select(this.#anchor, this.#at(event));
    });
    this.cells.addEventListener("pointermove", (event) => {
      if (this.cells.hasPointerCapture(event.pointerId)) this.#select(this.#anchor, this.#at(event));
    });
    this.cells.addEventListener("keydown", (event) => this.#key(event));
  }

  /** @param {number[]} numbers of the cells @param {(number: number) => boolean} isSelected */
  show(numbers, isSelected) {
    this.#numbers = numbers;
    this.#selected = [...numbers.keys()].filter((index) => isSelected(numbers[index]));
    while (this.cells.children.length > numbers.length) this.cells.lastChild?.remove();
    while (this.cells.children.length < numbers.length) this.cells.append(make("i"));
    numbers.forEach((number, index) => {
      this.cells.children[index].classList.toggle("selected", isSelected(number));
    });
    const all = this.#selected.length === numbers.length;
    this.label.textContent = all ? fill(texts.allOf, numbers.length) : ranges(this.#selected.map((i) => numbers[i]));
    this.cells.ariaValueMin = `${numbers[0]}`;
    this.cells.ariaValueMax = `${numbers[numbers.length - 1]}`;
    this.cells.ariaValueNow = `${numbers[this.#selected[0]]}`;
    this.cells.ariaValueText = `${this.name} ${this.label.textContent}`;
  }

  /** @param {PointerEvent} event */
  #at(event) {
    const box = this.cells.getBoundingClientRect();
    const index = Math.floor(((event.clientX - box.left) / box.width) * this.#numbers.length);
    return Math.min(this.#numbers.length - 1, Math.max(0, index));
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const last = this.#numbers.length - 1;
    const from = this.#selected[0];
    const to = this.#selected[this.#selected.length - 1];
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (event.ctrlKey || event.metaKey) return;
    if (by && event.shiftKey) this.#select(from, Math.min(last, Math.max(from, to + by)));
    else if (by && from + by >= 0 && to + by <= last) this.#select(from + by, to + by);
    else if (event.key === "Home") this.#select(0, 0);
    else if (event.key === "End") this.#select(last, last);
    else if (event.key.toLowerCase() === "a") this.#select(0, last);
    else if (!by) return;
    event.preventDefault();
  }

  /** @param {number} a @param {number} b */
  #select(a, b) {
    const from = Math.min(a, b);
    const indexes = Array.from({ length: Math.abs(a - b) + 1 }, (_, i) => from + i);
    if (indexes.length !== this.#selected.length || indexes[0] !== this.#selected[0]) this.onChange(indexes);
  }
}

/** "0–3, 7" of 0, 1, 2, 3, 7. @param {number[]} numbers */
function ranges(numbers) {
  /** @type {[number, number][]} */
  const found = [];
  for (const number of numbers) {
    const last = found[found.length - 1];
    if (last && last[1] + 1 === number) last[1] = number;
    else found.push([number, number]);
  }
  return found.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
}
