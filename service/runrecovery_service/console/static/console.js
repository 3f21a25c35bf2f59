// Keeps a page up to date, and shows times in the zone of the viewer. Without this script every page
// can be read and every question answered.
//
// The stream of a page says which version of the page is the present one. If the page shows another,
// it is fetched again, and its changed parts (`data-swap`) are replaced. What a person types stays.

const BEAT_MS = 25_000; // the service says every 10 s that it is alive
const RETRY_MS = 1_000;
const MAX_OUTPUT_CHARS = 400_000;

const away = document.getElementById("away");
const source = new WeakMap(); // the HTML of a part as the service sent it
const sent = new WeakSet(); // forms that were sent
let version = document.body.dataset.version;
let stream = null;
let watchdog = 0;
let retry = 0;
let isAway = false;
let loading = null;
const here = document.body.dataset.page ?? location.href; // of a page that answers a form: where it leads

function reload() {
  if (document.body.dataset.page) location.assign(here);
  else location.reload();
}

// -- times -----------------------------------------------------------------------------------

const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const hours = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });
const UNITS = [["day", 86_400], ["hour", 3_600], ["minute", 60], ["second", 1]];

function ago(date) {
  const seconds = (date - Date.now()) / 1000;
  const [unit, size] = UNITS.find(([, size]) => Math.abs(seconds) >= size) ?? UNITS[3];
  return relative.format(Math.trunc(seconds / size), unit);
}

function showTimes(root) {
  const today = new Date().toDateString();
  for (const element of root.querySelectorAll("time")) {
    const date = new Date(element.dateTime);
    const isNear = Math.abs(date - Date.now()) < 7 * 86_400_000;
    const text = date.toDateString() === today ? hours.format(date) : clock.format(date);
    element.textContent = "ago" in element.dataset && isNear ? ago(date) : text;
  }
}

// The address of a list has its times in UTC. With this script a person sees and writes them in their
// zone.
const utcOf = (local) => (local ? new Date(local).toISOString().slice(0, 16) : "");

