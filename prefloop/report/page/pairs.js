// The list of chains: unpacked, filtered, sorted, scrolled; only rows in sight exist.

const ROW = 68;
const list = document.getElementById("list"), spacer = document.getElementById("spacer"), detail = document.getElementById("detail");
const form = document.getElementById("filters"), field = (name) => document.getElementById(name);
let chains = [], shown = [], current = -1;

async function unpacked(stream) {
  return new Response(stream.pipeThrough(new DecompressionStream("gzip"))).text();
}

async function readEmbedded() {
  const holder = document.getElementById("chains");
  const bytes = Uint8Array.from(atob(holder.textContent.trim()), (c) => c.charCodeAt(0));
  holder.remove();
  take(JSON.parse(await unpacked(new Blob([bytes]).stream())));
}

function take(found) {
  chains = found;
  for (const chain of chains) {
    const texts = chain.steps ?? [];
    const of = (role) => texts.find((step) => step.roles?.includes(role));
    const chosen = of("chosen") ?? texts[texts.length - 1];
    chain.runName = facts.runs.length > 1 ? facts.runs[chain.run] : "";
    chain.score = chosen?.score;
    chain.length = chosen?.text?.length;
    chain.first = chain.prompt?.length ? chain.prompt[chain.prompt.length - 1][1].slice(0, 160) : chain.detail?.slice(0, 160) ?? "";
    // An empty answer, or the other one of a method of single answers, has no tokens to compare.
    const scored = [of("chosen"), of("rejected")].filter((step) => step?.ratios);
    chain.learnt = scored.length ? scored.reduce((total, step) => total + Math.abs(sum(step.ratios)), 0) : undefined;
  }
  options("round", [...new Set(chains.map((chain) => chain.round))].sort((a, b) => a - b), (n) => (n < 0 ? "start" : String(n)));
  options("reason", [...new Set(chains.map((chain) => chain.reason).filter(Boolean))].sort(), String);
  select();
  openFromAddress();
}

const sum = (ratios) => ratios.policy.reduce((total, value, n) => total + value - ratios.reference[n], 0);

function options(name, values, label) {
  const menu = field(name);
  menu.replaceChildren(menu.options[0], ...values.map((value) => { const option = element("option", "", label(value)); option.value = value; return option; }));
}

/** Share of the words of chosen and rejected that the other one has not: computed when it is first sorted by. */
function change(chain) {
  if (chain.change === undefined) {
    const of = (role) => chain.steps?.find((step) => step.roles?.includes(role))?.text;
    const a = new Set((of("chosen") ?? "").split(/\s+/)), b = new Set((of("rejected") ?? "").split(/\s+/));
    const common = [...a].filter((word) => b.has(word)).length;
    chain.change = chain.kind === "pair" ? 1 - common / Math.max(a.size, b.size, 1) : null;
  }
  return chain.change ?? undefined;
}

function holds(chain, wanted) {
  return chain.id.toLowerCase().includes(wanted.plain) || wanted.pattern.test(chain.detail ?? "") ||
    (chain.prompt ?? []).some(([, text]) => wanted.pattern.test(text)) || (chain.steps ?? []).some((step) => wanted.pattern.test(step.text ?? ""));
}

function select() {
  const value = (name) => field(name).value, number = (name) => (value(name) === "" ? null : Number(value(name)));
  const kind = value("kind"), round = value("round"), reason = value("reason"), words = value("search").trim();
  const wanted = words && { plain: words.toLowerCase(), pattern: new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "iu") };
  const ranges = [["margin", number("margin-from"), number("margin-to")], ["gap", number("gap-from"), number("gap-to")]];
  shown = chains.filter((chain) =>
    !hiddenRuns.has(chain.run) && (!kind || chain.kind === kind) && (round === "" || chain.round === Number(round)) && (!reason || chain.reason === reason) &&
    ranges.every(([name, from, to]) => (from === null && to === null) || (chain[name] !== undefined && chain[name] >= (from ?? -Infinity) && chain[name] <= (to ?? Infinity))) &&
    (!wanted || holds(chain, wanted)));
  const sort = value("sort"), sign = field("down").checked ? -1 : 1;
  if (sort) {
    const key = sort === "change" ? change : (chain) => chain[sort];
    shown.sort((a, b) => {
      const x = key(a), y = key(b);
      // What has no value goes last, whichever way is up.
      return (x === undefined) - (y === undefined) || (x === undefined ? 0 : sign * (x - y));
    });
  }
  current = -1;
  list.scrollTop = 0;
  spacer.style.height = `${shown.length * ROW}px`;
  field("count").textContent = `${shown.length.toLocaleString("en")} of ${chains.length.toLocaleString("en")}`;
  draw();
}

