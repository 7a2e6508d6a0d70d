// The page of `python -m benchmarks.browse`. What a run holds is untrusted text: it reaches the page through text nodes
// alone (`make`), never as markup, and characters that would hide or reorder others are spelled out (`plain`).

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const CHARACTERS_SHOWN = 20000; // beyond them a button shows the rest

// --- text

const UNSEEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f"
  + "\\ufeff\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}\\ud800-\\udfff]", "gu"); // the last: halves of characters
const plain = (text) =>
  String(text).replace(UNSEEN, (c) => `‹U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);
const beginning = (text, length) => plain(text.length > length ? `${text.slice(0, length)} …` : text);
const number = (value, digits = 2) =>
  value === null || value === undefined ? "none" : Number(value).toFixed(digits).replace("-", "−");
const signed = (value) => (value > 0 ? "+" : "") + number(value);

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// A text of any length.
function cutText(text, tag = "div", name = "text") {
  const block = make(tag, { class: name }, beginning(text, CHARACTERS_SHOWN));
  if (text.length <= CHARACTERS_SHOWN) return block;
  const all = () => block.replaceChildren(plain(text));
  block.append(make("button", { type: "button", click: all }, `show all ${text.length} characters`));
  return block;
}
