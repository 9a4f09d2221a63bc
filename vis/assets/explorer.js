"use strict";

// The threshold explorer of a report: what graph merging does at any threshold, from the similarities of neighboring
// patches alone. The functions above the line know no page; tests hold them to g2tm.graph_merge.

/**
 * Connected components of the patches, joined along every edge whose similarity exceeds the threshold.
 *
 * @param right (rows · (columns - 1)) similarities of each patch and the one to its right, row by row
 * @param down ((rows - 1) · columns) similarities of each patch and the one below it
 * @returns {count, assignment}: number of regions, and the region of every patch; regions are numbered in the order of
 *     their first patch
 */
function mergedRegions(right, down, rows, columns, threshold) {
  const limit = Math.fround(threshold); // torch compares float32 similarities with the threshold rounded to float32
  const parent = Int32Array.from({ length: rows * columns }, (_, patch) => patch);

  function root(patch) {
    while (parent[patch] !== patch) {
      parent[patch] = parent[parent[patch]];
      patch = parent[patch];
    }
    return patch;
  }

  function join(first, second) {
    const a = root(first);
    const b = root(second);
    parent[Math.max(a, b)] = Math.min(a, b);
  }

  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const patch = row * columns + column;
      if (column + 1 < columns && right[row * (columns - 1) + column] > limit) join(patch, patch + 1);
      if (row + 1 < rows && down[patch] > limit) join(patch, patch + columns);
    }
  }
  const assignment = new Int32Array(rows * columns);
  let count = 0;
  for (let patch = 0; patch < parent.length; patch++) {
    const first = root(patch);
    assignment[patch] = first === patch ? count++ : assignment[first];
  }
  return { count, assignment };
}

/**
 * Borders between regions, in patches: one {x, y, length, vertical} for every straight stretch.
 */
function borders(assignment, rows, columns) {
  const found = [];
  function scan(lines, length, differs, vertical) {
    for (let line = 1; line < lines; line++) {
      for (let start = 0; start < length; start++) {
        if (!differs(line, start)) continue;
        let end = start + 1;
        while (end < length && differs(line, end)) end++;
        const [x, y] = vertical ? [line, start] : [start, line];
        found.push({ x, y, length: end - start, vertical });
        start = end;
      }
    }
  }
  const at = (row, column) => assignment[row * columns + column];
  scan(columns, rows, (column, row) => at(row, column) !== at(row, column - 1), true);
  scan(rows, columns, (row, column) => at(row, column) !== at(row - 1, column), false);
  return found;
}

/**
 * Mean color of every region.
 *
 * @param sums (patches · 4) red, green, blue and number of pixels, summed over every patch
 * @returns (regions · 3), each 0 to 255
 */
function meanColors(sums, assignment, count) {
  const total = new Float64Array(count * 4);
  assignment.forEach((region, patch) => {
    for (let channel = 0; channel < 4; channel++) total[4 * region + channel] += sums[4 * patch + channel];
  });
  const colors = new Uint8Array(count * 3);
  for (let region = 0; region < count; region++) {
    const pixels = Math.max(1, total[4 * region + 3]);
    for (let channel = 0; channel < 3; channel++) {
      colors[3 * region + channel] = Math.round(total[4 * region + channel] / pixels);
    }
  }
  return colors;
}

// ---------------------------------------------------------------------------------------------------------------------

const SHORTER_SIDE = 1024; // pixels of the canvas, about; the photograph is enlarged by a whole factor

function decodeFloats(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, index) => view.getFloat32(4 * index, true));
}

async function loadImage(entry) {
  const photo = new Image();
  photo.src = entry.photo;
  await photo.decode();
  const { rows, columns, patch } = entry;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [photo.naturalWidth, photo.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(photo, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const sums = new Float64Array(rows * columns * 4);
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++) {
      const to = 4 * (Math.floor(y / patch[0]) * columns + Math.floor(x / patch[1]));
      const from = 4 * (y * canvas.width + x);
      for (let channel = 0; channel < 3; channel++) sums[to + channel] += pixels[from + channel];
      sums[to + 3] += 1;
    }
  }
  const edges = { right: decodeFloats(entry.right), down: decodeFloats(entry.down) };
  return { ...edges, rows, columns, patch, photo, sums, width: canvas.width, height: canvas.height, ratio: entry.ratio };
}

function draw(canvas, image, regions, fill) {
  const { rows, columns, patch, width, height } = image;
  const scale = Math.max(1, Math.round(SHORTER_SIDE / Math.min(width, height)));
  if (canvas.width !== width * scale || canvas.height !== height * scale) {
    [canvas.width, canvas.height] = [width * scale, height * scale];
  }
  canvas.style.aspectRatio = image.ratio; // the model saw the photograph resized, the reader sees its own ratio
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(image.photo, 0, 0, canvas.width, canvas.height);
  const [patchHeight, patchWidth] = [patch[0] * scale, patch[1] * scale];
  if (fill) {
    const colors = meanColors(image.sums, regions.assignment, regions.count);
    regions.assignment.forEach((region, index) => {
      context.fillStyle = `rgb(${colors.subarray(3 * region, 3 * region + 3).join()})`;
      const [row, column] = [Math.floor(index / columns), index % columns];
      context.fillRect(column * patchWidth, row * patchHeight, patchWidth, patchHeight);
    });
  }
  const thickness = 2 * Math.max(1, Math.round(Math.min(patchWidth, patchHeight) / 24));
  const lines = borders(regions.assignment, rows, columns);
  for (const [style, wide] of [["rgb(0 0 0 / 60%)", thickness + 2], ["rgb(255 255 0)", thickness]]) {
    context.fillStyle = style; // dark below yellow: seen on bright and on dark ground
    for (const { x, y, length, vertical } of lines) {
      const [left, top] = [x * patchWidth - wide / 2, y * patchHeight - wide / 2];
      if (vertical) context.fillRect(left, top, wide, length * patchHeight + wide);
      else context.fillRect(left, top, length * patchWidth + wide, wide);
    }
  }
}

function startExplorer(explorer) {
  const { images, threshold } = JSON.parse(explorer.querySelector("script").textContent);
  const [chooser, slider, number, fill, output, canvas] = ["select", "input[type=range]", "input[type=number]",
    "input[type=checkbox]", "output", "canvas"].map((name) => explorer.querySelector(name));
  const loaded = new Map();
  let current = threshold;

  async function update() {
    const chosen = Number(chooser.value);
    if (!loaded.has(chosen)) loaded.set(chosen, loadImage(images[chosen]));
    const image = await loaded.get(chosen);
    if (chosen !== Number(chooser.value)) return; // another was chosen while this one was read
    const regions = mergedRegions(image.right, image.down, image.rows, image.columns, current);
    const all = image.rows * image.columns;
    output.textContent = `${regions.count} of ${all} tokens (${((100 * regions.count) / all).toFixed(1)} %)`;
    canvas.setAttribute("aria-label", `${images[chosen].name}: ${output.textContent} at threshold ${current}`);
    draw(canvas, image, regions, fill.checked);
  }

  slider.addEventListener("input", () => {
    current = Number(slider.value);
    number.value = slider.value;
    update();
  });
  number.addEventListener("input", () => {
    const value = number.valueAsNumber;
    if (!(value >= -1 && value <= 1)) return; // not yet a threshold
    current = value;
    slider.value = value;
    update();
  });
  chooser.addEventListener("change", update);
  fill.addEventListener("change", update);
  update();
}

if (typeof document !== "undefined") document.querySelectorAll(".explorer").forEach(startExplorer);
