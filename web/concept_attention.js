/**
 * Concept Attention's front end: the panel of Concept Viewer, and maps while a model samples.
 *
 * @typedef {import("@comfyorg/comfyui-frontend-types").ComfyExtension} ComfyExtension
 * @typedef {Parameters<NonNullable<ComfyExtension["nodeCreated"]>>[0]} LGraphNode
 * @typedef {import("./panel.mjs").LiveView & {nodes: string[], sampler: string}} LiveMessage
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Panel } from "./panel.mjs";
import { texts } from "./texts.mjs";

const LIVE_PREVIEW = "ConceptAttention.LivePreview";
const VIEWER = "ConceptViewer";
const OPACITY = "opacity";
const RESULT = "concept_view";
const DEFAULT_OPACITY = 0.65;
const HEIGHT = 360;

/** @type {import("./maps.mjs").Loader} */
const load = {
  file: (file) => api.fetchApi(`/view?${new URLSearchParams(file)}`),
  frames: (key, image, frames) => api.fetchApi(`/concept_attention/${key}/${image}/${frames}`),
};

/** @type {WeakMap<LGraphNode, Panel>} */
const panels = new WeakMap();
/** Nodes 2.0 keeps a widget's element on the page for the next widget of the same node id and type, which
 * after undo or on loading a workflow again is another one: so each has a type of its own. */
let widgets = 0;
/** The panels that show a run. @type {Set<Panel>} */
const live = new Set();
/** The latest preview of each sampler in this run. @type {Map<string, Blob>} */
const previews = new Map();

/** @param {LGraphNode} node @param {Panel} panel */
function addPanel(node, panel) {
  const { element } = panel;
  element.style.setProperty("--min-height", `${HEIGHT}px`);
  // @ts-expect-error the package of types leaves addDOMWidget out
  const widget = node.addDOMWidget("view", `concept_viewer_${++widgets}`, element, {
    hideOnZoom: false,
    serialize: false,
    getMinHeight: () => HEIGHT,
  });
  widget.serialize = false;
  element.addEventListener("keydown", (event) => {
    // Keys that work here are no shortcuts of the graph.
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
  element.addEventListener("wheel", (event) => {
    // In Nodes 2.0 it reaches the graph by itself.
    if (!LiteGraph.vueNodesMode) app.canvas.processMouseWheel(event);
  });
  // The middle button drags the graph, from here as from everywhere.
  element.addEventListener("pointerdown", (event) => event.button === 1 && app.canvas.processMouseDown(event));
  element.addEventListener("pointermove", (event) => event.buttons & 4 && app.canvas.processMouseMove(event));
  element.addEventListener("pointerup", (event) => event.button === 1 && app.canvas.processMouseUp(event));
  panels.set(node, panel);
  chain(node, "onRemoved", () => panel.dispose());
  return panel;
}

/** A panel that comes with the first maps and is not saved. @param {LGraphNode} node */
function addLivePanel(node) {
  const settings = { threshold: 0.5, picked: [], opacity: DEFAULT_OPACITY };
  const panel = addPanel(node, new Panel(load, settings, () => {}));
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
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
  const panel = addPanel(
    node,
    new Panel(load, settings(), (changed) => {
      if (changed.threshold !== undefined) threshold.value = changed.threshold;
      if (changed.picked) concept.value = changed.picked.join(", ");
      if (changed.opacity !== undefined) node.properties[OPACITY] = changed.opacity;
      node.setDirtyCanvas(true, true);
    }),
  );
  for (const widget of [threshold, concept]) {
    widget.hidden = true;
    widget.options.hidden = true;
    chain(widget, "callback", () => panel.set(settings()));
  }
  chain(node, "onExecuted", (output) => showResult(node, output));
  chain(node, "onConfigure", () => {
    panel.set(settings());
    const view = sessionStorage.getItem(storageKey(node));
    if (view) panel.show(JSON.parse(view));
  });
  node.setSize([Math.max(node.size[0], 380), Math.max(node.size[1], 640)]);
}

/** @param {LGraphNode} node @param {any} output of a run */
function showResult(node, output) {
  const [view] = output[RESULT];
  const panel = /** @type {Panel} */ (panels.get(node));
  live.delete(panel);
  panel.show(view);
  // For the page when it is reloaded. Kept in the workflow, it would count as a change of it.
  sessionStorage.setItem(storageKey(node), JSON.stringify(view));
}

/** @param {LGraphNode} node */
function storageKey(node) {
  return `ConceptAttention.result/${node.graph?.id}/${node.id}`;
}

/**
 * Names as core/concepts.py splits them.
 * @param {string} text
 */
function splitNames(text) {
  return text.split(",").map((name) => name.trim()).filter(Boolean);
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

/** @param {LiveMessage} message */
function showLive(message) {
  for (const id of message.nodes) {
    const node = nodeByExecutionId(id);
    if (!node) continue;
    const panel = panels.get(node) ?? addLivePanel(node);
    live.add(panel);
    panel.showLive(message, previews.get(message.sampler));
  }
}

/** Whether maps are shown while a model samples. */
let wantsLive = true;
/** What the server was told last. */
let told = "";

/** Tell the server whether to send maps while it samples. */
function tell() {
  if (!api.clientId) return;
  const body = JSON.stringify({ client_id: api.clientId, on: wantsLive });
  if (body === told) return;
  told = body;
  api.fetchApi("/concept_attention/live", { method: "POST", body });
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
    });
    api.addEventListener("execution_start", () => previews.clear());
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
      api.addEventListener(end, () => {
        for (const panel of live) panel.endLive();
        live.clear();
      });
    }
    await translate();
  },
  nodeCreated(node) {
    if (node.comfyClass === VIEWER) addViewer(node);
  },
  // An older run from the history, or a return to a workflow that ran in the meantime.
  onNodeOutputsUpdated(/** @type {Record<string, any>} */ outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      const node = nodeByLocator(locator);
      if (node?.comfyClass === VIEWER && RESULT in output) showResult(node, output);
    }
  },
});
