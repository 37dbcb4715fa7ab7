// The page: one conversation, its answers as they come, and the list of the others.

import { depthOf, newAnswer, receive, sent } from "./answer.js";
import * as api from "./api.js";
import { $, fit, h } from "./dom.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import { Turn } from "./turns.js";

let properties = null; // what the server says of itself, once it has
let chat = store.newChat();
let turns = [];
let writing = null; // {controller, done} of the answer that is being written

// --- the conversation ---------------------------------------------------------------------------

/** Show a chat from its message `from` on; what is before stays. */
function show(from = 0) {
    for (const turn of turns.splice(from)) turn.element.remove();
    for (const message of chat.messages.slice(from)) append(message);
    refresh();
}

function append(message) {
    const at = turns.length;
    const turn = new Turn(message, {
        edit: (text) => edit(at, text),
        again: () => regenerate(at),
    });
    turns.push(turn);
    $("turns").append(turn.element);
    return turn;
}

function refresh() {
    const first = chat.messages.length === 0;
    $("empty").hidden = !first;
    $("title").textContent = first ? "" : store.title(chat);
    $("chats").replaceChildren(...store.chats().map(entry));
}

/** A chat in the list. */
function entry(other) {
    const name = store.title(other);
    const current = other.id === chat.id;
    const show = {
        type: "button",
        class: "open",
        "aria-current": current,
        onclick: () => open(other),
    };
    const label = `Delete the chat ${name}`;
    const remove = {
        type: "button",
        class: "delete",
        "aria-label": label,
        onclick: () => forget(other),
    };
    return h("li", {}, h("button", show, name), h("button", remove, "×"));
}

function ask(text) {
    chat.messages.push({ role: "user", content: text });
    show(chat.messages.length - 1);
    keep();
    return answer();
}

/** Write the answer at place `at` anew, or answer the question there. What follows is cut. */
async function regenerate(at) {
    await stop();
    chat.messages.length = chat.messages[at].role === "user" ? at + 1 : at;
    show(at);
    return answer();
}

/** Change message `at`. What follows is cut; a question is asked. */
async function edit(at, text) {
    await stop();
    const { role } = chat.messages[at];
    chat.messages.length = at;
    chat.messages.push({ role, content: text });
    show(at);
    keep();
    if (role === "user") return answer();
}

async function open(other) {
    await stop();
    chat = other;
    show();
    say("");
    if ($("side").matches(":popover-open")) $("side").hidePopover();
    toEnd();
    focusQuestion();
}

async function forget(other) {
    if (other.id === chat.id) await open(store.newChat());
    store.remove(other.id);
    refresh();
}

function keep(asked = chat) {
    if (!store.save(asked)) say("The browser has no room to keep this chat.", true);
    refresh();
}

// --- an answer ----------------------------------------------------------------------------------

/** Ask the server to answer the conversation, and show the answer as it comes. */
async function answer() {
    if (!(await load())) return;
    const wrong = settings.wrongField();
    if (wrong) return say(wrong, true);
    const asked = chat;
    const message = newAnswer();
    const body = { ...settings.fields(), messages: sent(chat.messages, settings.systemPrompt()) };
    const controller = new AbortController();
    chat.messages.push(message);
    const turn = append(message);
    const job = write(body, message, turn, controller.signal).then((failed) =>
        finish(message, turn, failed, asked),
    );
    writing = { controller, done: job };
    working(true);
    await job;
    writing = null;
    working(false);
}

/** Receive an answer. Returns the error that ended it, if any but the reader did. */
async function write(body, message, turn, signal) {
    try {
        await receive(body, message, signal, { changed: () => paint(turn), say });
    } catch (error) {
        if (error.name !== "AbortError") return error;
        message.end = "stopped";
    }
    return null;
}

let frame = null;

/** Draw the answer at the next frame, however many chunks come before it. */
function paint(turn) {
    frame ??= requestAnimationFrame(() => {
        frame = null;
        staying(() => turn.show(true));
    });
}

