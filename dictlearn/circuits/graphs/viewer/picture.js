"use strict";

// Data, words, layout and drawing. Everything from the data enters the document as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, tokens } = data;
const PITCH = 19, GAP = 12, LEFT = 92; // px: between nodes, between rows, for the names of layers
const N_FAINT = 300, N_INPUTS = 3; // edges always drawn: at most, and of each node
const N_ROWS = data.n_layers + 2, TOP = N_ROWS - 1; // embeddings, layers, logits
const state = { clicked: null, hovered: null, pinned: [], query: "" };

for (const node of nodes) Object.assign(node, { ins: [], outs: [] });
const edges = data.edges.map(([source, target, weight]) => {
  const edge = { source: nodes[source], target: nodes[target], weight, size: Math.abs(weight) };
  edge.share = edge.size / edge.target.row.size;
  edge.source.outs.push(edge);
  edge.target.ins.push(edge);
  return edge;
});
for (const node of nodes) {
  node.ins.sort((a, b) => b.size - a.size);
  node.outs.sort((a, b) => b.size - a.size);
}
const matters = (node) => node.influence ?? node.weight ?? 0;
const byInfluence = (a, b) => matters(b) - matters(a);
const latents = nodes.filter((node) => node.kind === "latent").sort(byInfluence);
const most = latents.length ? matters(latents[0]) : 1;
const strength = (node) => Math.min(1, Math.sqrt(matters(node) / most));
const largest = (list) => Math.max(1e-12, ...list.map((edge) => edge.size));

// -- elements and words --

function make(found, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else found.setAttribute(key, value);
  }
  found.append(...children);
  return found;
}
const SVG = "http://www.w3.org/2000/svg";
const html = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => make(document.createElementNS(SVG, tag), attributes, children);
const get = (id) => document.getElementById(id);

const MARKS = { "\n": "⏎", "\t": "⇥", "\r": "↵" };
const visible = (text) => text.replace(/[\n\t\r]/g, (sign) => MARKS[sign]).replace(/^ +$/, "␣");
const bare = (text) => visible(text).trim();
const spaced = (text) => visible(text.replaceAll(" ", "␣"));
const logitText = (node) => (isDifference(node) ? visible(node.text) : spaced(node.text));
const tokenAt = (node) => bare(tokens[node.position]);
function cut(text, length) {
  const letters = [...text];
  return letters.length > length ? letters.slice(0, length - 1).join("") + "…" : text;
}
function percent(share) {
  const digits = share < 0.0995 || (share > 0.995 && share < 1) ? 1 : 0;
  return `${(100 * share).toFixed(digits)} %`;
}
function number(value, signed = false) {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? size.toExponential(2) : size.toPrecision(3);
  return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + text;
}
const sign = (weight) => (weight < 0 ? "negative" : "positive");

function title(node) {
  if (node.kind === "latent") {
    const layer = node.dictionary in data.n_per_layer ? ` layer ${node.layer}` : "";
    return `${node.dictionary}${layer} / ${node.in_layer}`;
  }
  if (node.kind === "error") return `error of layer ${node.layer}`;
  return `${node.kind} “${node.kind === "logit" ? logitText(node) : tokenAt(node)}”`;
}
const isDifference = (node) => node.kind === "logit" && node.is_difference;
const withShare = (text, node) => (isDifference(node) ? text : `${text} ${percent(node.probabilities[0])}`);
const logitLabel = (node) => withShare(cut(logitText(node), isDifference(node) ? 25 : 12), node);
const valueName = (node) => (
  isDifference(node) ? "difference of logits" : node.kind === "logit" ? "logit above the mean" : "pre-activation");
function inList(node) {
  if (node.kind === "logit") return withShare(title(node), node);
  if (node.kind === "embedding") return `${title(node)} @${node.position}`;
  const top = node.promoted?.length ? ` → ${bare(node.promoted[0])}` : "";
  return `${title(node)} @${node.position} ${tokenAt(node)}${top}`;
}

