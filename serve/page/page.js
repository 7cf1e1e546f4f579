"use strict";
const EXAMPLES = [
  "A woman in a red dress with a black handbag",
  "A man wearing a navy jacket, blue jeans and white trainers",
  "Someone with a yellow backpack and a grey hoodie",
  "A person in a striped shirt and shorts",
];
const BUSY_TRIES = 2; // again after 503, before saying so
const POLL_MS = 500; // between looks at a job
const POLL_LIMIT_MS = 120_000;
const READING_S = 2; // that an engine has to read the searcher's words, if nothing else is chosen
const SENTENCES = 3; // of an explanation, before "more"
const ANSWERS = 8; // to a question, before "more"
const IMAGE_TYPES = /^image\/(jpeg|png|webp|bmp|x-ms-bmp)$/;

const defaults = document.body.dataset;
const at = (id) => document.getElementById(id);
const [form, query, omega, topK, sure, closer, grid, status, notice, chips, talk, filters] =
  ["form", "query", "omega", "top-k", "sure", "closer", "grid", "status", "notice", "chips", "talk", "filters"].map(at);
const [talkToggle, filtersToggle, addToggle] = ["talk-toggle", "filters-toggle", "add-toggle"].map(at);

// What the search is besides its words: like which image (`files` or a gallery id), facet → values, facet → answer.
const state = { like: null, where: new Map(), answers: new Map(), talk: false };
const files = new Map(); // images chosen while this page is open, by the name that the address has for them
let facets = new Map(); // facet → values, those that have several

// An element with properties and children. Text only ever enters through textContent or attributes.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const say = (textContent, className = "") => make("p", { textContent, className });
const press = (textContent, onclick, properties = {}) =>
  make("button", { type: "button", textContent, onclick, ...properties });
const readable = (facet) => facet.replaceAll("_", " ");
const percent = (share) =>
  `${share >= 0.0995 ? Math.round(100 * share) : share >= 0.001 ? (100 * share).toFixed(1) : "<0.1"} %`;
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
const sleep = (milliseconds) => new Promise((wake) => setTimeout(wake, milliseconds));

// --- the address: #q=… or like=…, omega, k, sure, closer, where.FACET=VALUE, answer.FACET=VALUE, unknown=FACET, talk -----------
function readAddress() {
  const values = new URLSearchParams(location.hash.slice(1));
  query.value = values.get("q") ?? "";
  omega.value = values.get("omega") ?? defaults.omega;
  topK.value = values.get("k") ?? 10;
  sure.value = values.get("sure") ?? 0;
  closer.value = values.get("closer") ?? 0;
  state.like = values.get("like");
  state.talk = values.has("talk");
  state.where = new Map();
  state.answers = new Map(values.getAll("unknown").map((facet) => [facet, null]));
  for (const [name, value] of values) {
    const facet = name.slice(name.indexOf(".") + 1);
    if (name.startsWith("where.")) state.where.set(facet, [...(state.where.get(facet) ?? []), value]);
    if (name.startsWith("answer.")) state.answers.set(facet, value);
  }
  showOmega();
}

function address() {
  const values = new URLSearchParams(state.like ? { like: state.like } : { q: query.value.trim() });
  values.append("omega", omega.value);
  values.append("k", topK.value);
  if (state.like) return `#${values}`;
  if (Number(sure.value)) values.append("sure", sure.value);
  if (Number(closer.value)) values.append("closer", closer.value);
  for (const [facet, wanted] of state.where) for (const value of wanted) values.append(`where.${facet}`, value);
  for (const [facet, answer] of state.answers) {
    if (answer === null) values.append("unknown", facet); else values.append(`answer.${facet}`, answer);
  }
  if (state.talk) values.append("talk", "1");
  return `#${values}`;
}
const showOmega = () => { at("omega-shown").textContent = "ω " + Number(omega.value).toFixed(2); };

// --- asking the service --------------------------------------------------------------------------------------
const posted = (json) =>
  ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(json) });

