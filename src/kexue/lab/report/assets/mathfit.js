// Display formulas that shrink with the window (kexue, Apache-2.0).
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
const SAFETY = 0.998;
const root = document.documentElement;
const records = new Map();
const undos = new WeakMap();
let options = DEFAULTS;
let running = false;

const sheet = document.createElement("style");
sheet.textContent = `@media print {
[data-mathfit-print=block] { container-type: inline-size !important; overflow: visible !important }
[data-mathfit-print=formula] { font-size: min(var(--mathfit-size) * 1em,
${100 * SAFETY}cqi / var(--mathfit-width)) !important } }`;

function checked(given, isText) {
  const merged = { ...options };
  for (const name of Object.keys(given)) {
    const kind = typeof DEFAULTS[name];
    let value = given[name];
    if (isText && kind === "undefined") continue;
    try {
      if (isText && kind === "number") value = parseFloat(value);
      if (isText && kind === "boolean") value = JSON.parse(value || true);
      if (name === "selector") root.matches(value);
      const most = name === "minScale" ? 1 : 1e9;
      if (typeof value !== kind || value !== value || value < 0 || value > most) throw value;
      merged[name] = value;
    } catch (_) {
      throw new RangeError(`mathfit: ${name} cannot be ${String(given[name])}`);
    }
  }
  return merged;
}

// The author's attributes win.
function put(element, on, values) {
  const css = element.style;
  const text = element.getAttribute("style");
  const undo = undos.get(element) || Object.assign(new Map(), { css: css.cssText, text });
  undos.set(element, undo);
  for (const [name, value] of Object.entries(values)) {
    const property = !/^(data|aria|role|tab)/.test(name);
    const now = property ? css.getPropertyValue(name) : element.getAttribute(name);
    if (!on) {
      if (undo.has(name)) undo.get(name)();
      undo.delete(name);
    } else if (property && now !== value) {
      if (!undo.has(name)) undo.set(name, () => css.setProperty(name, now));
      css.setProperty(name, value);
    } else if (now === null || (now !== value && (undo.has(name) || /^data/.test(name)))) {
      undo.set(name, () => element.removeAttribute(name));
      element.setAttribute(name, value);
    }
  }
}

function restore(element) {
  const undo = undos.get(element);
  if (!undo) return;
  put(element, false, Object.fromEntries(undo));
  undos.delete(element);
  if (element.style.cssText !== undo.css || element.getAttribute("style") === undo.text) return;
  if (undo.text === null) element.removeAttribute("style");
  else element.setAttribute("style", undo.text);
}

const wanted = () => options.selector + (options.inline ? ", mjx-container, .katex" : "");

function around(node) {
  const block = node && node.closest && node.closest(wanted());
  return block && (around(block.parentElement) || block);
}

function find(node) {
  if (around(node)) return [around(node)];
  return node.querySelectorAll ? [...node.querySelectorAll(wanted())].map(around) : [];
}

function adopt(block) {
  const inline = !block.matches(options.selector);
  const formula =
    (inline && block.querySelector(".katex-html")) ||
    block.querySelector("mjx-math, .katex, mjx-container > svg") ||
    block.firstElementChild;
  let it = records.get(block);
  if (it && it.formula === formula) return it;
  if (it) forget(it);
  if (!formula) return null;
  if (block.matches("[data-mathfit]")) formula.style.fontSize = block.style.overflow = "";
  const host = formula.parentElement;
  const mathjax = host.matches("mjx-container");
  const minWidth = mathjax ? host.style.minWidth : "";
  // A numbered MathJax container is as wide as its formula.
  if (minWidth) put(host, true, { "min-width": "0px" });
  it = { block, formula, host, inline, mathjax, minWidth, target: block };
  records.set(block, it);
  return it;
}

function forget(it) {
  records.delete(it.block);
  [it.block, it.host, it.formula].forEach(restore);
}

const px = (text) => parseFloat(text) || 0;
const short = (number) => String(px(number.toFixed(5)));
const styleOf = getComputedStyle;
const both = (css, edge) => px(css[`${edge}Left`]) + px(css[`${edge}Right`]);
const contentWidth = (element) => element.clientWidth - both(styleOf(element), "padding");

function span(elements) {
  const boxes = elements.map((element) => element.getBoundingClientRect());
  return Math.max(...boxes.map((box) => box.right)) - Math.min(...boxes.map((box) => box.left));
}

function naturalWidth(it) {
  const css = styleOf(it.formula);
  const size = px(css.fontSize);
  if (it.minWidth) return it.minWidth.endsWith("em") ? px(it.minWidth) * size : px(css.minWidth);
  // Rectangles include CSS transforms, layout does not.
  const ratio = span([it.target]) / it.target.offsetWidth;
  const zoom = Math.abs(ratio - 1) > 0.01 ? ratio : 1;
  const html = !it.inline && it.formula.querySelector(".katex-html");
  const parts = (kind) => html ? [...html.children].filter((part) => part.matches(kind)) : [];
  const bases = parts(".base, .katex-base");
  const number = parts(".tag, .katex-tag");
  if (bases.length) {
    const gap = number.length && span(number) / zoom + size;
    return span(bases) / zoom + px(css.paddingLeft) + gap * (it.block.matches(".fleqn") ? 1 : 2);
  }
  return Math.max(it.formula.scrollWidth, span([it.formula]) / zoom + both(css, "margin"));
}

