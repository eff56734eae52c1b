/**
 * Concept Attention's front end: the panel of Concept Viewer, and maps while a model samples.
 *
 * @typedef {import("@comfyorg/comfyui-frontend-types").ComfyExtension} ComfyExtension
 * @typedef {Parameters<NonNullable<ComfyExtension["nodeCreated"]>>[0]} LGraphNode
 * @typedef {import("./maps.mjs").View} View
 * @typedef {import("./selection.mjs").Selection} Selection
 *
 * Maps of a run that was queued from `workflow`, for `nodes` of it, by their execution ids and classes.
 * @typedef {import("./panel.mjs").LiveView
 *   & {workflow: string | null, nodes: Record<string, string>, sampler: string}} LiveMessage
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { andBefore } from "./graph.mjs";
import { splitNames } from "./concepts.mjs";
import { Panel } from "./panel.mjs";
import { differs, handOver } from "./saliency.mjs";
import { texts } from "./texts.mjs";

const LIVE_PREVIEW = "ConceptAttention.LivePreview";
const VIEWER = "ConceptViewer";
const OPACITY = "opacity";
const RESULT = "concept_view";
const DEFAULT_OPACITY = 0.65;
const HEIGHT = 360;

/** @type {import("./maps.mjs").Loader} */
const load = {
  file: (file, priority) => api.fetchApi(`/view?${new URLSearchParams(file)}`, { priority }),
  frames: (key, image, frames) => api.fetchApi(`/concept_attention/${key}/${image}/${frames}`),
  video: (key, video, layers, steps) =>
    api.fetchApi(`/concept_attention/${key}/video/${video}?layers=${layers}&steps=${steps}`),
};

/** @type {WeakMap<LGraphNode, Panel>} */
const panels = new WeakMap();
/** Nodes 2.0 keeps a widget's element on the page for the next widget of the same node id and type, which
 * after undo or on loading a workflow again is another one: so each has a type of its own. */
let widgets = 0;
/** The nodes that show a run. @type {Set<LGraphNode>} */
const live = new Set();
/** The latest preview of each sampler in this run. @type {Map<string, Blob>} */
const previews = new Map();
/** The nodes of this run whose outputs are those of an earlier one. @type {Set<string>} */
const cached = new Set();
/**
 * Results of workflows that were not open when they came, by execution id.
 * @type {Map<string, Map<string, View>>}
 */
const missed = new Map();
/** How the panels go that came with a run. @type {WeakMap<LGraphNode, () => void>} */
const removals = new WeakMap();