// -- where nodes are --

const rowOf = (node) => (node.kind === "embedding" ? 0 : node.layer + 1);
const cells = new Map();
for (const node of [...nodes].sort((a, b) => (a.kind === "error") - (b.kind === "error") || byInfluence(a, b))) {
  const key = `${rowOf(node)},${node.position}`;
  cells.set(key, [...(cells.get(key) ?? []), node]);
}
const inCell = (row, position) => cells.get(`${row},${position}`) ?? [];
const total = (parts, key) => parts.reduce((sum, part) => sum + part[key], 0);

function stretch(parts, key, room) {
  const extra = Math.max(0, room - total(parts, key)) / parts.length;
  for (const part of parts) part[key] += extra;
}

// Columns are as wide as their fullest cell and their token need, rows as high as theirs, and both fill the room
// there is; logits stand one above the other with their names beside them.
function layout(roomX, roomY) {
  const rowNumbers = [...Array(N_ROWS).keys()];
  const columns = tokens.map((token, position) => {
    const fullest = Math.max(1, ...rowNumbers.slice(0, TOP).map((row) => inCell(row, position).length));
    const perLine = Math.ceil(Math.sqrt(1.5 * fullest) - 0.5);
    return { perLine, width: Math.max(perLine * PITCH + 12, Math.min(bare(token).length * 6.8 + 8, 88)) };
  });
  const perLine = (row, position) => (row === TOP ? 1 : columns[position].perLine);
  const rows = rowNumbers.map((row) => {
    const lines = tokens.map((_, position) => Math.ceil(inCell(row, position).length / perLine(row, position)));
    return { height: Math.max(1, ...lines) * PITCH + GAP };
  });
  const name = Math.max(...inCell(TOP, tokens.length - 1).map((node) => logitLabel(node).length));
  const beside = Math.max(0, 20 + 6.8 * name - columns.at(-1).width / 2);
  stretch(columns, "width", roomX - beside);
  stretch(rows, "height", roomY);
  const size = { width: total(columns, "width") + beside, height: total(rows, "height") };
  let x = 0, y = size.height;
  for (const column of columns) { column.x = x + column.width / 2; x += column.width; }
  for (const row of rows) { y -= row.height; row.y = y + row.height / 2; row.top = y; }
  for (const [key, own] of cells) {
    const [row, position] = key.split(",").map(Number), n = perLine(row, position);
    own.forEach((node, i) => {
      const line = Math.floor(i / n), inLine = Math.min(n, own.length - line * n);
      node.x = columns[position].x + ((i % n) - (inLine - 1) / 2) * PITCH;
      node.y = rows[row].y + (line - (Math.ceil(own.length / n) - 1) / 2) * PITCH;
    });
  }
  return { columns, rows, ...size };
}

// -- the picture --

function shape(node) {
  const r = 3.5 + 5 * strength(node), d = r + 1;
  if (node.kind === "latent") return svg("circle", { r });
  if (node.kind === "error") return svg("path", { d: `M0 ${-d}L${d} 0L0 ${d}L${-d} 0Z` });
  return svg("rect", { x: -5.5, y: -5.5, width: 11, height: 11, rx: 1.5 });
}
function shade(node) {
  if (node.kind === "latent") return 0.2 + 0.8 * strength(node);
  return node.kind === "error" ? 1 : 0.85;
}
function curve(edge, width, opacity) {
  const { source: a, target: b } = edge, bend = (a.y - b.y) / 2;
  const d = `M${a.x} ${a.y}C${a.x} ${a.y - bend} ${b.x} ${b.y + bend} ${b.x} ${b.y}`;
  return svg("path", { d, class: `edge ${sign(edge.weight)}`, "stroke-width": width, "stroke-opacity": opacity });
}
function faint() {
  const score = (edge) => edge.share * matters(edge.target);
  const found = nodes.flatMap((node) => node.ins.slice(0, N_INPUTS)).sort((a, b) => score(b) - score(a));
  const opacity = (edge) => 0.1 + 0.4 * Math.sqrt(score(edge) / score(found[0]));
  return found.slice(0, N_FAINT).map((edge) => curve(edge, 1, opacity(edge)));
}
function picture(node) {
  const place = { class: `node ${node.kind}`, transform: `translate(${node.x} ${node.y})` };
  node.element = svg("g", place, shape(node));
  node.element.node = node;
  if (node.kind === "logit") node.element.append(svg("text", { x: 11, y: 4 }, logitLabel(node)));
  return node.element;
}
function fill(id, width, height, children) {
  get(id).replaceChildren(...children);
  get(id).setAttribute("width", width);
  get(id).setAttribute("height", height);
}

