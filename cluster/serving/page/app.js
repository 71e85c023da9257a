// Asks two models of this endpoint the same thing and shows both answers side by side.
// The token is kept in `token` alone: in no storage, cookie or address, and not in the document once it is accepted.

const CHAT = "v1/chat/completions";
const COMPLETIONS = "v1/completions";
const LONG_LIST = 12; // models; from here on the list can be filtered
const STATES = {
  idle: "",
  waiting: "waiting…",
  answering: "answering…",
  complete: "complete",
  stopped: "stopped",
  failed: "failed",
};
const FINISHES = { stop: "stop: it was done", length: "length: token limit" };

const element = (id) => document.getElementById(id);

let token = "";
let models = [];
let running = null; // what stops the answers, while there are any
let hasChatTemplate = true; // until the endpoint says that it has none

/** Why there is no answer, in words for the reader. */
class Refusal extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// The endpoint

async function request(path, body, signal) {
  const options = { headers: { Authorization: `Bearer ${token}` }, cache: "no-store", credentials: "omit", signal };
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.headers["serve-multiplexed-model-id"] = encodeURIComponent(body.model); // the replica that has it
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options).catch((error) => {
    throw broken(error, "The endpoint cannot be reached: it has ended, or the network is down.");
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

/** What a failed fetch or read means; an abort stays one. */
function broken(error, words) {
  return error.name === "AbortError" ? error : new Refusal(words);
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const { message, code } = body?.error ?? {};
  if (response.status === 401) return new Refusal("The endpoint does not accept this token.", 401, code);
  const words = [message ?? "The endpoint gives no reason.", `(HTTP ${response.status}${code ? `, ${code}` : ""})`];
  const wait = Number(response.headers.get("Retry-After"));
  if (wait > 0) words.push(`Try again in ${wait} s.`);
  return new Refusal(words.join(" "), response.status, code);
}

/** The server-sent events of an answer, up to `[DONE]`. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw broken(error, "The connection broke before the answer was complete.");
    });
    if (done) throw new Refusal("The endpoint ended the answer before it was complete.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice("data:".length).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(`${event.error.message} (${event.error.code ?? event.error.type})`);
      yield event;
    }
  }
}

/** Start one answer; a model without a chat template gets the prompt as plain text. */
async function open(question, model, signal) {
  const { system, prompt, ...settings } = question;
  const body = { model, ...settings, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  if (hasChatTemplate) {
    const messages = [{ role: "user", content: prompt }];
    if (system) messages.unshift({ role: "system", content: system });
    try {
      return await request(CHAT, { ...body, messages }, signal);
    } catch (error) {
      if (error.code !== "no_chat_template") throw error;
      hasChatTemplate = false;
      element("plain").hidden = false;
    }
  }
  return request(COMPLETIONS, { ...body, prompt: system ? `${system}\n\n${prompt}` : prompt }, signal);
}

// One side

class Side {
  constructor(name) {
    const section = element("side").content.cloneNode(true).firstElementChild;
    const part = (selector) => section.querySelector(selector);
    this.section = section;
    this.asked = part(".asked");
    this.select = part(".model");
    this.state = part(".state");
    this.version = part(".version");
    this.answer = part(".answer");
    this.error = part(".error");
    section.id = name.toLowerCase();
    section.setAttribute("aria-label", name);
    part("h2").textContent = name;
    this.select.setAttribute("aria-label", `${name} model`);
    this.answer.setAttribute("aria-label", `${name} answer`);
    this.select.addEventListener("change", () => this.showVersion());
    this.asked.addEventListener("change", () => this.turn(this.asked.checked));
    this.clear();
    element("sides").append(section);
  }

  /** Offer the models whose id holds `text`, and the one that is picked. */
  offer(text) {
    const picked = this.select.value;
    const offered = models.filter(({ id }) => id === picked || id.toLowerCase().includes(text));
    this.select.replaceChildren(...offered.map(({ id }) => new Option(id, id)));
    this.pick(picked);
  }

  pick(id) {
    if (models.some((model) => model.id === id)) this.select.value = id;
    this.showVersion();
  }

  showVersion() {
    const model = models.find(({ id }) => id === this.select.value);
    this.version.textContent = model?.parent ? `version ${model.root}, over ${model.parent}` : "the base alone";
  }

  turn(on) {
    this.asked.checked = on;
    this.section.classList.toggle("off", !on);
  }

  clear() {
    this.text = document.createTextNode("");
    this.answer.replaceChildren(this.text);
    this.error.textContent = "";
    for (const value of this.section.querySelectorAll("[data-fact]")) value.textContent = "–";
    this.enter("idle");
  }

  enter(state) {
    this.section.dataset.state = state;
    this.state.textContent = STATES[state];
    this.answer.setAttribute("aria-busy", String(state === "waiting" || state === "answering"));
  }

  tell(name, words) {
    this.section.querySelector(`[data-fact="${name}"]`).textContent = words;
  }

  /** Ask, and show the answer as it comes; never throws. */
  async ask(question, signal) {
    this.clear();
    this.enter("waiting");
    this.times = { asked: performance.now(), first: null, last: null };
    try {
      const response = await open(question, this.select.value, signal);
      for await (const event of eventsOf(response)) this.take(event);
      this.enter("complete");
    } catch (error) {
      if (error.name === "AbortError") {
        this.enter("stopped");
      } else {
        this.enter("failed");
        explain(error, this.error);
      }
    }
  }

  take(event) {
    this.tell("version", event.system_fingerprint);
    const [choice] = event.choices;
    const text = choice?.delta?.content ?? choice?.text;
    if (text) this.write(text);
    if (choice?.finish_reason) this.tell("finish", FINISHES[choice.finish_reason] ?? choice.finish_reason);
    if (event.usage) this.count(event.usage);
  }

  write(text) {
    this.times.last = performance.now();
    if (this.times.first === null) {
      this.times.first = this.times.last;
      this.tell("first", `${Math.round(this.times.first - this.times.asked)} ms`);
      this.enter("answering");
    }
    this.text.appendData(text);
  }

  /** The speed is that of the tokens after the first one. */
  count({ prompt_tokens, completion_tokens }) {
    this.tell("tokens", `${prompt_tokens} in, ${completion_tokens} out`);
    const seconds = (this.times.last - this.times.first) / 1000;
    if (seconds > 0) this.tell("speed", `${((completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
}

const sides = [new Side("Left"), new Side("Right")];

// The page

async function loadModels() {
  const response = await request("v1/models");
  const { data = [] } = await response.json().catch(() => ({}));
  if (!data.length) throw new Refusal("The endpoint lists no model that this token may use.");
  models = data;
  const adapter = models.find((model) => model.parent) ?? models[0];
  const base = models.find((model) => !model.parent) ?? models[0];
  const known = sides.map((side) => models.some(({ id }) => id === side.select.value));
  element("place").textContent = `${location.host}, ${models.length} model${models.length === 1 ? "" : "s"}`;
  element("narrow").hidden = models.length < LONG_LIST;
  element("filter").value = "";
  filter();
  if (!known[0]) sides[0].pick(adapter.id);
  if (!known[1]) sides[1].pick(base.id);
  if (models.length === 1) sides[1].turn(false);
}

function filter() {
  const text = element("filter").value.trim().toLowerCase();
  for (const side of sides) side.offer(text);
  const found = models.filter(({ id }) => id.toLowerCase().includes(text)).length;
  element("matches").textContent = `${found} of ${models.length}`;
}

async function connect() {
  const given = element("token").value.trim();
  if (!/^[!-~]+$/.test(given)) {
    element("trouble").textContent = "A token is one word of printable ASCII characters.";
    return;
  }
  const button = element("connect").querySelector("button");
  button.disabled = true;
  element("trouble").textContent = "";
  token = given;
  try {
    await loadModels();
    element("token").value = "";
    showConnected(true);
    element("prompt").focus();
  } catch (error) {
    disconnect(error.status === 401 ? `${error.message} Check it and try again.` : error.message);
  } finally {
    button.disabled = false;
  }
}

function disconnect(words) {
  token = "";
  showConnected(false);
  element("trouble").textContent = words;
  element("token").focus();
  element("token").select();
}

/** Tell an error where it belongs; a token that was good until now is asked for again. */
function explain(error, place) {
  place.textContent = error.message;
  if (error.status === 401) disconnect("The endpoint does not accept this token any more.");
}

async function reload() {
  element("refused").textContent = "";
  await loadModels().catch((error) => explain(error, element("refused")));
}

function showConnected(connected) {
  element("connect").hidden = connected;
  element("session").hidden = element("compare").hidden = !connected;
}

function readQuestion() {
  const maxTokens = element("max-tokens").valueAsNumber;
  return {
    prompt: element("prompt").value,
    system: element("system").value.trim(),
    temperature: element("temperature").valueAsNumber,
    max_tokens: Number.isNaN(maxTokens) ? undefined : maxTokens,
  };
}

async function send() {
  const asked = sides.filter((side) => side.asked.checked);
  element("refused").textContent = asked.length ? "" : "Both sides are switched off: switch one on.";
  if (running || !asked.length) return;
  running = new AbortController();
  for (const side of sides) if (!asked.includes(side)) side.clear();
  element("stop").disabled = false;
  if (document.activeElement === element("send")) element("stop").focus();
  element("send").disabled = true;
  const question = readQuestion();
  await Promise.all(asked.map((side) => side.ask(question, running.signal)));
  running = null;
  element("send").disabled = false;
  if (document.activeElement === element("stop")) element("prompt").focus();
  element("stop").disabled = true;
}

function on(id, type, handler) {
  element(id).addEventListener(type, (event) => {
    if (type === "submit") event.preventDefault();
    handler();
  });
}

on("connect", "submit", connect);
on("ask", "submit", send);
on("filter", "input", filter);
on("stop", "click", () => running?.abort());
on("forget", "click", () => location.reload());
on("reload", "click", reload);
document.addEventListener("keydown", (event) => {
  const sends = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (sends && !element("compare").hidden) element("ask").requestSubmit();
});
