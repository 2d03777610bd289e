// One chain, opened: what was asked, everything that was written, what differs, what training changed.

// A text of a megabyte is shown in parts: nobody reads it whole, and laying it out takes seconds.
const SHOWN = 20000;
let marks = true;

function showChain(chain, target, move) {
  const parts = [heading(chain, move)];
  if (chain.reason) parts.push(element("p", "notice bad", `Rejected by ${chain.stage}: ${chain.reason}${chain.detail ? ". " + chain.detail : ""}`));
  if (!chain.prompt?.length) parts.push(element("p", "small", "What was asked was not kept with this reject."));
  for (const [role, text, whole] of chain.prompt ?? []) {
    const turn = element("div", "step");
    turn.append(element("h4", "", role), longText(text));
    if (whole) turn.append(cutNote(whole));
    parts.push(turn);
  }
  const byName = new Map((chain.steps ?? []).map((step) => [step.name, step]));
  for (const step of byName.values()) parts.push(stepCard(step, byName.get(step.base)));
  if (chain.kind === "pair") parts.push(side(byName));
  if ([...byName.values()].some((step) => step.ratios)) parts.push(learnt(byName));
  if (chain.ratings) parts.push(ratings(chain.ratings));
  target.classList.toggle("no-marks", !marks);
  target.replaceChildren(...parts.filter(Boolean));
}

function heading(chain, move) {
  const head = element("div"), buttons = element("span", "move");
  for (const [label, by] of [["‹ previous", -1], ["next ›", 1]]) {
    const button = element("button", "", label);
    button.type = "button";
    button.addEventListener("click", () => move(by));
    buttons.append(button);
  }
  const facts = [];
  if (chain.margin) facts.push(`margin M ${short(chain.margin)}`);
  if (chain.gap !== undefined) facts.push(chain.kind === "held-out" ? `score since the start ${signed(chain.gap)}` : `score gap ${signed(chain.gap)}`);
  const title = element("h3");
  const name = element("bdi", "", `${chain.kind} ${chain.id}`);
  title.append(name);
  head.append(buttons, title, element("p", "small", [chain.runName, ...facts].filter(Boolean).join(" · ")));
  return head;
}

const signed = (value) => (value > 0 ? "+" : "") + short(value);

function stepCard(step, base) {
  const roles = step.roles ?? [];
  const card = element("div", ["step", ...roles].join(" ")), head = element("h4", "", step.name.replaceAll("_", " "));
  for (const role of roles) if (role !== step.name) head.append(element("span", `badge ${role}`, role));
  if (step.unfinished) head.append(element("span", "badge cut", "cut off"));
  const facts = [];
  if (step.score !== undefined) facts.push(`scores ${short(step.score)}`);
  if (step.tokens) facts.push(`${step.tokens} ${step.tokens === 1 ? "token" : "tokens"}`);
  if (step.mean_logprob !== undefined) facts.push(`${short(step.mean_logprob)} nats a token when sampled`);
  if (base) facts.push(`beside ${base.name.replaceAll("_", " ")}`);
  if (facts.length) head.append(element("span", "small", facts.join(" · ")));
  card.append(head);
  if (!step.text) card.append(element("p", "small", "(empty)"));
  else if (base) card.append(markedText(base.text, step.text, ["old", "new"]));
  else card.append(longText(step.text));
  if (step.cut) card.append(cutNote(step.cut));
  return card;
}

const cutNote = (whole) => element("p", "small", `Cut here; the whole text has ${whole.toLocaleString("en")} characters and is in the run's folder.`);

function longText(text) {
  const box = element("div", "model-text");
  box.dir = "auto";
  box.append(...partOf(text, (part, parent) => say(parent, part)));
  return box;
}

/** The beginning of a long text, with a button for the rest. */
function partOf(text, put) {
  const body = element("span");
  put(text.slice(0, SHOWN), body);
  if (text.length <= SHOWN) return [body];
  const more = element("button", "", `show all ${text.length.toLocaleString("en")} characters`);
  more.type = "button";
  more.addEventListener("click", () => { body.replaceChildren(); put(text, body); more.remove(); });
  return [body, more];
}

