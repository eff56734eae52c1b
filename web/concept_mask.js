/**
 * Concept Mask's front end: the names of the concepts that its maps have, to pick from.
 *
 * @typedef {Parameters<NonNullable<import("@comfyorg/comfyui-frontend-types").ComfyExtension["nodeCreated"]>>[0]}
 *   LGraphNode
 */

import { app } from "../../scripts/app.js";
import { andBefore, giver } from "./graph.mjs";
import { splitNames } from "./concepts.mjs";
import { offer } from "./pick_list.mjs";

const MASK = "ConceptMask";
const CONCEPT = "concept";
const OBSERVERS = ["ConceptAttention", "ConceptAttentionImage"];
/** The names that a node's maps had when it last ran. @type {WeakMap<LGraphNode, string[]>} */
const known = new WeakMap();

/**
 * The names in the nodes that observe, background last: those of the nearest one before `node`, or else those
 * that its maps had in the last run.
 * @param {LGraphNode} node
 */
function namesFor(node) {
  const observer = observerBefore(node);
  if (!observer) return known.get(node) ?? [];
  const texts = ["concepts", "background"].map((field) => observer.widgets?.find(({ name }) => name === field)?.value);
  return splitNames(texts.join());
}

/**
 * The nearest node whose concepts the maps of `node` have. Nothing if they come from a file, or the concepts from
 * another node.
 * @param {LGraphNode} node
 */
function observerBefore(node) {
  const maps = giver(node, node.findInputSlot("maps"));
  // Or out of the subgraph that it is in, at the head of which it is.
  for (const one of andBefore([maps ?? node])) {
    if (!OBSERVERS.includes(`${one.comfyClass}`)) continue;
    return one.inputs.some(({ name, link }) => name === "concepts" && link != null) ? null : one;
  }
  return null;
}

app.registerExtension({
  name: "ConceptAttention.ConceptMask",
  init() {
    const href = new URL("./pick_list.css", import.meta.url).href;
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
    // The inputs of Nodes 2.0. They name their widget.
    document.addEventListener("focusin", ({ target }) => {
      if (!(target instanceof HTMLInputElement) || target.ariaLabel !== CONCEPT) return;
      const id = target.closest("[data-node-id]")?.getAttribute("data-node-id");
      const node = id && app.canvas.graph?.getNodeById(id);
      if (node && node.comfyClass === MASK) offer(target, namesFor(node));
    });
  },
  nodeCreated(node) {
    if (node.comfyClass !== MASK) return;
    const widget = /** @type {any} */ (node.widgets?.find(({ name }) => name === CONCEPT));
    // The classic canvas asks for the value in a dialog.
    const { onClick } = widget;
    widget.onClick = function (/** @type {any} */ options) {
      onClick.call(this, options);
      const dialog = options.canvas.prompt_box;
      const input = dialog?.querySelector("input");
      if (!input) return;
      const open = () => offer(input, namesFor(node), () => dialog.querySelector("button").click());
      input.addEventListener("focus", open);
      if (document.activeElement === input) open();
    };
    const executed = /** @type {any} */ (node);
    const { onExecuted } = executed;
    executed.onExecuted = function (/** @type {any} */ output) {
      onExecuted?.call(this, output);
      if (output.concepts) known.set(node, output.concepts);
    };
  },
});
