/**
 * The nodes of a graph that come before others.
 *
 * @typedef {Parameters<NonNullable<import("@comfyorg/comfyui-frontend-types").ComfyExtension["nodeCreated"]>>[0]}
 *   LGraphNode
 */

import { app } from "../../scripts/app.js";

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
  const { rootGraph } = app;
  const everywhere = [rootGraph, ...rootGraph.subgraphs.values()].flatMap((graph) => graph.nodes);
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