function markedText(before, after, kinds) {
  if (before.length > SHOWN || after.length > SHOWN) return longText(after);
  const box = element("div", "model-text"), tags = { old: "del", new: "ins", same: "span" };
  box.dir = "auto";
  for (const [kind, text] of differences(before, after)) if (kind === "same" || kinds.includes(kind)) box.append(element(tags[kind], "", text));
  return box;
}

/** Chosen and rejected with what only one of them has; left out where the chain already says it. */
function side(byName) {
  const of = (role) => [...byName.values()].find((step) => step.roles?.includes(role));
  const chosen = of("chosen"), rejected = of("rejected");
  if (!chosen || !rejected || rejected.base === chosen.name) return null;
  const box = element("div");
  box.append(element("h3", "", "Chosen beside rejected"));
  for (const [step, role, kind] of [[chosen, "chosen", "new"], [rejected, "rejected", "old"]]) {
    const card = element("div", `step ${role}`);
    card.append(element("h4", "", role), markedText(rejected.text, chosen.text, [kind]));
    if (step.text) box.append(card);
  }
  return box;
}

const BANDS = [0.05, 0.25, 1, 2.5];
const band = (ratio) => { const n = BANDS.filter((edge) => Math.abs(ratio) >= edge).length; return n ? `${ratio > 0 ? "up" : "down"}-${n}` : ""; };

/** Each token of chosen, rejected and target, coloured by log policy - log reference. */
function learnt(byName) {
  const box = element("div", "learnt"), legend = element("p", "small legend"), reading = element("p", "small token-reading");
  box.append(element("h3", "", "What training changed, token by token"));
  legend.append("less likely than under the reference ");
  for (const name of ["down-4", "down-3", "down-2", "down-1", "", "up-1", "up-2", "up-3", "up-4"]) legend.append(element("span", name, name ? " " : "as before"));
  legend.append(" more likely; steps at 0.05, 0.25, 1 and 2.5 nats");
  box.append(legend, reading);
  for (const step of byName.values()) {
    if (!step.ratios) continue;
    const { pieces: texts, policy, reference } = step.ratios;
    const total = policy.reduce((sum, value, n) => sum + value - reference[n], 0);
    const card = element("div", ["step", ...step.roles].join(" ")), head = element("h4", "", step.roles.join(", ")), body = element("div", "model-text tokens");
    head.append(element("span", "small", `r = ${signed(total)} nats over ${texts.length} ${texts.length === 1 ? "token" : "tokens"}`));
    texts.forEach((text, n) => {
      const ratio = policy[n] - reference[n];
      const token = element("span", band(ratio), text || (n + 1 === texts.length ? "⏎" : ""));
      token.dataset.reading = `${text ? JSON.stringify(text) : "end of turn"}: policy ${short(policy[n])}, reference ${short(reference[n])}, change ${signed(ratio)} nats`;
      body.append(token);
    });
    body.dir = "auto";
    card.append(head, body);
    box.append(card);
  }
  const read = (event) => { const said = event.target.dataset?.reading; if (said) reading.replaceChildren(element("bdi", "", said)); };
  box.addEventListener("pointerover", read);
  box.addEventListener("click", read);
  reading.append("Point at a token to read its log-probs.");
  return box;
}

function ratings(values) {
  const table = element("table", "numbers ratings");
  for (const [name, value] of Object.entries(values)) {
    const row = element("tr"), cell = element("td");
    row.append(element("th", "", name.replaceAll("_", " ")), element("td", "", short(value)));
    if (name.startsWith("severity")) {
      const meter = element("meter");
      Object.assign(meter, { min: 1, max: 5, value });
      cell.append(meter);
    }
    row.append(cell);
    table.append(row);
  }
  const box = element("div");
  box.append(element("h3", "", "What the margin was made from"), table);
  return box;
}