// `json` is posted; `again` is what to do once a key is given, where one is needed.
async function send(path, { again, json, ...options } = {}) {
  if (json) Object.assign(options, posted(json));
  for (let left = BUSY_TRIES; ; left--) {
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The service does not answer. Check that it is running and that you are connected.");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      askForKey(again);
      throw new DOMException("a key is needed", "AbortError"); // handled: nothing more to show
    }
    const wait = Number(response.headers.get("Retry-After"));
    const problem = await readProblem(response);
    if (response.status !== 503 || !wait || !left) throw problem;
    const before = status.textContent;
    status.textContent = "The service is busy; trying again …";
    await sleep(1000 * Math.min(wait, 10));
    options.signal?.throwIfAborted();
    status.textContent = before;
  }
}

async function readProblem(response) {
  const detail = (await response.json().catch(() => null))?.detail;
  const said = Array.isArray(detail) ? detail.map((problem) => problem.msg).join("; ") : detail;
  const words = said ? said[0].toUpperCase() + said.slice(1).replace(/[^.!?]$/, "$&.") : "";
  const message = response.status === 503 ? `The service cannot answer right now. ${words}` : words;
  const unsaid = `The service answered with status ${response.status}; see its log.`;
  return Object.assign(new Error(message || unsaid), { status: response.status });
}

async function call(path, options) {
  const response = await send(path, options);
  return response.json().catch(() => { throw new Error("The service's answer cannot be read; see its log."); });
}

function askForKey(again) {
  const key = make("input", { type: "password", name: "key", autocomplete: "current-password", required: true });
  const said = say("This service needs a key.");
  const asked = make("form", { className: "notice" }, said, make("label", { textContent: "Key " }, key),
    make("button", { type: "submit", textContent: "Continue" }));
  asked.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const response = await fetch("v1/session", posted({ key: key.value }));
      if (response.status === 401) throw new Error("This key is not known. Try another.");
      if (!response.ok) throw await readProblem(response);
      notice.replaceChildren();
      loadFacets();
      again();
    } catch (error) {
      said.textContent = error.message;
    }
  });
  if (again === search) clearResults();
  notice.replaceChildren(asked);
  key.focus();
}

async function logOut() {
  try {
    const response = await fetch("v1/session", { method: "DELETE" });
    if (!response.ok) throw await readProblem(response);
    location.replace(location.pathname); // without the search, so that nothing of it stays on the page
  } catch (error) {
    notice.replaceChildren(sayProblem(error, logOut));
  }
}

// What went wrong, in place; with a key of too small a scope, another one can be given.
function sayProblem(error, again) {
  const said = make("div", { className: "bad" }, say(error.message));
  said.setAttribute("role", "alert");
  if (error.status === 403) said.append(press("Use another key", () => askForKey(again)));
  return said;
}

// Looks at a job until it is done or failed; null where that takes longer than a person wants to look.
async function follow(job, show, again) {
  for (const end = Date.now() + POLL_LIMIT_MS; Date.now() < end; await sleep(POLL_MS)) {
    const found = await call(`v1/jobs/${job}`, { again });
    show(found);
    if (found.status !== "waiting") return found;
  }
  return null;
}

// --- searching -----------------------------------------------------------------------------------------------
let running = null;
let shown = null; // the search whose results are on the page, and its newest answer

async function search() {
  running?.abort();
  const mine = running = new AbortController();
  notice.replaceChildren();
  status.textContent = "";
  showState();
  const asked = {
    like: state.like, query: query.value.trim(), top_k: Number(topK.value), omega: Number(omega.value),
    where: Object.fromEntries(state.where), answers: Object.fromEntries(state.answers), suggest: state.talk,
    min_confidence: Number(sure.value) / 100,
    rerank: Number(closer.value) ? { seconds: Number(closer.value) } : null,
  };
  if (!asked.like && !asked.query) return showWelcome();
  const problem = findProblem(asked);
  if (problem) return showError(problem);
  const waiting = setTimeout(showWaiting, 150, asked.top_k);
  try {
    const answer = await ask(asked, 0, { signal: mine.signal, again: search });
    if (mine === running) showAnswer(asked, answer);
  } catch (error) {
    if (mine === running && error.name !== "AbortError") showError(error.message, true);
  } finally {
    clearTimeout(waiting);
  }
}

