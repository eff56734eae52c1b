/**
 * A list of names below a text input, to pick from while it has the focus. Anything can still be typed. Names
 * come from users and are only ever set as text.
 */

import { make } from "./dom.mjs";
import { splitNames } from "./concepts.mjs";
import { texts } from "./texts.mjs";

/** How the list that is open is closed. */
let close = () => {};

/**
 * Offer names for an input that may hold several, separated by commas, until it loses the focus.
 * @param {HTMLInputElement} input
 * @param {string[]} names
 * @param {() => void} [picked] called when a single one was picked
 */
export function offer(input, names, picked = () => {}) {
  close();
  if (!names.length || input.readOnly || input.disabled) return;
  const ended = new AbortController();
  const { signal } = ended;
  /** The name that the arrow keys are at. */
  let at = -1;

  const list = make("div", { className: "concept-pick-list", role: "listbox", ariaLabel: texts.concepts });
  list.ariaMultiSelectable = "true";
  const options = names.map((name, index) => {
    const option = make("div", { role: "option", title: texts.chip }, name);
    option.addEventListener("click", (event) => choose(index, event.ctrlKey || event.metaKey || event.shiftKey));
    return option;
  });
  list.append(...options);
  // The input keeps the focus, and the graph does not notice.
  for (const type of ["pointerdown", "mousedown", "pointerup", "wheel"]) {
    list.addEventListener(type, (event) => {
      event.stopPropagation();
      if (type !== "wheel") event.preventDefault();
    });
  }

  /** @param {number} index @param {boolean} also */
  function choose(index, also) {
    const before = splitNames(input.value);
    const name = names[index];
    const rest = before.filter((other) => other.toLowerCase() !== name.toLowerCase());
    const chosen = !also ? [name] : rest.length < before.length ? rest : [...before, name];
    input.value = chosen.join(", ");
    input.dispatchEvent(new Event("input", { bubbles: true }));
    if (also) return show();
    close();
    picked();
  }

  function show() {
    const chosen = new Set(splitNames(input.value).map((name) => name.toLowerCase()));
    for (const [index, option] of options.entries()) {
      option.ariaSelected = `${chosen.has(names[index].toLowerCase())}`;
      option.classList.toggle("at", index === at);
    }
    options[at]?.scrollIntoView({ block: "nearest" });
  }

  input.addEventListener("input", show, { signal });
  input.addEventListener("blur", () => close(), { signal });
  input.addEventListener(
    "keydown",
    (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (step) at = (at + step + names.length + (at < 0 && step < 0 ? 1 : 0)) % names.length;
      else if (event.key === "Enter" && at >= 0) choose(at, event.ctrlKey || event.metaKey || event.shiftKey);
      else if (event.key === "Escape" || event.key === "Enter") return close();
      else return;
      event.preventDefault();
      event.stopImmediatePropagation();
      show();
    },
    { signal, capture: true },
  );
  // It would stay where it is when the graph moves below it.
  window.addEventListener("wheel", () => close(), { signal, capture: true, passive: true });

  document.body.append(list);
  const { left, bottom, top, width } = input.getBoundingClientRect();
  list.style.minWidth = `${width}px`;
  list.style.left = `${Math.max(0, Math.min(left, innerWidth - list.offsetWidth))}px`;
  const below = bottom + list.offsetHeight <= innerHeight;
  list.style.top = `${below ? bottom : Math.max(0, top - list.offsetHeight)}px`;
  close = () => {
    ended.abort();
    list.remove();
    close = () => {};
  };
  show();
}
