// Activation, and K/V used against dense, as they grow with an answer: two small charts.

import { bytes, h, svg } from "./dom.js";

const WIDTH = 150;
const HEIGHT = 44;
const MOST_POINTS = 120;

/** Add a chunk's figures to `points`, which stay few and spread over all tokens. */
export function addPoint(points, tokens, { activation, kv_used_bytes, kv_dense_bytes }) {
    if (!Object.keys(activation).length) return; // Nothing has been read yet.
    if (points.length && points.at(-1).tokens === tokens) points.pop();
    points.push({ tokens, activation, used: kv_used_bytes, dense: kv_dense_bytes });
    if (points.length > MOST_POINTS) points.splice(0, points.length, ...thinned(points));
}

/** About half of the points: the first, the last, and those far enough from the one before. */
function thinned(points) {
    const [first, last] = [points[0], points.at(-1)];
    const least = (last.tokens - first.tokens) / (MOST_POINTS / 2);
    const kept = [first];
    for (const point of points.slice(1, -1)) {
        if (point.tokens - kept.at(-1).tokens >= least) kept.push(point);
    }
    return [...kept, last];
}

export class Growth {
    constructor() {
        this.activation = chart("Activation");
        this.memory = chart("K/V");
        this.element = h("div", { class: "growth" }, this.activation.element, this.memory.element);
    }

    show(points) {
        const last = points.at(-1);
        if (!last) return;
        const kinds = Object.entries(last.activation);
        const shares = kinds.map(
            ([kind, share]) => `${kinds.length > 1 ? `${kind} ` : ""}${share.toFixed(2)}`,
        );
        this.activation.say(shares.join(", "));
        this.activation.lines(
            kinds.map(([kind]) => ({
                name: kind,
                at: points.map((p) => [p.tokens, p.activation[kind] ?? 0]),
            })),
            1,
        );
        this.memory.element.hidden = !last.dense;
        const part = Math.round((100 * last.used) / last.dense);
        this.memory.say(`${bytes(last.used)} of ${bytes(last.dense)}, ${part} %`);
        const dense = { name: "dense", at: points.map((p) => [p.tokens, p.dense]) };
        const used = { name: "used", at: points.map((p) => [p.tokens, p.used]) };
        this.memory.lines([dense, used], last.dense);
    }
}

function chart(name) {
    const value = h("span", { class: "value" });
    const plot = svg("svg", {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        preserveAspectRatio: "none",
        "aria-hidden": true,
    });
    const element = h("figure", {}, h("figcaption", {}, `${name} `, value), plot);
    return {
        element,
        say: (text) => value.replaceChildren(text),
        /** Draw lines of [x, y] points; `top` is the largest y. */
        lines(lines, top) {
            const xs = lines.flatMap(({ at }) => at.map(([x]) => x));
            const [from, to] = [Math.min(...xs), Math.max(...xs)];
            const place = ([x, y]) =>
                `${(to > from ? ((x - from) / (to - from)) * WIDTH : 0).toFixed(1)},` +
                `${(HEIGHT - 1 - (y / (top || 1)) * (HEIGHT - 2)).toFixed(1)}`;
            plot.replaceChildren(
                ...lines.map(({ name: kind, at }) =>
                    svg("polyline", { class: `line ${kind}`, points: at.map(place).join(" ") }),
                ),
            );
        },
    };
}