async function more() {
  const mine = shown;
  at("more-problem").textContent = "";
  at("more").setAttribute("aria-busy", "true");
  try {
    const answer = await ask(mine.asked, mine.answer.next_offset, { signal: running.signal, again: more });
    if (mine === shown) appendAnswer(answer);
  } catch (error) {
    if (mine === shown && error.name !== "AbortError") at("more-problem").textContent = error.message;
  } finally {
    at("more").removeAttribute("aria-busy");
  }
}

function findProblem({ like, query: text, top_k: count, min_confidence: least }) {
  const length = [...text].length;
  if (!like && length > defaults.textLimit) {
    return `The description has ${length} characters; at most ${defaults.textLimit} are read.`;
  }
  if (!(Number.isInteger(count) && count >= 1 && count <= defaults.topKLimit)) {
    return `Results must be a whole number from 1 to ${defaults.topKLimit}.`;
  }
  return least >= 0 && least <= 1 ? null : "The confidence must be from 0 to 100 %.";
}

async function ask({ like, ...wanted }, offset, options) {
  const page = { top_k: Math.min(wanted.top_k, defaults.topKLimit - offset), offset, omega: wanted.omega };
  if (!like) return call("v1/search", { ...options, json: { ...wanted, ...page } });
  const where = wanted.where;
  if (/^[0-9a-f]{16}$/.test(like)) return call("v1/search/like", { ...options, json: { image_id: like, where, ...page } });
  if (!files.has(like)) {
    throw new Error("An image from a file is forgotten when the page is closed. Choose it again.");
  }
  const body = files.get(like).file;
  const headers = { "Content-Type": body.type };
  const values = new URLSearchParams({ ...page, where: JSON.stringify(where) });
  return call(`v1/search/image?${values}`, { ...options, method: "POST", headers, body });
}

// --- what is shown -------------------------------------------------------------------------------------------
function clearResults() {
  shown = null;
  grid.replaceChildren();
  grid.classList.remove("stale");
  grid.removeAttribute("aria-busy");
  at("more-line").hidden = true;
  status.textContent = "";
  talk.replaceChildren();
}

function showWelcome() {
  clearResults();
  talk.replaceChildren(say("Describe the person first. Then questions narrow the search down."));
  notice.replaceChildren(make("div", { className: "notice" },
    say("Describe a person in your own words, or start from one of the examples."),
    say("More detail finds the person sooner: colours, patterns, shoes, hair, bags.")));
}

function showWaiting(count) {
  grid.setAttribute("aria-busy", "true");
  status.textContent ||= "Searching …";
  if (grid.querySelector(".picture")) return grid.classList.add("stale");
  grid.replaceChildren(...Array.from({ length: Math.min(count, 12) }, () => make("li", { className: "card empty" })));
}

function showError(message, again = false) {
  clearResults();
  const box = make("div", { className: "notice bad" }, say(message));
  box.setAttribute("role", "alert");
  if (again) box.append(press("Try again", search));
  notice.replaceChildren(box);
}

function showAnswer(asked, answer) {
  const fresh = [asked.query, asked.omega, answer.gallery];
  if (String(fresh) !== String(explanations.of)) Object.assign(explanations, { of: fresh, found: new Map() });
  const focused = talk.contains(document.activeElement);
  clearResults();
  shown = { asked, answer };
  if (asked.suggest && !asked.like) showQuestion(answer.question, focused);
  appendAnswer(answer);
  if (answer.hits.length) return;
  status.textContent = "";
  if (answer.confidence !== null && answer.confidence < asked.min_confidence) return showNobody(answer.confidence);
  notice.replaceChildren(make("div", { className: "notice" }, say(Object.keys(asked.where).length
    ? "No image matches all filters. Remove one of them."
    : "The gallery has no images to show. Index a split that has some, or add an image.")));
}

function showNobody(confidence) {
  const anyway = press("Show the best images anyway", () => { sure.value = 0; go(); });
  notice.replaceChildren(make("div", { className: "notice" },
    say(`Probably nobody here fits this description: the best image is the person with a confidence of ${
      percent(confidence)}.`), anyway));
}

