/**
 * A new element with properties and children. Strings become text.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Partial<HTMLElementTagNameMap[T]>} [properties]
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/**
 * A button.
 * @param {Partial<HTMLButtonElement>} properties @param {(event: MouseEvent) => void} onClick
 * @param {(Node | string)[]} children
 */
export function makeButton(properties, onClick, ...children) {
  const button = make("button", { type: "button", ...properties }, ...children);
  button.addEventListener("click", onClick);
  return button;
}
