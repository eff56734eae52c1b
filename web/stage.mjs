/**
 * The picture with its maps.
 *
 * @typedef {import("./paint.mjs").Maps} Maps
 *
 * What is on the canvas: an image, or one of `count` frames of a video. `highest` is the value of full colour.
 * @typedef {Pick<import("./maps.mjs").View, "concepts" | "colours" | "shown"> & Maps
 *   & {count: number, highest: number, picture: ImageBitmap | null}} Scene
 *
 * How it is drawn: the concepts, by their indexes, and where their outlines run. `bare` is the picture alone.
 * @typedef {{drawn: number[], threshold: number, opacity: number, bare: boolean}} Look
 *
 * @typedef {object} Listener
 * @property {(patch: Patch | null, byKey: boolean) => void} onPoint
 * @property {(patch: Patch, add: boolean) => void} onPick
 * @property {(bare: boolean) => void} onBare the picture alone is wanted, or no more
 *
 * A row and a column.
 * @typedef {[number, number]} Patch
 */

import { Field, blend, heatmap } from "./paint.mjs";
import { adds } from "./chips.mjs";
import { make } from "./dom.mjs";
import { withNames } from "./names.mjs";
import { texts } from "./texts.mjs";

/** The most pixels along a side that are drawn where it is shown smaller; copying takes the picture's own size. */
const LARGEST = 1536;
/** Milliseconds after which a press no longer picks but shows the picture alone. */
const LONG = 250;
/** Pixels along the longer side where there is no picture. */
const WITHOUT_PICTURE = 512;

export class Stage {
  /** @type {Scene | null} */
  scene = null;
  /** The patch that is looked at. @type {Patch | null} */
  patch = null;
  /** Until a press is a long one. */
  #pressing = 0;
  #isBare = false;
  /** @type {Map<number, Field>} */
  #fields = new Map();
  /** @type {Map<number, Path2D>} */
  #outlines = new Map();
  #outlinesAt = NaN;
  /** @type {{key: string, canvas: HTMLCanvasElement} | null} */
  #overlay = null;

