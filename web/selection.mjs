import { Clip } from "./clip.mjs";
import { RecordedMaps, chosenEvaluations, same } from "./maps.mjs";

/**
 * Which image, layers and evaluations of a result are looked at. Another choice is another selection.
 *
 * @typedef {import("./maps.mjs").View} View
 */
export class Selection {
  /**
   * @param {View} view @param {number} image @param {RecordedMaps} recorded
   * @param {number[]} layers @param {number[]} evaluations
   */
  constructor(view, image, recorded, layers, evaluations) {
    this.view = view;
    this.image = image;
    this.recorded = recorded;
    this.layers = layers;
    this.evaluations = evaluations;
    /** The steps that there are, and those of the evaluations. */
    this.everyStep = distinct(view.steps);
    this.steps = distinct(evaluations.map((i) => view.steps[i]));
  }

  /** What the node was given. @param {View} view @param {import("./maps.mjs").Loader} load @param {number} image */
  static of(view, load, image) {
    const recorded = new RecordedMaps(view, image, load);
    return new Selection(view, image, recorded, view.chosen_layers, chosenEvaluations(view));
  }

  get isGiven() {
    const { view, layers, evaluations } = this;
    return same(layers, view.chosen_layers) && same(evaluations, chosenEvaluations(view));
  }

  /** The sigma of the steps, if it is one step. */
  get sigma() {
    return this.steps.length === 1 ? this.view.sigmas[this.evaluations[0]] : null;
  }

  /** The same of the next image, or the one before. @param {number} by */
  turned(by) {
    const { view, layers, evaluations, recorded } = this;
    const image = (this.image + by + view.images.length) % view.images.length;
    return new Selection(view, image, new RecordedMaps(view, image, recorded.load), layers, evaluations);
  }

  /** Other layers of the same image, by their places among those that there are. @param {number[]} places */
  withLayers(places) {
    const { view, image, recorded, evaluations } = this;
    return new Selection(view, image, recorded, places.map((place) => view.layers[place]), evaluations);
  }

  /** Other steps of the same image, by their places among those that there are. @param {number[]} places */
  withSteps(places) {
    const { view, image, recorded, layers } = this;
    const wanted = new Set(places.map((place) => this.everyStep[place]));
    const evaluations = [...view.steps.keys()].filter((i) => wanted.has(view.steps[i]));
    return new Selection(view, image, recorded, layers, evaluations);
  }

  /** The layers and steps that the node was given, of the same image. */
  reset() {
    const { view, image, recorded } = this;
    return new Selection(view, image, recorded, view.chosen_layers, chosenEvaluations(view));
  }

  /** Its maps, once they have come with the picture of a frame, or of the last one before. @param {number} frame */
  async clip(frame) {
    const { view, recorded } = this;
    const { pictures } = recorded;
    const [values] = await Promise.all([
      recorded.mean(this.layers, this.evaluations),
      pictures.at(frame),
    ]);
    return new Clip(view, values, pictures);
  }
}

/** @param {number[]} numbers */
function distinct(numbers) {
  return [...new Set(numbers)].sort((a, b) => a - b);
}