function appendAnswer(answer) {
  shown.answer = answer;
  const before = grid.children.length;
  const there = new Set([...grid.children].map((item) => item.dataset.image)); // the gallery may grow between pages
  const hits = answer.hits.filter((hit) => !there.has(hit.image_id));
  grid.append(...hits.map((hit, number) => card(hit, before + number + 1)));
  at("more-line").hidden = answer.next_offset === null;
  const found = grid.children.length;
  const took = Math.max(1, Math.round(answer.took_ms));
  const which = answer.reranking?.by === "engine" ? "most similar" : "first";
  const confidence = answer.confidence === null ? ""
    : ` · the ${which} is the person with a confidence of ${percent(answer.confidence)}`;
  status.textContent = `${found} ${found === 1 ? "image" : "images"}, best first, in ${took} ms${confidence}${
    howRanked(answer.reranking)}${answer.approximate ? " · approximate: some of the best may be missing" : ""}`;
  if (before) grid.children[before]?.querySelector("a").focus({ preventScroll: true });
}

function howRanked(reranking) {
  if (!reranking) return "";
  if (reranking.by === "plain") return ` · not ranked again: ${reranking.reason}`;
  return ` · ranked again by the engine in ${reranking.seconds.toFixed(1)} s${
    reranking.reason ? ` (${reranking.reason})` : ""}`;
}

// What the engine says of an image: the attributes of the description that it fits, and those in which it differs.
function sayVerdicts(verdicts) {
  const named = (wanted) => Object.entries(verdicts).filter(([, said]) => said === wanted).map(([name]) => readable(name));
  return ["fits", "differs", "unseen"].map((said) => [said, named(said)]).filter(([, names]) => names.length)
    .map(([said, names]) => `${said}: ${names.join(", ")}`).join(" · ");
}

function card(hit, rank) {
  const image = make("img", { src: hit.image.slice(1), alt: `Result ${rank}`, loading: "lazy", decoding: "async" });
  const picture = make("a", { className: "picture", href: hit.image.slice(1), target: "_blank", title: hit.source_path || hit.image_id },
    image, make("span", { className: "rank", textContent: rank }));
  image.onerror = () => picture.classList.add("gone");
  const identity = hit.identity === null
    ? make("span", { className: "soft", textContent: "identity unknown" })
    : press(`identity ${hit.identity}`, () => mark(hit.identity),
      { className: "identity", title: "Mark the results of this identity" });
  const soft = (textContent) => make("div", { className: "soft", textContent });
  const believed = hit.belief !== null;
  const parts = `global ${hit.global_similarity.toFixed(2)} · local ${hit.local_similarity.toFixed(2)}`;
  const facts = make("div", { className: "facts" },
    make("div", { className: "line" }, make("strong", believed
      ? { textContent: percent(hit.belief), title: "Probability that this is the image, if it is among the best ones" }
      : { textContent: hit.similarity.toFixed(3), title: "Similarity" }), identity),
    bar(believed ? hit.belief : hit.similarity),
    ...(believed ? [soft(`similarity ${hit.similarity.toFixed(3)}`)] : []), soft(parts),
    ...(hit.verdicts ? [soft(sayVerdicts(hit.verdicts))] : []));
  if (hit.summary) facts.append(make("details", {}, make("summary", { textContent: "Description" }), say(hit.summary)));
  const item = make("li", { className: "card" }, picture, facts);
  Object.assign(item.dataset, { image: hit.image_id, identity: hit.identity ?? "" });
  facts.append(actions(item, hit));
  return item;
}

function actions(item, hit) {
  const why = press("Why?", () => explain(item, hit.image_id, why), { ariaExpanded: "false" });
  const found = make("div", { className: "actions" },
    press("More like this", () => lookLike(hit.image_id)),
    ...(shown.asked.like ? [] : [why]), // an image has no words to explain
    press("Delete", () => confirmDelete(item, hit.image_id, found)));
  return found;
}

function bar(share) {
  const level = make("div");
  level.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  return make("div", { className: "bar" }, level);
}

function mark(identity) {
  const off = grid.querySelector(".same")?.dataset.identity === String(identity);
  for (const item of grid.children) {
    const same = !off && item.dataset.identity === String(identity);
    item.classList.toggle("same", same);
    item.querySelector(".identity")?.setAttribute("aria-pressed", same);
  }
}

// --- why an image was found ----------------------------------------------------------------------------------
const explanations = { of: null, found: new Map() }; // by image, of one query, ω and gallery

