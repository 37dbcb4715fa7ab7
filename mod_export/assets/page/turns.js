// Questions and answers as they stand in the conversation.

import { note } from "./answer.js";
import { DepthMap } from "./depth.js";
import { fit, h } from "./dom.js";
import { Growth } from "./growth.js";
import { draw } from "./markdown.js";
import { align } from "./trace.js";

/** A message, and what the reader may do with it: `acts` has edit(text) and again(). */
export class Turn {
    constructor(message, acts) {
        this.message = message;
        this.acts = acts;
        this.answer = message.role === "assistant";
        this.text = h("div", { class: "text", dir: "auto" });
        this.actions = h("div", { class: "actions" });
        this.aside = h("div", { class: "aside" });
        const name = this.answer ? "Answer" : "Question";
        this.element = h(
            "article",
            { class: this.answer ? "answer" : "question", "aria-label": name },
            h("div", { class: "body" }, this.text, this.actions),
            this.answer ? this.aside : null,
        );
        this.text.addEventListener("click", (event) => this.clicked(event));
        this.show();
    }

    /** Draw the message as it is now. While `busy` the answer is being written. */
    show(busy = false) {
        this.element.setAttribute("aria-busy", busy);
        if (!this.answer) this.text.replaceChildren(h("p", {}, this.message.content));
        else this.showAnswer(busy);
        this.actions.replaceChildren(...(busy ? [] : [...this.buttons(), ...this.notes()]));
    }

    showAnswer(busy) {
        const { content, reasoning = "", depth, points } = this.message;
        const tokenAt = depth && !busy ? align(depth.texts, reasoning + content).tokenAt : null;
        if (!this.parts) {
            this.parts = { thought: h("div"), content: h("div") };
            this.text.replaceChildren(this.parts.content);
        }
        if (reasoning && !this.parts.thought.parentElement) {
            const summary = h("summary", {}, "Thoughts");
            this.parts.content.before(h("details", {}, summary, this.parts.thought));
        }
        draw(this.parts.thought, reasoning, tokenAt);
        draw(this.parts.content, content, tokenAt?.subarray(reasoning.length));
        if (points?.length) {
            if (!this.growth) {
                this.growth = new Growth();
                this.aside.append(this.growth.element);
            }
            this.growth.show(points);
        }
        if (depth && !busy && !this.map) {
            this.map = new DepthMap(depth, (token) => this.mark(token));
            this.aside.append(this.map.element);
        }
    }

    /** Mark the text of a token, -1 for none. */
    mark(token) {
        for (const span of this.text.querySelectorAll(".t.on")) span.classList.remove("on");
        for (const span of this.text.querySelectorAll(`.t[data-t="${token}"]`))
            span.classList.add("on");
    }

    clicked({ target }) {
        const token = target.closest(".t")?.dataset.t;
        if (token !== undefined && this.map && getSelection().isCollapsed)
            this.map.pin(Number(token), -1);
    }

    buttons() {
        const button = (name, act, kind) =>
            h("button", { type: "button", class: kind, onclick: act }, name);
        const copy = () => navigator.clipboard.writeText(this.message.content);
        return [
            button("Edit", () => this.edit()),
            this.answer
                ? button("Regenerate", this.acts.again)
                : button("Ask again", this.acts.again, "again"),
            navigator.clipboard ? button("Copy", copy) : null,
        ].filter(Boolean);
    }

    notes() {
        return this.answer ? [h("span", { class: "quiet" }, note(this.message))] : [];
    }

    /** Change the text in place. What follows the message is cut when the change is kept. */
    edit() {
        const area = h("textarea", {
            "aria-label": this.answer ? "The answer" : "The question",
            rows: 1,
        });
        area.value = this.message.content;
        const keep = () => area.value.trim() && this.acts.edit(area.value.trim());
        const leave = () => {
            this.parts = null;
            this.show();
            this.actions.querySelector("button").focus();
        };
        area.addEventListener("input", () => fit(area));
        area.addEventListener("keydown", (event) => {
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
                event.preventDefault();
                keep();
            } else if (event.key === "Escape") {
                event.stopPropagation();
                leave();
            }
        });
        const does = this.answer ? "Keep, and cut what follows" : "Ask, and cut what follows";
        this.text.replaceChildren(area);
        this.actions.replaceChildren(
            h("button", { type: "button", class: "main", onclick: keep }, does),
            h("button", { type: "button", onclick: leave }, "Cancel"),
        );
        fit(area);
        area.focus();
    }
}
