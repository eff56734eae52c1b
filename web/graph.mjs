/**
 * The nodes of a graph that come before others.
 *
 * @typedef {Parameters<NonNullable<import("@comfyorg/comfyui-frontend-types").ComfyExtension["nodeCreated"]>>[0]}
 *   LGraphNode
 */

import { app } from "../../scripts/app.js";

/** LiteGraph's mode of nodes that are bypassed, and of those that are muted. */
const BYPASSED = 4;
const MUTED = 2;

/**
 * The node that an input gets its value from. Subgraph nodes of newer front ends look for it among their
 * outputs, so it is not asked for there.
 * @param {LGraphNode} node @param {number} slot
 * @returns {LGraphNode | null}
 */
export function giver(node, slot) {
  const number = node.inputs[slot]?.link;
  const link = number == null ? null : node.graph?.getLink(number);
  return (link && node.graph?.getNodeById(link.origin_id)) ?? null;
}

/**
 * These nodes, then all before them, the nearest first. What goes into a subgraph comes before all that is in it.
 * @param {LGraphNode[]} first
 */
export function* andBefore(first) {
  const everywhere = everyNode();
  const reached = new Set(first);
  // Also goes through those that are added on the way.
  for (const one of reached) {
    yield one;
    const givers = (one.inputs ?? []).map((_, slot) => giver(one, slot));
    const around = everywhere.filter((other) => other.isSubgraphNode() && other.subgraph === one.graph);
    const within = one.isSubgraphNode() ? one.subgraph.nodes : [];
    for (const other of [...givers, ...around, ...within]) if (other) reached.add(other);
  }
}

/**
 * The node that a link's value comes from in a run: through reroutes, bypassed nodes, and into and out of
 * subgraphs. Null where a subgraph is used several times, which gives as many values.
 * @param {NonNullable<LGraphNode["graph"]>} graph @param {LGraphNode["inputs"][number]["link"] | undefined} id
 * @param {any} type
 * @returns {LGraphNode | null}
 */
export function source(graph, id, type) {
  const link = graph.getLink(id);
  if (!link) return null;
  if (link.originIsIoNode) {
    const around = everyNode().filter((node) => node.isSubgraphNode() && node.subgraph === graph);
    if (around.length !== 1 || !around[0].graph) return null;
    return source(around[0].graph, around[0].inputs[link.origin_slot]?.link, type);
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node || node.mode === MUTED) return null;
  if (node.mode === BYPASSED) {
    return source(graph, node.inputs.find((input) => `${input.type}`.split(",").includes(type))?.link, type);
  }
  if (node.isSubgraphNode()) {
    return source(node.subgraph, node.subgraph.outputNode.slots[link.origin_slot].getLinks()[0]?.id, type);
  }
  if (node.isVirtualNode) return source(graph, node.inputs[link.origin_slot]?.link, type);
  return node;
}

/** The nodes of the workflow, also those in subgraphs. */
function everyNode() {
  const { rootGraph } = app;
  return [rootGraph, ...rootGraph.subgraphs.values()].flatMap((graph) => graph.nodes);
}