async function explain(item, image, button) {
  const open = item.classList.toggle("explained");
  button.ariaExpanded = String(open);
  if (!open) return item.querySelector(".why").remove();
  const box = make("section", { className: "why", ariaLabel: "Why this image" }, say("Looking closer …", "soft"));
  item.append(box);
  const { found } = explanations;
  const again = () => explain(item, image, button);
  const json = { query: shown.asked.query, image_id: image, omega: shown.asked.omega };
  try {
    if (!found.has(image)) found.set(image, call("v1/explain", { json, again }));
    box.replaceChildren(...explanation(await found.get(image)));
  } catch (error) {
    found.delete(image);
    if (error.name !== "AbortError") box.replaceChildren(sayProblem(error));
    else if (box.isConnected) again(); // closed until there is a key
  }
}

function explanation(found) {
  const part = (name, similarity, weight) => make("div", { className: "part" },
    make("span", { textContent: name }), bar(similarity),
    make("span", { className: "number", textContent: `${similarity.toFixed(3)} × ${weight.toFixed(2)}`,
      title: "Similarity × its weight" }));
  const sum = make("div", { className: "part" }, make("strong", { textContent: "Together" }), bar(found.similarity),
    make("strong", { className: "number", textContent: found.similarity.toFixed(3) }));
  return [
    make("h2", { textContent: "How similar" }),
    part("Whole sentence", found.global_similarity, 1 - found.omega),
    part("Details", found.local_similarity, found.omega), sum,
    make("h2", { textContent: "What each word adds" }), wordsOf(found.words), legend(),
    make("h2", { textContent: "Sentences about this image" }), ...sentencesOf(found.sentences),
  ];
}

function wordsOf(words) {
  const most = Math.max(...words.map((word) => Math.abs(word.contribution)), 1e-6);
  return make("div", { className: "words", role: "list" }, ...words.map(({ word, contribution }) => {
    const shaded = make("span", { className: contribution < 0 ? "word against" : "word", role: "listitem",
      title: `${word}: ${signed(contribution)}` }, word, make("small", { textContent: signed(contribution) }));
    shaded.style.setProperty("--strength", Math.abs(contribution) / most);
    return shaded;
  }));
}

const legend = () => make("p", { className: "soft legend" },
  make("span", { className: "word", textContent: "These words" }), " raise the similarity, ",
  make("span", { className: "word against", textContent: "these" }),
  " lower it. The number is by how much the similarity falls without the word.");

function sentencesOf(sentences) {
  if (!sentences.length) return [say("None: the image has no dialogue.", "soft")];
  const items = sentences.map(({ source, text, similarity }, place) => make("li",
    { hidden: place >= SENTENCES, tabIndex: -1 },
    make("span", { className: "soft", textContent: source === "summary" ? "In the description" : source }),
    make("span", { className: "number", textContent: similarity.toFixed(3), title: "Similarity to the query" }),
    say(text)));
  return [make("ol", { className: "sentences" }, ...items), ...unfold(items, SENTENCES, "sentences")];
}

// A button that shows the hidden rest of some elements, where there is one.
function unfold(elements, first, what) {
  if (elements.length <= first) return [];
  const button = press(`${elements.length - first} more ${what}`, () => {
    for (const element of elements) element.hidden = false;
    elements[first].focus({ preventScroll: true });
    button.remove();
  }, { className: "unfold" });
  return [button];
}

// --- filters, answers, and an image to look like -------------------------------------------------------------
async function loadFacets() {
  const response = await fetch("v1/facets").catch(() => null);
  if (!response?.ok) return; // without a key, or away: the search says so
  const { compare } = new Intl.Collator(undefined, { numeric: true });
  // A split is nothing that a person shows.
  const { time, ...all } = await response.json();
  const named = Object.entries(all).filter(([facet]) => facet !== "split");
  const several = named.filter(([, values]) => values.length > 1);
  facets = new Map(several.map(([facet, values]) => [facet, values.sort(compare)]));
  filters.replaceChildren(...[...facets].map(([facet, values]) => make("fieldset", {},
    make("legend", { textContent: readable(facet) }),
    make("div", { className: "options" }, ...values.map((value) => {
      const box = make("input", { type: "checkbox", value, onchange: () => filter(facet, value, box.checked) });
      box.dataset.facet = facet;
      return make("label", { className: "option" }, box, value);
    })))), ...(time && time[0] !== time[1] ? [timeFields(time)] : []));
  showState();
}

