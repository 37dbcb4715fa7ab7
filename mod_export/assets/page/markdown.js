// Markdown of answers as elements. The text of a model goes to text nodes only. Links and images
// are written out with their addresses: nothing is loaded, and nothing is followed by mistake.
//
// Every piece of text knows where in the source it is. So where `tokenAt` has the token of each
// character of the source, the text of each token is an element <span class="t" data-t="token">,
// without the white space before it.

import { h } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

const DEEPEST = 20; // quotes and lists inside each other; what is deeper is shown as it is written

const drawn = new WeakMap(); // root -> the blocks that it shows

/** Show `source` in `root`. Blocks that stayed the same keep their elements and selections. */
export function draw(root, source, tokenAt = null) {
    const before = drawn.get(root) ?? [];
    const after = blocks(linesOf(source)).map((block) => {
        const key = `${block.at}:${Boolean(tokenAt)}:${source.slice(block.at, block.end)}`;
        return { key, block };
    });
    let same = 0;
    while (same < after.length && before[same]?.key === after[same].key) same++;
    while (root.children.length > same) root.lastElementChild.remove();
    for (const { block } of after.slice(same)) root.append(element(block, tokenAt));
    drawn.set(root, after);
}

/** The lines of a text: what each says, and where in the source it begins. */
function linesOf(source) {
    let at = 0;
    return source.split("\n").map((text) => {
        const line = { text, at };
        at += text.length + 1;
        return line;
    });
}

const cut = ({ text, at }, count) => ({ text: text.slice(count), at: at + count });
const blank = ({ text }) => !text.trim();
const indent = ({ text }) => text.length - text.trimStart().length;

/** Split lines into blocks: {kind, lines, at, end, next, ...}. `depth` blocks are around them. */
function blocks(lines, depth = 0) {
    const kinds = depth < DEEPEST ? [fence, single, quote, list, table, paragraph] : [paragraph];
    const result = [];
    let i = 0;
    while (i < lines.length) {
        if (blank(lines[i])) {
            i++;
            continue;
        }
        let block = null;
        for (const kind of kinds) block ??= kind(lines, i);
        const last = lines[block.next - 1];
        result.push({ ...block, at: lines[i].at, end: last.at + last.text.length });
        i = block.next;
    }
    return result;
}

/** Code between fences. A fence that nothing has closed yet goes on to the end. */
function fence(lines, start) {
    const found = FENCE.exec(lines[start].text);
    if (!found) return null;
    const close = new RegExp(`^ {0,3}${found[1][0]}{${found[1].length},}\\s*$`);
    let end = start + 1;
    while (end < lines.length && !close.test(lines[end].text)) end++;
    const depth = indent(lines[start]);
    const body = lines
        .slice(start + 1, end)
        .map((line) => cut(line, Math.min(indent(line), depth)));
    const next = Math.min(end + 1, lines.length);
    return { kind: "code", language: found[2].trim(), lines: body, next };
}

/** Headings and rules: one line each. */
function single(lines, start) {
    const line = lines[start];
    if (RULE.test(line.text)) return { kind: "rule", lines: [], next: start + 1 };
    const found = HEADING.exec(line.text);
    if (!found) return null;
    const text = { text: found[2], at: line.at + line.text.indexOf(found[2], found[1].length) };
    return { kind: "heading", level: found[1].length, lines: [text], next: start + 1 };
}

function quote(lines, start) {
    let end = start;
    while (end < lines.length && QUOTE.test(lines[end].text)) end++;
    if (end === start) return null;
    const body = lines.slice(start, end).map((line) => cut(line, QUOTE.exec(line.text)[0].length));
    return { kind: "quote", lines: body, next: end };
}

/** A list: its items are lines of their own, from which blocks are made in turn. */
function list(lines, start) {
    const first = ITEM.exec(lines[start].text);
    if (!first) return null;
    const ordered = /\d/.test(first[2]);
    const items = [];
    let i = start;
    for (;;) {
        const next = lines.findIndex((line, k) => k >= i && !blank(line));
        const found = next < 0 ? null : ITEM.exec(lines[next].text);
        if (!found || found[1].length > first[1].length + 3 || /\d/.test(found[2]) !== ordered)
            break;
        const body = [cut(lines[next], found[0].length)];
        i = next + 1;
        while (i < lines.length && inItem(lines, i, found[1].length)) {
            body.push(cut(lines[i], Math.min(indent(lines[i]), found[0].length)));
            i++;
        }
        items.push(body);
    }
    return { kind: "list", ordered, first: parseInt(first[2], 10), items, lines: [], next: i };
}

/** Whether line `i` goes on with an item whose marker is `depth` characters in. */
function inItem(lines, i, depth) {
    if (blank(lines[i])) {
        const next = lines.slice(i).find((line) => !blank(line));
        return Boolean(next) && indent(next) > depth;
    }
    if (indent(lines[i]) > depth) return true;
    return !blank(lines[i - 1]) && !starts(lines[i]);
}

const starts = ({ text }) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(text));

function table(lines, start) {
    if (!lines[start].text.includes("|") || !lines[start + 1]?.text.includes("|")) return null;
    if (!TABLE_RULE.test(lines[start + 1].text)) return null;
    let end = start + 2;
    while (end < lines.length && lines[end].text.includes("|")) end++;
    const rows = [lines[start], ...lines.slice(start + 2, end)].map(cells);
    return { kind: "table", rows, lines: [], next: end };
}

function cells(line) {
    const result = [];
    for (const found of line.text.matchAll(/(?:\\\||[^|])+/g)) {
        const text = found[0].trim();
        if (!text && (found.index === 0 || found.index + found[0].length === line.text.length))
            continue;
        result.push({ text, at: line.at + found.index + found[0].indexOf(text) });
    }
    return result;
}

