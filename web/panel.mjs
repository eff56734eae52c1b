/**
 * The panel of Concept Viewer: the picture with its maps, and what it takes to look into them. Names of
 * concepts come from users and are only ever set as text.
 *
 * @typedef {import("./maps.mjs").View} View
 * @typedef {import("./maps.mjs").Loader} Loader
 * @typedef {import("./stage.mjs").Scene} Scene
 *
 * What the server sends while a model samples: `maps` is a packet in base64.
 * @typedef {Pick<View, "concepts" | "colours" | "shown" | "grid" | "coverage">
 *   & {maps: string, evaluations: number}} LiveView
 *
 * What the user sets and the workflow keeps.
 * @typedef {object} Settings
 * @property {number} threshold
 * @property {string[]} picked names of concepts; all of them if empty
 * @property {number} opacity
 */

import { Card } from "./card.mjs";
import { Chips } from "./chips.mjs";
import { Controls } from "./controls.mjs";
import { Selection } from "./selection.mjs";
import { Stage, ranked } from "./stage.mjs";
import { make } from "./dom.mjs";
import { unpack } from "./maps.mjs";
import { fill, texts } from "./texts.mjs";

export class Panel {
  /** @type {Selection | null} */
  #selection = null;
  /** @type {ImageBitmap | null} */
  #picture = null;
  /** @type {number | null} */
  #hovered = null;
  /** Whether a run is shown, or about to be. */
  #live = false;
  /** What the status line says of the patch that the keyboard chose. */
  #readout = "";
  /** Answers to all but the latest request are dropped. */
  #request = 0;
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
    this.stage = new Stage((patch, byKey) => this.#point(patch, byKey));
    this.card = new Card();
    this.stage.element.append(this.card.element);
    this.chips = new Chips(
      (picked) => this.#pick(picked),
      (concept) => {
        this.#hovered = concept;
        this.#redraw();
      },
    );
    this.controls = new Controls({
      setOpacity: (opacity) => this.#change({ opacity }),
      setThreshold: (threshold) => this.#change({ threshold }),
      chooseLayers: (places) => this.#choose((selection) => selection.withLayers(places)),
      chooseSteps: (places) => this.#choose((selection) => selection.withSteps(places)),
      reset: () => this.#choose((selection) => selection.reset()),
      turn: (by) => this.#turn(by),
      copy: () => this.#copy(),
    });
    this.status = this.controls.status;
    this.element = make(
      "div",
      { className: "concept-viewer" },
      this.stage.element,
      this.chips.element,
      this.controls.element,
      this.controls.bar,
    );
    this.resizing = new ResizeObserver(() => this.#redraw());
    this.resizing.observe(this.stage.element);
    this.#update();
  }

  /** Take over settings that were changed elsewhere. @param {Partial<Settings>} changed */
  set(changed) {
    this.settings = { ...this.settings, ...changed };
    this.#update();
  }

  /** Show the result of a run, unless it is shown. @param {View} view */
  async show(view) {
    if (view.key === this.#selection?.view.key && !this.#live) return;
    const image = Math.min(this.#selection?.image ?? 0, view.images.length - 1);
    this.#selection = Selection.of(view, this.load, image);
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
    if (this.#selection) await this.#open();
    this.#end(request);
  }

  dispose() {
    this.resizing.disconnect();
    this.#request++;
  }

  async #open() {
    const selection = /** @type {Selection} */ (this.#selection);
    const request = this.#begin();
    try {
      const [scene, picture] = await Promise.all([
        selection.scene(),
        this.#loadPicture(selection.view.images[selection.image].picture),
      ]);
      if (request !== this.#request) return;
      this.#live = false;
      this.#picture = picture;
      this.#setScene(scene);
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
    if (this.stage.scene) this.status.textContent = message;
    else this.stage.notice.textContent = message;
  }

  /** Look at other layers or steps. @param {(selection: Selection) => Selection} other */
  async #choose(other) {
    const selection = other(/** @type {Selection} */ (this.#selection));
    this.#selection = selection;
    this.#update();
    const request = this.#begin();
    const waiting = setTimeout(() => (this.status.textContent = texts.loading), 150);
    try {
      const scene = await selection.scene();
      if (request !== this.#request) return;
      this.status.textContent = "";
      this.#setScene(scene);
    } catch (error) {
      if (request === this.#request) this.#fail(error);
    } finally {
      clearTimeout(waiting);
      this.#end(request);
    }
  }

  /** @param {number} by */
  #turn(by) {
    this.#selection = /** @type {Selection} */ (this.#selection).turned(by);
    this.#point(null, false);
    this.#open();
  }

  /** @param {Scene} scene */
  #setScene(scene) {
    this.stage.show(scene, this.#picture);
    this.#update();
    if (this.stage.patch) this.#point(this.stage.patch, false);
  }

  /** Bring everything but the maps up to date. */
  #update() {
    const { scene } = this.stage;
    this.element.classList.toggle("empty", !scene);
    this.controls.set(this.settings);
    this.controls.show(this.#live ? null : this.#selection);
    if (scene) this.chips.show(scene, this.#picked());
    this.#redraw();
  }

  /** @param {Partial<Settings>} changed */
  #change(changed) {
    this.set(changed);
    this.onChange(changed);
  }

  /** Indexes of the concepts picked, whatever their case; names of an older list are passed over. */
  #picked() {
    const picked = new Set(this.settings.picked.map((name) => name.toLowerCase()));
    const concepts = this.stage.scene?.concepts ?? [];
    return concepts.flatMap((name, index) => (picked.has(name.toLowerCase()) ? [index] : []));
  }

  /** @param {number[]} picked */
  #pick(picked) {
    const concepts = this.stage.scene?.concepts ?? [];
    this.#hovered = null;
    this.#change({ picked: concepts.filter((_, index) => picked.includes(index)) });
  }

  /** Take what no chip shows as picked out of the settings, where Concept Mask would find it. */
  #forget() {
    const picked = this.#picked();
    const names = picked.map((index) => this.stage.scene?.concepts[index]);
    if (names.join() !== this.settings.picked.join()) this.#pick(picked);
  }

  /** @param {Scene} scene @returns {import("./stage.mjs").Look} */
  #look({ shown }) {
    const { threshold, opacity } = this.settings;
    const picked = this.#hovered === null ? this.#picked() : [this.#hovered];
    return { drawn: picked.length ? picked : [...Array(shown).keys()], threshold, opacity };
  }

  #redraw() {
    this.#drawing ||= requestAnimationFrame(() => {
      this.#drawing = 0;
      const { scene, highest } = this.stage;
      if (!scene) return;
      const look = this.#look(scene);
      this.stage.draw(look);
      const { drawn, threshold } = look;
      const alone = drawn.length === 1 ? { area: this.stage.area(drawn[0], threshold), highest } : null;
      this.controls.measure(threshold, alone);
    });
  }

  /** Show the concepts at a patch. @param {import("./stage.mjs").Patch | null} patch @param {boolean} byKey */
  #point(patch, byKey) {
    this.stage.mark(patch);
    const { scene } = this.stage;
    if (!patch || !scene) {
      this.card.hide();
      this.#read("");
      return;
    }
    const concepts = ranked(scene, patch);
    this.card.show(concepts, this.stage);
    const highest = concepts.slice(0, 2).map(({ name, value }) => `${name} ${value.toFixed(3)}`);
    this.#read(byKey ? highest.join(", ") : "");
  }

  /** Say what is at the keyboard's patch, or nothing any more. @param {string} readout */
  #read(readout) {
    if (readout || this.status.textContent === this.#readout) this.status.textContent = readout;
    this.#readout = readout;
  }

  async #copy() {
    const { scene } = this.stage;
    if (!scene) return;
    /** @type {Promise<any>} */
    const png = this.stage.copy(this.#look(scene));
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
