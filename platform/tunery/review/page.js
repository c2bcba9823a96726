// The review page. Rows are untrusted text: they are only inserted as text nodes, never through innerHTML.
"use strict";

const MAX_CHARS = 3000; // characters of a message that are displayed before "show all"
// Invisible characters: controls, bidirectional overrides and isolates, zero-width marks.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u2028-\u202e\u2060-\u2069\ufeff]/;
const $ = (id) => document.getElementById(id);

let state = null; // the last response of the server
let position = 0; // index of the current row; state.ids.length: the end
let displayedId = null; // id of the row on the page, the only one that can be decided
let queue = Promise.resolve(); // tasks run one at a time
let lastDecidedId = ""; // id of the row that the line above the keys describes, if not the displayed one
const rows = new Map();

async function request(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The review server has stopped. Your decisions are saved; start it again to continue.");
  }
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

// Return a promise of the row; a prefetched row is not requested again.
function row(id) {
  if (!rows.has(id)) {
    const fetched = request("rows/" + encodeURIComponent(id));
    fetched.catch(() => rows.delete(id));
    rows.set(id, fetched);
  }
  return rows.get(id);
}

function element(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function appendText(parent, text) {
  let plain = "";
  for (const character of text) {
    if (INVISIBLE.test(character)) {
      parent.append(plain, element("span", "mark", "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
      plain = "";
    } else plain += character;
  }
  parent.append(plain);
}

function looksLikeCode(text) {
  const lines = text.split("\n");
  const indented = lines.filter((line) => /^(\s{2,}|>>> |\.\.\. |[{}<])/.test(line)).length;
  return lines.length > 2 && indented > lines.length / 3;
}

function messageElement({ role, content, judged }) {
  const message = element("section", "message " + (judged ? "judged" : "context"));
  const names = { assistant: "response", user: "prompt", "rejected assistant": "rejected response" };
  message.append(element("h2", "", names[role] ?? role));
  const body = element("div", "body");
  body.dir = "auto";
  if (content) appendText(body, content.replaceAll("\r\n", "\n"));
  else body.append(element("span", "empty", "empty"));
  message.append(body);
  if (looksLikeCode(content)) message.classList.add("code");
  if (content.length > MAX_CHARS) {
    message.classList.add("long");
    const more = element("button", "more small", "Show all " + content.length.toLocaleString("en") + " characters");
    more.type = "button";
    more.addEventListener("click", () => message.classList.add("open"));
    message.append(more);
  }
  return message;
}

function number(value) {
  if (value === null) return "none";
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
}

// Describe the outcome of the filter for a decided row, and its scores.
function renderOutcome(line, id) {
  const filter = state.filter[id];
  const decision = state.decided[id];
  line.replaceChildren();
  if (!filter) {
    if (state.ids[position] !== undefined) line.append("Would you train on this row?");
    return;
  }
  const past = { keep: "kept", drop: "dropped" };
  if (id !== state.ids[position]) line.append("Last row: "); // the outcome of the displayed row is hidden until it is decided
  if (decision) line.append("you ", element("b", decision, past[decision]), " it, ");
  line.append("the filter ", decision === filter.decision ? "did too" : element("b", filter.decision, past[filter.decision]));
  if (decision !== filter.decision) line.append(" it");
  const scores = filter.scores.map((s) => s.name.replaceAll("_", " ") + " " + number(s.value) + ", threshold " + number(s.threshold));
  if (scores.length) line.append(" (" + scores.join("; ") + ")");
}

function counts() {
  const decisions = state.ids.map((id) => state.decided[id]).filter(Boolean);
  const kept = decisions.filter((decision) => decision === "keep").length;
  return { total: state.ids.length, decided: decisions.length, kept, dropped: decisions.length - kept };
}

function updateControls() {
  const { total, decided } = counts();
  const id = state.ids[position];
  document.title = decided + "/" + total + " " + state.stage;
  $("stage").textContent = state.stage;
  $("count").replaceChildren(element("b", "", String(decided)), " of " + total + " decided");
  if (decided < total) $("count").append(" · " + (total - decided) + " left");
  $("bar").setAttribute("aria-valuemax", total);
  $("bar").setAttribute("aria-valuenow", decided);
  $("bar").firstElementChild.style.width = (total ? (100 * decided) / total : 100) + "%";
  for (const name of ["keep", "drop"]) {
    $(name).disabled = id === undefined;
    $(name).setAttribute("aria-pressed", String(id !== undefined && state.decided[id] === name));
  }
  $("undo").disabled = state.undo === null;
  $("back").disabled = position === 0;
  $("forward").disabled = position >= total;
  renderOutcome($("outcome"), state.filter[id] ? id : lastDecidedId);
}

function finish() {
  const { total, decided, kept, dropped } = counts();
  $("finished-title").textContent = decided === total ? "All " + total + " rows are decided." : total - decided + " rows are not decided yet.";
  $("finished-counts").textContent = kept + " kept, " + dropped + " dropped.";
  const both = state.ids.filter((id) => state.decided[id]);
  const agreed = both.filter((id) => state.decided[id] === state.filter[id].decision).length;
  $("finished-agreement").textContent = both.length
    ? "You and the filter agree on " + agreed + " of " + both.length + " (" + Math.round((100 * agreed) / both.length) + "%)." : "";
  $("next").textContent = state.next;
  $("file").textContent = state.file;
}

// Display the row at `position`.
async function show() {
  const id = state.ids[position];
  if (id === undefined) {
    displayedId = null;
    $("row").hidden = true;
    $("finished").hidden = false;
    finish();
    updateControls();
    return;
  }
  if (id !== displayedId) {
    const content = await row(id);
    $("row").replaceChildren(...content.messages.map(messageElement));
    displayedId = id;
    $("row").hidden = false;
    $("finished").hidden = true;
    window.scrollTo(0, 0);
    const next = nextUndecided(position);
    if (state.ids[next]) row(state.ids[next]).catch(() => {}); // reported when the row is displayed
  }
  updateControls();
}

// Return the position of the next undecided row after `start`, cyclically; the end if all are decided.
function nextUndecided(start) {
  const ids = state.ids;
  for (let step = 1; step <= ids.length; step++) {
    const candidate = (start + step) % ids.length;
    if (!state.decided[ids[candidate]]) return candidate;
  }
  return ids.length;
}

function enqueue(task) {
  document.body.setAttribute("aria-busy", "true");
  const result = queue.then(async () => {
    try {
      await task();
      $("problem").hidden = true;
    } catch (error) {
      $("problem").textContent = error.message;
      $("problem").hidden = false;
    }
    if (queue === result) document.body.setAttribute("aria-busy", "false");
  });
  queue = result;
}

// Decide on the row that is displayed at the key press; a second press before the next row is displayed has no effect.
function decide(decision) {
  const id = displayedId;
  enqueue(async () => {
    if (id === null || id !== displayedId || id !== state.ids[position]) return;
    state = await request("decide", { id, decision });
    lastDecidedId = id;
    position = nextUndecided(position);
    await show();
  });
}

const undo = () => enqueue(async () => {
  if (!state || state.undo === null) return;
  state = await request("undo", {});
  lastDecidedId = "";
  if (state.undone !== null) position = state.ids.indexOf(state.undone);
  await show();
});

const move = (step) => enqueue(async () => {
  if (!state) return;
  position = Math.min(Math.max(0, position + step), state.ids.length);
  lastDecidedId = "";
  await show();
});

const refresh = (first) => enqueue(async () => {
  state = await request("state");
  if (first) position = state.ids.length && state.decided[state.ids[0]] ? nextUndecided(0) : 0;
  await show();
});

const KEYS = {
  k: () => decide("keep"), d: () => decide("drop"), u: undo, ArrowLeft: () => move(-1), ArrowRight: () => move(1),
  e: () => document.querySelectorAll(".message.long").forEach((message) => message.classList.add("open")),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || $("keys").open) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  // A held key repeats moves, but not decisions.
  if (!event.repeat || event.key.startsWith("Arrow")) action();
});
for (const [name, action] of Object.entries({
  keep: () => decide("keep"), drop: () => decide("drop"), undo, back: () => move(-1), forward: () => move(1),
})) {
  $(name).addEventListener("click", (event) => {
    if (event.detail) event.currentTarget.blur(); // after a mouse click the space bar scrolls instead of pressing the button again
    action();
  });
}
$("help").addEventListener("click", () => $("keys").showModal());
// Another tab may have changed decisions.
window.addEventListener("focus", () => { if (state) refresh(false); });
refresh(true);