function paragraph(lines, start) {
    let end = start + 1;
    while (end < lines.length && !blank(lines[end]) && !starts(lines[end]) && !table(lines, end))
        end++;
    const body = lines.slice(start, end).map((line) => cut(line, indent(line)));
    return { kind: "paragraph", lines: body, next: end };
}

/** The element of a block. */
function element(block, tokenAt, depth = 0) {
    const inside = (lines) =>
        blocks(lines, depth + 1).map((inner) => element(inner, tokenAt, depth + 1));
    const text = (parent, lines) => inline(parent, joined(lines), tokenAt);
    switch (block.kind) {
        case "code":
            return code(block, tokenAt);
        case "rule":
            return h("hr");
        case "heading":
            return text(h(`h${Math.min(block.level + 2, 6)}`), block.lines);
        case "quote":
            return h("blockquote", {}, ...inside(block.lines));
        case "list": {
            const items = block.items.map((lines) => h("li", {}, ...tight(inside(lines))));
            return h(
                block.ordered ? "ol" : "ul",
                block.ordered ? { start: block.first } : {},
                ...items,
            );
        }
        case "table": {
            const row = (name) => (line) =>
                h("tr", {}, ...line.map((cell) => text(h(name), [cell])));
            const [head, ...body] = block.rows;
            const parts = [h("thead", {}, row("th")(head)), h("tbody", {}, ...body.map(row("td")))];
            return h("div", { class: "table", tabindex: 0 }, h("table", {}, ...parts));
        }
        default:
            return text(h("p"), block.lines);
    }
}

/** The first paragraph of an item stands in the item itself. */
function tight(elements) {
    const [first, ...others] = elements;
    return first?.tagName === "P" ? [...first.childNodes, ...others] : elements;
}

function code(block, tokenAt) {
    const body = h("code");
    emit(body, joined(block.lines), 0, Infinity, tokenAt);
    const copy = () => navigator.clipboard.writeText(body.textContent);
    const button = navigator.clipboard && h("button", { type: "button", onclick: copy }, "Copy");
    const head = h("div", { class: "code-head" }, h("span", {}, block.language), button || null);
    return h("div", { class: "code" }, head, h("pre", { tabindex: 0 }, body));
}

/** Lines as one text: {text, at}, where at[i] is the place of character i in the source. */
function joined(lines) {
    const at = [];
    for (const [i, line] of lines.entries()) {
        if (i) at.push(lines[i - 1].at + lines[i - 1].text.length);
        for (let k = 0; k < line.text.length; k++) at.push(line.at + k);
    }
    return { text: lines.map((line) => line.text).join("\n"), at };
}

// Code, escaped characters, strong, emphasis, struck out, links and images.
const INLINE = new RegExp(
    [
        /(?<code>(?<ticks>`+)(?!`).+?(?<!`)\k<ticks>(?!`))/,
        /(?<escape>\\[!-/:-@[-`{-~])/,
        /(?<strong>\*\*(?=\S).+?(?<=\S)\*\*(?!\*)|(?<!\w)__(?=\S).+?(?<=\S)__(?!\w))/,
        /(?<em>\*(?=[^\s*]).*?(?<=[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_]).*?(?<=[^\s_])_(?!\w))/,
        /(?<del>~~(?=\S).+?(?<=\S)~~)/,
        /(?<link>!?\[(?<label>[^\]\n]*)\]\((?<address>[^()\s]*)[^()\n]*\))/,
    ]
        .map(({ source }) => source)
        .join("|"),
    "gs",
);

/** Append `text` from `start` to `end` with its inline marks. Returns the parent. */
function inline(parent, text, tokenAt, start = 0, end = text.text.length) {
    let done = start;
    for (const found of text.text.slice(start, end).matchAll(INLINE)) {
        const from = start + found.index;
        const to = from + found[0].length;
        const { code, ticks, escape, strong, em, del, link, label, address } = found.groups;
        emit(parent, text, done, from, tokenAt);
        const within = (name, marks) =>
            parent.append(inline(h(name), text, tokenAt, from + marks, to - marks));
        if (code)
            parent.append(emit(h("code"), text, from + ticks.length, to - ticks.length, tokenAt));
        else if (escape) emit(parent, text, from + 1, to, tokenAt);
        else if (strong) within("strong", 2);
        else if (em) within("em", 1);
        else if (del) within("del", 2);
        else if (link) {
            const labelAt = from + link.indexOf("[") + 1;
            const addressAt = labelAt + label.length + 2;
            inline(parent, text, tokenAt, labelAt, labelAt + label.length);
            parent.append(" (");
            parent.append(
                emit(
                    h("span", { class: "address" }),
                    text,
                    addressAt,
                    addressAt + address.length,
                    tokenAt,
                ),
            );
            parent.append(")");
        }
        done = to;
    }
    emit(parent, text, done, end, tokenAt);
    return parent;
}

/** Append characters as they are, in a span for each token. Returns the parent. */
function emit(parent, { text, at }, start, end, tokenAt) {
    end = Math.min(end, text.length);
    if (!tokenAt) {
        if (start < end) parent.append(text.slice(start, end));
        return parent;
    }
    while (start < end) {
        const token = tokenAt[at[start]];
        let next = start + 1;
        while (next < end && tokenAt[at[next]] === token) next++;
        const piece = text.slice(start, next);
        const space = token < 0 ? piece : /^\s*/.exec(piece)[0];
        const word = piece.slice(space.length);
        if (space) parent.append(space);
        if (word) parent.append(h("span", { class: "t", "data-t": token }, word));
        start = next;
    }
    return parent;
}