function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4), last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const rows = [];
  for (let n = first; n < last; n++) rows.push(row(n));
  list.replaceChildren(spacer, ...rows);
  if (current >= first && current < last) list.setAttribute("aria-activedescendant", `row-${current}`); else list.removeAttribute("aria-activedescendant");
}

function row(n) {
  const chain = shown[n], made = element("div", "row"), head = element("div", "head");
  made.id = `row-${n}`;
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", String(n === current));
  made.setAttribute("aria-posinset", n + 1);
  made.setAttribute("aria-setsize", shown.length);
  made.style.top = `${n * ROW}px`;
  made.dataset.n = n;
  if (facts.runs.length > 1) head.append(element("i", `dot back-run-${chain.run % 8}`));
  head.append(element("span", "", chain.id));
  if (chain.kind === "reject") head.append(element("span", "badge reject", chain.reason));
  else if (chain.kind === "held-out") head.append(element("span", "", "held out"));
  if (chain.margin) head.append(element("span", "", `M ${short(chain.margin)}`));
  if (chain.gap !== undefined) head.append(element("span", "", `gap ${signed(chain.gap)}`));
  const text = element("bdi", "first", chain.first);
  made.append(head, text);
  return made;
}

function open(n, { focus = false } = {}) {
  if (n < 0 || n >= shown.length) return;
  current = n;
  if (n * ROW < list.scrollTop) list.scrollTop = n * ROW;
  else if ((n + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (n + 1) * ROW - list.clientHeight;
  draw();
  const chain = shown[n];
  showChain(chain, detail, (by) => open(current + by));
  detail.scrollTop = 0;
  history.replaceState(null, "", `#pair=${chain.run}/${encodeURIComponent(chain.id.toWellFormed?.() ?? chain.id)}`);
  if (focus) detail.focus({ preventScroll: true });
  if (matchMedia("(max-width: 50rem)").matches) detail.scrollIntoView({ block: "start" });
}

function openFromAddress() {
  const found = /^#pair=(\d+)\/(.*)$/.exec(location.hash);
  if (!found) return;
  let id = "";
  try { id = decodeURIComponent(found[2]); } catch { return; }
  const n = shown.findIndex((chain) => chain.run === Number(found[1]) && chain.id === id);
  if (n >= 0) open(n);
}

form.reset(); // Browsers remember what was typed over a reload.
let waiting = 0;
list.addEventListener("scroll", () => { waiting ||= requestAnimationFrame(() => { waiting = 0; draw(); }); }, { passive: true });
list.addEventListener("click", (event) => { const chosen = event.target.closest(".row"); if (chosen) open(Number(chosen.dataset.n)); });
let typing = 0;
form.addEventListener("input", (event) => { clearTimeout(typing); typing = setTimeout(select, event.target.type === "search" ? 150 : 0); });
form.addEventListener("reset", () => setTimeout(select));
form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("runs", select);
window.addEventListener("resize", draw);
window.addEventListener("hashchange", openFromAddress);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typingNow = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") { list.focus(); return; }
  if (typingNow) return;
  const inList = document.activeElement === list;
  const moves = { j: 1, k: -1, ...(inList && { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }) };
  if (event.key === "/") field("search").focus();
  else if (event.key === "d") { marks = !marks; detail.classList.toggle("no-marks", !marks); }
  else if (event.key in moves) open(Math.min(Math.max(current + moves[event.key], 0), shown.length - 1));
  else if (inList && event.key === "Home") open(0);
  else if (inList && event.key === "End") open(shown.length - 1);
  else if (inList && event.key === "Enter") open(Math.max(current, 0), { focus: true });
  else return;
  event.preventDefault();
});
field("open-all")?.addEventListener("change", async (event) => {
  const file = event.target.files[0];
  if (!file) return;
  field("count").textContent = "Reading …";
  try {
    const text = file.name.endsWith(".gz") ? await unpacked(file.stream()) : await file.text();
    take(text.split("\n").filter(Boolean).map((line) => JSON.parse(line)));
  } catch (error) {
    field("count").textContent = `${file.name} could not be read: ${error.message}`;
  }
});
readEmbedded().catch((error) => { field("count").textContent = `The pairs could not be unpacked: ${error.message}`; });
