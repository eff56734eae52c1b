/**
 * Concept maps as pixels and outlines.
 *
 * @typedef {object} Maps
 * @property {Float32Array} values concepts x rows x columns, in 0..1
 * @property {[number, number]} grid rows and columns
 * @property {[number, number]} coverage the share of the grid that the picture covers
 *
 * Pixels of a field and the range of their values.
 * @typedef {{top: number, left: number, bottom: number, right: number, low: number, high: number}} Block
 */

/** Pixels along the longer side of a field, where there are few concepts and where there are many. */
const DETAIL = 512;
const LESS_DETAIL = 256;
const MANY = 16;
/** Cells along the side of a block, which is passed over where no outline runs through it. */
const BLOCK = 16;

/** One concept's map at the resolution that it is drawn in. */
export class Field {
  /** @type {Block[] | null} */
  #blocks = null;

  /** @param {Maps} maps @param {number} concept */
  constructor({ values, grid: [rows, columns], coverage }, concept) {
    const height = rows * coverage[0];
    const width = columns * coverage[1];
    const many = values.length > MANY * rows * columns;
    const detail = (many ? LESS_DETAIL : DETAIL) / Math.max(height, width);
    this.height = Math.round(height * detail);
    this.width = Math.round(width * detail);
    this.values = new Float32Array(this.height * this.width);
    const x = samples(this.width, width, columns);
    const y = samples(this.height, height, rows);
    const line = new Float32Array(columns);
    for (let i = 0; i < this.height; i++) {
      const above = (concept * rows + y.from[i]) * columns;
      const below = (concept * rows + y.to[i]) * columns;
      for (let j = 0; j < columns; j++) {
        line[j] = values[above + j] + (values[below + j] - values[above + j]) * y.share[i];
      }
      const start = i * this.width;
      for (let j = 0; j < this.width; j++) {
        this.values[start + j] = line[x.from[j]] + (line[x.to[j]] - line[x.from[j]]) * x.share[j];
      }
    }
  }

  /** The share of the picture where the map is above a threshold. @param {number} threshold */
  area(threshold) {
    let count = 0;
    for (const v of this.values) if (v > threshold) count++;
    return count / this.values.length;
  }

  /**
   * Where the map crosses a threshold (marching squares), in the field's pixels.
   * @param {number} threshold
   */
  outline(threshold) {
    const path = new Path2D();
    this.#blocks ??= this.#divide();
    for (const block of this.#blocks) {
      if (block.low <= threshold && threshold < block.high) this.#trace(path, block, threshold);
    }
    return path;
  }

  /** The blocks of cells between pixels, with their lowest and highest values. */
  #divide() {
    const { values, width, height } = this;
    /** @type {Block[]} */
    const blocks = [];
    for (let top = 0; top + 1 < height; top += BLOCK) {
      const bottom = Math.min(top + BLOCK, height - 1);
      for (let left = 0; left + 1 < width; left += BLOCK) {
        const right = Math.min(left + BLOCK, width - 1);
        let low = Infinity;
        let high = -Infinity;
        for (let i = top; i <= bottom; i++) {
          for (let k = i * width + left; k <= i * width + right; k++) {
            if (values[k] < low) low = values[k];
            if (values[k] > high) high = values[k];
          }
        }
        blocks.push({ top, left, bottom, right, low, high });
      }
    }
    return blocks;
  }

  /** @param {Path2D} path @param {Block} block @param {number} threshold */
  #trace(path, { top, left, bottom, right }, threshold) {
    const { values, width } = this;
    for (let i = top; i < bottom; i++) {
      for (let j = left; j < right; j++) {
        const k = i * width + j;
        const a = values[k] - threshold;
        const b = values[k + 1] - threshold;
        const c = values[k + width + 1] - threshold;
        const d = values[k + width] - threshold;
        const corners = +(a > 0) | (+(b > 0) << 1) | (+(c > 0) << 2) | (+(d > 0) << 3);
        if (corners === 0 || corners === 15) continue;
        const x = j + 0.5;
        const y = i + 0.5;
        // where it crosses the top, right, bottom and left side of the cell
        const sides = [
          [x + a / (a - b), y],
          [x + 1, y + b / (b - c)],
          [x + d / (d - c), y + 1],
          [x, y + a / (a - d)],
        ];
        for (const [from, to] of CROSSINGS[corners]) {
          path.moveTo(sides[from][0], sides[from][1]);
          path.lineTo(sides[to][0], sides[to][1]);
        }
      }
    }
  }
}

