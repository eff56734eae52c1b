import { make } from "./dom.mjs";
import { fill, texts } from "./texts.mjs";

const MOST_ROWS = 8;
/** Pixels that a row takes, and what is around the rows. */
const ROW = 17;
const AROUND = 18;

/** The concepts at a patch of the picture, beside it. */
export class Card {
  constructor() {
    this.element = make("div", { className: "card", hidden: true });
  }

  hide() {
    this.element.hidden = true;
  }

  /**
   * @param {{name: string, colour: string, value: number}[]} concepts highest first
   * @param {import("./stage.mjs").Stage} stage
   */
  show(concepts, stage) {
    const room = Math.floor((stage.element.clientHeight - AROUND) / ROW);
    // The last row says how many more there are.
    const fitting = Math.min(MOST_ROWS, concepts.length > room ? Math.max(3, room - 1) : room);
    this.element.hidden = false;
    this.element.replaceChildren(...concepts.slice(0, fitting).map(row));
    if (concepts.length > fitting) {
      const text = fill(texts.more, concepts.length - fitting);
      this.element.append(make("div", { className: "more", textContent: text }));
    }
    this.place(stage);
  }

  /** Beside the patch, on the side where there is room. @param {import("./stage.mjs").Stage} stage */
  place({ element: stage, frame, marker }) {
    const card = this.element;
    const x = frame.offsetLeft + marker.offsetLeft;
    const y = frame.offsetTop + marker.offsetTop;
    const right = x + marker.offsetWidth + 10;
    const left = right + card.offsetWidth > stage.clientWidth ? x - card.offsetWidth - 10 : right;
    const top = Math.min(y + 10, stage.clientHeight - card.offsetHeight - 4);
    card.style.left = `${Math.max(4, left)}px`;
    card.style.top = `${Math.max(4, top)}px`;
  }
}

/** @param {{name: string, colour: string, value: number}} concept */
function row({ name, colour, value }) {
  const bar = make("i");
  bar.style.setProperty("--share", `${Math.min(1, value)}`);
  const element = make(
    "div",
    {},
    make("b", { textContent: name }),
    make("span", { textContent: value.toFixed(3) }),
    bar,
  );
  element.style.setProperty("--colour", colour);
  return element;
}
