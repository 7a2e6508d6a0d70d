// What there is to choose from, where we are, the list, and the keys.

// --- what is there: groups of training in their order, held-out problems

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
// Over n - 1, as the advantages have it.
const deviation = (values) => Math.sqrt(values.reduce((sum, value) => sum + (value - mean(values)) ** 2, 0) / (values.length - 1));
const rows = data.groups.flatMap((group) => group.rows);
const largestOf = (value) => // not Math.max(...values), which takes only so many
  rows.reduce((most, row) => Math.max(most, Math.abs(value(row) || 0)), 1e-9);
const groups = data.groups.map((group) => {
  const rewards = group.rows.map((row) => row.reward).filter((reward) => reward !== null);
  return {
    ...group,
    problem: data.problems[group.problem],
    id: group.problem,
    mean: rewards.length ? mean(rewards) : null,
    spread: new Set(rewards).size > 1 ? deviation(rewards) : 0, // of equal ones it would be a rounding error
    right: group.rows.filter((row) => row.right).length,
    truncated: group.rows.filter((row) => row.truncated).length,
  };
});
const visits = new Map(); // problem -> its groups, earliest first
for (const group of groups) {
  if (visits.has(group.id)) visits.get(group.id).push(group);
  else visits.set(group.id, [group]);
}
const steps = [...new Set(groups.map((group) => group.step))];
const largest = largestOf((row) => row.advantage);
const scale = data.functions.map((_, i) => largestOf((row) => row.rewards[i]));
const heldout = data.heldout.map((problem) => {
  const verdicts = problem.answers.map((answer) => answer.right);
  return {
    ...problem,
    first: verdicts[0],
    last: verdicts[verdicts.length - 1],
    changes: verdicts.filter((right, i) => i && right !== verdicts[i - 1]).length,
    truncated: problem.answers[problem.answers.length - 1].truncated,
  };
});

const rowText = (row) => (row.tokens ? row.tokens.map(([piece]) => data.pieces[piece][1]).join("") : row.text);

const VIEWS = {
  train: {
    items: groups,
    name: "groups",
    show: {
      all: ["all groups", () => true],
      spread: ["rewards differ", (g) => g.spread > 0],
      equal: ["zero variance: nothing to learn", (g) => g.spread === 0],
      right: ["only right", (g) => g.right === g.rows.length],
      wrong: ["only wrong", (g) => g.right === 0],
      mixed: ["right and wrong", (g) => g.right > 0 && g.right < g.rows.length],
      truncated: ["some truncated", (g) => g.truncated > 0],
      again: ["drawn more than once", (g) => visits.get(g.id).length > 1],
    },
    sort: {
      order: ["step", null],
      spread: ["standard deviation of rewards", (g) => -g.spread],
      low: ["lowest mean reward", (g) => (g.mean === null ? Infinity : g.mean)],
      high: ["highest mean reward", (g) => -g.mean],
    },
    key: (g) => ({ step: String(g.step), group: String(g.group) }),
    text: (g) => [g.problem.question, g.problem.expected, ...g.rows.map(rowText)].join("\n"),
    small: (g) => `step ${g.step}, group ${g.group}: mean ${number(g.mean)}, standard deviation ${number(g.spread)}, `
      + `${g.right} of ${g.rows.length} right${g.truncated ? `, ${g.truncated} truncated` : ""}`,
    question: (g) => g.problem.question,
  },
  heldout: {
    items: heldout,
    name: "problems",
    show: {
      all: ["all problems", () => true],
      learned: ["learned: wrong before, right after", (p) => !p.first && p.last],
      lost: ["lost: right before, wrong after", (p) => p.first && !p.last],
      right: ["always right", (p) => p.answers.every((answer) => answer.right)],
      wrong: ["always wrong", (p) => p.answers.every((answer) => !answer.right)],
      truncated: ["truncated at the end", (p) => p.truncated],
    },
    sort: { order: ["place", null], changes: ["most changes of verdict", (p) => -p.changes] },
    key: (p) => ({ step: "", group: String(heldout.indexOf(p)) }),
    text: (p) => [p.question, p.expected, ...p.answers.map((answer) => answer.text)].join("\n"),
    small: (p) => p.answers.map((answer) => (answer.right ? "✓" : "✗")).join(" "),
    question: (p) => p.question,
  },
};

// --- where we are: all of it in the address

const LISTED = 200; // a button shows more
const START = {
  view: groups.length ? "train" : "heldout", step: "", group: "", q: "", show: "all", sort: "order", at: "",
};
let place = { ...START }, shown = [], limit = LISTED;

function readPlace() {
  const found = new URLSearchParams(location.hash.slice(1));
  place = { ...START };
  for (const name of Object.keys(START)) if (found.has(name)) place[name] = found.get(name);
  if (!Object.hasOwn(VIEWS, place.view)) place.view = START.view;
  const view = VIEWS[place.view];
  if (!Object.hasOwn(view.show, place.show)) place.show = "all";
  if (!Object.hasOwn(view.sort, place.sort)) place.sort = "order";
  if (!steps.includes(Number(place.at))) place.at = "";
}

