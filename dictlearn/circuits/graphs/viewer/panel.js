"use strict";

// The panel beside the picture, and what the reader does.

const byId = new Map(nodes.map((node) => [node.id, node]));

// -- the panel --

function row(node, share, weight) {
  const listeners = {
    onclick: () => select(node, true), onmouseenter: () => hover(node), onmouseleave: () => hover(null) };
  const whole = `${title(node)} at ${tokenAt(node)} (${node.position})`;
  return html("button", { class: "row", title: whole, ...listeners },
    html("span", { class: "name" }, inList(node)),
    ...(weight === undefined ? [] : [html("span", { class: `number ${sign(weight)}` }, number(weight, true))]),
    html("span", { class: "share" }, percent(share)));
}
function sum(name, value, kind = "muted") {
  return html("div", { class: `row ${kind}` }, html("span", { class: "name" }, name),
    html("span", { class: "number" }, number(value, true)), html("span", { class: "share" }));
}
const list = (id, children) => html("div", { class: "list", id }, ...children);
const part = (name, ...children) => html("section", {}, html("h3", {}, name), ...children);
const note = (text) => html("p", { class: "note" }, text);
const chips = (texts) => texts.map((text) => html("span", { class: "chip" }, visible(text)));

function facts(node) {
  const found = [["at", [`“${tokenAt(node)}” (${node.position})`]]];
  const add = (name, value, show) => { if (value !== undefined) found.push([name, [show(value)].flat()]); };
  if (node.dictionary in data.n_per_layer) add(`number in ${node.dictionary}`, node.index, String);
  add("activation", node.activation, number);
  if (node.probabilities?.length) {
    const [name, joint] = isDifference(node) ? ["probabilities", ", "] : ["probability", ""];
    add(name, node.probabilities.map(percent).join(joint), String);
  }
  add(valueName(node), node.row?.total, number);
  add("influence", node.influence, percent);
  if (node.promoted?.length) {
    add("promotes", node.promoted, chips);
    add("suppresses", node.suppressed, chips);
  }
  return html("dl", {}, ...found.flatMap(([name, shown]) => [html("dt", {}, name), html("dd", {}, ...shown)]));
}
function inputs(node) {
  const { n_pruned: n, pruned, bias, other, total: all } = node.row;
  return part(`Inputs (${node.ins.length})`, note("Weight, and its share of the sizes of all inputs."),
    list("inputs", node.ins.map((edge) => row(edge.source, edge.share, edge.weight))),
    list("sums", [
      sum(`${n} pruned edge${n === 1 ? "" : "s"}`, pruned), sum("biases", bias),
      ...(other ? [sum("latents that are no nodes", other)] : []), sum(`sum: ${valueName(node)}`, all, "total")]));
}
function outputs(node) {
  return part(`Outputs (${node.outs.length})`, note("Weight, and its share of the sizes of all inputs there."),
    list("outputs", node.outs.map((edge) => row(edge.target, edge.share, edge.weight))));
}
function pins() {
  return part(`Pinned (${state.pinned.length})`, list("pinned", state.pinned.map((node) => {
    const drop = html("button", { class: "drop", title: "Unpin", onclick: () => pin(node) }, "✕");
    return html("div", { class: "pin" }, row(node, matters(node)), drop);
  })));
}
function key(kind, text) {
  const node = nodes.find((own) => own.kind === kind);
  if (!node) return [];
  const mark = svg("g", { class: `node ${kind}`, transform: "translate(10 10)" }, shape(node));
  return [svg("svg", { width: 20, height: 20 }, mark), html("span", {}, text)];
}
function overview() {
  return [
    html("section", {}, html("h2", {}, "How the model came to these logits"),
      html("p", { class: "muted" }, `Dictionaries: ${data.dictionaries.join(", ")}`),
      html("div", { class: "key" },
        ...key("latent", "active latent; larger and stronger: more influence"),
        ...key("error", "what the dictionary of a layer does not explain"),
        ...key("embedding", "below: token embedding; on top: logit of a next token")),
      note("Blue edges raise their target, orange ones lower it. Hover for details, click for inputs and outputs, "
        + "Ctrl or Shift and click to pin; Esc clears. The address keeps what is selected.")),
    part("Latents of most influence", note("Share of the influence of all nodes on the logits."),
      list("top", latents.slice(0, 40).map((node) => row(node, matters(node)))))];
}
function selected(node) {
  const button = (text, id, onclick) => html("button", { class: "action", id, onclick }, text);
  const head = html("section", { id: "selected" }, html("h2", {}, title(node)), facts(node),
    button(state.pinned.includes(node) ? "Unpin" : "Pin", "pin", () => pin(node)),
    button("Clear", "clear", () => select(null)));
  return [head, ...(node.row ? [inputs(node)] : []), ...(node.kind === "logit" ? [] : [outputs(node)])];
}
function panel() {
  const pinned = state.pinned.length ? [pins()] : [];
  const parts = state.clicked ? [...selected(state.clicked), ...pinned] : [...pinned, ...overview()];
  get("panel").replaceChildren(...parts);
}

