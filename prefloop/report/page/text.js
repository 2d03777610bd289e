// Text of models and files, always as text; and where two texts differ, word by word.

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}\ud800-\udfff]/gu;

/** An element with text and class; everything on the page that a model wrote goes through `say`. */
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) say(made, text);
  return made;
}

/** Append text; characters that are invisible or turn the line are shown by their number instead. */
function say(parent, text) {
  let at = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > at) parent.append(text.slice(at, found.index));
    const mark = document.createElement("span");
    mark.className = "hidden-character";
    mark.textContent = "U+" + found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parent.append(mark);
    at = found.index + found[0].length;
  }
  if (at < text.length) parent.append(at ? text.slice(at) : text);
}

const pieces = (text) => text.match(/\s+|\S+/g) ?? [];

// Beyond so many edits two texts have so little in common that marks would only confuse.
const MOST_EDITS = 800;

/** [kind, text] with kind "same", "old" or "new": Myers's shortest edit script (1986) over words and spaces. */
function differences(oldText, newText) {
  const a = pieces(oldText), b = pieces(newText);
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  let tail = 0;
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  const found = [];
  const add = (kind, words) => { if (words.length) found.push([kind, words.join("")]); };
  add("same", a.slice(0, head));
  const inner = script(a.slice(head, a.length - tail), b.slice(head, b.length - tail));
  for (const [kind, words] of inner) add(kind, words);
  add("same", tail ? a.slice(-tail) : []);
  return joined(found);
}

function script(a, b) {
  const trace = [], most = Math.min(a.length + b.length, MOST_EDITS), furthest = new Map([[1, 0]]);
  for (let d = 0; d <= most; d++) {
    trace.push(new Map(furthest));
    for (let k = -d; k <= d; k += 2) {
      const down = k === -d || (k !== d && furthest.get(k - 1) < furthest.get(k + 1));
      let x = down ? furthest.get(k + 1) : furthest.get(k - 1) + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
      furthest.set(k, x);
      if (x >= a.length && x - k >= b.length) return walkBack(a, b, trace, d);
    }
  }
  return [["old", a], ["new", b]];
}

function walkBack(a, b, trace, d) {
  const found = [];
  let x = a.length, y = b.length;
  for (; d > 0; d--) {
    const before = trace[d], k = x - y;
    const down = k === -d || (k !== d && before.get(k - 1) < before.get(k + 1));
    const fromX = down ? before.get(k + 1) : before.get(k - 1), fromY = fromX - (down ? k + 1 : k - 1);
    while (x > fromX && y > fromY) { found.push(["same", [a[--x]]]); y--; }
    if (down) found.push(["new", [b[--y]]]); else found.push(["old", [a[--x]]]);
  }
  while (x > 0) found.push(["same", [a[--x]]]);
  return found.reverse();
}

/** Neighbours of one kind in one piece, and a lone space between two changes counted among them. */
function joined(parts) {
  const found = [];
  let old = "", fresh = "";
  const flush = () => {
    if (old) found.push(["old", old]);
    if (fresh) found.push(["new", fresh]);
    old = fresh = "";
  };
  parts.forEach(([kind, text], n) => {
    const between = kind === "same" && !text.trim() && text && (old || fresh) && n + 1 < parts.length;
    if (kind === "old" || between) old += text;
    if (kind === "new" || between) fresh += text;
    if (kind === "same" && !between) { flush(); found.push([kind, text]); }
  });
  flush();
  return found;
}