function draw() {
  const { columns, rows, width, height } = layout(get("graph").clientWidth - LEFT, get("graph").clientHeight - 44);
  const stripes = columns.filter((_, position) => position % 2).map((column) => (
    svg("rect", { class: "stripe", x: column.x - column.width / 2, y: 0, width: column.width, height })));
  const rules = rows.slice(0, -1).map((row) => svg("line", { class: "rule", x2: width, y1: row.top, y2: row.top }));
  const elements = nodes.map(picture);
  fill("plot", width, height, [
    ...stripes, ...rules, svg("g", { id: "faint" }, ...faint()), svg("g", { id: "active" }), ...elements]);
  fill("layers", LEFT, height, rows.map((row, i) => {
    const name = i === 0 ? "embeddings" : i === TOP ? "logits" : `layer ${i - 1}`;
    return svg("text", { x: LEFT - 10, y: row.y + 4, "text-anchor": "end" }, name);
  }));
  fill("tokens", width, 40, columns.flatMap(({ x, width: room }, position) => {
    const text = cut(bare(tokens[position]), Math.max(3, Math.floor(room / 6.8)));
    const whole = svg("title", {}, visible(tokens[position]));
    return [
      svg("text", { x, y: 16, class: "token", "text-anchor": "middle" }, text, whole),
      svg("text", { x, y: 32, "text-anchor": "middle" }, position)];
  }));
  update();
}

// Edges and shades for what is hovered, else clicked; edges between pinned nodes; what the search found.
function update() {
  const focus = state.hovered ?? state.clicked, near = new Map();
  const own = focus ? [...focus.outs, ...focus.ins] : [], isPinned = new Set(state.pinned);
  for (const edge of own) near.set(edge.source === focus ? edge.target : edge.source, edge.weight);
  const between = edges.filter((edge) => isPinned.has(edge.source) && isPinned.has(edge.target));
  const widest = largest(own), widestPinned = largest(between);
  get("active").replaceChildren(
    ...between.map((edge) => curve(edge, 1 + 3 * edge.size / widestPinned, 0.85)),
    ...own.map((edge) => curve(edge, 0.6 + 3.4 * edge.size / widest, 0.25 + 0.6 * edge.size / widest)));
  get("faint").style.display = focus || between.length ? "none" : "";
  const found = state.query ? new Set(matches(state.query)) : null;
  for (const node of nodes) {
    const weight = near.get(node), far = focus && node !== focus && weight === undefined && !isPinned.has(node);
    const classes = {
      positive: weight > 0, negative: weight < 0, clicked: node === state.clicked, pinned: isPinned.has(node),
      match: found?.has(node), dim: focus ? far : found && !found.has(node) };
    for (const [name, is] of Object.entries(classes)) node.element.classList.toggle(name, Boolean(is));
    const plain = weight === undefined || node.kind === "error";
    const opacity = plain ? shade(node) : 0.25 + 0.75 * Math.abs(weight) / widest;
    node.element.firstChild.setAttribute("fill-opacity", opacity);
  }
}
