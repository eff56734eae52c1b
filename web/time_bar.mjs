import { make, makeButton } from "./dom.mjs";
import { texts } from "./texts.mjs";

/** Milliseconds that a frame is shown. Maps know of no frame rate; most video models have 16 or 24 frames a second. */
const PERIOD = 1000 / 16;

/** Which frame of a video is shown: to be dragged, gone through with the keyboard, and played. */
export class TimeBar {
  /** How many frames there are. */
  count = 1;
  /** The one that is wanted; it is shown as soon as its picture has come. */
  frame = 0;
  /** What began with the last click on the button, until it stops. @type {symbol | null} */
  #playing = null;

  /** @param {() => Promise<void>} onFrame shows the frame that is wanted, and says when it is shown */
  constructor(onFrame) {
    this.onFrame = onFrame;
    this.icon = make("i");
    this.button = makeButton({ className: "icon" }, () => this.#toggle(), this.icon);
    this.slider = make("input", { type: "range", min: "0", ariaLabel: texts.frame });
    this.slider.addEventListener("input", () => this.#go(this.slider.valueAsNumber));
    this.label = make("output");
    this.element = make("div", { className: "time", hidden: true }, this.button, this.slider, this.label);
    this.#update();
  }

  /** Take over the number of frames. @param {number} count */
  of(count) {
    this.count = count;
    this.frame = Math.min(this.frame, count - 1);
    this.slider.max = `${count - 1}`;
    this.#update();
  }

  /** Say which frame is shown by now. @param {number} frame */
  tell(frame) {
    this.label.textContent = `${frame + 1} / ${this.count}`;
  }

  /** Where a key of the panel means time, it does nothing else. @param {KeyboardEvent} event */
  key(event) {
    const { key, repeat } = event;
    const target = /** @type {Element} */ (event.target);
    const last = this.count - 1;
    if (key === " " && !target.matches("button")) {
      if (!repeat) this.#toggle();
    } else if (target.matches("input")) return;
    else if (key === "ArrowLeft") this.#go(Math.max(0, this.frame - 1));
    else if (key === "ArrowRight") this.#go(Math.min(last, this.frame + 1));
    else if (key === "Home") this.#go(0);
    else if (key === "End") this.#go(last);
    else return;
    event.preventDefault();
  }

  stop() {
    this.#playing = null;
    this.#update();
  }

  /** @param {number} frame */
  #go(frame) {
    this.frame = frame;
    this.stop();
    this.onFrame();
  }

  #toggle() {
    if (this.#playing) this.stop();
    else this.#play();
  }

  /** Over and over. Frames that it is too late for are left out, and one whose picture has not come is waited for. */
  async #play() {
    const playing = (this.#playing = Symbol());
    this.#update();
    let shown = performance.now();
    while (true) {
      const now = await new Promise(requestAnimationFrame);
      if (this.#playing !== playing) return;
      if (!this.element.checkVisibility()) shown = now;
      const steps = Math.floor((now - shown) / PERIOD);
      if (steps < 1) continue;
      shown += steps * PERIOD;
      this.frame = (this.frame + steps) % this.count;
      this.#update();
      await this.onFrame();
      shown = Math.max(shown, performance.now() - PERIOD);
    }
  }

  #update() {
    const name = this.#playing ? texts.pause : texts.play;
    this.icon.className = this.#playing ? "pause" : "play";
    this.button.ariaLabel = name;
    this.button.title = `${name}\n${texts.time}`;
    this.slider.valueAsNumber = this.frame;
    this.slider.ariaValueText = `${this.frame + 1} / ${this.count}`;
  }
}
