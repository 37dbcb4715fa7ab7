// One answer: what is sent, the chunks that come, and the trace at its end. No elements here.

import * as api from "./api.js";
import { addPoint } from "./growth.js";
import { align, pack } from "./trace.js";

const TRACE_FOUND = 0.5; // A trace of which less is in the answer is another request's.

export function newAnswer() {
    return { role: "assistant", content: "", points: [] };
}

/** The messages as the server takes them, with the system prompt. */
export function sent(messages, system) {
    const plain = messages.map(({ role, content }) => ({ role, content }));
    return system ? [{ role: "system", content: system }, ...plain] : plain;
}

/**
 * Ask the server, and add to `message` what comes. `changed` is called after each chunk, `say` with
 * a line about what the server does.
 */
export async function receive(body, message, signal, { changed, say }) {
    for await (const chunk of api.chat(body, signal)) {
        const { delta = {}, finish_reason: reason } = chunk.choices?.[0] ?? {};
        const { content, reasoning_content: thought } = delta;
        if (thought) message.reasoning = (message.reasoning ?? "") + thought;
        if (content) message.content += content;
        if (chunk.timings) measure(chunk.timings, message);
        if (chunk.prompt_progress) say(progress(chunk.prompt_progress));
        else say("Writing");
        if (reason === "length") message.end = lengthReason(message, body);
        changed();
    }
}

function progress({ total, cache, processed }) {
    const known = cache ? `, ${cache} known before` : "";
    return `Reading ${processed} of ${total} tokens${known}`;
}

/** Take the figures of a chunk. */
function measure(timings, message) {
    const { cache_n: known = 0, prompt_n: read = 0, predicted_n: tokens = 0, mod } = timings;
    Object.assign(message, { known, read, tokens, speed: timings.predicted_per_second });
    if (!mod) return;
    message.shift = mod.shift;
    message.slot = mod.id_slot ?? 0;
    addPoint(message.points, known + read + tokens, mod);
}

/** Why an answer ended that the model had not ended. */
function lengthReason({ tokens }, { max_tokens: limit }) {
    return limit >= 0 && tokens >= limit ? "ended at the limit" : "ended as the context is full";
}

/** One line about an answer that has ended. */
export function note({ end, tokens, speed, read, known, shift }) {
    const parts = [
        end,
        tokens ? `${tokens} tokens` : "",
        speed ? `${speed.toFixed(1)} tokens/s` : "",
        read === undefined ? "" : `${read} read${known ? `, ${known} known before` : ""}`,
        shift ? `dial ${shift > 0 ? "+" : ""}${Math.round(shift * 100) / 100}` : "",
    ];
    return parts.filter(Boolean).join(" · ");
}

/** The packed trace of an answer; null where its slot has been used for another one since. */
export async function depthOf({ slot, content, reasoning = "" }) {
    const trace = await api.trace(slot);
    if (!trace) return null;
    const packed = pack(trace);
    return align(packed.texts, reasoning + content).share >= TRACE_FOUND ? packed : null;
}
