/**
 * The panel of Concept Viewer: the picture with its maps, and what it takes to look into them. Names of
 * concepts come from users and are only ever set as text.
 *
 * @typedef {import("./maps.mjs").View} View
 * @typedef {import("./maps.mjs").Loader} Loader
 * @typedef {import("./paint.mjs").Maps} Maps
 *
 * What the server sends while a model samples: `maps` is a packet in base64.
 * @typedef {Pick<View, "concepts" | "colours" | "shown" | "grid" | "coverage">
 *   & {maps: string, evaluations: number}} LiveView
 *
 * What is on the canvas.
 * @typedef {Pick<View, "concepts" | "colours" | "shown"> & Maps} Scene
 *
 * What the user sets and the workflow keeps.
 * @typedef {object} Settings
 * @property {number} threshold
 * @property {string[]} picked names of concepts; all of them if empty
 * @property {number} opacity
 */

import { RecordedMaps, chosenEvaluations, same, unpack } from "./maps.mjs";
import { Field, MAGMA_GRADIENT, blend, heatmap } from "./paint.mjs";
import { Strip } from "./strip.mjs";
import { withNames } from "./names.mjs";
import { make } from "./dom.mjs";
import { fill, texts } from "./texts.mjs";

/** The most pixels along a side that are drawn on screen; copying takes the picture's own size. */
const LARGEST = 1536;
/** Pixels along the longer side where there is no picture. */
const WITHOUT_PICTURE = 512;
const CARD_ROWS = 8;

export class Panel {
  /** @type {View | null} */
  #view = null;
  #image = 0;
  /** @type {RecordedMaps | null} */
  #recorded = null;
  /** @type {number[]} */
  #layers = [];
  /** @type {number[]} */
  #evaluations = [];
  /** @type {Scene | null} */
  #scene = null;
  /** @type {ImageBitmap | null} */
  #picture = null;
  /** @type {number | null} */
  #hovered = null;
  /** @type {[number, number] | null} row and column */
  #patch = null;
  /** Whether a run is shown, or about to be. */
  #live = false;
  /** What the status line says of the patch that the keyboard chose. */
  #readout = "";
  /** Answers to all but the latest request are dropped. */
  #request = 0;
  #highest = 1;
  /** @type {Map<number, Field>} */
  #fields = new Map();
  /** @type {Map<number, Path2D>} */
  #outlines = new Map();
  /** @type {{key: string, canvas: HTMLCanvasElement} | null} */
  #overlay = null;
  #drawing = 0;

