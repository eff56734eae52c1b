/** The names of concepts on a picture that leaves the page. They come from users and are only ever drawn. */

import { make } from "./dom.mjs";

/** Letters in pixels, at least, and as a share of the picture's longer side. */
const SMALLEST = 11;
const SHARE = 1 / 40;

/**
 * The picture with the names of the concepts that it shows: a single one in its corner, several below it, each
 * beside its colour.
 * @param {HTMLCanvasElement} picture which a single name is written into
 * @param {{name: string, colour: string}[]} concepts
 */
export function withNames(picture, concepts) {
  const { width, height } = picture;
  const size = Math.max(SMALLEST, SHARE * Math.max(width, height));
  if (concepts.length === 1) {
    const context = writer(picture, size);
    const name = cut(context, concepts[0].name, width - 3 * size);
    context.fillStyle = "rgb(0 0 0 / 0.65)";
    context.beginPath();
    context.roundRect(0.4 * size, 0.4 * size, context.measureText(name).width + size, 1.7 * size, 0.35 * size);
    context.fill();
    context.fillStyle = "white";
    context.fillText(name, 0.9 * size, 1.3 * size);
    return picture;
  }
  const margin = 0.7 * size;
  const row = 1.7 * size;
  const measure = writer(make("canvas"), size);
  let [x, y] = [margin, margin + row / 2];
  const places = concepts.map(({ name, colour }) => {
    const short = cut(measure, name, width - 2 * margin - 1.6 * size);
    const end = 1.6 * size + measure.measureText(short).width;
    if (x > margin && x + end > width - margin) [x, y] = [margin, y + row];
    const place = { name: short, colour, x, y };
    x += end + 1.4 * size;
    return place;
  });
  const canvas = make("canvas", { width, height: Math.ceil(height + y + row / 2 + margin) });
  const context = writer(canvas, size);
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0);
  for (const { name, colour, x, y } of places) {
    context.fillStyle = colour;
    context.fillRect(x, height + y - 0.6 * size, 1.2 * size, 1.2 * size);
    context.fillStyle = "#202020";
    context.fillText(name, x + 1.6 * size, height + y);
  }
  return canvas;
}

/** @param {HTMLCanvasElement} canvas @param {number} size of letters, in pixels */
function writer(canvas, size) {
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.font = `${size}px sans-serif`;
  context.textBaseline = "middle";
  return context;
}

/** A text cut to a width. @param {CanvasRenderingContext2D} context @param {string} text @param {number} width */
function cut(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  const letters = [...text].slice(0, 200);
  while (letters.length > 1 && context.measureText(`${letters.join("")}…`).width > width) letters.pop();
  return `${letters.join("")}…`;
}