/** The sides (top, right, bottom, left) that an outline joins, by which corners are inside. */
const CROSSINGS = [
  [], [[3, 0]], [[0, 1]], [[3, 1]], [[1, 2]], [[3, 0], [1, 2]], [[0, 2]], [[3, 2]],
  [[2, 3]], [[2, 0]], [[0, 1], [2, 3]], [[2, 1]], [[1, 3]], [[1, 0]], [[0, 3]], [],
];

/**
 * Neighbours to interpolate between, as torch's bilinear `interpolate` takes them (corners not aligned).
 * @param {number} count @param {number} patches that they cover @param {number} limit patches that there are
 */
function samples(count, patches, limit) {
  const from = new Uint16Array(count);
  const to = new Uint16Array(count);
  const share = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const at = Math.min(Math.max(((i + 0.5) * patches) / count - 0.5, 0), limit - 1);
    from[i] = Math.floor(at);
    to[i] = Math.min(from[i] + 1, limit - 1);
    share[i] = at - from[i];
  }
  return { from, to, share };
}

/**
 * One map in the colours of magma.
 * @param {Field} field @param {number} highest the value of the brightest colour
 */
export function heatmap(field, highest) {
  const pixels = new ImageData(field.width, field.height);
  const words = new Uint32Array(pixels.data.buffer);
  const scale = 255 / highest;
  for (let i = 0; i < words.length; i++) words[i] = MAGMA[Math.min(255, field.values[i] * scale) | 0];
  return pixels;
}

/**
 * Several maps, each in its colour: where they overlap the higher one prevails, and the highest value is
 * the opacity.
 * @param {Field[]} fields @param {string[]} colours as "#rrggbb" @param {number} highest
 */
export function blend(fields, colours, highest) {
  const pixels = new ImageData(fields[0].width, fields[0].height);
  const { data } = pixels;
  const rgb = colours.map((colour) => parseInt(colour.slice(1), 16));
  for (let i = 0, p = 0; p < data.length; i++, p += 4) {
    let total = 1e-12;
    let red = 0;
    let green = 0;
    let blue = 0;
    let top = 0;
    for (let k = 0; k < fields.length; k++) {
      const value = fields[k].values[i];
      const weight = value * value * value;
      total += weight;
      red += weight * (rgb[k] >> 16);
      green += weight * ((rgb[k] >> 8) & 255);
      blue += weight * (rgb[k] & 255);
      if (value > top) top = value;
    }
    data[p] = red / total;
    data[p + 1] = green / total;
    data[p + 2] = blue / total;
    data[p + 3] = (255 * top) / highest;
  }
  return pixels;
}

/** matplotlib's magma at 16 equal distances; between them it is linear to 1 % of full scale. */
const STOPS = "000004 0b0924 20114b 3b0f70 57157e 721f81 8c2981 a8327d c43c75 de4968 f1605d fa7f5e fe9f6d febf84 fddea0 fcfdbf"
  .split(" ")
  .map((colour) => parseInt(colour, 16));

/** Magma in 256 steps, as little-endian RGBA. */
const MAGMA = Uint32Array.from({ length: 256 }, (_, i) => {
  const at = (i / 255) * (STOPS.length - 1);
  const from = Math.min(Math.floor(at), STOPS.length - 2);
  const channel = (/** @type {number} */ shift) => {
    const [low, high] = [STOPS[from] >> shift, STOPS[from + 1] >> shift].map((value) => value & 255);
    return Math.round(low + (high - low) * (at - from));
  };
  return (255 << 24) | (channel(0) << 16) | (channel(8) << 8) | channel(16);
});

/** Magma as a CSS gradient. */
export const MAGMA_GRADIENT = `linear-gradient(to right, ${[...MAGMA]
  .filter((_, i) => i % 15 === 0)
  .map((c) => `rgb(${c & 255} ${(c >> 8) & 255} ${(c >> 16) & 255})`)
  .join(", ")})`;
