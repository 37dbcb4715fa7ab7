// The settings: what the reader changed is kept in the browser, the rest are the server's values.

import { $, fit } from "./dom.js";
import { saveSettings, settings } from "./store.js";

const RANDOM_SEEDS = [-1, 4294967295];

/** Show the server's values in the empty fields, and the dial for a Mixture-of-Depths model. */
export function prepare(properties) {
    const defaults = properties.default_generation_settings?.params ?? {};
    const form = $("settings");
    for (const input of form.querySelectorAll("input[name]")) {
        const value =
            input.name === "threshold_shift" ? properties.mod?.shift : defaults[input.name];
        input.placeholder = placeholder(input.name, value);
    }
    $("dial").hidden = !properties.mod;
    const kept = settings();
    for (const field of form.elements)
        if (field.name && field.name in kept) field.value = kept[field.name];
    follow();
    fit(form.elements.system);
}

/** Follow what the reader changes. */
export function listen() {
    const form = $("settings");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => changed(event.target));
    $("defaults").addEventListener("click", () => {
        form.reset();
        follow();
        saveSettings({});
    });
}

function placeholder(name, value) {
    if (value === undefined) return "";
    if (name === "seed" && RANDOM_SEEDS.includes(value)) return "random";
    if (name === "max_tokens" && value < 0) return "no limit";
    return String(Math.round(value * 1e4) / 1e4);
}

function changed(field) {
    const { elements } = $("settings");
    if (field.id === "shift-slider") elements.threshold_shift.value = field.value;
    else follow();
    if (field.name === "system") fit(field);
    saveSettings(
        Object.fromEntries(
            [...elements].filter((e) => e.name && e.value !== "").map((e) => [e.name, e.value]),
        ),
    );
}

/** The slider stands where the number does. */
function follow() {
    const { threshold_shift: number } = $("settings").elements;
    $("shift-slider").value = number.value || number.placeholder || "0";
}

/** The request's fields for what the reader has set. A number out of its range is left out. */
export function fields() {
    const { elements } = $("settings");
    const result = {};
    for (const field of elements) {
        if (field.type !== "number" || field.value === "" || !field.checkValidity()) continue;
        if (field.name === "threshold_shift" && $("dial").hidden) continue;
        result[field.name] = field.valueAsNumber;
    }
    return result;
}

export function systemPrompt() {
    return $("settings").elements.system.value.trim();
}

/** What is wrong with the first field whose value cannot be sent; "" where all are right. */
export function wrongField() {
    const field = [...$("settings").elements].find((one) => one.name && !one.checkValidity());
    if (!field) return "";
    const name = field.ariaLabel ?? field.closest("label").firstChild.textContent.trim();
    return `${name}: ${field.validationMessage}`;
}
