/* mathfit.js: display formulas that shrink with the window (kexue, Apache-2.0). A formula of natural
 * width N in a block of width A is set min(1, A / N) times as large, but never below a readable
 * size: from there on its block scrolls. For MathJax 3 and 4 (CHTML, SVG) and KaTeX. */
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
const SAFETY = 0.998; // rules and padding in px do not shrink with the font
const ROUNDS = 5; // ex and glyphs snap to whole pixels, so the first guess may be wide
const root = document.documentElement;
const script = document.currentScript;
const records = new Map(); // block -> what is known of it
const originals = new WeakMap(); // element -> a bare copy from before we touched it
const warned = new WeakSet();
let options = DEFAULTS;
let running = false;
let frame = 0;

const sheet = document.createElement("style");
sheet.nonce = script ? script.nonce : "";
sheet.textContent = `@media print {
[data-mathfit-print=block] { container-type: inline-size !important; overflow: visible !important }
[data-mathfit-print=formula] { font-size: min(var(--mathfit-size) * 1em,
${100 * SAFETY}cqi / var(--mathfit-width)) !important } }`;

function checked(given) {
  for (const [name, value] of Object.entries(given)) {
    let good = typeof value === typeof DEFAULTS[name];
    if (typeof value === "number") good = value >= 0 && value <= (name === "minScale" ? 1 : 1e6);
    try {
      if (name === "selector") root.matches(value);
    } catch (_) {
      good = false;
    }
    if (!good) throw new RangeError(`mathfit: ${name} cannot be ${String(value)}`);
  }
  return { ...options, ...given };
}

function fromAttributes(data) {
  const given = {};
  const words = { "": true, true: true, false: false };
  for (const name of Object.keys(DEFAULTS).filter((key) => key in data)) {
    const text = data[name];
    if (typeof DEFAULTS[name] === "string") given[name] = text;
    else if (text in words) given[name] = words[text];
    else given[name] = isNaN(text) ? text : Number(text);
  }
  return given;
}

// Set CSS properties and attributes, or take them back. The author's attributes win.
function put(element, on, values) {
  if (!originals.has(element)) originals.set(element, element.cloneNode(false));
  const original = originals.get(element);
  for (const [name, value] of Object.entries(values)) {
    if (!/^(data-|aria-|role|tabindex)/.test(name)) {
      element.style.setProperty(name, on ? value : original.style.getPropertyValue(name));
    } else if (!original.hasAttribute(name)) {
      if (on) element.setAttribute(name, value);
      else element.removeAttribute(name);
    }
  }
}

function restore(element) {
  const original = originals.get(element);
  if (!original) return;
  originals.delete(element);
  for (const { name } of [...element.attributes]) {
    const ours = /^(data-mathfit|role$|tabindex$|aria-label$)/.test(name);
    if (ours && !original.hasAttribute(name)) element.removeAttribute(name);
  }
  const text = original.getAttribute("style");
  element.style.cssText = text;
  if (text === null) element.removeAttribute("style");
  else if (element.getAttribute("style") !== text) element.setAttribute("style", text);
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
  if (known && known.formula === formula && known.inline === inline) return known;
  if (known) forget(known);
  if (!formula) return null;
  // A copy of a fitted block carries marks that are not its own.
  if (block.matches("[data-mathfit]")) {
    formula.style.fontSize = block.style.overflow = "";
    [block, formula].forEach((one) => ["", "-scale", "-print"].forEach((end) => one.removeAttribute("data-mathfit" + end)));
  }
  const host = formula.parentElement;
  const mathjax = host.matches("mjx-container");
  const minWidth = mathjax ? host.style.minWidth : "";
  // A numbered MathJax container is as wide as its formula, whatever the window.
  if (minWidth) put(host, true, { "min-width": "0px" });
  const record = { block, formula, host, inline, mathjax, minWidth };
  records.set(block, record);
  return record;
}

function forget({ block, formula, host }) {
  records.delete(block);
  [block, host, formula].forEach(restore);
}

