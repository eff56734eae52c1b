/**
 * The panel of Concept Viewer: the picture with its maps, and what it takes to look into them. Names of
 * concepts come from users and are only ever set as text.
 *
 * @typedef {import("./maps.mjs").View} View
 * @typedef {import("./maps.mjs").Loader} Loader
 * @typedef {import("./stage.mjs").Scene} Scene
 * @typedef {import("./clip.mjs").Clip} Clip
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
 *
 * Where layers and steps can be set that are looked at here. `handOver` returns the title of the node.
 * @typedef {object} Upstream
 * @property {(selection: Selection) => boolean} differs
 * @property {(selection: Selection) => string | null} handOver
 */

import { Card } from "./card.mjs";
import { Chips } from "./chips.mjs";
import { highest } from "./clip.mjs";
import { Controls } from "./controls.mjs";
import { Selection } from "./selection.mjs";
import { Stage, ranked } from "./stage.mjs";
import { TimeBar } from "./time_bar.mjs";
import { make } from "./dom.mjs";
import { unpack } from "./maps.mjs";
import { fill, texts } from "./texts.mjs";

export class Panel {
  /** What the user chose. @type {Selection | null} */
  #chosen = null;
  /** What is on the canvas, or was before a run: the same, unless it is on its way. @type {Selection | null} */
  #shown = null;
  /** The same, if it is no run. @type {Clip | null} */
  #clip = null;
  /** Until the frame that is wanted is shown. @type {Promise<void> | null} */
  #seeking = null;
  /** @type {number | null} */
  #hovered = null;
  #isBare = false;
  /** Whether a run is shown, or about to be. */
  #live = false;
  /** What the status line says of the patch that the keyboard chose. */
  #readout = "";
  /** Answers to all but the latest request are dropped. */
  #request = 0;
  #drawing = 0;
  /** In Nodes 2.0 the graph takes the wheel before the panel sees it. @param {WheelEvent} event */
  #keepWheel = (event) => {
    if (this.isFullScreen) event.stopPropagation();
  };

  /**
   * @param {Loader} load
   * @param {Settings} settings
   * @param {(changed: Partial<Settings>) => void} onChange
   * @param {Upstream} [upstream]
   */
  constructor(load, settings, onChange, upstream) {
    this.load = load;
    this.settings = settings;
    this.onChange = onChange;
    this.upstream = upstream;
    this.stage = new Stage({
      onPoint: (patch, byKey) => this.#point(patch, byKey),
      onPick: (patch, add) => this.#pickAt(patch, add),
      onBare: (bare) => this.#showBare(bare),
    });
    this.card = new Card();
    this.stage.element.append(this.card.element);
    this.chips = new Chips(
      (concept, add) => this.#pick(concept, add),
      (concept) => {
        this.#hovered = concept;
        this.#redraw();
      },
    );
    this.time = new TimeBar(() => (this.#seeking ??= this.#seek().finally(() => (this.#seeking = null))));
    this.controls = new Controls({
      setOpacity: (opacity) => this.#change({ opacity }),
      setThreshold: (threshold) => this.#change({ threshold }),
      chooseLayers: (places) => this.#open(this.#chosen?.withLayers(places)),
      chooseSteps: (places) => this.#open(this.#chosen?.withSteps(places)),
      reset: () => this.#open(this.#chosen?.reset()),
      turn: (by) => {
        this.#point(null, false);
        this.#open(this.#chosen?.turned(by));
      },
      handOver: () => this.#handOver(),
      copy: () => this.#copy(),
      showBare: (bare) => this.#showBare(bare),
      toggleFullScreen: () => {
        if (this.isFullScreen) document.exitFullscreen();
        else this.element.requestFullscreen();
      },
    });
    this.status = this.controls.status;
    this.element = make(
      "div",
      { className: "concept-viewer" },
      this.stage.element,
      this.time.element,
      this.chips.element,
      this.controls.element,
      this.controls.bar,
      this.controls.info,
    );
    window.addEventListener("wheel", this.#keepWheel, true);
    this.element.addEventListener("fullscreenchange", () => this.#adapt());
    this.element.addEventListener("keydown", (event) => {
      if (this.time.element.hidden || event.defaultPrevented) return;
      if (!event.ctrlKey && !event.metaKey && !event.altKey) this.time.key(event);
    });
    // The graph may have changed since.
    this.element.addEventListener("pointerenter", () => this.#showSelection());
    this.resizing = new ResizeObserver(() => {
      if (this.stage.patch) this.card.place(this.stage);
      this.#redraw();
    });
    this.resizing.observe(this.stage.element);
    this.resizing.observe(this.stage.frame);
    this.#update();
  }

  /** Take over settings that were changed elsewhere. @param {Partial<Settings>} changed */
  set(changed) {
    this.settings = { ...this.settings, ...changed };
    this.#update();
  }

  /** Show the result of a run, unless it is shown. @param {View} view */
  async show(view) {
    if (view.key === this.#chosen?.view.key && !this.#live) return;
    const image = Math.min(this.#chosen?.image ?? 0, view.images.length - 1);
    await this.#open(Selection.of(view, this.load, image));
  }

  /** Show maps of a run that is still going on. @param {LiveView} live @param {Blob | undefined} preview */
  async showLive(live, preview) {
    const request = this.#begin();
    this.#live = true;
    this.time.stop();
    const { concepts, colours, shown, grid, coverage } = live;
    const size = concepts.length * grid[0] * grid[1];
    const packet = Uint8Array.from(atob(live.maps), (c) => c.charCodeAt(0));
    const [frames, picture] = await Promise.all([
      unpack(new Blob([packet]), size),
      preview ? createImageBitmap(preview) : null,
    ]);
    if (request !== this.#request) return;
    const { values } = frames;
    const foreground = values.subarray(0, shown * grid[0] * grid[1]);
    this.#clip = null;
    this.#setScene({
      concepts, colours, shown, grid, coverage, values, picture, count: 1, highest: highest(foreground),
    });
    this.status.textContent = fill(texts.sampling, live.evaluations);
    this.#end(request);
  }

  /** The run of `showLive` ended without a result for this panel. */
  async endLive() {
    if (!this.#live) return;
    // Maps that are still being unpacked come too late.
    const request = this.#begin();
    this.status.textContent = "";
    if (this.#shown) await this.#open(this.#shown);
    this.#end(request);
  }

  dispose() {
    window.removeEventListener("wheel", this.#keepWheel, true);
    this.time.stop();
    this.resizing.disconnect();
    this.#request++;
  }

  get isFullScreen() {
    return document.fullscreenElement === this.element;
  }

  /** Show a selection; if it does not come, what was shown before stays. @param {Selection | undefined} selection */
  async #open(selection) {
    if (!selection) return;
    this.#chosen = selection;
    this.#update();
    const request = this.#begin();
    const waiting = setTimeout(() => {
      if (request === this.#request) this.status.textContent = texts.loading;
    }, 150);
    try {
      const clip = await selection.clip(this.time.frame);
      const frame = Math.min(this.time.frame, clip.count - 1);
      const scene = await clip.scene(frame);
      if (request !== this.#request) return;
      this.#live = false;
      this.#shown = selection;
      this.#clip = clip;
      this.time.of(clip.count);
      this.time.tell(frame);
      this.#setScene(scene);
      this.status.textContent = "";
      this.#forget();
      if (frame !== this.time.frame) this.time.onFrame();
    } catch (error) {
      if (request === this.#request) this.#fail(error);
    } finally {
      clearTimeout(waiting);
      this.#end(request);
    }
  }

  /** Show the frame that is wanted; while its picture is on its way another one may be. */
  async #seek() {
    try {
      let clip, frame;
      do {
        clip = this.#clip;
        frame = this.time.frame;
        if (!clip) return;
        const scene = await clip.scene(frame);
        if (clip !== this.#clip) continue;
        this.time.tell(frame);
        this.stage.show(scene);
        if (this.stage.patch) this.#point(this.stage.patch, false);
        this.#draw();
      } while (clip !== this.#clip || frame !== this.time.frame);
    } catch (error) {
      this.time.stop();
      this.status.textContent = messageOf(error);
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

  /** @param {unknown} error */
  #fail(error) {
    this.#chosen = this.#shown;
    this.#update();
    if (this.stage.scene) this.status.textContent = messageOf(error);
    else this.stage.notice.textContent = messageOf(error);
  }

  /** @param {Scene} scene */
  #setScene(scene) {
    this.stage.show(scene);
    this.#update();
    if (this.stage.patch) this.#point(this.stage.patch, false);
  }

  /** Bring everything but the maps up to date. */
  #update() {
    const { scene } = this.stage;
    this.element.classList.toggle("empty", !scene);
    this.time.element.hidden = !scene || scene.count < 2;
    this.controls.set(this.settings);
    this.controls.bare.hidden = !scene?.picture;
    this.#showSelection();
    if (scene) this.chips.show(scene, this.#picked());
    this.#redraw();
  }

  #showSelection() {
    const selection = this.#live ? null : this.#chosen;
    const canHandOver = !!selection && !selection.isGiven && !!this.upstream?.differs(selection);
    this.controls.show(selection, canHandOver);
  }

  #handOver() {
    const title = this.#chosen && this.upstream?.handOver(this.#chosen);
    this.#showSelection();
    if (title) this.status.textContent = fill(texts.handedOver, title);
  }

  /** To full screen, or back from it. */
  #adapt() {
    const { isFullScreen } = this;
    const { fullScreen } = this.controls;
    fullScreen.ariaLabel = fullScreen.title = isFullScreen ? texts.leaveFullScreen : texts.fullScreen;
    // Keys are to stay here then, wherever was clicked: behind it is the graph.
    if (!isFullScreen) return this.element.removeAttribute("tabindex");
    this.element.tabIndex = -1;
    if (!this.element.contains(document.activeElement)) this.element.focus();
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

  /**
   * Pick a concept alone, or all if it was alone; `add` it to the others, or take it away. Null picks all.
   * @param {number | null} concept @param {boolean} add
   */
  #pick(concept, add) {
    const picked = this.#picked();
    const rest = picked.filter((other) => other !== concept);
    if (concept === null) this.#setPicked([]);
    else if (add) this.#setPicked(rest.length < picked.length ? rest : [...picked, concept]);
    else this.#setPicked(picked.length === 1 && !rest.length ? [] : [concept]);
  }

  /** Pick the concept that is highest at a patch. @param {import("./stage.mjs").Patch} patch @param {boolean} add */
  #pickAt(patch, add) {
    if (this.stage.scene) this.#pick(ranked(this.stage.scene, patch)[0].index, add);
  }

  /** @param {number[]} picked */
  #setPicked(picked) {
    const concepts = this.stage.scene?.concepts ?? [];
    this.#hovered = null;
    this.#change({ picked: concepts.filter((_, index) => picked.includes(index)) });
  }

  /** Take what no chip shows as picked out of the settings, where Concept Mask would find it. */
  #forget() {
    const picked = this.#picked();
    const names = picked.map((index) => this.stage.scene?.concepts[index]);
    if (names.join() !== this.settings.picked.join()) this.#setPicked(picked);
  }

  /** Show the picture alone, or the maps on it again. @param {boolean} bare */
  #showBare(bare) {
    this.#isBare = bare;
    this.element.classList.toggle("bare", bare);
    this.#redraw();
  }

  /** @param {Scene} scene @returns {import("./stage.mjs").Look} */
  #look({ shown }) {
    const { threshold, opacity } = this.settings;
    const picked = this.#hovered === null ? this.#picked() : [this.#hovered];
    const drawn = picked.length ? picked : [...Array(shown).keys()];
    return { drawn, threshold, opacity, bare: this.#isBare };
  }

  #redraw() {
    this.#drawing ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    cancelAnimationFrame(this.#drawing);
    this.#drawing = 0;
    const { scene } = this.stage;
    if (!scene) return;
    const look = this.#look(scene);
    this.stage.draw(look);
    const { drawn, threshold } = look;
    const alone = drawn.length === 1 ? { area: this.stage.area(drawn[0], threshold), highest: scene.highest } : null;
    this.controls.measure(threshold, alone);
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

/** @param {unknown} error */
function messageOf(error) {
  return error instanceof Error ? error.message : `${error}`;
}