function go(change, remember = true) {
  place = { ...place, ...change };
  const kept = Object.entries(place).filter(([name, value]) => value !== START[name]);
  const address = `#${new URLSearchParams(kept)}`;
  if (address !== (location.hash || "#")) history[remember ? "pushState" : "replaceState"](null, "", address);
  render();
}

const isHere = (item) => {
  const key = VIEWS[place.view].key(item);
  return key.group === place.group && key.step === place.step;
};

// --- the list

function listed() {
  const view = VIEWS[place.view], wanted = place.q.toLowerCase();
  let items = view.items.filter(view.show[place.show][1]);
  if (place.view === "train" && place.at) items = items.filter((g) => String(g.step) === place.at);
  if (wanted) items = items.filter((item) => (item.hay ??= view.text(item).toLowerCase()).includes(wanted));
  const order = view.sort[place.sort][1];
  return order ? items.map((item) => [order(item), item]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]) : items;
}

function renderChoices() {
  const view = VIEWS[place.view];
  for (const button of byId("views").children) {
    button.setAttribute("aria-pressed", button.dataset.view === place.view);
    button.disabled = !VIEWS[button.dataset.view].items.length;
  }
  for (const name of ["show", "sort"]) {
    byId(name).replaceChildren(...Object.entries(view[name]).map(([value, [text]]) =>
      make("option", { value, selected: value === place[name] }, text)));
  }
  if (byId("q").value !== place.q) byId("q").value = place.q;
  byId("slider").hidden = place.view !== "train" || steps.length < 2;
  byId("at").max = steps.length;
  byId("at").value = place.at ? steps.indexOf(Number(place.at)) + 1 : 0;
  byId("at-said").value = place.at ? `${place.at} only` : "all of them";
  byId("at").setAttribute("aria-valuetext", place.at ? `step ${place.at}` : "all steps");
}

function renderList() {
  const view = VIEWS[place.view];
  byId("count").textContent = `${shown.length} of ${view.items.length} ${view.name}`;
  byId("list").replaceChildren(...shown.slice(0, limit).map((item) => make("li", null,
    make("button", { type: "button", "aria-current": isHere(item) && "true", click: () => go(view.key(item)) },
      make("small", null, view.small(item)), make("span", null, beginning(view.question(item), 160))))));
  byId("more").hidden = shown.length <= limit;
  byId("list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}

const HINT = "Point at a token, or choose a completion with Tab and its tokens with ← and →.";
let detailed = null;
function renderDetail() {
  const item = VIEWS[place.view].items.find(isHere) || shown[0];
  if (item === detailed) return;
  detailed = item;
  byId("inspector").textContent = item && place.view === "train" && data.pieces.length ? HINT : "";
  byId("detail").replaceChildren(...(!item ? [make("p", null, "Nothing matches.")]
    : place.view === "train" ? groupDetail(item) : heldoutDetail(item)));
}

function render() {
  shown = listed();
  if (!place.group && shown.length) Object.assign(place, VIEWS[place.view].key(shown[0]));
  renderChoices();
  renderList();
  renderDetail();
}

// --- keys and controls

function nextInList(move) {
  const at = shown.findIndex(isHere), to = at < 0 ? 0 : at + move;
  if (to >= limit) limit = to + LISTED;
  if (shown[to]) go(VIEWS[place.view].key(shown[to]));
}

function nextVisit(move) {
  if (place.view !== "train" || !detailed) return;
  const drawn = visits.get(detailed.id), to = drawn[drawn.indexOf(detailed) + move];
  if (to) go({ ...VIEWS.train.key(to), at: "" });
}

function nextStep(move) {
  if (place.view !== "train") return;
  const to = Math.max(0, Math.min(steps.length, Number(byId("at").value) + move));
  go({ at: to ? String(steps[to - 1]) : "", step: "", group: "" });
}

const KEYS = {
  j: () => nextInList(1), k: () => nextInList(-1), ArrowRight: () => nextVisit(1), ArrowLeft: () => nextVisit(-1),
  "]": () => nextStep(1), "[": () => nextStep(-1), "/": () => byId("q").focus(),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, select")) return;
  if (!Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});
const afresh = { step: "", group: "" }; // what is chosen is the first that matches
for (const button of byId("views").children) {
  button.addEventListener("click", () => go({ ...START, view: button.dataset.view }));
}
for (const name of ["show", "sort"]) {
  byId(name).addEventListener("change", (event) => go({ ...afresh, [name]: event.target.value }));
}
byId("q").addEventListener("input", (event) => go({ ...afresh, q: event.target.value }, false));
byId("at").addEventListener("input", (event) => {
  const at = Number(event.target.value);
  go({ ...afresh, at: at ? String(steps[at - 1]) : "" }, false);
});
byId("more").addEventListener("click", () => {
  limit += LISTED;
  renderList();
});
window.addEventListener("popstate", () => {
  readPlace();
  render();
});

byId("run").textContent = plain(data.run);
byId("about").textContent = plain(data.about.join(" "));
readPlace();
render();
