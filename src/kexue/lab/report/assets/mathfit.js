// mathfit.js: display formulas that shrink with the window. Part of kexue, Apache-2.0.
// Natural width N in room A: min(1, A / N) times as large, or readable in a scroller.
(() => {
"use strict";
if (window.mathfit && window.mathfit.refresh) return window.mathfit.refresh();

const DEFAULTS = {
  selector: 'mjx-container[display="true"], .katex-display',
  minFontSize: 10, // px
  minScale: 0,
  tolerance: 0.5, // px
  print: true,
  auto: true,
  inline: false,
  label: "Scrollable formula",
};
const SAFETY = 0.998; // lengths in px do not shrink
const root = document.documentElement;
const records = new Map(); // by block
const undos = new WeakMap(); // by element, then by name
let options = DEFAULTS;
let running = false;

const sheet = document.createElement("style");
sheet.textContent = `@media print {
[data-mathfit-print=block] { container-type: inline-size !important; overflow: visible !important }
[data-mathfit-print=formula] { font-size: min(var(--mathfit-size) * 1em,
${100 * SAFETY}cqi / var(--mathfit-width)) !important } }`;

function checked(given, isText) {
  const merged = { ...options };
  for (const [name, raw] of Object.entries(given)) {
    const kind = typeof DEFAULTS[name];
    if (isText && kind === "undefined") continue;
    try {
      const value = isText && kind !== "string" ? JSON.parse(raw || true) : raw;
      if (name === "selector") root.matches(value);
      const most = name === "minScale" ? 1 : 1e9;
      if (typeof value !== kind || value !== value || value < 0 || value > most) throw value;
      merged[name] = value;
    } catch (_) {
      throw new RangeError(`mathfit: ${name} cannot be ${String(raw)}`);
    }
  }
  return merged;
}

// Set properties, and attributes that the author has not set; or take ours back.
function put(element, on, values) {
  const undo = undos.get(element) || new Map([["", element.getAttribute("style")]]);
  undos.set(element, undo);
  const css = element.style;
  for (const [name, value] of Object.entries(values)) {
    const before = css.getPropertyValue(name);
    if (!on) {
      if (undo.has(name)) undo.get(name)();
      undo.delete(name);
    } else if (!/^(data|aria|role|tab)/.test(name)) {
      if (!undo.has(name)) undo.set(name, () => css.setProperty(name, before));
      css.setProperty(name, value);
    } else if (undo.has(name) || /^data/.test(name) || !element.hasAttribute(name)) {
      undo.set(name, () => element.removeAttribute(name));
      element.setAttribute(name, value);
    }
  }
}

function restore(element) {
  const undo = undos.get(element);
  if (!undo) return;
  const text = undo.get("");
  undo.delete("");
  put(element, false, Object.fromEntries(undo));
  undos.delete(element);
  const original = document.createElement("i");
  original.style.cssText = text;
  const left = element.getAttribute("style") || "";
  if (left !== original.style.cssText) return; // somebody else's, too
  if (text === null) element.removeAttribute("style");
  else if (text !== left) element.setAttribute("style", text);
}

const wanted = () => options.selector + (options.inline ? ", mjx-container, .katex" : "");

function around(node) {
  const block = node && node.closest && node.closest(wanted());
  return block && (around(block.parentElement) || block);
}

function find(node) {
  const block = around(node);
  if (block) return [block];
  return node.querySelectorAll ? [...node.querySelectorAll(wanted())].map(around) : [];
}

function adopt(block) {
  const inline = !block.matches(options.selector);
  const formula =
    (inline && block.querySelector(".katex-html")) ||
    block.querySelector("mjx-math, .katex, mjx-container > svg") ||
    block.firstElementChild;
  const known = records.get(block);
  if (known && known.formula === formula) return known;
  if (known) forget(known);
  if (!formula) return null;
  // A copy of a fitted block.
  if (block.dataset.mathfit) formula.style.fontSize = block.style.overflow = "";
  const host = formula.parentElement;
  const mathjax = host.matches("mjx-container");
  const minWidth = mathjax ? host.style.minWidth : "";
  // A numbered MathJax container is as wide as its formula, whatever the window.
  if (minWidth) put(host, true, { "min-width": "0px" });
  const record = { block, formula, host, inline, mathjax, minWidth, target: block };
  records.set(block, record);
  return record;
}

function forget({ block, formula, host }) {
  records.delete(block);
  [block, host, formula].forEach(restore);
}

const px = (text) => parseFloat(text) || 0;
const fontSize = (element) => px(getComputedStyle(element).fontSize);

function contentWidth(element) {
  const { paddingLeft, paddingRight } = getComputedStyle(element);
  return element.clientWidth - px(paddingLeft) - px(paddingRight);
}

function span(elements) {
  const boxes = elements.map((element) => element.getBoundingClientRect());
  return Math.max(...boxes.map((box) => box.right)) - Math.min(...boxes.map((box) => box.left));
}

function naturalWidth({ block, formula, inline, minWidth, target }) {
  const css = getComputedStyle(formula);
  const size = px(css.fontSize);
  if (minWidth) return minWidth.endsWith("em") ? px(minWidth) * size : px(css.minWidth);
  // Rectangles include CSS transforms, layout does not.
  const ratio = span([target]) / target.offsetWidth;
  const zoom = Math.abs(ratio - 1) > 0.01 ? ratio : 1;
  const html = !inline && formula.querySelector(".katex-html");
  const parts = (kind) => html ? [...html.children].filter((part) => part.matches(kind)) : [];
  const bases = parts(".base, .katex-base");
  const number = parts(".tag, .katex-tag");
  if (bases.length) {
    const gap = number.length && span(number) / zoom + size;
    // A centred formula makes room for its number on both sides.
    return span(bases) / zoom + px(css.paddingLeft) + gap * (block.matches(".fleqn") ? 1 : 2);
  }
  const margins = px(css.marginLeft) + px(css.marginRight);
  return Math.max(formula.scrollWidth || 0, span([formula]) / zoom + margins);
}

// Seldom; and that is known without a new layout.
function moved(it) {
  const width = contentWidth(it.target);
  const now = naturalWidth(it);
  const same = Math.abs(now - it.now) < 0.1;
  it.known = same && it.target === it.block && Math.abs(now - width) > 0.05;
  // The ceiling: the width at which a scroll bar comes that is gone at the next smaller one.
  return !same || !(Math.abs(width - it.width) < 0.6 || Math.abs(width - it.ceiling) < 0.6);
}

function measure(it) {
  it.target = it.inline ? it.block.parentElement : it.block;
  while (/^inline|contents/.test(getComputedStyle(it.target).display)) it.target = it.target.parentElement;
  it.room = it.block.getClientRects().length && contentWidth(it.target);
  if (!it.known) {
    it.size = fontSize(it.formula);
    it.relative = it.size / fontSize(it.host);
    it.natural = it.room > 0 && it.size > 0 ? naturalWidth(it) : 0;
  }
  it.floor = Math.max(options.minScale, Math.min(1, options.minFontSize / it.size));
  it.print = options.print && !it.inline;
  it.scale = 1;
  it.now = it.natural;
}

// A box that wraps its content says nothing about the room. The first ancestor does that is as
// wide without the formula's share: what sticks out of it is too much.
function unwrap(tight) {
  const widths = new Map();
  for (const { block } of tight) {
    for (let at = block; at; at = at.parentElement) widths.set(at, span([at]));
  }
  tight.forEach(({ block }) => put(block, true, { contain: "inline-size" }));
  for (const it of tight) {
    it.alone = contentWidth(it.block);
    while (Math.abs(span([it.target]) - widths.get(it.target)) > 0.5) {
      it.item = it.target;
      it.target = it.target.parentElement;
    }
  }
  tight.forEach(({ block }) => put(block, false, { contain: "" }));
  for (const it of tight.filter(({ block, target }) => target !== block)) {
    const row = /flex|grid/.test(getComputedStyle(it.target).display);
    const content = span(row ? [...it.target.children] : [it.item]);
    it.room = Math.max(it.alone, it.room - content + contentWidth(it.target));
    it.print = it.print && it.alone > it.room - 1;
  }
}

function each(list, step) {
  return list.filter((it) => {
    try {
      return step(it) !== false;
    } catch (error) {
      if (!it.failed) console.warn("mathfit:", error, it.block);
      it.failed = true;
      return false;
    }
  });
}

// Write all, read all, write all: two layouts, however many formulas.
function fit(blocks, again) {
  let list = [...new Set(blocks)].filter((block) => block && block.isConnected);
  list = each(list.map(adopt).filter(Boolean), moved);
  if (!list.length) return;
  sizes.disconnect();
  const unknown = list.filter((it) => !it.known);
  unknown.forEach((it) => put(it.formula, false, { "font-size": "", "min-width": "" }));
  list = each(list, measure);
  unwrap(list.filter((it) => !it.inline && Math.abs(it.natural - it.room) < 1));
  for (const it of list) {
    it.ceiling = again && it.width;
    it.width = it.room && contentWidth(it.target);
  }
  list = list.filter((it) => it.natural > 0);
  // In rounds, because ex and glyphs snap to whole pixels.
  for (let wide = list, round = 0; wide.length; round++) {
    wide = each(wide, (it) => {
      if (round) it.now = naturalWidth(it);
      it.over = it.now > it.room + options.tolerance;
      return it.over && it.scale > it.floor && round < 5;
    });
    for (const it of wide) {
      it.scale = Math.max(it.floor, (it.scale * SAFETY * it.room) / it.now);
      put(it.formula, true, { "font-size": `${(it.relative * it.scale).toFixed(5)}em` });
    }
  }
  const changed = each(list, show);
  // A scroll bar has come, or another formula has made room.
  const narrower = list.filter((it) => contentWidth(it.target) < it.width - 0.5);
  if (narrower.length && !again) fit(narrower.map((it) => it.block), true);
  for (const { block, scale, state } of changed) {
    const detail = { scale, state };
    block.dispatchEvent(new CustomEvent("mathfit:fit", { bubbles: true, detail }));
  }
  // Later, for within a resize callback this would be reported as a loop.
  requestAnimationFrame(() => running && records.forEach((it) => sizes.observe(it.target)));
}

function show(it) {
  const { block, formula, over, print, scale, shown } = it;
  const em = (it.natural / it.size).toFixed(4);
  it.state = over ? "scroll" : scale < 1 ? "scaled" : "natural";
  it.shown = it.state + scale.toFixed(4);
  put(formula, scale < 1, { "font-size": `${(it.relative * scale).toFixed(5)}em` });
  put(block, true, { "data-mathfit": it.state, "data-mathfit-scale": scale.toFixed(4) });
  const scroller = { overflow: "auto hidden", "justify-content": "start", tabindex: "0", role: "region" };
  put(block, over, { ...scroller, "aria-label": options.label });
  // As wide as all of it: both ends, and the number, can be reached.
  put(formula, over && !it.mathjax, { "min-width": `${em}em` });
  put(block, it.inline && (over || scale < 1), { display: "inline-block", "max-width": "100%" });
  put(block, print, { "data-mathfit-print": "block" });
  const printed = { "--mathfit-size": it.relative.toFixed(5), "--mathfit-width": em };
  put(formula, print, { "data-mathfit-print": "formula", ...printed });
  return shown !== it.shown;
}

const sizes = new ResizeObserver((entries) => {
  const targets = new Set(entries.map((entry) => entry.target));
  fit([...records.values()].filter((it) => targets.has(it.target)).map((it) => it.block));
});

const mutations = new MutationObserver((list) => {
  records.forEach((it) => it.block.isConnected || forget(it));
  fit(list.flatMap(({ addedNodes, target }) => [around(target), ...[...addedNodes].flatMap(find)]));
});

const refresh = (node = document) => fit(find(node));
const late = () => running && refresh();

function start(given = {}) {
  options = checked(given);
  records.forEach((it) => (around(it.block) === it.block ? (it.now = 0) : forget(it)));
  (document.head || root).append(sheet);
  running = true;
  mutations.observe(root, { childList: true, subtree: true });
  refresh();
}

function stop() {
  running = false;
  mutations.disconnect();
  sizes.disconnect();
  records.forEach(forget);
  sheet.remove();
}

document.fonts.addEventListener("loadingdone", late);
document.fonts.ready.then(late);
window.mathfit = {
  version: "1.0.0",
  start,
  stop,
  refresh,
  get options() {
    return { ...options };
  },
};
options = checked(window.mathfitConfig || {});
options = checked(document.currentScript ? document.currentScript.dataset : {}, true);
if (options.auto) start();
})();
