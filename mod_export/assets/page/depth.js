// The depth map of an answer: tokens across, units down, a mark where the unit was active.

import { h } from "./dom.js";

const LOOK_AHEAD = 16; // characters
const WORDS = { kv: ["remembered", "not remembered"], default: ["active", "skipped"] };

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

/** The map of a packed trace. `onSelect(token)` is told which column is pointed at, -1 for none. */
export class DepthMap {
    constructor(depth, onSelect) {
        this.depth = depth;
        this.onSelect = onSelect;
        this.token = this.unit = -1;
        this.pinned = -1;
        this.rowHeight = Math.min(6, Math.max(1, Math.floor(180 / depth.units.length)));
        this.canvas = h("canvas", {
            tabindex: 0,
            role: "img",
            "aria-label": this.summary(),
            "data-columns": depth.active.length,
            "data-rows": depth.units.length,
        });
        this.scroller = h("div", { class: "map-scroll" }, this.canvas);
        this.readout = h("p", { class: "readout quiet", "aria-live": "polite" }, this.hint());
        const axis = h("div", { class: "map-axis", "aria-hidden": true }, ...this.labels());
        this.element = h("div", { class: "map" }, this.legend(), axis, this.scroller, this.readout);
        this.listen();
        new ResizeObserver(() => this.resize()).observe(this.scroller);
    }

    summary() {
        const { active, units } = this.depth;
        const share = active.length ? this.share(active.map((_, i) => i)) : 0;
        return (
            `Depth map: ${active.length} tokens across, ${units.length} units down, ` +
            `${Math.round(100 * share)} % active. The arrow keys move through it.`
        );
    }

    hint() {
        if (!this.depth.active.length) return "No token of the answer was read.";
        return "Layers down, tokens across, marked where active. Point at the map or at a word.";
    }

    /** The colours of the kinds, where there are several. */
    legend() {
        const kinds = [...new Set(this.depth.units.map(([, kind]) => kind))];
        if (kinds.length < 2) return null;
        return h(
            "p",
            { class: "legend" },
            ...kinds.map((kind) => h("span", { class: kind }, kind)),
        );
    }

    share(tokens) {
        const count = this.depth.units.length;
        let sum = 0;
        for (const token of tokens) {
            for (let unit = 0; unit < count; unit++)
                sum += isActive(this.depth.active[token], unit);
        }
        return sum / (count * tokens.length);
    }

    /** Numbers of layers, where there is room for them. */
    labels() {
        const { units } = this.depth;
        const rows = [];
        let below = -Infinity;
        for (const [row, [layer]] of units.entries()) {
            const top = row * this.rowHeight;
            if ((row && units[row - 1][0] === layer) || top - below < 22) continue;
            below = top;
            const label = h("span", {}, String(layer));
            label.style.top = `${top}px`;
            rows.push(label);
        }
        return rows;
    }

    listen() {
        const { canvas } = this;
        const at = ({ offsetX, offsetY }) =>
            this.point(
                Math.floor(offsetX / this.columnWidth),
                Math.floor(offsetY / this.rowHeight),
            );
        canvas.addEventListener("pointermove", at);
        canvas.addEventListener("pointerdown", (event) => {
            at(event);
            this.pinned = this.token;
        });
        canvas.addEventListener("pointerleave", () => this.point(this.pinned, this.unit));
        canvas.addEventListener("keydown", (event) => this.move(event));
    }

    move(event) {
        const steps = {
            ArrowLeft: [-1, 0],
            ArrowRight: [1, 0],
            ArrowUp: [0, -1],
            ArrowDown: [0, 1],
        };
        const step = steps[event.key];
        if (!step) return;
        event.preventDefault();
        const last = this.depth.active.length - 1;
        const bottom = this.depth.units.length - 1;
        const token = Math.min(last, Math.max(0, this.token + step[0]));
        const unit = step[1] ? Math.min(bottom, Math.max(0, this.unit + step[1])) : this.unit;
        this.pin(token, unit);
    }

    /** Mark a column and keep the mark; the map scrolls to it. */
    pin(token, unit = this.unit) {
        this.pinned = token;
        this.point(token, unit);
        const middle = (token + 0.5) * this.columnWidth - this.scroller.clientWidth / 2;
        this.scroller.scrollTo({ left: middle, behavior: "smooth" });
    }

    /** Show what is known of a token, and of a unit where the pointer is on one. */
    point(token, unit = -1) {
        const { active, units } = this.depth;
        this.token = token >= 0 && token < active.length ? token : -1;
        this.unit = unit >= 0 && unit < units.length ? unit : -1;
        this.readout.replaceChildren(...(this.token < 0 ? [this.hint()] : this.words()));
        this.draw();
        this.onSelect(this.token);
    }

    words() {
        const { active, units, texts } = this.depth;
        const text = h("q", {}, texts[this.token].replace(/\n/g, "⏎"));
        const count = Math.round(this.share([this.token]) * units.length);
        const total = ` ${count} of ${units.length} units active`;
        if (this.unit < 0) return [text, total];
        const [layer, kind, head] = units[this.unit];
        const word = (WORDS[kind] ?? WORDS.default)[
            isActive(active[this.token], this.unit) ? 0 : 1
        ];
        const where = `layer ${layer}${head === null ? "" : `, head ${head}`}, ${kind}`;
        return [text, ` ${where}: `, h("strong", {}, word), `; ${total.trim()}`];
    }

    resize() {
        const columns = this.depth.active.length;
        const width = this.scroller.clientWidth;
        if (!width || !columns) return;
        this.columnWidth = Math.min(10, Math.max(4, Math.floor(width / columns)));
        const height = this.depth.units.length * this.rowHeight;
        const ratio = window.devicePixelRatio;
        this.canvas.style.width = `${columns * this.columnWidth}px`;
        this.canvas.style.height = `${height}px`;
        this.canvas.width = Math.round(columns * this.columnWidth * ratio);
        this.canvas.height = Math.round(height * ratio);
        this.draw();
    }

    draw() {
        if (!this.columnWidth) return;
        const context = this.canvas.getContext("2d");
        const style = getComputedStyle(this.canvas);
        const color = (name) => style.getPropertyValue(name).trim();
        const { active, units } = this.depth;
        const [width, height] = [this.columnWidth, this.rowHeight];
        const [wide, high] = [width, height].map((size) => (size > 2 ? size - 0.5 : size));
        context.setTransform(window.devicePixelRatio, 0, 0, window.devicePixelRatio, 0, 0);
        context.fillStyle = color("--map-paper");
        context.fillRect(0, 0, active.length * width, units.length * height);
        for (const [row, [, kind]] of units.entries()) {
            context.fillStyle = color(`--${kind}`) || color("--accent");
            for (const [column, marks] of active.entries()) {
                if (isActive(marks, row))
                    context.fillRect(column * width, row * height, wide, high);
            }
        }
        context.strokeStyle = context.fillStyle = color("--mark");
        if (this.token >= 0)
            context.strokeRect(this.token * width - 0.5, 0, width + 0.5, units.length * height);
        if (this.token >= 0 && this.unit >= 0) {
            context.strokeRect(0, this.unit * height - 0.5, active.length * width, height + 0.5);
        }
    }
}