// Two fields for a range of time, which is written first..last and is in UTC.
function timeFields([earliest, latest]) {
  const toMinute = (time) => time.slice(0, 16);
  const fields = ["From", "To"].map((word) => make("input", { type: "datetime-local", ariaLabel: `${word} (UTC)`,
    min: toMinute(earliest), max: toMinute(latest), onchange: () => {
      const range = fields.map((field) => field.value).join("..");
      if (range === "..") state.where.delete("time"); else state.where.set("time", [range]);
      go();
    } }));
  fields.forEach((field, end) => { field.dataset.end = end; });
  return make("fieldset", {}, make("legend", { textContent: "time, from and to (UTC)" }),
    make("div", { className: "options" }, ...fields));
}

function filter(facet, value, wanted) {
  const others = (state.where.get(facet) ?? []).filter((other) => other !== value);
  const values = wanted ? [...others, value] : others;
  if (values.length) state.where.set(facet, values); else state.where.delete(facet);
  go();
}

// The toggles, panels and chips as the state has them.
function showState() {
  const byImage = Boolean(state.like);
  talkToggle.hidden = byImage;
  talkToggle.ariaPressed = String(state.talk);
  talk.hidden = byImage || !state.talk;
  filtersToggle.hidden = !filters.childElementCount;
  filters.hidden = filtersToggle.hidden || filtersToggle.ariaExpanded !== "true";
  const [range = ""] = state.where.get("time") ?? [];
  const ends = range.includes("..") ? range.split("..") : [range, range];
  for (const field of filters.querySelectorAll("input[data-end]")) field.value = ends[field.dataset.end];
  for (const box of filters.querySelectorAll("input[data-facet]")) {
    box.checked = Boolean(state.where.get(box.dataset.facet)?.includes(box.value));
  }
  const focused = chips.contains(document.activeElement);
  chips.replaceChildren(...(byImage ? [imageChip(), ...filterChips()] : [...filterChips(), ...answerChips()]));
  if (focused) (chips.querySelector("button") ?? chips).focus({ preventScroll: true });
}

const chip = (text, remove, ...before) => make("button",
  { type: "button", className: "chip", ariaLabel: `Remove ${text}`, onclick: () => { remove(); go(); } },
  ...before, make("span", { textContent: text }), make("span", { textContent: "×", ariaHidden: "true" }));

function imageChip() {
  const chosen = files.get(state.like);
  const preview = make("img", { src: chosen?.preview ?? `v1/images/${encodeURIComponent(state.like)}`, alt: "" });
  preview.onerror = () => preview.remove();
  const text = chosen ? `images like ${chosen.file.name}` : "images like this one";
  return chip(text, () => { state.like = null; }, preview);
}
const filterChips = () => [...state.where].flatMap(([facet, values]) => values.map((value) =>
  chip(`${readable(facet)}: ${value}`, () => filter(facet, value, false))));
const answerChips = () => [...state.answers].map(([facet, answer]) =>
  chip(`${readable(facet)}: ${answer ?? "not known"}`, () => state.answers.delete(facet)));

function showQuestion(question, focused) {
  if (!question) {
    talk.replaceChildren(say("No further question would help: no answer would tell these images apart."));
  } else {
    const reply = (answer) => () => { state.answers.set(question.facet, answer); go(); };
    const values = Object.entries(question.values);
    const buttons = values.map(([value, share], place) => {
      const button = press(value, reply(value), { hidden: place >= ANSWERS });
      button.append(" ", make("small", { textContent: percent(share), title: "Probability of this answer" }));
      return button;
    });
    talk.replaceChildren(say(question.text, "question"), make("div", { className: "answers" }, ...buttons,
      ...unfold(buttons, ANSWERS, "answers"), press("I don't know", reply(null))));
  }
  talk.append(ownWords(question));
  if (!focused) return;
  talk.firstChild.tabIndex = -1;
  talk.firstChild.focus({ preventScroll: true });
}

