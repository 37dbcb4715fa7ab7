// Small helpers to build the page. Text becomes text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element: h("button", {type: "button", onclick: f}, "Send"). */
export function h(name, properties = {}, ...children) {
    return fill(document.createElement(name), properties, children);
}

/** Make an SVG element; all of its properties are attributes. */
export function svg(name, properties = {}, ...children) {
    return fill(document.createElementNS(SVG, name), properties, children);
}

function fill(element, properties, children) {
    for (const [name, value] of Object.entries(properties)) {
        if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
        else if (name.startsWith("aria-")) element.setAttribute(name, value);
        else if (value === true) element.setAttribute(name, "");
        else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child != null));
    return element;
}

export const $ = (id) => document.getElementById(id);

/** 3145728 -> "3.1 MB" */
export function bytes(count) {
    const [size, unit] = count < 1e6 ? [1e3, "kB"] : count < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
    return `${(count / size).toFixed(count < 1e6 ? 0 : 1)} ${unit}`;
}

/** Fit a text area to its text where the browser cannot do so by itself. */
export function fit(area) {
    if (CSS.supports("field-sizing", "content")) return;
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
}