  /** @param {Listener} listener */
  constructor(listener) {
    this.listener = listener;
    this.canvas = make("canvas", { tabIndex: 0, role: "application", ariaLabel: texts.picture });
    this.marker = make("div", { className: "patch", hidden: true });
    this.notice = make("div", { className: "notice", textContent: texts.run });
    this.frame = make("div", { className: "frame" }, this.canvas, this.marker);
    this.element = make("div", { className: "stage" }, this.frame, this.notice);
    this.frame.addEventListener("pointermove", (event) => listener.onPoint(this.#at(event), false));
    this.frame.addEventListener("pointerleave", () => listener.onPoint(null, false));
    this.frame.addEventListener("pointerdown", (event) => this.#press(event));
    this.frame.addEventListener("pointerup", (event) => this.#release(event));
    this.frame.addEventListener("pointercancel", () => this.#unveil(false));
    this.frame.addEventListener("contextmenu", (event) => {
      // What a long touch asks for as well.
      if (!this.#isBare) return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.canvas.addEventListener("blur", () => {
      this.#unveil(false);
      listener.onPoint(null, false);
    });
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("keyup", (event) => event.key === " " && this.#unveil(false));
  }

  /** @param {Scene} scene */
  show(scene) {
    // Frames of a video may have the same maps.
    if (scene.values !== this.scene?.values) {
      this.#fields.clear();
      this.#outlines.clear();
      this.#overlay = null;
    }
    this.scene = scene;
    this.canvas.ariaLabel = scene.count > 1 ? texts.video : texts.picture;
    this.notice.hidden = true;
  }

  /** Mark a patch, or none. @param {Patch | null} patch */
  mark(patch) {
    const { scene } = this;
    this.patch = patch;
    this.marker.hidden = !patch || !scene;
    if (!patch || !scene) return;
    const [row, column] = patch;
    const [rows, columns] = patches(scene);
    const { style } = this.marker;
    style.left = `${(100 * column) / columns}%`;
    style.top = `${(100 * row) / rows}%`;
    style.width = `${100 / columns}%`;
    style.height = `${100 / rows}%`;
  }

  /** The share of the picture where a concept is above a threshold. @param {number} concept @param {number} threshold */
  area(concept, threshold) {
    return this.#field(concept).area(threshold);
  }

  /** @param {Look} look */
  draw(look) {
    const { canvas } = this;
    const { width, height } = this.#size();
    const onScreen = devicePixelRatio * Math.max(canvas.clientWidth, canvas.clientHeight);
    const shrink = Math.min(1, Math.max(LARGEST, onScreen) / Math.max(width, height));
    const size = { width: Math.round(width * shrink), height: Math.round(height * shrink) };
    // Also where it changes nothing, it costs.
    if (canvas.width !== size.width || canvas.height !== size.height) Object.assign(canvas, size);
    this.frame.style.setProperty("--aspect", `${width / height}`);
    this.#paint(canvas, look, canvas.width / (canvas.clientWidth || canvas.width));
  }

  /** The picture as shown with its names, in its own size, as PNG; null of one that is too large. @param {Look} look */
  copy(look) {
    const { width, height } = this.#size();
    const canvas = make("canvas", { width, height });
    this.#paint(canvas, look, Math.max(width, height) / 640);
    const { concepts, colours } = /** @type {Scene} */ (this.scene);
    const named = withNames(canvas, look.drawn.map((i) => ({ name: concepts[i], colour: colours[i] })));
    return /** @type {Promise<Blob | null>} */ (new Promise((resolve) => named.toBlob(resolve)));
  }

  /** Height and width of the picture. */
  #size() {
    const picture = this.scene?.picture;
    if (picture) return picture;
    const { width, height } = this.#field(0);
    const scale = WITHOUT_PICTURE / Math.max(width, height);
    return { width: Math.round(width * scale), height: Math.round(height * scale) };
  }

  /** @param {HTMLCanvasElement} canvas @param {Look} look @param {number} pixel how many of its pixels make one on screen */
  #paint(canvas, { drawn, threshold, opacity, bare }, pixel) {
    const { colours, picture } = /** @type {Scene} */ (this.scene);
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    const { width, height } = canvas;
    context.fillStyle = "black";
    context.fillRect(0, 0, width, height);
    if (picture) context.drawImage(picture, 0, 0, width, height);
    if (picture && bare) return;
    context.globalAlpha = picture ? opacity : 1;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#overlayOf(drawn), 0, 0, width, height);
    context.globalAlpha = 1;
    const field = this.#field(drawn[0]);
    const scale = width / field.width;
    context.setTransform(scale, 0, 0, height / field.height, 0, 0);
    context.lineCap = "round";
    for (const concept of drawn) {
      const outline = this.#outline(concept, threshold);
      context.lineWidth = (3.5 * pixel) / scale;
      context.strokeStyle = "rgb(0 0 0 / 0.7)";
      context.stroke(outline);
      context.lineWidth = (1.7 * pixel) / scale;
      context.strokeStyle = drawn.length === 1 ? "white" : colours[concept];
      context.stroke(outline);
    }
    context.resetTransform();
  }

  /** @param {number[]} drawn */
  #overlayOf(drawn) {
    const key = drawn.join();
    if (this.#overlay?.key !== key) {
      const fields = drawn.map((concept) => this.#field(concept));
      const { colours, highest } = /** @type {Scene} */ (this.scene);
      const pixels =
        drawn.length === 1
          ? heatmap(fields[0], highest)
          : blend(fields, drawn.map((concept) => colours[concept]), highest);
      const canvas = make("canvas", { width: pixels.width, height: pixels.height });
      canvas.getContext("2d")?.putImageData(pixels, 0, 0);
      this.#overlay = { key, canvas };
    }
    return this.#overlay.canvas;
  }

  /** @param {number} concept */
  #field(concept) {
    let field = this.#fields.get(concept);
    if (!field) {
      field = new Field(/** @type {Scene} */ (this.scene), concept);
      this.#fields.set(concept, field);
    }
    return field;
  }

  /** @param {number} concept @param {number} threshold */
  #outline(concept, threshold) {
    if (threshold !== this.#outlinesAt) this.#outlines.clear();
    this.#outlinesAt = threshold;
    let outline = this.#outlines.get(concept);
    if (!outline) {
      outline = this.#field(concept).outline(threshold);
      this.#outlines.set(concept, outline);
    }
    return outline;
  }

  /** The patch under the pointer. @param {PointerEvent} event @returns {Patch | null} */
  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const y = (event.clientY - box.top) / box.height;
    const x = (event.clientX - box.left) / box.width;
    if (!this.scene || !(y >= 0 && y < 1 && x >= 0 && x < 1)) return null;
    const [rows, columns] = patches(this.scene);
    return [Math.floor(y * rows), Math.floor(x * columns)];
  }

  /** What is there is picked on release; a long press shows the picture alone. @param {PointerEvent} event */
  #press(event) {
    if (event.button !== 0 || !this.scene) return;
    this.frame.setPointerCapture(event.pointerId);
    this.#pressing = setTimeout(() => this.#unveil(true), LONG);
  }

  /** @param {PointerEvent} event */
  #release(event) {
    const patch = this.#at(event);
    if (this.#pressing && patch) this.listener.onPick(patch, adds(event));
    this.#unveil(false);
  }

  /** Show the picture alone, if there is one, or the maps again. @param {boolean} bare */
  #unveil(bare) {
    if (bare && !this.scene?.picture) return;
    clearTimeout(this.#pressing);
    this.#pressing = 0;
    if (bare === this.#isBare) return;
    this.#isBare = bare;
    this.listener.onBare(bare);
  }

  /**
   * Arrow keys move over the patches, Enter picks what is there, and Space shows the picture alone. On a video
   * those and Space are for the frames, and arrow keys with Shift for the patches.
   * @param {KeyboardEvent} event
   */
  #key(event) {
    if (!this.scene || event.ctrlKey || event.metaKey || event.altKey) return;
    const isVideo = this.scene.count > 1;
    const stride = event.shiftKey && !isVideo ? 8 : 1;
    if (event.key === "Escape") this.listener.onPoint(null, true);
    else if (event.key === "Enter" && this.patch) this.listener.onPick(this.patch, adds(event));
    else if (isVideo && !(event.shiftKey && event.key in MOVES)) return;
    else if (event.key === " ") this.#unveil(true);
    else if (event.key in MOVES) this.#walk(/** @type {keyof typeof MOVES} */ (event.key), stride);
    else return;
    event.preventDefault();
  }

  /** @param {keyof typeof MOVES} key @param {number} stride */
  #walk(key, stride) {
    const [rows, columns] = patches(/** @type {Scene} */ (this.scene));
    const [row, column] = this.patch ?? [Math.floor(rows / 2), Math.floor(columns / 2)];
    const [down, right] = MOVES[key];
    const y = Math.min(rows - 1, Math.max(0, row + stride * down));
    const x = Math.min(columns - 1, Math.max(0, column + stride * right));
    this.listener.onPoint([y, x], true);
  }
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** How many rows and columns of patches the picture has. @param {Scene} scene */
function patches({ grid, coverage }) {
  return [Math.round(grid[0] * coverage[0]), Math.round(grid[1] * coverage[1])];
}

/** The concepts at a patch, highest first. @param {Scene} scene @param {Patch} patch */
export function ranked({ concepts, colours, grid, values }, [row, column]) {
  const size = grid[0] * grid[1];
  const at = row * grid[1] + column;
  return concepts
    .map((name, index) => ({ index, name, colour: colours[index], value: values[index * size + at] }))
    .sort((a, b) => b.value - a.value);
}
