/**
 * The texts of Concept Viewer, in English; locales/<language>/main.json has the others under the same keys.
 * %s stands for a number or a name.
 */
export const texts = {
  picture: "Picture with concept maps. The arrow keys move from patch to patch, Enter picks the concept there, Space shows the picture alone.",
  video: "Frame of a video with concept maps. Space plays or stops, the left and right arrow keys go from frame to frame. Arrow keys with Shift move from patch to patch, Enter picks the concept there.",
  run: "Run the workflow to see the concept maps.",
  frame: "Frame",
  play: "Play",
  pause: "Pause",
  time: "Space plays or stops, the left and right arrow keys go from frame to frame, Home and End to the first and the last.",
  concepts: "Concepts",
  all: "All",
  chip: "Click: this one. Ctrl or Shift click: add or take away.",
  opacity: "Opacity",
  threshold: "Threshold",
  layers: "Layers",
  steps: "Steps",
  allOf: "all %s",
  strip: "Drag over a range. Arrow keys move it, with Shift they grow it; A takes all.",
  previous: "Previous image",
  next: "Next image",
  reset: "Reset",
  resetHint: "Back to the layers and steps of Concept Saliency",
  handOver: "Apply",
  handOverHint: "Set these layers and steps in Concept Saliency",
  handedOver: "Set in %s. Run the workflow to get these maps.",
  bare: "Picture alone",
  bareHint: "Hold to see the picture alone, here or on the picture itself",
  fullScreen: "Full screen",
  leaveFullScreen: "Leave full screen",
  copy: "Copy",
  copyHint: "Copy the picture as shown",
  copied: "Copied",
  saved: "Saved as %s",
  tooLarge: "The picture is too large.",
  sampling: "Sampling, %s so far",
  loading: "Loading…",
  more: "%s more below",
  plain: "Without anchor propagation: layers and steps are shown as in the paper.",
  averaged: "Averaged after the softmax: layers and steps are shown as in the paper.",
  gone: "ComfyUI no longer has these maps. Run the workflow again to see them.",
  failed: "The maps did not arrive. Is ComfyUI still running?",
};

/** @param {string} text @param {string | number} value */
export function fill(text, value) {
  return text.replace("%s", `${value}`);
}
