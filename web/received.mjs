import { texts } from "./texts.mjs";

/**
 * What ComfyUI was asked for; fails with a message for the user.
 * @template T
 * @param {Promise<Response>} asked @param {(content: Blob) => Promise<T>} decode
 */
export async function received(asked, decode) {
  let message = texts.failed;
  try {
    const response = await asked;
    if (response.ok) return await decode(await response.blob());
    if (response.status === 404 || response.status === 410) message = texts.gone;
  } catch (error) {
    console.info("Concept Attention: the maps or the picture did not arrive.", error);
  }
  throw new Error(message);
}