  /**
   * @param {Loader} load
   * @param {Settings} settings
   * @param {(changed: Partial<Settings>) => void} onChange
   */
  constructor(load, settings, onChange) {
    this.load = load;
    this.settings = settings;
    this.onChange = onChange;

    this.canvas = make("canvas", {
      tabIndex: 0,
      role: "img",
      ariaLabel: texts.picture,
    });
    this.patch = make("div", { className: "patch", hidden: true });
    this.card = make("div", { className: "card", hidden: true });
    this.notice = make("div", { className: "notice", textContent: texts.run });
    this.frame = make("div", { className: "frame" }, this.canvas, this.patch);
    this.stage = make("div", { className: "stage" }, this.frame, this.notice, this.card);
    this.chips = make("div", { className: "chips", role: "group", ariaLabel: texts.concepts });
    this.opacity = slider(texts.opacity, settings.opacity);
    this.threshold = slider(texts.threshold, settings.threshold);
    this.layers = new Strip(texts.layers, (indexes) => this.#choose({ layers: indexes }));
    this.steps = new Strip(texts.steps, (indexes) => this.#choose({ steps: indexes }));
    this.previous = make("button", { type: "button", textContent: "‹", ariaLabel: texts.previous });
    this.next = make("button", { type: "button", textContent: "›", ariaLabel: texts.next });
    this.page = make("span");
    this.pager = make("span", { className: "pager", hidden: true }, this.previous, this.page, this.next);
    this.low = make("span");
    this.high = make("span");
    const gradient = make("i");
    gradient.style.background = MAGMA_GRADIENT;
    this.scale = make("span", { className: "scale", hidden: true }, this.low, gradient, this.high);
    this.status = make("span", { className: "status", role: "status" });
    this.reset = make("button", {
      type: "button",
      textContent: texts.reset,
      title: texts.resetHint,
      hidden: true,
    });
    this.copy = make("button", { type: "button", textContent: texts.copy, title: texts.copyHint });
    this.plain = make("div", { className: "plain", textContent: texts.plain, hidden: true });
    this.element = make(
      "div",
      { className: "concept-viewer" },
      this.stage,
      this.chips,
      make(
        "div",
        { className: "controls" },
        this.opacity.row,
        this.threshold.row,
        this.layers.element,
        this.steps.element,
        this.plain,
      ),
      make("div", { className: "bar" }, this.pager, this.scale, this.status, this.reset, this.copy),
    );
    this.resizing = new ResizeObserver(() => this.#redraw());
    this.resizing.observe(this.stage);
    this.#listen();
    this.#update();
  }

  #listen() {
    this.opacity.input.addEventListener("input", () => {
      this.set({ opacity: this.opacity.input.valueAsNumber });
      this.onChange({ opacity: this.settings.opacity });
    });
    this.threshold.input.addEventListener("input", () => {
      this.set({ threshold: this.threshold.input.valueAsNumber });
      this.onChange({ threshold: this.settings.threshold });
    });
    this.frame.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.#pointAt((event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
    });
    this.frame.addEventListener("pointerleave", () => this.#point(null));
    this.canvas.addEventListener("blur", () => this.#point(null));
    this.canvas.addEventListener("keydown", (event) => this.#walk(event));
    this.chips.addEventListener("wheel", (event) => {
      if (this.chips.scrollHeight > this.chips.clientHeight) event.stopPropagation();
    });
    this.previous.addEventListener("click", () => this.#turn(-1));
    this.next.addEventListener("click", () => this.#turn(1));
    this.reset.addEventListener("click", () => this.#choose({ layers: null, steps: null }));
    this.copy.addEventListener("click", () => this.#copy());
  }

  /** Take over settings that were changed elsewhere. @param {Partial<Settings>} changed */
  set(changed) {
    this.settings = { ...this.settings, ...changed };
    if (changed.threshold !== undefined) this.#outlines.clear();
    this.#update();
  }

  /** Show the result of a run, unless it is shown. @param {View} view */
  async show(view) {
    if (view.key === this.#view?.key && !this.#live) return;
    this.#view = view;
    this.#image = Math.min(this.#image, view.images.length - 1);
    this.#layers = view.chosen_layers;
    this.#evaluations = chosenEvaluations(view);
    await this.#open();
  }

  /** Show maps of a run that is still going on. @param {LiveView} live @param {Blob | undefined} preview */
  async showLive(live, preview) {
    const request = this.#begin();
    this.#live = true;
    const { concepts, colours, shown, grid, coverage } = live;
    const size = concepts.length * grid[0] * grid[1];
    const packet = Uint8Array.from(atob(live.maps), (c) => c.charCodeAt(0));
    const [frames, picture] = await Promise.all([
      unpack(new Blob([packet]), size),
      preview ? createImageBitmap(preview) : null,
    ]);
    if (request !== this.#request) return;
    const values = new Float32Array(size);
    frames.addTo(values, [0]);
    this.#picture = picture;
    this.#setScene({ concepts, colours, shown, grid, coverage, values });
    this.status.textContent = fill(texts.sampling, live.evaluations);
    this.#end(request);
  }

  /** The run of `showLive` ended without a result for this panel. */
  async endLive() {
    if (!this.#live) return;
    // Maps that are still being unpacked come too late.
    const request = this.#begin();
    this.status.textContent = "";
    if (this.#view) await this.#open();
    this.#end(request);
  }

  dispose() {
    this.resizing.disconnect();
    this.#request++;
  }

  async #open() {
    const view = /** @type {View} */ (this.#view);
    const request = this.#begin();
    this.#recorded = new RecordedMaps(view, this.#image, this.load);
    try {
      const [values, picture] = await Promise.all([
        this.#recorded.mean(this.#layers, this.#evaluations),
        this.#loadPicture(view.images[this.#image].picture),
      ]);
      if (request !== this.#request) return;
      const { concepts, colours, shown, grid, coverage } = view;
      this.#live = false;
      this.#picture = picture;
      this.#setScene({ concepts, colours, shown, grid, coverage, values });
      this.status.textContent = "";
      this.#forget();
    } catch (error) {
      if (request === this.#request) this.#fail(error);
    } finally {
      this.#end(request);
    }
  }

  #begin() {
    this.element.ariaBusy = "true";
    return ++this.#request;
  }

  /** @param {number} request */
  #end(request) {
    if (request === this.#request) this.element.ariaBusy = "false";
  }

  /** @param {import("./maps.mjs").TemporaryFile | null} file */
  async #loadPicture(file) {
    if (!file) return null;
    const response = await this.load.file(file);
    return response.ok ? createImageBitmap(await response.blob()) : null;
  }

  /** @param {unknown} error */
  #fail(error) {
    const message = error instanceof Error ? error.message : `${error}`;
    if (this.#scene) this.status.textContent = message;
    else this.notice.textContent = message;
  }

  /**
   * Look at other layers or steps; null for those of the node.
   * @param {{layers?: number[] | null, steps?: number[] | null}} chosen as indexes into the strips
   */
  async #choose({ layers, steps }) {
    const view = /** @type {View} */ (this.#view);
    if (layers !== undefined) {
      this.#layers = layers === null ? view.chosen_layers : layers.map((index) => view.layers[index]);
    }
    if (steps === null) {
      this.#evaluations = chosenEvaluations(view);
    } else if (steps) {
      const wanted = new Set(steps.map((index) => distinct(view.steps)[index]));
      this.#evaluations = [...view.steps.keys()].filter((i) => wanted.has(view.steps[i]));
    }
    this.#update();
    const request = this.#begin();
    const waiting = setTimeout(() => (this.status.textContent = texts.loading), 150);
    try {
      const values = await /** @type {RecordedMaps} */ (this.#recorded).mean(this.#layers, this.#evaluations);
      if (request !== this.#request) return;
      this.status.textContent = "";
      this.#setScene({ .../** @type {Scene} */ (this.#scene), values });
    } catch (error) {
      if (request === this.#request) this.#fail(error);
    } finally {
      clearTimeout(waiting);
      this.#end(request);
    }
  }

  /** @param {number} by */
  #turn(by) {
    const view = /** @type {View} */ (this.#view);
    this.#image = (this.#image + by + view.images.length) % view.images.length;
    this.#point(null);
    this.#open();
  }

  /** @param {Scene} scene */
  #setScene(scene) {
    this.#scene = scene;
    this.#fields.clear();
    this.#outlines.clear();
    this.#overlay = null;
    const foreground = scene.values.subarray(0, scene.shown * scene.grid[0] * scene.grid[1]);
    this.#highest = foreground.reduce((high, v) => Math.max(high, v), 0) || 1;
    this.notice.hidden = true;
    this.#update();
    if (this.#patch) this.#point(this.#patch);
  }

  /** Bring everything but the maps up to date. */
  #update() {
    const scene = this.#scene;
    const view = this.#live ? null : this.#view;
    this.element.classList.toggle("empty", !scene);
    this.opacity.input.valueAsNumber = this.settings.opacity;
    this.threshold.input.valueAsNumber = this.settings.threshold;
    this.opacity.output.textContent = this.settings.opacity.toFixed(2);
    this.pager.hidden = !view || view.images.length < 2;
    this.layers.element.hidden = !view || view.layers.length < 2;
    this.steps.element.hidden = !view || distinct(view.steps).length < 2;
    if (view) {
      this.page.textContent = `${this.#image + 1} / ${view.images.length}`;
      const steps = distinct(view.steps);
      const chosen = new Set(this.#evaluations.map((i) => view.steps[i]));
      this.layers.show(view.layers, (layer) => this.#layers.includes(layer));
      this.steps.show(steps, (step) => chosen.has(step));
      if (chosen.size === 1) {
        const sigma = view.sigmas[this.#evaluations[0]];
        this.steps.label.textContent += ` · σ ${sigma.toFixed(3)}`;
      }
    }
    const given =
      !view || (same(this.#layers, view.chosen_layers) && same(this.#evaluations, chosenEvaluations(view)));
    this.reset.hidden = given;
    this.plain.hidden = given || view.grounding === "paper";
    if (scene) this.#updateChips(scene);
    this.#redraw();
  }

  /** @param {Scene} scene */
  #updateChips({ concepts, colours, shown }) {
    const key = JSON.stringify([concepts, colours, shown]);
    if (this.chips.dataset.key !== key) {
      this.chips.dataset.key = key;
      const all = chip(texts.all, null, () => this.#pick([]));
      this.chips.replaceChildren(
        all,
        ...concepts.map((concept, index) => {
          const button = chip(concept, colours[index], (event) => {
            const picked = this.#picked();
            const rest = picked.filter((other) => other !== index);
            if (event.ctrlKey || event.metaKey || event.shiftKey) {
              this.#pick(rest.length < picked.length ? rest : [...picked, index]);
            } else {
              this.#pick(picked.length === 1 && picked[0] === index ? [] : [index]);
            }
          });
          button.title = `${concept}\n${texts.chip}`;
          button.classList.toggle("background", index >= shown);
          for (const type of ["pointerenter", "focus"]) button.addEventListener(type, () => this.#hover(index));
          for (const type of ["pointerleave", "blur"]) button.addEventListener(type, () => this.#hover(null));
          return button;
        }),
      );
    }
    const picked = this.#picked();
    [...this.chips.children].forEach((button, index) => {
      button.ariaPressed = `${index === 0 ? !picked.length : picked.includes(index - 1)}`;
    });
  }

  /** Indexes of the concepts picked, whatever their case; names of an older list are passed over. */
  #picked() {
    const picked = new Set(this.settings.picked.map((name) => name.toLowerCase()));
    const concepts = this.#scene?.concepts ?? [];
    return concepts.flatMap((name, index) => (picked.has(name.toLowerCase()) ? [index] : []));
  }

  /** @param {number[]} picked */
  #pick(picked) {
    const concepts = this.#scene?.concepts ?? [];
    this.#hovered = null;
    this.set({ picked: concepts.filter((_, index) => picked.includes(index)) });
    this.onChange({ picked: this.settings.picked });
  }

  /** Take what no chip shows as picked out of the settings, where Concept Mask would find it. */
  #forget() {
    const picked = this.#picked();
    const names = picked.map((index) => this.#scene?.concepts[index]);
    if (names.join() !== this.settings.picked.join()) this.#pick(picked);
  }

  /** @param {number | null} concept */
  #hover(concept) {
    this.#hovered = concept;
    this.#redraw();
  }

  /** The concepts on the canvas. @param {Scene} scene */
  #drawn({ shown }) {
    if (this.#hovered !== null) return [this.#hovered];
    const picked = this.#picked();
    return picked.length ? picked : [...Array(shown).keys()];
  }

  /** @param {number} concept */
  #field(concept) {
    let field = this.#fields.get(concept);
    if (!field) {
      field = new Field(/** @type {Scene} */ (this.#scene), concept);
      this.#fields.set(concept, field);
    }
    return field;
  }

  /** @param {number} concept */
  #outline(concept) {
    let outline = this.#outlines.get(concept);
    if (!outline) {
      outline = this.#field(concept).outline(this.settings.threshold);
      this.#outlines.set(concept, outline);
    }
    return outline;
  }

  #redraw() {
    this.#drawing ||= requestAnimationFrame(() => {
      this.#drawing = 0;
      this.#draw();
    });
  }

  #draw() {
    const scene = this.#scene;
    if (!scene) return;
    const { width, height } = this.#size();
    const shrink = Math.min(1, LARGEST / Math.max(width, height));
    this.canvas.width = Math.round(width * shrink);
    this.canvas.height = Math.round(height * shrink);
    this.frame.style.setProperty("--aspect", `${width / height}`);
    this.#paint(this.canvas, this.canvas.width / (this.canvas.clientWidth || this.canvas.width));

    const drawn = this.#drawn(scene);
    const alone = drawn.length === 1;
    const area = alone ? ` · ${(100 * this.#field(drawn[0]).area(this.settings.threshold)).toFixed(0)} %` : "";
    this.threshold.output.textContent = this.settings.threshold.toFixed(2) + area;
    this.scale.hidden = !alone;
    this.low.textContent = "0";
    this.high.textContent = this.#highest.toFixed(2);
  }

  /** Height and width of the picture. */
  #size() {
    if (this.#picture) return this.#picture;
    const { width, height } = this.#field(0);
    const scale = WITHOUT_PICTURE / Math.max(width, height);
    return { width: Math.round(width * scale), height: Math.round(height * scale) };
  }

  /** @param {HTMLCanvasElement} canvas @param {number} pixel how many of its pixels make one on screen */
  #paint(canvas, pixel) {
    const scene = /** @type {Scene} */ (this.#scene);
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    const { width, height } = canvas;
    const drawn = this.#drawn(scene);
    context.fillStyle = "black";
    context.fillRect(0, 0, width, height);
    if (this.#picture) context.drawImage(this.#picture, 0, 0, width, height);
    context.globalAlpha = this.#picture ? this.settings.opacity : 1;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#overlayOf(drawn), 0, 0, width, height);
    context.globalAlpha = 1;
    const field = this.#field(drawn[0]);
    const scale = width / field.width;
    context.setTransform(scale, 0, 0, height / field.height, 0, 0);
    context.lineCap = "round";
    for (const concept of drawn) {
      context.lineWidth = (3.5 * pixel) / scale;
      context.strokeStyle = "rgb(0 0 0 / 0.7)";
      context.stroke(this.#outline(concept));
      context.lineWidth = (1.7 * pixel) / scale;
      context.strokeStyle = drawn.length === 1 ? "white" : scene.colours[concept];
      context.stroke(this.#outline(concept));
    }
    context.resetTransform();
  }

  /** @param {number[]} drawn */
  #overlayOf(drawn) {
    const key = drawn.join();
    if (this.#overlay?.key !== key) {
      const fields = drawn.map((concept) => this.#field(concept));
      const { colours } = /** @type {Scene} */ (this.#scene);
      const pixels =
        drawn.length === 1
          ? heatmap(fields[0], this.#highest)
          : blend(fields, drawn.map((concept) => colours[concept]), this.#highest);
      const canvas = make("canvas", { width: pixels.width, height: pixels.height });
      canvas.getContext("2d")?.putImageData(pixels, 0, 0);
      this.#overlay = { key, canvas };
    }
    return this.#overlay.canvas;
  }

  /** @param {number} y @param {number} x from 0 to 1 over the picture */
  #pointAt(y, x) {
    const scene = this.#scene;
    if (!scene || !(y >= 0 && y < 1 && x >= 0 && x < 1)) return this.#point(null);
    const [rows, columns] = patches(scene);
    this.#point([Math.floor(y * rows), Math.floor(x * columns)]);
  }

  /** Show the concepts at a patch, highest first. @param {[number, number] | null} patch */
  #point(patch) {
    this.#patch = patch;
    this.#read("");
    const scene = this.#scene;
    this.patch.hidden = this.card.hidden = !patch || !scene;
    if (!patch || !scene) return;
    const [row, column] = patch;
    const [rows, columns] = patches(scene);
    const box = this.patch.style;
    box.left = `${(100 * column) / columns}%`;
    box.top = `${(100 * row) / rows}%`;
    box.width = `${100 / columns}%`;
    box.height = `${100 / rows}%`;
    const lines = ranked(scene, patch);
    const fitting = Math.max(3, Math.min(CARD_ROWS, Math.floor((this.stage.clientHeight - 40) / 18)));
    this.card.replaceChildren(
      ...lines.slice(0, fitting).map(({ name, colour, value }) => {
        const bar = make("i");
        bar.style.setProperty("--share", `${Math.min(1, value)}`);
        const line = make(
          "div",
          {},
          make("b", { textContent: name }),
          make("span", { textContent: value.toFixed(3) }),
          bar,
        );
        line.style.setProperty("--colour", colour);
        return line;
      }),
    );
    if (lines.length > fitting) {
      this.card.append(make("div", { className: "more", textContent: fill(texts.more, lines.length - fitting) }));
    }
    this.#placeCard();
  }

  /** Beside the patch, on the side where there is room. */
  #placeCard() {
    const { stage, frame, patch, card } = this;
    const x = frame.offsetLeft + patch.offsetLeft;
    const y = frame.offsetTop + patch.offsetTop;
    const right = x + patch.offsetWidth + 10;
    const left = right + card.offsetWidth > stage.clientWidth ? x - card.offsetWidth - 10 : right;
    const top = Math.min(y + 10, stage.clientHeight - card.offsetHeight - 4);
    card.style.left = `${Math.max(4, left)}px`;
    card.style.top = `${Math.max(4, top)}px`;
  }

  /** Arrow keys move over the patches. @param {KeyboardEvent} event */
  #walk(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[/** @type {keyof typeof moves} */ (event.key)];
    if (event.key === "Escape") this.#point(null);
    if (!move || !this.#scene) return;
    event.preventDefault();
    const [rows, columns] = patches(this.#scene);
    const stride = event.shiftKey ? 8 : 1;
    const [row, column] = this.#patch ?? [Math.floor(rows / 2), Math.floor(columns / 2)];
    /** @type {[number, number]} */
    const patch = [
      Math.min(rows - 1, Math.max(0, row + stride * move[0])),
      Math.min(columns - 1, Math.max(0, column + stride * move[1])),
    ];
    this.#point(patch);
    const highest = ranked(this.#scene, patch).slice(0, 2);
    this.#read(highest.map(({ name, value }) => `${name} ${value.toFixed(3)}`).join(", "));
  }

  /** Say what is at the keyboard's patch, or nothing any more. @param {string} readout */
  #read(readout) {
    if (readout || this.status.textContent === this.#readout) this.status.textContent = readout;
    this.#readout = readout;
  }

  async #copy() {
    if (!this.#scene) return;
    const { width, height } = this.#size();
    const canvas = make("canvas", { width, height });
    this.#paint(canvas, Math.max(width, height) / 640);
    const { concepts, colours } = this.#scene;
    const shown = this.#drawn(this.#scene).map((i) => ({ name: concepts[i], colour: colours[i] }));
    /** @type {Promise<any>} a Blob, or null of a picture that is too large */
    const png = new Promise((resolve) => withNames(canvas, shown).toBlob(resolve));
    try {
      await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
      this.status.textContent = texts.copied;
    } catch {
      // Browsers allow it on secure pages only, which a ComfyUI in the local network is not.
      this.#save(await png);
    }
  }

  /** @param {Blob | null} png */
  #save(png) {
    if (!png) {
      this.status.textContent = texts.tooLarge;
      return;
    }
    const link = make("a", { href: URL.createObjectURL(png), download: "concepts.png" });
    link.click();
    URL.revokeObjectURL(link.href);
    this.status.textContent = fill(texts.saved, link.download);
  }
}

/** How many rows and columns of patches the picture has. @param {Scene} scene */
function patches({ grid, coverage }) {
  return [Math.round(grid[0] * coverage[0]), Math.round(grid[1] * coverage[1])];
}

/** The concepts at a patch, highest first. @param {Scene} scene @param {[number, number]} patch */
function ranked({ concepts, colours, grid, values }, [row, column]) {
  const size = grid[0] * grid[1];
  const at = row * grid[1] + column;
  return concepts
    .map((name, index) => ({ name, colour: colours[index], value: values[index * size + at] }))
    .sort((a, b) => b.value - a.value);
}

/** @param {number[]} numbers in ascending order */
function distinct(numbers) {
  return [...new Set(numbers)].sort((a, b) => a - b);
}

/** @param {string} text @param {string | null} colour @param {(event: MouseEvent) => void} onClick */
function chip(text, colour, onClick) {
  const button = make("button", { type: "button", className: "chip" }, make("span", { textContent: text }));
  if (colour) button.style.setProperty("--colour", colour);
  button.addEventListener("click", onClick);
  return button;
}

/** @param {string} name @param {number} value in 0..1 */
function slider(name, value) {
  const input = make("input", { type: "range", min: "0", max: "1", step: "0.01", ariaLabel: name });
  input.valueAsNumber = value;
  const output = make("output");
  const row = make("label", { className: "row" }, make("span", { textContent: name }), output, input);
  return { input, output, row };
}