const px = (text) => parseFloat(text) || 0;
const paddings = (css) => px(css.paddingLeft) + px(css.paddingRight);
const contentWidth = (element) => element.clientWidth - paddings(getComputedStyle(element));

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
  const parts = inline ? [] : [...formula.querySelectorAll(":scope > .katex-html > *")];
  const bases = parts.filter((part) => part.matches(".base, .katex-base"));
  if (bases.length) {
    const number = parts.filter((part) => part.matches(".tag, .katex-tag"));
    const gap = number.length ? span(number) / zoom + size : 0;
    // The number stands on one side, but a centred formula makes room for it on both.
    return span(bases) / zoom + paddings(css) + (block.matches(".fleqn") ? 1 : 2) * gap;
  }
  const margins = px(css.marginLeft) + px(css.marginRight);
  return Math.max(formula.scrollWidth || 0, span([formula]) / zoom + margins);
}

function measure(record) {
  const { block, formula, host, inline } = record;
  let target = inline ? block.parentElement : block;
  while (/^inline|contents/.test(getComputedStyle(target).display)) target = target.parentElement;
  const room = block.getClientRects().length ? contentWidth(target) : 0;
  const size = px(getComputedStyle(formula).fontSize);
  const relative = size / px(getComputedStyle(host).fontSize);
  const floor = Math.max(options.minScale, Math.min(1, options.minFontSize / size));
  Object.assign(record, { target, room, size, relative, floor, scale: 1, print: options.print && !inline });
  record.now = record.natural = room > 0 && size > 0 ? naturalWidth(record) : 0;
}

/* A box that wraps its content grows with the formula and says nothing about the room. The first
 * ancestor that is as wide without the formula's share does: what sticks out of it is too much. */
function unwrap(tight) {
  const widths = new Map();
  for (const { block } of tight) {
    for (let at = block; at; at = at.parentElement) widths.set(at, span([at]));
  }
  tight.forEach(({ block }) => put(block, true, { contain: "inline-size" }));
  for (const record of tight) {
    record.alone = contentWidth(record.block);
    while (Math.abs(span([record.target]) - widths.get(record.target)) > 0.5) {
      record.item = record.target;
      record.target = record.target.parentElement;
    }
  }
  tight.forEach(({ block }) => put(block, false, { contain: "" }));
  for (const record of tight.filter(({ block, target }) => target !== block)) {
    const { alone, item, target } = record;
    const row = /flex|grid/.test(getComputedStyle(target).display) ? [...target.children] : [item];
    const excess = Math.max(0, span(row) - contentWidth(target));
    record.room = Math.max(alone, record.room - excess);
    record.print = record.print && alone > record.room - 1;
  }
}

function each(list, step) {
  return list.filter((record) => {
    try {
      return step(record) !== false;
    } catch (error) {
      if (!warned.has(record.block)) console.warn("mathfit:", error, record.block);
      warned.add(record.block);
      return false;
    }
  });
}

// Write all, read all, write all: two layouts, however many formulas.
function fit(blocks, again = false) {
  let list = [...new Set(blocks)].map(adopt).filter(Boolean);
  list.forEach(({ formula }) => put(formula, false, { "font-size": "", "min-width": "" }));
  list = each(list, measure);
  unwrap(list.filter(({ inline, natural, room }) => !inline && Math.abs(natural - room) < 1));
  for (const record of list) {
    record.ceiling = again ? record.width : 0;
    record.width = record.room && contentWidth(record.target);
  }
  list = list.filter(({ natural }) => natural > 0);
  for (let wide = list, round = 0; wide.length; round++) {
    wide = each(wide, (record) => {
      if (round) record.now = naturalWidth(record);
      record.over = record.now > record.room + options.tolerance;
      return record.over && record.scale > record.floor && round < ROUNDS;
    });
    for (const record of wide) {
      const scale = (record.scale * SAFETY * record.room) / record.now;
      record.scale = Math.max(record.floor, scale);
      put(record.formula, true, { "font-size": `${(record.relative * record.scale).toFixed(5)}em` });
    }
  }
  const changed = each(list, show);
  // Taller or narrower content can bring a scroll bar, or make a box that wraps it narrower.
  const narrower = list.filter(({ target, width }) => contentWidth(target) < width - 0.5);
  if (narrower.length && !again) fit(narrower.map(({ block }) => block), true);
  for (const { block, scale, state } of changed) {
    const detail = { scale, state };
    block.dispatchEvent(new CustomEvent("mathfit:fit", { bubbles: true, detail }));
  }
  observe();
}

