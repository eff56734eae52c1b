/**
 * Names as core/concepts.py splits them: trimmed, in order, each once whatever its case.
 * @param {string} text
 */
export function splitNames(text) {
  /** @type {Map<string, string>} */
  const names = new Map();
  for (const part of text.split(/[\n\r\v\f\x1c-\x1e\x85\u2028\u2029,，、]/)) {
    const name = part.trim().replace(/\s+/g, " ");
    if (name && !names.has(name.toLowerCase())) names.set(name.toLowerCase(), name);
  }
  return [...names.values()];
}
