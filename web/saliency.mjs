/**
 * The Concept Saliency that a viewer's maps come from, to set the layers and steps there that the viewer shows.
 *
 * @typedef {import("./graph.mjs").LGraphNode} LGraphNode
 * @typedef {import("./selection.mjs").Selection} Selection
 */

import { app } from "../../scripts/app.js";
import { source } from "./graph.mjs";
import { chosenEvaluations, same } from "./maps.mjs";

const SALIENCY = "ConceptSaliency";
/** Concept Saliency's end_step where it takes every step. */
const NO_END = 10000;

/**
 * Whether there is a Concept Saliency before the viewer whose widgets say something else.
 * @param {LGraphNode} viewer @param {Selection} selection
 */
export function differs(viewer, selection) {
  const node = saliencyBefore(viewer);
  const wanted = Object.entries(widgetValues(selection));
  const widgets = wanted.map(([name]) => node && freeWidget(node, name));
  return widgets.every(Boolean) && wanted.some(([, value], i) => widgets[i]?.value !== value);
}

/**
 * Set its widgets, as one change that can be undone.
 * @param {LGraphNode} viewer @param {Selection} selection
 * @returns {string | null} the title of the node; null if it is no longer there
 */
export function handOver(viewer, selection) {
  const node = saliencyBefore(viewer);
  if (!node || !differs(viewer, selection)) return null;
  app.canvas.emitBeforeChange();
  for (const [name, value] of Object.entries(widgetValues(selection))) {
    const widget = freeWidget(node, name);
    if (!widget) continue;
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  }
  app.canvas.emitAfterChange();
  node.setDirtyCanvas(true, true);
  return node.getTitle() ?? null;
}

/**
 * A selection as Concept Saliency's widgets take it. What is as the maps were made stays as it is written there.
 * @param {Selection} selection
 */
function widgetValues({ view, layers, evaluations, steps, everyStep }) {
  /** @type {Record<string, string | number>} */
  const values = {};
  if (!same(layers, view.chosen_layers)) {
    const [first, last] = [layers[0], layers[layers.length - 1]];
    if (layers.length === view.layers.length) values.layers = "all";
    else values.layers = first === last ? `${first}` : `${first}-${last}`;
  }
  if (!same(evaluations, chosenEvaluations(view))) {
    const all = steps.length === everyStep.length;
    values.start_step = all ? 0 : steps[0];
    values.end_step = all ? NO_END : steps[steps.length - 1] + 1;
  }
  return values;
}

/** A widget that no link takes the value for. @param {LGraphNode} node @param {string} name */
function freeWidget(node, name) {
  const linked = node.inputs.some((input) => input.widget?.name === name && input.link != null);
  return linked ? null : node.widgets?.find((widget) => widget.name === name);
}

/** @param {LGraphNode} viewer */
function saliencyBefore(viewer) {
  const input = viewer.inputs.find(({ name }) => name === "maps");
  const node = viewer.graph && source(viewer.graph, input?.link, input?.type);
  return node?.comfyClass === SALIENCY ? node : null;
}