// -- what the reader does --

function reveal(node) {
  if (node) node.element.scrollIntoView({ block: "center", inline: "center" });
}
function select(node, move = false) {
  Object.assign(state, { clicked: node, hovered: null });
  changed();
  get("panel").scrollTop = 0;
  if (move) reveal(node);
}
function pin(node) {
  const others = state.pinned.filter((own) => own !== node);
  state.pinned = others.length < state.pinned.length ? others : [...others, node];
  changed();
}
function hover(node) {
  state.hovered = node;
  update();
}
function changed() {
  const parts = [];
  if (state.clicked) parts.push(`clicked=${state.clicked.id}`);
  if (state.pinned.length) parts.push(`pinned=${state.pinned.map((node) => node.id).join(",")}`);
  history.replaceState(null, "", `#${parts.join("&")}`);
  update();
  panel();
}
function fromAddress() {
  const found = new URLSearchParams(location.hash.slice(1));
  const pinned = new Set((found.get("pinned") ?? "").split(","));
  state.clicked = byId.get(found.get("clicked")) ?? null;
  state.pinned = [...pinned].map((id) => byId.get(id)).filter(Boolean);
  update();
  panel();
  reveal(state.clicked);
}

// A latent by its number in the layer, "layer / number" or "dictionary / number", of a cross-layer transcoder that
// among the latents of all layers; else nodes at a token, or that promote it.
function matches(query) {
  const wanted = query.trim().toLowerCase(), has = (text) => bare(text).toLowerCase().includes(wanted);
  if (!wanted) return [];
  const names = (node) => [
    node.id, title(node), `${node.dictionary}/${node.index}`, `${node.layer}/${node.in_layer}`, `${node.in_layer}`];
  const short = (text) => text.toLowerCase().replaceAll(" ", "");
  const named = latents.filter((node) => names(node).map(short).includes(short(wanted)));
  if (named.length) return named;
  const own = (node) => (node.kind === "logit" ? bare(node.text) : tokenAt(node));
  return nodes.filter((node) => has(own(node)) || node.promoted?.some(has)).sort(byInfluence);
}
function search() {
  state.query = get("search").value.trim();
  const n = matches(state.query).length;
  get("found").textContent = state.query ? `${n || "no"} node${n === 1 ? "" : "s"}` : "";
  update();
}

function showTip(node, event) {
  const tip = get("tip"), chosen = state.clicked, paths = chosen ? [...chosen.ins, ...chosen.outs] : [];
  const edge = node === chosen ? undefined : paths.find((own) => own.source === node || own.target === node);
  const way = edge?.source === node ? "to" : "from";
  const about = edge ? [html("p", {}, `edge ${way} ${title(chosen)}: ${number(edge.weight, true)}`)] : [];
  tip.replaceChildren(html("strong", {}, title(node)), facts(node), ...about);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect(), x = event.clientX + 14, y = event.clientY + 14;
  tip.style.left = `${x + width > innerWidth ? x - width - 28 : x}px`;
  tip.style.top = `${Math.max(4, y + height > innerHeight ? y - height - 28 : y)}px`;
}

const nodeAt = (event) => event.target.closest(".node")?.node ?? null;
get("plot").addEventListener("mouseover", (event) => {
  const node = nodeAt(event);
  if (node) showTip(node, event);
  else get("tip").hidden = true;
  if (node !== state.hovered) hover(node);
});
get("plot").addEventListener("mouseleave", () => {
  get("tip").hidden = true;
  hover(null);
});
get("plot").addEventListener("click", (event) => {
  const node = nodeAt(event);
  if (node && (event.ctrlKey || event.shiftKey || event.metaKey)) pin(node);
  else select(node === state.clicked ? null : node);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  get("search").value = "";
  search();
  select(null);
});
get("search").addEventListener("input", search);
get("search").addEventListener("keydown", (event) => {
  const [first] = matches(state.query);
  if (event.key === "Enter" && first) select(first, true);
});
addEventListener("resize", draw);
addEventListener("hashchange", fromAddress);

const { counts, scores } = data, grouped = (value) => value.toLocaleString("en");
const fact = (name, value) => html("span", {}, name, html("b", {}, value));
get("facts").replaceChildren(
  fact("", data.lm), fact("replacement score ", scores.replacement.toFixed(3)),
  fact("completeness ", scores.completeness.toFixed(3)),
  fact("nodes ", `${grouped(counts.nodes)} of ${grouped(counts.all_nodes)}`),
  fact("latents ", `${grouped(counts.latents)} of ${grouped(counts.all_latents)}`),
  fact("edges ", `${grouped(counts.edges)} of ${grouped(counts.all_edges)}`));
draw();
get("graph").scrollLeft = get("graph").scrollWidth; // where the logits are
fromAddress();