/** The end of an answer: its depth map, or the line that says what went wrong. */
async function finish(message, turn, failed, asked) {
    cancelAnimationFrame(frame);
    frame = null;
    say(failed?.message ?? "", Boolean(failed));
    if (failed?.status === 0) properties = null; // What answers next may be another model.
    if (message.slot !== undefined) message.depth = await depthOf(message).catch(() => null);
    delete message.slot;
    if (failed && !message.content) {
        asked.messages.pop();
        turns.pop().element.remove();
    } else {
        staying(() => turn.show());
    }
    keep(asked);
}

/** End the answer that is being written, if any, and wait until it has been kept. */
async function stop() {
    writing?.controller.abort();
    await writing?.done;
}

/** Do what changes the height of the page. Where its end was in view, it stays so. */
function staying(change) {
    const low = window.innerHeight + window.scrollY > document.body.scrollHeight - 80;
    change();
    if (low) toEnd();
}

function toEnd() {
    window.scrollTo(0, document.body.scrollHeight);
}

// --- the page -----------------------------------------------------------------------------------

/** Show a line about what goes on, or about what went wrong. The same line is not said again. */
function say(text, wrong = false) {
    const lines = { error: wrong ? text : "", status: wrong ? "" : text };
    for (const [id, line] of Object.entries(lines)) {
        if ($(id).textContent !== line) $(id).textContent = line;
    }
}

function working(on) {
    $("send").hidden = on;
    $("stop").hidden = !on;
    // A button that was pressed may be gone, and the focus with it.
    if (document.activeElement === document.body) focusQuestion();
    if (on) say("Waiting for the first token");
}

/** Let the reader type. On a phone that would open the keyboard, so there it takes a tap. */
function focusQuestion() {
    if (matchMedia("(hover: hover)").matches) $("question").focus({ preventScroll: true });
}

/** Ask for the API key; null where the reader cancels. */
function askForKey(wrong) {
    const dialog = $("key");
    $("key-wrong").textContent = wrong
        ? "The server did not take this key."
        : "The tab keeps the key until it is closed.";
    $("key-value").value = "";
    dialog.showModal();
    return new Promise((resolve) => {
        const end = (value) => {
            dialog.close();
            resolve(value);
        };
        $("key-form").onsubmit = (event) => {
            event.preventDefault();
            end($("key-value").value);
        };
        $("key-cancel").onclick = () => end(null);
        dialog.oncancel = () => end(null);
    });
}

function listen() {
    const question = $("question");
    $("ask").addEventListener("submit", (event) => {
        event.preventDefault();
        const text = question.value.trim();
        if (!text || writing) return;
        question.value = "";
        fit(question);
        ask(text);
        toEnd();
    });
    question.addEventListener("input", () => fit(question));
    question.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        $("ask").requestSubmit();
    });
    document.addEventListener("keydown", (event) => {
        const free = !$("side").matches(":popover-open") && !$("key").open;
        if (event.key === "Escape" && free) writing?.controller.abort();
    });
    $("stop").addEventListener("click", () => writing?.controller.abort());
    for (const id of ["new", "new-small"])
        $(id).addEventListener("click", () => open(store.newChat()));
    window.addEventListener("storage", refresh); // another tab has kept a chat
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
        for (const { map } of turns) map?.paint();
    });
}

/** What the model is, in the words of its properties. */
function describe() {
    const name = properties.model_alias || properties.model_path?.split("/").pop() || "model";
    const { n_ctx: context } = properties.default_generation_settings ?? {};
    const { mod } = properties;
    const routed = mod ? `${mod.units.length} routed units (${mod.kinds.join(", ")})` : "dense";
    $("model").textContent = `${name} · context of ${context} tokens · ${routed}`;
    $("empty").textContent = mod
        ? "Ask something. Beside the answer stands which parts of the model each token used."
        : "Ask something.";
    document.title = `${name} · mod-export`;
}

/** Ask the server what it is, unless it has said so. Returns whether it has. */
async function load() {
    if (properties) return true;
    try {
        properties = await api.properties(say);
    } catch (error) {
        say(error.message, true);
        return false;
    }
    say("");
    settings.prepare(properties);
    describe();
    return true;
}

async function start() {
    api.onKeyNeeded(askForKey);
    listen();
    settings.listen();
    show();
    await load();
    focusQuestion();
}

start();