// Leave the result on the block; false where it is what it was.
function show(record) {
  const { block, formula, inline, mathjax, natural, over, print, relative, scale, shown, size } = record;
  const state = over ? "scroll" : scale < 1 ? "scaled" : "natural";
  const em = (natural / size).toFixed(4);
  Object.assign(record, { state, shown: state + scale.toFixed(4), fontSize: scale * size });
  put(block, true, { "data-mathfit": state, "data-mathfit-scale": scale.toFixed(4) });
  put(block, over, { overflow: "auto hidden", "justify-content": "start" });
  put(block, over, { tabindex: "0", role: "region", "aria-label": options.label });
  // As wide as all of it, so that both ends and the number can be reached.
  put(formula, over && !mathjax, { "min-width": `${em}em` });
  put(block, inline && state !== "natural", { display: "inline-block", "max-width": "100%" });
  put(block, print, { "data-mathfit-print": "block" });
  put(formula, print, { "data-mathfit-print": "formula" });
  put(formula, print, { "--mathfit-size": relative.toFixed(5), "--mathfit-width": em });
  return shown !== record.shown;
}

/* Observed anew in the next frame: what changed under our hands inside a resize callback would be
 * reported as a loop, and a first observation tells what has changed meanwhile. */
function observe() {
  frame = frame || requestAnimationFrame(() => {
    frame = 0;
    sizes.disconnect();
    const targets = new Set([...records.values()].map(({ target }) => target));
    if (running) targets.forEach((target) => sizes.observe(target));
  });
}

const sizes = new ResizeObserver((entries) => {
  const widths = new Map(entries.map(({ target, contentRect }) => [target, contentRect.width]));
  const stale = [...records.values()].filter(({ ceiling, fontSize, formula, target, width }) => {
    const now = widths.get(target);
    // Width is what counts: our own writing changes heights, and may take a scroll bar away.
    if (Math.abs(now - width) > 0.6) return Math.abs(now - ceiling) > 0.6;
    return now > 0 && Math.abs(px(getComputedStyle(formula).fontSize) - fontSize) > 0.01;
  });
  if (!stale.length) return;
  sizes.disconnect();
  fit(stale.map(({ block }) => block));
});

const mutations = new MutationObserver((list) => {
  records.forEach((record) => record.block.isConnected || forget(record));
  const added = list.flatMap(({ addedNodes }) => [...addedNodes]);
  const targets = list.map(({ target }) => target);
  if (targets.concat(added).some((node) => /^(style|link)$/.test(node.localName))) return refresh();
  const blocks = targets.map(around).concat(added.flatMap(find));
  fit(blocks.filter((block) => block && block.isConnected));
});

const refresh = (node = document) => fit(find(node));
const late = () => running && refresh();

function start(given = {}) {
  options = checked(given);
  records.forEach((record) => record.block.matches(wanted()) || forget(record));
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

document.addEventListener("load", ({ target }) => target.localName === "link" && late(), true);
document.fonts.addEventListener("loadingdone", late);
document.fonts.ready.then(late);
const api = { version: "1.0.0", start, stop, refresh };
window.mathfit = Object.defineProperty(api, "options", { get: () => ({ ...options }) });
options = checked({ ...window.mathfitConfig, ...fromAttributes(script ? script.dataset : {}) });
if (options.auto) start();
})();