// An answer in the searcher's own words, to the question or unasked: the service reads it beside the first image.
function ownWords(question) {
  const words = make("input", { type: "text", maxLength: defaults.textLimit, required: true, autocomplete: "off",
    placeholder: Number(closer.max) ? "no, the jacket was darker" : "no, he had a red jacket" });
  const said = say("");
  said.setAttribute("role", "status");
  const tell = async () => {
    const json = { words: words.value, facet: question?.facet ?? null,
      image_id: grid.firstElementChild?.dataset.image ?? null };
    if (Number(closer.max)) json.seconds = Number(closer.value) || Math.min(READING_S, closer.max);
    said.textContent = "Reading …";
    form.setAttribute("aria-busy", "true");
    try { // ends with this search
      const { answers, reason } = await call("v1/understand", { json, again: tell, signal: running.signal });
      if (!Object.keys(answers).length) {
        said.textContent = "None of that was understood. Name a garment, a colour, the hair, shoes or a bag."
          + (reason ? ` (${reason})` : "");
        return;
      }
      for (const [facet, answer] of Object.entries(answers)) state.answers.set(facet, answer);
      go();
    } catch (error) {
      if (error.name === "AbortError") said.textContent = ""; else said.replaceChildren(sayProblem(error, tell));
    } finally {
      form.removeAttribute("aria-busy");
    }
  };
  const form = make("form", { className: "own-words" },
    make("label", {}, question ? "Or in your own words " : "In your own words ", words),
    make("button", { type: "submit", textContent: "Tell" }), said);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!form.hasAttribute("aria-busy")) tell();
  });
  return form;
}

function lookLike(name) {
  state.like = name;
  showState();
  chips.querySelector("button").focus({ preventScroll: true });
  window.scrollTo(0, 0);
  go();
}

function lookLikeFile(file) {
  const problem = findFileProblem(file);
  if (problem) return showError(problem);
  const name = `file-${files.size + 1}`;
  files.set(name, { file, preview: URL.createObjectURL(file) });
  lookLike(name);
}

function findFileProblem(file) {
  if (!IMAGE_TYPES.test(file.type)) return `${file.name} cannot be read: choose a JPEG, PNG, WebP or BMP image.`;
  if (file.size <= defaults.imageBytesLimit) return null;
  const megabytes = (bytes) => (bytes / 2 ** 20).toFixed(1);
  return `${file.name} has ${megabytes(file.size)} MB; the limit is ${megabytes(defaults.imageBytesLimit)} MB.`;
}

// --- adding and deleting -------------------------------------------------------------------------------------
async function add(file, fields, line, done) {
  const name = make("strong", { textContent: file.name });
  const show = (word, ...rest) => line.replaceChildren(name, ` ${word} `, ...rest);
  const again = () => add(file, fields, line, done);
  try {
    show("is being sent …");
    const headers = { "Content-Type": file.type };
    const { job, image_id: image } = await call(`v1/images?${fields}`, { method: "POST", headers, body: file, again });
    done();
    const end = await follow(job, ({ detail }) => show(detail ? `is waiting: ${detail}` : "is waiting …"), again);
    if (!end) show("is still waiting after two minutes; the service continues.");
    else if (end.status === "failed") show("failed.", sayProblem(new Error(end.detail)));
    else {
      show("is searchable.", press("Show it", () => lookLike(image)));
      loadFacets();
    }
  } catch (error) {
    if (error.name === "AbortError") show("waits for a key."); else show("was not added.", sayProblem(error, again));
  }
}

function submitImage(event) {
  event.preventDefault();
  const { file: chooser, summary, identity, camera, time } = event.target.elements;
  const file = chooser.files[0];
  const line = make("li");
  at("added").prepend(line);
  const problem = findFileProblem(file);
  if (problem) return line.append(sayProblem(new Error(problem)));
  const given =
    { summary: summary.value.trim(), identity: identity.value, camera: camera.value.trim(), time: time.value };
  const named = Object.entries(given).filter(([, value]) => value);
  const fields = new URLSearchParams([["name", file.name.slice(0, 300)], ...named]);
  add(file, fields, line, () => { if (chooser.files[0] === file) event.target.reset(); });
}

