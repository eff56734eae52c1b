import { received } from "./received.mjs";

/** So many pictures after the one shown are fetched before they are asked for. */
const AHEAD = 4;

/** The picture of an image, or those of a video's frames, fetched when somebody looks at them. */
export class Pictures {
  /** As they came: not to be fetched again, and small. @type {Map<number, Promise<Blob>>} */
  #fetched = new Map();
  /** Of the frame asked for last and those after it. @type {Map<number, Promise<ImageBitmap>>} */
  #decoded = new Map();

  /**
   * @param {import("./maps.mjs").TemporaryFile[]} files of the frames, or one for all of them, or none
   * @param {import("./maps.mjs").Loader} load
   */
  constructor(files, load) {
    this.files = files;
    this.load = load;
  }

  /**
   * The picture of a frame, or the last one before it; null if there is none.
   * @param {number} frame @returns {Promise<ImageBitmap | null>}
   */
  async at(frame) {
    const count = this.files.length;
    if (!count) return null;
    const first = Math.min(frame, count - 1);
    const near = new Set(Array.from({ length: AHEAD + 1 }, (_, i) => (first + i) % count));
    for (const index of this.#decoded.keys()) if (!near.has(index)) this.#decoded.delete(index);
    const [picture] = [...near].map((index, i) => this.#picture(index, i === 0));
    return picture;
  }

  /** @param {number} index @param {boolean} isWaitedFor */
  #picture(index, isWaitedFor) {
    const fetched = kept(this.#fetched, index, () =>
      received(this.load.file(this.files[index], isWaitedFor ? "high" : "low"), async (file) => file),
    );
    return kept(this.#decoded, index, () => fetched.then(createImageBitmap));
  }
}

/**
 * What is in `map` already, or else what `make` gives, unless that fails.
 * @template T
 * @param {Map<number, Promise<T>>} map @param {number} index @param {() => Promise<T>} make
 */
function kept(map, index, make) {
  let value = map.get(index);
  if (!value) {
    const made = (value = make());
    map.set(index, made);
    made.catch(() => map.get(index) === made && map.delete(index));
  }
  return value;
}
