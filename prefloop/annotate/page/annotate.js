// The page of `prefloop annotate`. Whatever a model, a prompt or a file says becomes text (textContent), never markup;
// the server's Content-Security-Policy forbids everything else besides.
"use strict";

const find = (id) => document.getElementById(id);
const token = location.hash.slice(1);
// A second press of a key that was meant for the last item must not decide the next one.
const SETTLE_MS = 150;

let state = null; // what the server said last
let busy = false; // a call is under way
let shownAt = 0; // when the item was shown, milliseconds
let waiting = null; // the call that failed, to be tried again

async function call(path, body) {
  if (busy) return;
  busy = true;
  waiting = null;
  enable();
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Prefloop-Token": token },
      body: JSON.stringify(body),
    });
    const found = await response.json();
    if (!response.ok) throw new Error(found.error);
    trouble("");
    show(found);
  } catch (error) {
    const away = error instanceof TypeError;
    if (away || path !== "/api/join") waiting = () => call(path, body);
    trouble(
      away
        ? "Not saved: the server does not answer. Start it again with the same command and open the new link; what was saved before is kept."
        : `Not saved: ${error.message}.`,
    );
  } finally {
    busy = false;
    enable();
  }
}

function trouble(sentence) {
  const box = find("trouble");
  box.hidden = !sentence;
  box.textContent = sentence;
  if (waiting) {
    const again = document.createElement("button");
    again.type = "button";
    again.className = "small";
    again.textContent = "Try again";
    again.addEventListener("click", () => waiting?.());
    box.append(" ", again);
  }
}

function show(found) {
  const begins = state === null;
  if ("instructions" in found) put(find("instructions"), found.instructions, "");
  find("instructions").hidden = !find("instructions").textContent;
  state = found;
  const { item, done, total, name } = found;
  find("join").hidden = true;
  find("bar").hidden = find("votes").hidden = false;
  find("work").hidden = item === null;
  find("done").hidden = item !== null;
  find("who").textContent = name;
  find("progress").max = total;
  find("progress").value = done;
  find("count").textContent = `${done} of ${total}`;
  document.body.dataset.item = item === null ? "" : item.id;
  if (item !== null) {
    find("prompt").replaceChildren(...turns(item.messages));
    put(find("first"), item.first, "(an empty answer)");
    put(find("second"), item.second, "(an empty answer)");
  }
  scrollTo(0, 0);
  (item === null ? find("done").firstElementChild : find("prompt-title")).focus();
  find("status").textContent = `${done} of ${total} saved`;
  shownAt = performance.now();
  if (begins && found.instructions) find("help-dialog").showModal();
}

// A single question needs no name; a conversation says who speaks.
function turns(messages) {
  return messages.map(({ role, text }) => {
    const turn = document.createElement("div");
    turn.className = "turn";
    if (messages.length > 1) {
      const who = document.createElement("span");
      who.className = "role";
      who.textContent = role;
      turn.append(who);
    }
    const words = document.createElement("div");
    words.className = "text";
    words.dir = "auto";
    words.textContent = text;
    turn.append(words);
    return turn;
  });
}

function put(box, text, whenEmpty) {
  const empty = !(text ?? "").trim();
  box.textContent = empty ? whenEmpty : text;
  box.classList.toggle("empty", empty);
}

function enable() {
  for (const button of document.querySelectorAll("#votes button")) button.disabled = busy || !possible(button);
}

function possible(button) {
  return button.id === "undo" ? Boolean(state?.undo) : Boolean(state?.item);
}

function vote(answer, reason = null) {
  const settled = performance.now() - shownAt >= SETTLE_MS;
  if (busy || !state?.item || !settled) return;
  const seconds = Math.round((performance.now() - shownAt) / 100) / 10;
  call("/api/vote", { name: state.name, item: state.item.id, answer, reason, seconds });
}

function undo() {
  if (!busy && state?.undo) call("/api/undo", { name: state.name, item: state.undo });
}

function askReason() {
  if (busy || !state?.item) return;
  find("reason").value = "";
  find("skip-dialog").showModal();
}

function skip(reason) {
  find("skip-dialog").close();
  vote("skip", reason);
}

const reasons = [...document.querySelectorAll("#reasons button")];
const KEYS = {
  1: () => vote("first"),
  ArrowLeft: () => vote("first"),
  2: () => vote("second"),
  ArrowRight: () => vote("second"),
  0: () => vote("tie"),
  u: undo,
  s: askReason,
  "?": () => find("help-dialog").showModal(),
};

document.addEventListener("keydown", (event) => {
  // A key that is held down says one thing, and a key for the browser is not for us.
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target instanceof HTMLInputElement) return;
  if (find("skip-dialog").open) {
    const reason = reasons[Number(event.key) - 1];
    if (reason) {
      event.preventDefault();
      skip(reason.firstChild.textContent.trim());
    }
    return;
  }
  if (state === null || find("help-dialog").open) return;
  const act = KEYS[event.key];
  if (act) {
    event.preventDefault();
    act();
  }
});

find("join").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("name", find("name").value);
  call("/api/join", { name: find("name").value });
});
for (const button of document.querySelectorAll("#votes [data-answer]"))
  button.addEventListener("click", () => vote(button.dataset.answer));
for (const button of reasons) button.addEventListener("click", () => skip(button.firstChild.textContent.trim()));
find("undo").addEventListener("click", undo);
find("skip").addEventListener("click", askReason);
find("help").addEventListener("click", () => find("help-dialog").showModal());
find("skip-cancel").addEventListener("click", () => find("skip-dialog").close());
find("skip-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (find("reason").value.trim()) skip(find("reason").value);
  else find("reason").focus();
});
// A new link in the same tab is a new session.
addEventListener("hashchange", () => location.reload());

find(token ? "join" : "locked").hidden = false;
find("name").value = sessionStorage.getItem("name") ?? "";
if (token) find("name").focus();
