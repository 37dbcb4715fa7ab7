// Chats and settings in the browser's own storage. A chat has a key of its own, so that tabs that
// show different chats do not overwrite each other's.

const CHAT = "mod-export.chat.";
const SETTINGS = "mod-export.settings";
const MOST_CHATS = 20;

export function newChat() {
    const id = `${Date.now()}-${Math.floor(Math.random() * 1e6)}`;
    return { id, changed: Date.now(), messages: [] };
}

/** All chats, the one that changed last first. What cannot be read is left out. */
export function chats() {
    const found = Object.keys(localStorage).filter((key) => key.startsWith(CHAT));
    const read = found.map((key) => parse(localStorage.getItem(key)));
    return read
        .filter((chat) => Array.isArray(chat?.messages))
        .sort((a, b) => b.changed - a.changed);
}

/** Keep a chat. The oldest others go where there are too many, or no room. */
export function save(chat) {
    chat.changed = Date.now();
    const others = chats().filter(({ id }) => id !== chat.id);
    while (others.length >= MOST_CHATS) remove(others.pop().id);
    for (;;) {
        try {
            localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
            return true;
        } catch {
            if (!others.length) return false;
            remove(others.pop().id);
        }
    }
}

export function remove(id) {
    localStorage.removeItem(CHAT + id);
}

export function title(chat) {
    const first = chat.messages.find(({ role }) => role === "user")?.content ?? "";
    return first.trim().replace(/\s+/g, " ").slice(0, 80) || "Empty chat";
}

export function settings() {
    return parse(localStorage.getItem(SETTINGS)) ?? {};
}

export function saveSettings(values) {
    localStorage.setItem(SETTINGS, JSON.stringify(values));
}

function parse(text) {
    try {
        return JSON.parse(text);
    } catch {
        return null;
    }
}
