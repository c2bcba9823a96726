// The review page. Rows are hostile text: they become text nodes and nothing else, there is no innerHTML in this file.
"use strict";

const LONG = 3000; // characters of a turn that are shown before "show all"
// What is not seen or turns the text around it: controls, bidirectional overrides and isolates, zero-width marks.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u2028-\u202e\u2060-\u2069\ufeff]/;
const $ = (id) => document.getElementById(id);

let state = null; // as the server tells it
let at = 0; // place of the row shown; state.ids.length: the end
let shown = null; // id of the row whose content is on the page: only that one can be decided
let working = Promise.resolve(); // one thing after another
let said = ""; // id of the row that the line above the keys speaks of, when it isn't the one shown
const rows = new Map();

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The review was ended in the terminal. What you decided is saved; start it again to go on.");
  }
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

// A promise of the row: one that is fetched ahead isn't asked for again.
function row(id) {
  if (!rows.has(id)) {
    const fetched = ask("rows/" + encodeURIComponent(id));
    fetched.catch(() => rows.delete(id));
    rows.set(id, fetched);
  }
  return rows.get(id);
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function textInto(parent, text) {
  let plain = "";
  for (const character of text) {
    if (UNSEEN.test(character)) {
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

function turnOf({ role, content, judged }) {
  const turn = element("section", "turn " + (judged ? "judged" : "context"));
  const names = { assistant: "answer", user: "question", "rejected assistant": "rejected answer" };
  turn.append(element("h2", "", names[role] ?? role));
  const body = element("div", "body");
  body.dir = "auto";
  if (content) textInto(body, content.replaceAll("\r\n", "\n"));
  else body.append(element("span", "empty", "empty"));
  turn.append(body);
  if (looksLikeCode(content)) turn.classList.add("code");
  if (content.length > LONG) {
    turn.classList.add("long");
    const more = element("button", "more small", "Show all " + content.length.toLocaleString("en") + " characters");
    more.type = "button";
    more.addEventListener("click", () => turn.classList.add("open"));
    turn.append(more);
  }
  return turn;
}

function number(value) {
  if (value === null) return "none";
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
}

// What the filter did with a decided row, and the scores.
function verdictInto(line, id) {
  const filter = state.filter[id];
  const decision = state.decided[id];
  line.replaceChildren();
  if (!filter) {
    if (state.ids[at] !== undefined) line.append("Would you train on this row?");
    return;
  }
  const past = { keep: "kept", drop: "dropped" };
  if (id !== state.ids[at]) line.append("Last row: "); // not the one on the page, which nobody shall be told of yet
  if (decision) line.append("you ", element("b", decision, past[decision]), " it, ");
  line.append("the filter ", decision === filter.decision ? "did too" : element("b", filter.decision, past[filter.decision]));
  if (decision !== filter.decision) line.append(" it");
  const scores = filter.scores.map((s) => s.name.replaceAll("_", " ") + " " + number(s.value) + ", cut " + number(s.cut));
  if (scores.length) line.append(" (" + scores.join("; ") + ")");
}

function counts() {
  const decisions = state.ids.map((id) => state.decided[id]).filter(Boolean);
  const kept = decisions.filter((decision) => decision === "keep").length;
  return { total: state.ids.length, decided: decisions.length, kept, dropped: decisions.length - kept };
}

function frame() {
  const { total, decided } = counts();
  const id = state.ids[at];
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
  $("back").disabled = at === 0;
  $("forward").disabled = at >= total;
  verdictInto($("verdict"), state.filter[id] ? id : said);
}

function finish() {
  const { total, decided, kept, dropped } = counts();
  $("finished-title").textContent = decided === total ? "All " + total + " rows are decided." : total - decided + " rows are still open.";
  $("finished-counts").textContent = kept + " kept, " + dropped + " dropped.";
  const both = state.ids.filter((id) => state.decided[id]);
  const agreed = both.filter((id) => state.decided[id] === state.filter[id].decision).length;
  $("finished-agreement").textContent = both.length
    ? "You and the filter agree on " + agreed + " of " + both.length + " (" + Math.round((100 * agreed) / both.length) + "%)." : "";
  $("next").textContent = state.next;
  $("file").textContent = state.file;
}

// `at` says which row; what is on the page follows.
async function show() {
  const id = state.ids[at];
  if (id === undefined) {
    shown = null;
    $("row").hidden = true;
    $("finished").hidden = false;
    finish();
    frame();
    return;
  }
  if (id !== shown) {
    const content = await row(id);
    $("row").replaceChildren(...content.turns.map(turnOf));
    shown = id;
    $("row").hidden = false;
    $("finished").hidden = true;
    window.scrollTo(0, 0);
    const next = openAfter(at);
    if (state.ids[next]) row(state.ids[next]).catch(() => {}); // told when it is shown
  }
  frame();
}

// The nearest open row after `place`, or before it, or the end.
function openAfter(place) {
  const ids = state.ids;
  for (let step = 1; step <= ids.length; step++) {
    const candidate = (place + step) % ids.length;
    if (!state.decided[ids[candidate]]) return candidate;
  }
  return ids.length;
}

function work(task) {
  document.body.setAttribute("aria-busy", "true");
  const mine = working.then(async () => {
    try {
      await task();
      $("problem").hidden = true;
    } catch (error) {
      $("problem").textContent = error.message;
      $("problem").hidden = false;
    }
    if (working === mine) document.body.setAttribute("aria-busy", "false");
  });
  working = mine;
}

// About the row that is on the page when the key goes down: a second press before the next row is there is about none.
function decide(decision) {
  const id = shown;
  work(async () => {
    if (id === null || id !== shown || id !== state.ids[at]) return;
    state = await ask("decide", { id, decision });
    said = id;
    at = openAfter(at);
    await show();
  });
}

const undo = () => work(async () => {
  if (!state || state.undo === null) return;
  state = await ask("undo", {});
  said = "";
  if (state.undone !== null) at = state.ids.indexOf(state.undone);
  await show();
});

const move = (step) => work(async () => {
  if (!state) return;
  at = Math.min(Math.max(0, at + step), state.ids.length);
  said = "";
  await show();
});

const refresh = (first) => work(async () => {
  state = await ask("state");
  if (first) at = state.ids.length && state.decided[state.ids[0]] ? openAfter(0) : 0;
  await show();
});

const KEYS = {
  k: () => decide("keep"), d: () => decide("drop"), u: undo, ArrowLeft: () => move(-1), ArrowRight: () => move(1),
  e: () => document.querySelectorAll(".turn.long").forEach((turn) => turn.classList.add("open")),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || $("keys").open) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  // A key held down moves, but decides once.
  if (!event.repeat || event.key.startsWith("Arrow")) action();
});
for (const [name, action] of Object.entries({
  keep: () => decide("keep"), drop: () => decide("drop"), undo, back: () => move(-1), forward: () => move(1),
})) {
  $(name).addEventListener("click", (event) => {
    if (event.detail) event.currentTarget.blur(); // by a pointer: the space bar shall scroll on, not press it again
    action();
  });
}
$("help").addEventListener("click", () => $("keys").showModal());
// Another tab may have decided meanwhile.
window.addEventListener("focus", () => { if (state) refresh(false); });
refresh(true);
