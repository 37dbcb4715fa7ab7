// The depth map of an answer: tokens across, units down, a mark where the unit was active.

import { h } from "./dom.js";
import { isActive } from "./trace.js";

const MOST_PIXELS = 16000; // of a canvas, in every browser
const HEIGHT = 270; // pixels that the rows of many units share
const GAP = 1; // pixels between two layers, where layers have several units
const WORDS = { kv: ["remembered", "not remembered"], default: ["active", "skipped"] };

/** The map of a packed trace. `onSelect(token)` is told which column is pointed at, -1 for none. */
export class DepthMap {
    constructor(depth, onSelect) {
        this.depth = depth;
        this.onSelect = onSelect;
        this.token = this.unit = -1;
        this.pinned = -1;
        this.rowHeight = Math.min(6, Math.max(1, Math.floor(HEIGHT / depth.units.length)));
        this.placeRows();
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

    /** `tops`: where each row begins, in pixels. The units of a layer touch each other. */
    placeRows() {
        const layers = this.depth.units.map(([layer]) => layer);
        const gap = new Set(layers).size < layers.length ? GAP : 0;
        let top = 0;
        this.tops = layers.map((layer, row) => {
            if (row && layer !== layers[row - 1]) top += gap;
            top += this.rowHeight;
            return top - this.rowHeight;
        });
        this.height = top;
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
            const top = this.tops[row];
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
                this.tops.findLastIndex((top) => top <= offsetY),
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
        const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
        const middle = (token + 0.5) * this.columnWidth - this.scroller.clientWidth / 2;
        this.scroller.scrollTo({ left: middle, behavior: calm ? "auto" : "smooth" });
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

    /** Columns of 4 to 10 pixels; narrower ones where a canvas could not be so wide. */
    resize() {
        const columns = this.depth.active.length;
        const width = this.scroller.clientWidth;
        if (!width || !columns) return;
        const ratio = window.devicePixelRatio;
        const fitting = Math.min(10, Math.max(4, Math.floor(width / columns)));
        this.columnWidth = Math.min(fitting, MOST_PIXELS / (ratio * columns));
        this.width = columns * this.columnWidth;
        this.canvas.style.width = `${this.width}px`;
        this.canvas.style.height = `${this.height}px`;
        this.marks = document.createElement("canvas");
        for (const canvas of [this.canvas, this.marks]) {
            canvas.width = Math.round(this.width * ratio);
            canvas.height = Math.round(this.height * ratio);
            canvas.getContext("2d").scale(ratio, ratio);
        }
        this.paint();
    }

    color(name) {
        return getComputedStyle(this.canvas).getPropertyValue(name).trim();
    }

    /** Draw the marks, in the colours of now. */
    paint() {
        if (!this.marks) return;
        const context = this.marks.getContext("2d");
        const [wide, high] = [this.columnWidth, this.rowHeight];
        const inner = [wide, high].map((size) => (size > 2 ? size - 0.5 : size));
        context.clearRect(0, 0, this.width, this.height);
        for (const [row, [, kind]] of this.depth.units.entries()) {
            const top = this.tops[row];
            context.fillStyle = this.color("--map-paper");
            context.fillRect(0, top, this.width, high);
            context.fillStyle = this.color(`--${kind}`) || this.color("--accent");
            for (const [column, marks] of this.depth.active.entries()) {
                if (isActive(marks, row)) context.fillRect(column * wide, top, ...inner);
            }
        }
        this.draw();
    }

    /** Show the marks, and frames around the column and the row that are pointed at. */
    draw() {
        if (!this.marks) return;
        const context = this.canvas.getContext("2d");
        const [wide, high] = [this.columnWidth, this.rowHeight];
        context.clearRect(0, 0, this.width, this.height);
        context.drawImage(this.marks, 0, 0, this.width, this.height);
        context.strokeStyle = this.color("--mark");
        if (this.token < 0) return;
        context.strokeRect(this.token * wide - 0.5, 0.5, wide + 0.5, this.height - 1);
        if (this.unit < 0) return;
        context.strokeRect(0.5, this.tops[this.unit] - 0.5, this.width - 1, high + 0.5);
    }
}