function localOf(utc) {
  const date = new Date(`${utc}Z`);
  return new Date(date - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

function showTimeFields() {
  for (const zone of document.querySelectorAll("[data-zone]")) zone.textContent = "your time";
  for (const field of document.querySelectorAll("[data-utc]")) {
    if (field.defaultValue) field.value = localOf(field.defaultValue);
    field.form.addEventListener("formdata", ({ formData }) => formData.set(field.name, utcOf(field.value)));
  }
}

// -- parts of the page -----------------------------------------------------------------------

function remember(root) {
  for (const part of root.querySelectorAll("[data-swap], [data-list] > *")) source.set(part, part.outerHTML);
}

function isTouched(element) {
  if (element.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) return true;
  return [...element.querySelectorAll("textarea, input, select")].some((field) => {
    if (field.type === "hidden") return false;
    if (field.type === "radio" || field.type === "checkbox") return field.checked !== field.defaultChecked;
    return field.tagName === "SELECT" ? false : field.value !== field.defaultValue;
  });
}

function keepOpen(before, after) {
  const wasOpen = [...before.querySelectorAll("details")].map((each) => each.open);
  after.querySelectorAll("details").forEach((each, at) => { if (at < wasOpen.length) each.open = wasOpen[at]; });
}

function replace(before, after, html) {
  keepOpen(before, after);
  const scrolled = [...before.querySelectorAll(".scroll, .text")].map((each) => [each.scrollLeft, each.scrollTop]);
  before.replaceWith(after);
  [...after.querySelectorAll(".scroll, .text")].forEach((each, at) => { if (scrolled[at]) [each.scrollLeft, each.scrollTop] = scrolled[at]; });
  source.set(after, html);
}

function closeQuestion(article, text) {
  if (article.querySelector(".gone-note")) return;
  const note = document.createElement("p");
  note.className = "gone-note";
  note.setAttribute("role", "status");
  note.textContent = text;
  article.append(note);
  for (const button of article.querySelectorAll("button")) button.disabled = true;
}

function swapList(before, after) {
  const present = new Map([...after.children].map((child) => [child.id, child]));
  for (const child of [...before.children]) {
    if (present.has(child.id)) continue;
    if (isTouched(child)) closeQuestion(child, "This question no longer waits. What you wrote was not sent.");
    else child.remove();
  }
  let place = null;
  for (const fresh of present.values()) {
    const html = fresh.outerHTML;
    const old = document.getElementById(fresh.id);
    let kept = old;
    if (!old) {
      fresh.classList.add("fresh");
      kept = fresh;
    } else if (source.get(old) !== html && !isTouched(old)) {
      replace(old, fresh, html);
      kept = fresh;
    } else if (old.dataset.etag !== fresh.dataset.etag) {
      old.dataset.etag = fresh.dataset.etag;
      for (const etag of old.querySelectorAll("input[name=etag]")) etag.value = fresh.dataset.etag;
    }
    const next = place ? place.nextElementSibling : before.firstElementChild;
    if (kept !== next) before.insertBefore(kept, next);
    source.set(kept, html);
    place = kept;
  }
}

function swap(page) {
  document.title = page.title;
  for (const after of page.querySelectorAll("[data-swap]")) {
    const before = document.querySelector(`[data-swap="${after.dataset.swap}"]`);
    if (!before) return reload();
    if (after.dataset.swap === "output" && before.dataset.key === after.dataset.key && before.querySelector("[data-follow]")) continue;
    const list = before.querySelector("[data-list]");
    const html = after.outerHTML;
    if (source.get(before) === html) continue;
    if (list && list.children.length && after.querySelector("[data-list]").children.length) {
      const head = [".head", ":scope > p"].map((name) => [before.querySelector(name), after.querySelector(name)]);
      swapList(list, after.querySelector("[data-list]"));
      for (const [old, fresh] of head) if (old && fresh) old.replaceWith(fresh);
      source.set(before, html);
    } else if (!isTouched(before)) {
      replace(before, document.importNode(after, true), html);
    } else if (before.dataset.swap === "question" || list) {
      const article = before.querySelector("article, section");
      const fresh = after.querySelector("article, section");
      if (article && article.id !== fresh?.id) closeQuestion(article, "This question no longer waits. What you wrote was not sent.");
      else if (article) {
        const etag = fresh.querySelector("input[name=etag]")?.value ?? "";
        for (const field of article.querySelectorAll("input[name=etag]")) field.value = etag;
      }
    }
  }
  if (document.querySelectorAll("[data-swap]").length !== page.querySelectorAll("[data-swap]").length) return reload();
  showTimes(document);
}

// -- the stream ------------------------------------------------------------------------------

async function refresh() {
  const response = await fetch(here, { headers: { accept: "text/html" }, cache: "no-store" });
  if (response.redirected || response.status === 401) return reload();
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  swap(page);
  version = page.body.dataset.version;
  const before = document.body.dataset.live;
  document.body.dataset.live = page.body.dataset.live ?? "";
  return before !== document.body.dataset.live;
}

function refreshOnce() {
  loading ??= refresh()
    .catch(showAway)
    .finally(() => setTimeout(() => { loading = null; }, 300));
  return loading;
}

function showAway() {
  isAway = true;
  away.textContent = "The service is away. This page comes back by itself.";
  away.hidden = false;
}

function showBack() {
  if (!isAway) return;
  isAway = false;
  away.hidden = true;
}

function address() {
  const output = document.querySelector("[data-follow]");
  const follow = output ? `?${output.dataset.follow}` : "";
  return document.body.dataset.live + follow;
}

function addOutput({ data }) {
  const output = document.getElementById("output");
  if (!output?.dataset.follow) return;
  const { html, end } = JSON.parse(data);
  const isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  output.insertAdjacentHTML("beforeend", html); // escaped by the service, and no script may run
  document.querySelector("[data-no-output]")?.remove();
  while (output.textContent.length > MAX_OUTPUT_CHARS && output.firstChild !== output.lastChild) output.firstChild.remove();
  if (isAtEnd) output.scrollTop = output.scrollHeight;
  const follow = new URLSearchParams(output.dataset.follow);
  follow.set("from", end);
  output.dataset.follow = follow.toString();
}

function alive() {
  clearTimeout(watchdog);
  watchdog = setTimeout(() => { showAway(); connect(); }, BEAT_MS);
}

function disconnect() {
  clearTimeout(watchdog);
  clearTimeout(retry);
  stream?.close();
  stream = null;
}

function connect() {
  disconnect();
  if (!document.body.dataset.live || document.hidden) return;
  const mine = new EventSource(address());
  stream = mine;
  alive();
  mine.addEventListener("version", async ({ data }) => {
    alive();
    if (data === "away") return showAway();
    if (data !== version || isAway) {
      const key = document.querySelector("[data-swap=output]")?.dataset.key;
      const moved = await refreshOnce();
      const isOther = document.querySelector("[data-swap=output]")?.dataset.key !== key;
      if (stream === mine && (moved || isOther)) connect();
    }
    showBack();
  });
  mine.addEventListener("output", (event) => { alive(); addOutput(event); });
  mine.addEventListener("end", () => { disconnect(); reload(); });
  mine.addEventListener("error", () => {
    if (stream !== mine) return;
    disconnect();
    showAway();
    retry = setTimeout(connect, RETRY_MS);
  });
}

document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
addEventListener("pagehide", disconnect);
addEventListener("pageshow", ({ persisted }) => { if (persisted) connect(); });

// -- forms -----------------------------------------------------------------------------------

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method !== "post") return;
  if (isAway || sent.has(form)) return event.preventDefault();
  sent.add(form);
  setTimeout(() => sent.delete(form), 3000);
});

remember(document);
showTimes(document);
showTimeFields();
setInterval(() => showTimes(document), 15_000);
const output = document.querySelector("[data-follow]");
if (output) output.scrollTop = output.scrollHeight;
connect();
