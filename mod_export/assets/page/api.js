// What the page asks of llama-server: properties, answers as streams, and traces.

const KEY = "mod-export.key";
const GONE = "The server does not answer. Is it still running?";

/** What went wrong, in one line that a reader understands. */
export class ServerError extends Error {
    constructor(message, status) {
        super(message);
        this.status = status;
    }
}

let askForKey = async () => null;

/** `ask(wrong)` gets the key from the reader, or null where the reader cancels. */
export function onKeyNeeded(ask) {
    askForKey = ask;
}

async function request(path, options = {}) {
    const key = sessionStorage.getItem(KEY);
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
        response = await fetch(path, { ...options, headers });
    } catch (error) {
        throw error.name === "AbortError" ? error : new ServerError(GONE, 0);
    }
    if (response.ok) return response;
    if (response.status === 401) {
        const given = await askForKey(Boolean(key));
        if (given === null) throw new ServerError("The server asks for a key.", 401);
        sessionStorage.setItem(KEY, given);
        return request(path, options);
    }
    const body = await response.json().catch(() => ({}));
    throw failure(body.error ?? {}, response.status);
}

function failure({ message, type, n_prompt_tokens, n_ctx }, status) {
    if (type === "exceed_context_size_error") {
        return new ServerError(
            `The chat has ${n_prompt_tokens} tokens, and the context holds ${n_ctx}: ` +
                "shorten it or begin a new one.",
            status,
        );
    }
    if (status === 503) return new ServerError("The server is loading the model.", status);
    return new ServerError(`The server says: ${message ?? `error ${status}`}`, status);
}

/** The server's properties. Waits while the model is loading; `waiting` is told so. */
export async function properties(waiting) {
    for (;;) {
        try {
            return await (await request("props")).json();
        } catch (error) {
            if (error.status !== 503) throw error;
            waiting(error.message);
            await new Promise((wake) => setTimeout(wake, 1000));
        }
    }
}

/** The trace of a slot's last request, or null where there is none. */
export async function trace(slot) {
    try {
        return await (await request(`mod/trace?id_slot=${slot}`)).json();
    } catch (error) {
        if (error.status === 0) throw error;
        return null;
    }
}

/** Yields the chunks of an answer to a chat. */
export async function* chat(body, signal) {
    const response = await request("v1/chat/completions", {
        method: "POST",
        body: JSON.stringify({
            ...body,
            stream: true,
            timings_per_token: true,
            return_progress: true,
        }),
        signal,
    });
    for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw failure(chunk.error, chunk.error.code);
        yield chunk;
    }
}

/** Yields the data of server-sent events. */
async function* events(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
        const { value, done } = await reader.read().catch((error) => {
            throw error.name === "AbortError" ? error : new ServerError(GONE, 0);
        });
        if (done) return;
        const lines = (text + value).split("\n");
        text = lines.pop();
        for (const line of lines) {
            const found = /^(data|error): ?(.*)$/.exec(line.trimEnd());
            if (!found) continue;
            yield found[1] === "data" ? found[2] : `{"error": ${found[2]}}`;
        }
    }
}
