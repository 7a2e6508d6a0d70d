// What stands on the right: a group with its completions token by token, or a held-out problem over time.

const FULL_SURPRISE = 5; // nats at which the line below a token is full
const TOKENS_SHOWN = 3000; // of a completion; a button shows the rest

function tokenSpan(row, i) {
  const [piece, logp, kept] = row.tokens[i], advantage = kept ? row.advantage : 0;
  const text = data.pieces[piece][1];
  const kind = advantage > 0 ? "pos" : advantage < 0 ? "neg" : "off";
  const surprise = logp === null ? 1 : Math.min(1, -logp / 100 / FULL_SURPRISE);
  const span = make("span", { class: `t ${kind}`, "data-i": i,
    "--a": (0.15 + 0.85 * Math.abs(advantage) / largest).toFixed(3), "--s": Math.max(0, surprise).toFixed(3) });
  if (text === "") span.append(make("span", { class: "mark" }, "◌"));
  for (const [j, line] of text.split("\n").entries()) {
    if (j) span.append(make("span", { class: "mark" }, "⏎"), "\n");
    span.append(plain(line));
  }
  return span;
}

function inspect(block, i) {
  const row = block.row;
  block.querySelector(".at")?.classList.remove("at");
  block.at = Math.max(0, Math.min(i, block.querySelectorAll(".t").length - 1));
  const span = block.querySelectorAll(".t")[block.at];
  if (!span) return;
  span.classList.add("at");
  const [piece, logp, kept] = row.tokens[block.at], [id, text] = data.pieces[piece];
  const share = number(100 * Math.exp(logp / 100), 1);
  const likely = logp === null ? "no log-probability" : `log p ${number(logp / 100)} (p = ${share}%)`;
  const acted = !kept ? "no advantage acted on it" : `advantage ${signed(row.advantage)}`;
  const said = text === "" ? "(part of the next character)" : plain(JSON.stringify(text));
  const which = `token ${block.at + 1} of ${row.tokens.length}`;
  byId("inspector").textContent = `${which}: ${said}, id ${id}, ${likely}, ${acted}`;
}

function tokenBlock(row, name) {
  const block = make("div", { class: "tokens", tabindex: "0", role: "group",
    "aria-label": `${name}, token by token: left and right arrow keys` });
  block.row = row;
  block.at = -1;
  const fill = (count) => block.replaceChildren(...row.tokens.slice(0, count).map((_, i) => tokenSpan(row, i)));
  fill(TOKENS_SHOWN);
  if (row.tokens.length > TOKENS_SHOWN) {
    const all = () => fill(row.tokens.length);
    block.append(make("button", { type: "button", click: all }, `show all ${row.tokens.length} tokens`));
  }
  const under = (event) => event.target.closest("[data-i]");
  for (const kind of ["mouseover", "click"]) {
    block.addEventListener(kind, (event) => under(event) && inspect(block, Number(under(event).dataset.i)));
  }
  block.addEventListener("focus", () => inspect(block, Math.max(0, block.at)));
  block.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move || event.target !== block) return;
    event.preventDefault();
    event.stopPropagation();
    inspect(block, block.at + move);
  });
  return block;
}

function bar(name, value, shown, share, both) {
  const fill = make("i", { class: value < 0 ? "neg" : "", "--w": share.toFixed(3) });
  const box = make("div", { class: both ? "bar both" : "bar" }, fill);
  const label = plain(name).replaceAll("_", "_\u200b"); // where a long name may be broken
  return [make("span", null, label), make("b", null, shown), box];
}

// Each reward beside the largest of its function in the run, the advantage beside the largest of all.
function bars(row) {
  const rewards = data.functions.flatMap((name, i) =>
    bar(name, row.rewards[i], number(row.rewards[i]), Math.abs(row.rewards[i] || 0) / scale[i], false));
  const share = Math.abs(row.advantage || 0) / largest;
  const advantage = bar("advantage", row.advantage, signed(row.advantage), share, true);
  return make("div", { class: "bars" }, ...rewards, ...advantage);
}

// What is said of every answer, sampled or greedy.
function verdict(answer) {
  const found = answer.extracted ? beginning(answer.extracted, 60) : "none";
  return [
    make("span", null, answer.right ? "✓ right" : "✗ wrong"),
    make("span", null, "answer found: ", make("span", { class: "found" }, found)),
    make("span", null, `${answer.length} tokens`),
    answer.truncated ? make("span", { class: "badge" }, "truncated") : null,
  ];
}

function rowCard(row) {
  const leftOut = row.tokens && row.tokens.length && row.tokens.every((token) => !token[2]);
  const facts = make("div", { class: "facts" },
    make("h3", null, `Completion ${row.row}`),
    make("span", null, "reward ", make("strong", null, number(row.reward))),
    ...verdict(row),
    leftOut ? make("span", { class: "badge" }, "no advantage acted on it") : null);
  const name = `Completion ${row.row}, advantage ${signed(row.advantage)}`;
  const body = row.tokens ? tokenBlock(row, name) : cutText(row.text);
  return make("article", { "aria-label": name }, facts, bars(row), body);
}

// --- the right side

function groupDetail(group) {
  const drawn = visits.get(group.id);
  const equal = "All rewards are equal: under advantages within the group, this group taught nothing.";
  const strip = drawn.length < 2 ? [] : [make("ul", { class: "strip", "aria-label": "The same problem over time" },
    ...drawn.map((g) => make("li", null, make("button", { type: "button", "aria-current": g === group && "true",
      click: () => go({ ...VIEWS.train.key(g), at: "" }) }, `step ${g.step}: mean ${number(g.mean)}`))))];
  return [
    cutText(group.problem.question, "h2", "question"),
    make("p", { class: "note" }, `Expected: ${beginning(group.problem.expected, 200)}. ${VIEWS.train.small(group)}.`),
    ...strip,
    ...(group.spread === 0 ? [make("p", { class: "note" }, equal)] : []),
    ...group.rows.map(rowCard),
  ];
}

function heldoutDetail(problem) {
  const runs = []; // answers of the same text one after the other
  for (const answer of problem.answers) {
    const before = runs[runs.length - 1];
    if (before && before.text === answer.text) before.until = answer.step;
    else runs.push({ ...answer, until: answer.step });
  }
  const cards = runs.map((answer, i) => {
    const when = answer.step === answer.until ? `step ${answer.step}` : `steps ${answer.step} to ${answer.until}`;
    const part = runs.length === 1 ? "always: " : i === 0 ? "before: " : i === runs.length - 1 ? "after: " : "";
    const name = part + when;
    return make("article", { "aria-label": name }, make("div", { class: "facts" },
      make("h3", null, name),
      ...verdict(answer)), cutText(answer.text));
  });
  return [
    cutText(problem.question, "h2", "question"),
    make("p", { class: "note" }, `Expected: ${beginning(problem.expected, 200)}. A greedy answer in each evaluation.`),
    make("div", { class: "cards" }, ...cards),
  ];
}

