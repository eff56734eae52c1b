/**
 * The maps and pictures of one image, or of all frames of one video, for one choice of layers and steps.
 *
 * @typedef {import("./maps.mjs").View} View
 */
export class Clip {
  /** The maps of each latent frame. @type {Float32Array[]} */
  #maps;
  /** In the middle of which frames each latent frame is. @type {number[]} */
  #middles;
  /** The latent frame that each frame belongs to. @type {number[]} */
  #latent;

  /**
   * @param {View} view
   * @param {Float32Array} values latent frames x concepts x rows x columns; an image is one
   * @param {import("./pictures.mjs").Pictures} pictures
   */
  constructor(view, values, pictures) {
    this.view = view;
    this.pictures = pictures;
    const { durations, grid, shown } = view;
    const size = values.length / durations.length;
    this.#maps = durations.map((_, latent) => values.subarray(latent * size, (latent + 1) * size));
    this.#latent = durations.flatMap((duration, latent) => Array(duration).fill(latent));
    this.#middles = durations.map((duration, latent) => this.#latent.indexOf(latent) + (duration - 1) / 2);
    /** How many frames there are. */
    this.count = this.#latent.length;
    const foreground = shown * grid[0] * grid[1];
    /** The highest value of the concepts that are not background, in all frames: they have one scale. */
    this.highest = Math.max(...this.#maps.map((maps) => highest(maps.subarray(0, foreground))));
  }

  /**
   * What is on the canvas with a frame, once its picture has come.
   * @param {number} frame @returns {Promise<import("./stage.mjs").Scene>}
   */
  async scene(frame) {
    const { concepts, colours, shown, grid, coverage } = this.view;
    const { count, highest } = this;
    const picture = await this.pictures.at(frame);
    return { concepts, colours, shown, grid, coverage, count, highest, values: this.#values(frame), picture };
  }

  /** The maps of a frame, as core/reading/maps.py makes them of the latent frames. @param {number} frame */
  #values(frame) {
    if (this.view.between_frames === "hold") return this.#maps[this.#latent[frame]];
    const after = this.#middles.findIndex((middle) => middle >= frame);
    // Before the first middle, or (-1) behind the last one.
    if (after < 1) return /** @type {Float32Array} */ (this.#maps.at(after));
    const [from, to] = [this.#middles[after - 1], this.#middles[after]];
    if (frame === to) return this.#maps[after];
    const share = (frame - from) / (to - from);
    const [before, next] = [this.#maps[after - 1], this.#maps[after]];
    return before.map((value, i) => value + share * (next[i] - value));
  }
}

/** The highest of some values, or 1 if there is none above 0. @param {Float32Array} values */
export function highest(values) {
  return values.reduce((high, value) => Math.max(high, value), 0) || 1;
}
