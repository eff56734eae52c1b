/**
 * Concept maps from the server's packets (core/drawing/transport.py), and means over recorded maps.
 *
 * @typedef {{filename: string, subfolder: string, type: string}} TemporaryFile
 *
 * What a run of Concept Viewer sends. `grid` is rows and columns; `coverage` the share of the grid's height
 * and width that the picture covers; `steps` and `sigmas` have one entry per evaluation of the model. Several
 * pictures may share the maps of one `recorded` image. `durations` has one entry for each latent frame of a video,
 * how many of its frames that one stands for, and a single 1 for images; `between_frames` is what shows in between
 * them. A video is one of the `images`, with its frames' `pictures` or one for all of them.
 * @typedef {object} View
 * @property {string} key
 * @property {string | null} workflow the id of the one that it was queued from
 * @property {string[]} concepts background concepts last
 * @property {string[]} colours
 * @property {number} shown how many concepts are not background
 * @property {[number, number]} grid
 * @property {number[]} durations
 * @property {"linear" | "hold"} between_frames
 * @property {[number, number]} coverage
 * @property {boolean} softmax
 * @property {string} grounding of the node's maps; those of other layers and steps are always the "paper"'s
 * @property {string} average of the node's maps; those of other layers and steps are always means of maps
 * @property {number[]} layers
 * @property {number[]} steps
 * @property {number[]} sigmas
 * @property {number[]} chosen_layers
 * @property {number[]} chosen_steps
 * @property {{recorded: number, maps: TemporaryFile, pictures: TemporaryFile[]}[]} images
 *
 * @typedef {object} Loader
 * @property {(file: TemporaryFile, priority?: RequestPriority) => Promise<Response>} file
 * @property {(key: string, image: number, frames: string) => Promise<Response>} frames
 * @property {(key: string, video: number, layers: number[], steps: number[]) => Promise<Response>} video
 */

import { Pictures } from "./pictures.mjs";
import { received } from "./received.mjs";

/** Frames of quantised maps. */
export class Frames {
  /** @param {ArrayBuffer} packet @param {number} size values per frame */
  constructor(packet, size) {
    const header = new DataView(packet);
    this.low = header.getFloat32(0, true);
    this.step = (header.getFloat32(4, true) - this.low) / 255;
    this.size = size;
    this.levels = new Uint8Array(packet, 8);
    for (let i = size; i < this.levels.length; i++) this.levels[i] += this.levels[i - size];
  }

  /** The values of all frames. */
  get values() {
    const { levels, low, step } = this;
    const values = new Float32Array(levels.length);
    for (let i = 0; i < levels.length; i++) values[i] = low + levels[i] * step;
    return values;
  }

  /** @param {Float32Array} total @param {Iterable<number>} frames to add to it, value by value */
  addTo(total, frames) {
    const { levels, low, step, size } = this;
    for (const frame of frames) {
      const start = frame * size;
      for (let i = 0; i < size; i++) total[i] += low + levels[start + i] * step;
    }
  }
}

/** @param {Blob} packet @param {number} size values per frame */
export async function unpack(packet, size) {
  const stream = packet.stream().pipeThrough(new DecompressionStream("deflate"));
  return new Frames(await new Response(stream).arrayBuffer(), size);
}

/** The recorded maps of one image or video, fetched when somebody looks at them. */
export class RecordedMaps {
  /** @type {Map<string, Promise<Frames>>} */
  #fetched = new Map();
  /** The last mean that a video was asked for. @type {Promise<unknown>} */
  #asked = Promise.resolve();
  #request = 0;

  /** @param {View} view @param {number} image @param {Loader} load */
  constructor(view, image, load) {
    this.view = view;
    this.image = image;
    this.load = load;
    this.size = view.concepts.length * view.grid[0] * view.grid[1];
    this.pictures = new Pictures(view.images[image].pictures, load);
  }

  /**
   * The mean over layers and evaluations, in a video of each latent frame. Of an image one packet serves every
   * choice of layers as long as the steps are those that the node was given, and one every choice of steps; else
   * a packet is fetched for each layer. Of a video they would be too large, and the server takes the mean.
   * @param {number[]} layers @param {number[]} evaluations
   */
  async mean(layers, evaluations) {
    const { view } = this;
    const givenLayers = same(layers, view.chosen_layers);
    const givenSteps = same(evaluations, chosenEvaluations(view));
    if (givenLayers && givenSteps) return (await this.#frames("chosen")).values;
    if (view.durations.length > 1) return this.#meanOfVideo(layers, evaluations);
    const values = new Float32Array(this.size);
    let count;
    if (givenSteps) {
      const indexes = layers.map((layer) => view.layers.indexOf(layer));
      (await this.#frames("layers")).addTo(values, indexes);
      count = layers.length;
    } else if (givenLayers) {
      (await this.#frames("evaluations")).addTo(values, evaluations);
      count = evaluations.length;
    } else {
      const packets = await Promise.all(layers.map((layer) => this.#frames(`${layer}`)));
      for (const frames of packets) frames.addTo(values, evaluations);
      count = layers.length * evaluations.length;
    }
    return view.softmax ? values.map((v) => v / count) : stretched(values);
  }

  /**
   * Choices are asked for one after the other, and of those that came meanwhile only the last.
   * @param {number[]} layers @param {number[]} evaluations
   */
  async #meanOfVideo(layers, evaluations) {
    const { view, image, load } = this;
    const request = ++this.#request;
    await this.#asked;
    if (request !== this.#request) throw new Error("Another choice came after this one.");
    const steps = [...new Set(evaluations.map((i) => view.steps[i]))];
    const asked = load.video(view.key, view.images[image].recorded, layers, steps);
    const mean = received(asked, (packet) => unpack(packet, this.size));
    this.#asked = mean.catch(() => {});
    const { values } = await mean;
    return view.softmax ? values : stretched(values);
  }

  /** @param {string} name */
  #frames(name) {
    let frames = this.#fetched.get(name);
    if (!frames) {
      frames = this.#fetch(name);
      this.#fetched.set(name, frames);
      frames.catch(() => this.#fetched.delete(name));
    }
    return frames;
  }

  /** @param {string} name */
  #fetch(name) {
    const { view, image, load } = this;
    const asked =
      name === "chosen"
        ? load.file(view.images[image].maps)
        : load.frames(view.key, view.images[image].recorded, name);
    return received(asked, (packet) => unpack(packet, this.size));
  }
}

/** The evaluations in the steps that the node was given. @param {View} view */
export function chosenEvaluations(view) {
  return [...view.steps.keys()].filter((i) => view.chosen_steps.includes(view.steps[i]));
}

/** @param {number[]} a @param {number[]} b */
export function same(a, b) {
  return a.length === b.length && a.every((value, i) => value === b[i]);
}

/** Raw scores as maps in 0..1, the way core/reading/maps.py scales them. @param {Float32Array} values */
function stretched(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const v of values) {
    if (v < low) low = v;
    if (v > high) high = v;
  }
  const span = high > low ? high - low : 1;
  return values.map((v) => (v - low) / span);
}