function confirmDelete(item, image, before) {
  const keep = () => {
    asked.replaceWith(before);
    before.lastChild.focus();
  };
  const problem = make("div");
  const remove = async () => {
    asked.inert = true;
    try {
      const { job } = await call(`v1/images/${image}`, { method: "DELETE", again: remove });
      takeOut(item);
      status.textContent = "The image is removed from every search; it is being erased …";
      const end = await follow(job, () => {}, () => {});
      status.textContent = end?.status === "done" ? "The image is erased everywhere."
        : `The image is removed from every search, but not yet erased: ${end?.detail || "the service continues"}.`;
    } catch (error) {
      asked.inert = false;
      if (error.name !== "AbortError") problem.replaceChildren(sayProblem(error, remove));
    }
  };
  const kept = press("Keep", keep);
  const asked = make("div", { className: "actions confirm", role: "group",
    onkeydown: (event) => { if (event.key === "Escape") keep(); } },
  say("Delete this image everywhere?"), press("Delete", remove), kept, problem);
  before.replaceWith(asked);
  kept.focus();
}

function takeOut(item) {
  const next = item.nextElementSibling ?? item.previousElementSibling;
  item.remove();
  if (shown?.answer.next_offset) shown.answer.next_offset -= 1; // the gallery has one less in front
  (next?.querySelector("a") ?? query).focus({ preventScroll: true });
}

// --- what a person does --------------------------------------------------------------------------------------
function go() {
  if (location.hash === address()) search();
  else location.hash = address(); // hashchange searches, so that Back and Forward do too
}
function submit() {
  if (query.value.trim()) state.like = null;
  go();
}
function refine() { // a setting changed: search again without another entry in the history
  if (!query.value.trim() && !state.like) return;
  history.replaceState(null, "", address());
  search();
}
function toggle(button, panel) {
  panel.hidden = button.ariaExpanded === "true";
  button.ariaExpanded = String(!panel.hidden);
}
let pause;
form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
query.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
omega.addEventListener("input", () => { showOmega(); clearTimeout(pause); pause = setTimeout(refine, 200); });
topK.addEventListener("change", refine);
sure.addEventListener("change", refine);
closer.addEventListener("change", refine);
talkToggle.addEventListener("click", () => {
  state.talk = !state.talk;
  if (!state.talk) state.answers.clear();
  go();
});
filtersToggle.addEventListener("click", () => toggle(filtersToggle, filters));
addToggle.addEventListener("click", () => toggle(addToggle, at("add")));
at("add-form").addEventListener("submit", submitImage);
at("more").addEventListener("click", () => { if (!at("more").hasAttribute("aria-busy")) more(); });
at("image-file").addEventListener("change", ({ target }) => {
  if (target.files.length) lookLikeFile(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
const dropping = (event, over) => {
  if (!event.dataTransfer?.types.includes("Files") || event.target.closest?.("#add")) over = false;
  else event.preventDefault();
  document.body.classList.toggle("dropping", over);
};
document.addEventListener("dragover", (event) => dropping(event, true));
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) dropping(event, false); });
document.addEventListener("drop", (event) => {
  dropping(event, false);
  const file = event.dataTransfer?.files[0];
  if (file && event.defaultPrevented) lookLikeFile(file);
});
window.addEventListener("hashchange", () => { readAddress(); search(); });
document.addEventListener("keydown", (event) => {
  const typing = document.activeElement.matches("textarea, input:not([type=range], [type=checkbox], [type=file])");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    query.focus();
    query.select();
  }
});
at("examples").append(...EXAMPLES.map((text) => press(text, () => {
  query.value = text;
  state.answers.clear(); // they are about somebody else
  submit();
})));
topK.max = defaults.topKLimit;
at("log-out").hidden = defaults.closed !== "true";
at("log-out").addEventListener("click", logOut);

async function showServed() {
  const response = await fetch("readyz").catch(() => null);
  const served = await response?.json().catch(() => null);
  if (!served) return;
  at("served").textContent = response.ok
    ? `${served.images.toLocaleString()} images · model ${served.model} · gallery ${served.gallery}`
    : `The service is starting: ${served.detail}`;
  at("sure-line").hidden = (served.calibrated_omega ?? null) === null;
  at("closer-line").hidden = (served.rerank_seconds ?? null) === null;
  closer.max = served.rerank_seconds ?? 0;
  if (!response.ok) setTimeout(showServed, 2000);
}
showServed();
loadFacets();
readAddress();
search();