/** @param {LGraphNode} node @param {Panel} panel */
function addPanel(node, panel) {
  const { element } = panel;
  element.style.setProperty("--min-height", `${HEIGHT}px`);
  // @ts-expect-error the package of types leaves addDOMWidget out
  const widget = node.addDOMWidget("view", `concept_viewer_${++widgets}`, element, {
    hideOnZoom: false,
    hideInPanel: true,
    serialize: false,
    getMinHeight: () => HEIGHT,
  });
  widget.serialize = false;
  // The front end's side panel sets the width that a widget of a type that it does not know has there, and
  // the node would draw it that wide from then on. Without one it takes the node's.
  Object.defineProperty(widget, "width", { get: () => undefined, set: () => {} });
  element.addEventListener("keydown", (event) => {
    // Keys that work here are no shortcuts of the graph.
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
  element.addEventListener("wheel", (event) => {
    if (element.scrollHeight > element.clientHeight) event.stopPropagation();
    // In Nodes 2.0 it reaches the graph by itself.
    else if (!LiteGraph.vueNodesMode) app.canvas.processMouseWheel(event);
  });
  // The middle button drags the graph, from here as from everywhere on it.
  element.addEventListener("pointerdown", (event) => {
    if (event.button === 1 && !panel.isFullScreen) app.canvas.processMouseDown(event);
  });
  element.addEventListener("pointermove", (event) => {
    if (event.buttons & 4 && !panel.isFullScreen) app.canvas.processMouseMove(event);
  });
  element.addEventListener("pointerup", (event) => {
    if (event.button === 1 && !panel.isFullScreen) app.canvas.processMouseUp(event);
  });
  panels.set(node, panel);
  chain(node, "onRemoved", () => {
    live.delete(node);
    panel.dispose();
  });
  return panel;
}

/** A panel that comes with the first maps of a run. @param {LGraphNode} node */
function addLivePanel(node) {
  const height = node.size[1];
  const { onSerialize } = node;
  const settings = { threshold: 0.5, picked: [], opacity: DEFAULT_OPACITY };
  const panel = addPanel(node, new Panel(load, settings, () => {}));
  const [least, tall] = node.computeSize();
  node.setSize([Math.max(node.size[0], least), Math.max(height, tall)]);
  // A workflow that is saved while it runs keeps neither the panel nor the room for it.
  chain(node, "onSerialize", (saved) => (saved.size[1] = height));
  removals.set(node, () => {
    node.onSerialize = onSerialize;
    panels.delete(node);
    panel.dispose();
    node.removeWidget(widgetOf(node, "view"));
    node.setSize([node.size[0], height]);
  });
  return panel;
}

/** @param {LGraphNode} node */
function addViewer(node) {
  const threshold = widgetOf(node, "threshold");
  const concept = widgetOf(node, "concept");
  /** @returns {import("./panel.mjs").Settings} */
  const settings = () => ({
    threshold: Number(threshold.value),
    picked: splitNames(String(concept.value)),
    opacity: Number(node.properties[OPACITY] ?? DEFAULT_OPACITY),
  });
  /** @param {Partial<import("./panel.mjs").Settings>} changed */
  const keep = (changed) => {
    if (changed.threshold !== undefined) threshold.value = changed.threshold;
    if (changed.picked) concept.value = changed.picked.join(", ");
    if (changed.opacity !== undefined) node.properties[OPACITY] = changed.opacity;
    node.setDirtyCanvas(true, true);
  };
  const upstream = {
    differs: (/** @type {Selection} */ selection) => differs(node, selection),
    handOver: (/** @type {Selection} */ selection) => handOver(node, selection),
  };
  const panel = addPanel(node, new Panel(load, settings(), keep, upstream));
  for (const widget of [threshold, concept]) {
    widget.hidden = true;
    widget.options.hidden = true;
    chain(widget, "callback", () => panel.set(settings()));
  }
  chain(node, "onConfigure", () => panel.set(settings()));
  node.setSize([Math.max(node.size[0], 380), Math.max(node.size[1], 640)]);
}

/** @param {LGraphNode} node @param {View} view */
function showResult(node, view) {
  live.delete(node);
  panels.get(node)?.show(view);
  // For the page when it is reloaded. Kept in the workflow, it would count as a change of it.
  try {
    sessionStorage.setItem(storageKey(node), JSON.stringify({ view, origin: origin(node) }));
  } catch (error) {
    console.info("Concept Attention: this result will not be there when the page is reloaded.", error);
  }
}

/**
 * Show the result that was there before the page was reloaded, if the node would still get it.
 * @param {LGraphNode} node
 */
function showKept(node) {
  const kept = JSON.parse(sessionStorage.getItem(storageKey(node)) ?? "null");
  if (kept?.origin === origin(node)) panels.get(node)?.show(kept.view);
}

/** @param {LGraphNode} node */
function storageKey(node) {
  return `ConceptAttention.result/${node.graph?.id}/${node.id}`;
}

/**
 * What a node's result depends on: types and values of the nodes before it.
 * @param {LGraphNode} node
 */
function origin(node) {
  const [, ...before] = andBefore([node]);
  const values = before.map(({ type, widgets = [] }) =>
    JSON.stringify([type, ...widgets.filter((w) => w.serialize !== false).map((w) => w.value)]),
  );
  return values.sort().join();
}

/** @param {LGraphNode} node @param {string} name */
function widgetOf(node, name) {
  const widget = node.widgets?.find(({ name: other }) => other === name);
  if (!widget) throw new Error(`Concept Viewer has no widget ${name}.`);
  return widget;
}

/** @param {any} target @param {string} method @param {(...args: any[]) => void} also */
function chain(target, method, also) {
  const before = target[method];
  target[method] = function (/** @type {any[]} */ ...args) {
    const result = before?.apply(this, args);
    also(...args);
    return result;
  };
}

/** A node by the id that it has in a run, as in "5:3" for node 3 in subgraph node 5. @param {string} id */
function nodeByExecutionId(id) {
  /** @type {any} */
  let graph = app.rootGraph;
  const path = id.split(":");
  for (const outer of path.slice(0, -1)) graph = graph?.getNodeById(outer)?.subgraph;
  return /** @type {LGraphNode | undefined} */ (graph?.getNodeById(path[path.length - 1]));
}

/** A node by where it is: its number, after the id of the subgraph that it is in. @param {string} locator */
function nodeByLocator(locator) {
  const [number, subgraph] = locator.split(":").reverse();
  /** @type {any} */
  const root = app.rootGraph;
  return (subgraph ? root.subgraphs.get(subgraph) : root)?.getNodeById(number);
}

/** The other way round. @param {LGraphNode} node */
function locatorOf({ id, graph }) {
  return graph === app.rootGraph ? `${id}` : `${graph?.id}:${id}`;
}

/** Maps of a workflow that is not open are passed over; more come. @param {LiveMessage} message */
function showLive(message) {
  if (message.workflow !== app.rootGraph.id) return;
  for (const [id, type] of Object.entries(message.nodes)) {
    const node = nodeByExecutionId(id);
    if (node?.comfyClass !== type) continue;
    const panel = panels.get(node) ?? addLivePanel(node);
    live.add(node);
    panel.showLive(message, previews.get(message.sampler));
  }
}

/** The run ended, for some nodes without a result. */
function endLive() {
  for (const node of live) {
    if (node.comfyClass === VIEWER) panels.get(node)?.endLive();
    else removals.get(node)?.();
  }
  live.clear();
}

/**
 * A result goes to the workflow that was queued, which may not be the one that is open; ComfyUI itself only
 * looks for a node of that id. One from ComfyUI's cache may come from another workflow, but fits.
 * @param {string} id of the node in the run @param {View} view
 */
function receive(id, view) {
  const node = nodeByExecutionId(id);
  if (view.workflow === app.rootGraph.id || cached.has(id)) {
    if (node?.comfyClass === VIEWER) showResult(node, view);
  } else if (view.workflow) {
    const results = missed.get(view.workflow) ?? new Map();
    missed.set(view.workflow, results.set(id, view));
  }
}

/** Whether maps are shown while a model samples. */
let wantsLive = true;
/** What the server was told last. */
let told = "";

/** Tell the server whether to send maps while it samples. */
async function tell() {
  if (!api.clientId) return;
  const body = JSON.stringify({ client_id: api.clientId, on: wantsLive });
  if (body === told) return;
  told = body;
  const { ok } = await api.fetchApi("/concept_attention/live", { method: "POST", body });
  // The next status tries again.
  if (!ok && told === body) told = "";
}

/** Take the viewer's texts in the front end's language, where there are any. */
async function translate() {
  const language = `${app.extensionManager.setting.get("Comfy.Locale")}`;
  if (language === "en") return;
  const response = await api.fetchApi("/i18n");
  if (response.ok) Object.assign(texts, (await response.json())[language]?.conceptViewer);
}

app.registerExtension({
  name: "ConceptAttention",
  settings: [
    {
      // @ts-expect-error the front end's types list its own settings only
      id: LIVE_PREVIEW,
      category: ["Concept Attention", "Sampling", LIVE_PREVIEW],
      name: "Show concept maps while sampling",
      type: "boolean",
      defaultValue: true,
      // Called before the new value can be read from the settings.
      onChange(/** @type {boolean} */ value) {
        wantsLive = value;
        tell();
      },
    },
  ],
  init() {
    const href = new URL("./concept_viewer.css", import.meta.url).href;
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
  },
  async setup() {
    wantsLive = app.extensionManager.setting.get(LIVE_PREVIEW) !== false;
    // The first status brings the client's id; a server that was restarted has forgotten it.
    api.addEventListener("status", tell);
    api.addEventListener("reconnected", () => {
      told = "";
      tell();
      endLive();
    });
    api.addEventListener("execution_start", () => {
      previews.clear();
      cached.clear();
    });
    api.addEventListener("execution_cached", ({ detail }) => {
      for (const id of detail.nodes) cached.add(`${id}`);
    });
    api.addEventListener("executed", ({ detail }) => {
      const view = /** @type {any} */ (detail.output)?.[RESULT]?.[0];
      if (view) receive(`${detail.display_node || detail.node}`, view);
    });
    api.addEventListener("b_preview_with_metadata", ({ detail }) => {
      if (wantsLive) previews.set(detail.displayNodeId, detail.blob);
    });
    api.addEventListener(
      // @ts-expect-error an event of our own
      "concept_attention.maps",
      (/** @type {CustomEvent<LiveMessage>} */ { detail }) => {
        if (wantsLive) showLive(detail);
      },
    );
    for (const end of /** @type {const} */ (["execution_success", "execution_error", "execution_interrupted"])) {
      api.addEventListener(end, endLive);
    }
    await translate();
  },
  nodeCreated(node) {
    if (node.comfyClass === VIEWER) addViewer(node);
  },
  loadedGraphNode(node) {
    if (node.comfyClass === VIEWER) showKept(node);
  },
  // An older run from the history, or a return to a workflow, which may have run in the meantime.
  onNodeOutputsUpdated(/** @type {Record<string, any>} */ outputs) {
    const { id } = app.rootGraph;
    for (const [executionId, view] of missed.get(id) ?? []) {
      const node = nodeByExecutionId(executionId);
      if (node) outputs[locatorOf(node)] = { [RESULT]: [view] };
    }
    missed.delete(id);
    for (const [locator, output] of Object.entries(outputs)) {
      const view = output?.[RESULT]?.[0];
      const node = view?.workflow === id && nodeByLocator(locator);
      if (node && node.comfyClass === VIEWER) showResult(node, view);
    }
  },
});