function moved(it) {
  const width = contentWidth(it.target);
  const now = naturalWidth(it);
  const same = Math.abs(now - it.now) < 0.1;
  it.known = same && it.target === it.block && Math.abs(now - width) > 0.05;
  return !same || ![it.width, it.ceiling].some((known) => Math.abs(width - known) < 0.6);
}

function measure(it) {
  it.target = it.inline ? it.block.parentElement : it.block;
  while (/^inline|contents/.test(styleOf(it.target).display)) it.target = it.target.parentElement;
  it.room = it.block.getClientRects().length && contentWidth(it.target);
  if (!it.known) {
    it.size = px(styleOf(it.formula).fontSize);
    it.relative = it.size / px(styleOf(it.host).fontSize);
    it.natural = it.room > 0 && it.size > 0 ? naturalWidth(it) : 0;
  }
  it.floor = Math.max(options.minScale, Math.min(1, options.minFontSize / it.size));
  it.print = options.print && !it.inline;
  it.scale = 1;
  it.now = it.natural;
}

// Where a box wraps its formula, the first ancestor as wide without it has the room.
function unwrap(tight) {
  const widths = new Map();
  for (const it of tight) {
    for (let at = it.block; at; at = at.parentElement) widths.set(at, span([at]));
  }
  tight.forEach((it) => put(it.block, true, { contain: "inline-size" }));
  for (const it of tight) {
    it.alone = contentWidth(it.block);
    while (it.target !== root && Math.abs(span([it.target]) - widths.get(it.target)) > 0.5) {
      it.item = it.target;
      it.target = it.target.parentElement;
    }
  }
  tight.forEach((it) => put(it.block, false, { contain: "" }));
  for (const it of tight.filter((it) => it.target !== it.block)) {
    const row = /flex|grid/.test(styleOf(it.target).display) ? [...it.target.children] : [it.item];
    it.room = Math.max(it.alone, it.room - span(row) + contentWidth(it.target));
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

// Write all, read all, write all: two layouts.
function fit(blocks, again) {
  let list = [...new Set(blocks)].filter((block) => block && block.isConnected);
  list = each(list.map(adopt).filter(Boolean), moved);
  if (!list.length) return;
  sizes.disconnect();
  list.forEach((it) => it.known || put(it.formula, false, { "font-size": "", "min-width": "" }));
  list = each(list, measure);
  unwrap(list.filter((it) => !it.inline && Math.abs(it.natural - it.room) < 1));
  for (const it of list) {
    it.ceiling = again && it.width;
    it.width = it.room && contentWidth(it.target);
  }
  list = list.filter((it) => it.natural > 0);
  for (let wide = list, round = 0; wide.length; round++) {
    wide = each(wide, (it) => {
      if (round) it.now = naturalWidth(it);
      it.over = it.now > it.room + options.tolerance;
      return it.over && it.scale > it.floor && round < 5;
    });
    for (const it of wide) {
      it.scale = Math.max(it.floor, (it.scale * SAFETY * it.room) / it.now);
      resize(it);
    }
  }
  const changed = each(list, show);
  // A scroll bar has come.
  const narrower = list.filter((it) => contentWidth(it.target) < it.width - 0.5);
  if (narrower.length && !again) fit(narrower.map((it) => it.block), true);
  for (const it of changed) {
    const detail = { scale: it.scale, state: it.state };
    it.block.dispatchEvent(new CustomEvent("mathfit:fit", { bubbles: true, detail }));
  }
  // Within a resize callback this would be a loop.
  requestAnimationFrame(() => running && records.forEach((it) => sizes.observe(it.target)));
}

function resize(it) {
  put(it.formula, it.scale < 1, { "font-size": `${short(it.relative * it.scale)}em` });
}

function show(it) {
  const em = short(it.natural / it.size);
  const { shown } = it;
  it.state = it.over ? "scroll" : it.scale < 1 ? "scaled" : "natural";
  it.shown = it.state + it.scale.toFixed(4);
  resize(it);
  put(it.block, true, { "data-mathfit": it.state, "data-mathfit-scale": it.scale.toFixed(4) });
  put(it.block, it.over, { overflow: "auto hidden", "justify-content": "start" });
  put(it.block, it.over, { tabindex: "0", role: "region", "aria-label": options.label });
  put(it.formula, it.over && !it.mathjax, { "min-width": `${em}em` });
  put(it.block, it.inline && it.state !== "natural", { display: "inline-block", "max-width": "100%" });
  put(it.block, it.print, { "data-mathfit-print": "block" });
  put(it.formula, it.print, { "data-mathfit-print": "formula", "--mathfit-width": em });
  put(it.formula, it.print, { "--mathfit-size": short(it.relative) });
  return shown !== it.shown;
}

const sizes = new ResizeObserver(() => fit(records.keys()));

const mutations = new MutationObserver((list) => {
  records.forEach((it) => it.block.isConnected || forget(it));
  fit(list.flatMap(({ addedNodes, target }) => [around(target), ...[...addedNodes].flatMap(find)]));
});

const refresh = (node = document) => fit(find(node));
const late = () => running && refresh();

function start(given = {}) {
  options = checked(given);
  records.forEach((it) => (around(it.block) === it.block ? (it.now = 0) : forget(it)));
  document.head.append(sheet);
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
const { dataset } = document.currentScript || { dataset: {} };
const api = { version: "1.0.0", start, stop, refresh };
window.mathfit = Object.defineProperty(api, "options", { get: () => ({ ...options }) });
options = checked(window.mathfitConfig || {});
options = checked(dataset, true);
if (options.auto) start();
})();
