// What is kept of a trace, and where its tokens stand in the text of the answer.

const LOOK_AHEAD = 16; // characters

/**
 * What is kept of a trace: the answer's tokens, from `n_prompt` on. `active` is packed, four units
 * to a digit.
 */
export function pack(trace) {
    const from = trace.n_prompt;
    return {
        units: trace.units.map(({ layer, kind, head }) => [layer, kind, head ?? null]),
        texts: trace.tokens.slice(from).map(({ text }) => text),
        active: trace.active.slice(from).map((marks) => marks.replace(/.{1,4}/g, digit)),
    };
}

const digit = (marks) => parseInt(marks.padEnd(4, "0"), 2).toString(16);

/** Whether unit `unit` was active for a packed token. */
export function isActive(packed, unit) {
    return Boolean((parseInt(packed[unit >> 2], 16) >> (3 - (unit & 3))) & 1);
}

/**
 * The token of each character of `text`, -1 where there is none, and the share of characters found.
 *
 * The server may have taken special tokens and white space away, and a character may be several
 * tokens. So a token is looked for a little further on. What lies between two tokens belongs to the
 * one in between that was not found.
 */
export function align(texts, text) {
    const tokenAt = new Int32Array(text.length).fill(-1);
    let place = 0;
    let covered = 0;
    let pending = -1; // a token without characters of its own so far
    for (const [token, piece] of texts.entries()) {
        const reach = piece.length + (piece.trim() ? LOOK_AHEAD : 0);
        const gap = piece ? text.slice(place, place + reach).indexOf(piece) : -1;
        if (gap < 0) {
            pending = token;
            continue;
        }
        if (gap && pending >= 0) tokenAt.fill(pending, place, place + gap);
        tokenAt.fill(token, place + gap, place + gap + piece.length);
        covered += piece.length;
        place += gap + piece.length;
        pending = -1;
    }
    return { tokenAt, share: text.length ? covered / text.length : 1 };
}
