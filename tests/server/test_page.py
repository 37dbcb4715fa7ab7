"""The web page on the real server, in Chromium: what a reader does, and what the page shows."""

import json
import re
import time

import pytest

from tests.support.browser import SHIFT, Browser, chromium
from tests.support.llama_server import started

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="needs Chromium: apt-get install chromium"
)
KEY = "a secret"
DONE = "document.querySelector('#stop').hidden && !document.querySelector('[aria-busy=true]')"
LONG_QUESTION = "Write a long story about a lighthouse, with all details."
PAIRS = [
    ("ink", "paper"),
    ("quiet", "paper"),
    ("quiet", "raised"),
    ("wrong", "paper"),
    ("on-accent", "accent"),
]
MARKDOWN = [
    ("**b** *i* `c` ~~d~~", "<p><strong>b</strong> <em>i</em> <code>c</code> <del>d</del></p>"),
    ("2 * 3 * 4 and a_b_c", "<p>2 * 3 * 4 and a_b_c</p>"),
    ("## T\ntext\nmore", "<h4>T</h4><p>text\nmore</p>"),
    ("- a\n  1. b\n- c", '<ul><li>a<ol start="1"><li>b</li></ol></li><li>c</li></ul>'),
    ("3. a\n\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("> q\n\n---", "<blockquote><p>q</p></blockquote><hr>"),
    ("<b>x</b> &amp;", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"),
    ("[l](javascript:f)", '<p>l (<span class="address">javascript:f</span>)</p>'),
]
SOURCE = """A *b*

1. c `d`
   - e

```py
if x:
    y
```

| a | b |
| - | - |
| 1 | **2** |

> z"""


class Page:
    """The page as its reader knows it."""

    def __init__(self, browser: Browser, server, key: str | None = None, **settings):
        self.browser, self.server = browser, server
        self.address = "http://{}:{}/".format(*server.address)
        browser.screen(1400, 900)
        browser.open(self.address)
        kept = json.dumps(json.dumps({name: str(value) for name, value in settings.items()}))
        browser.run("localStorage.clear(), sessionStorage.clear()")
        browser.run(f"localStorage.setItem('mod-export.settings', {kept})")
        if key:
            browser.run(f"sessionStorage.setItem('mod-export.key', {json.dumps(key)})")
        self.load()

    def load(self) -> None:
        self.browser.open(self.address)
        self.browser.until("document.title.includes('·') || document.querySelector('dialog').open")

    def ask(self, question: str) -> None:
        """Type a question and wait for the end of its answer."""
        self.begin(question)
        self.browser.until(DONE)

    def begin(self, question: str) -> None:
        self.browser.run("document.querySelector('#question').focus()")
        self.browser.type(question)
        self.browser.press("Enter")
        self.browser.until(f"!({DONE}) || !document.querySelector('#error:empty')")

    def click(self, name: str, within: str = "body") -> None:
        """Click the last button that is called so."""
        buttons = f"[...document.querySelectorAll('{within} button')]"
        self.browser.run(f"{buttons}.findLast(b => b.textContent === {name!r}).click()")

    def texts(self) -> list[str]:
        return self.browser.run(
            "[...document.querySelectorAll('article .text')].map(e => e.textContent)"
        )

    def text(self, selector: str) -> str:
        return self.browser.run(f"document.querySelector('{selector}').textContent")

    def sent(self) -> list[dict]:
        """The bodies of the chats that the page asked for."""
        asked = [r for r in self.browser.requests() if r["url"].endswith("chat/completions")]
        return [json.loads(request["postData"]) for request in asked]


@pytest.fixture(scope="module")
def browser():
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def server(mod):
    with started(mod, "--ctx", "1024", "--name", "small", key=KEY, more=("-np", "2")) as one:
        yield one


@pytest.fixture
def page(browser, server):
    """The page with its key and short, certain answers. It must not complain."""
    yield Page(browser, server, KEY, temperature=0, max_tokens=40)
    assert browser.complaints() == []


def test_an_answer_comes_piece_by_piece_with_its_figures(page, browser, server):
    page.begin("What is a lighthouse?")
    first = browser.until("document.querySelector('.answer .text')?.textContent")
    browser.until(DONE)
    question, answer = page.texts()
    assert question == "What is a lighthouse?"
    assert answer.startswith(first)
    assert len(answer) > len(first)
    assert "40 tokens" in page.text(".answer .actions")
    assert 0 < float(page.text("figure .value").split()[0]) < 1
    assert re.fullmatch(
        r"[\d.]+ kB of [\d.]+ [kM]B, \d+ %|[\d.]+ MB of [\d.]+ MB, \d+ %",
        page.text("figure:last-child .value"),
    )
    body = page.sent()[0]
    assert body["messages"] == [{"role": "user", "content": question}]
    assert body["temperature"] == 0 and "threshold_shift" not in body


def test_the_depth_map_is_the_trace(page, browser, server):
    """As many columns as tokens that were read, and the marks of the server's trace."""
    page.ask("What is a lighthouse?")
    traces = [
        server.get(f"/mod/trace?id_slot={slot['id']}")
        for slot in server.get("/slots")
        if slot["mod"]["activation"]
    ]
    answer = page.texts()[1]
    trace = next(
        t for t in traces if "".join(x["text"] for x in t["tokens"][t["n_prompt"] :]) in answer
    )
    columns = trace["active"][trace["n_prompt"] :]
    canvas = "document.querySelector('canvas')"
    assert browser.run(f"[{canvas}.dataset.columns, {canvas}.dataset.rows].map(Number)") == [
        len(columns),
        len(trace["units"]),
    ]
    assert len(columns) == 39  # the last token was written, and not read
    browser.run(f"{canvas}.focus()")
    for token in range(3):
        browser.press("ArrowRight")
        text = trace["tokens"][trace["n_prompt"] + token]["text"]
        assert (
            page.text(".readout")
            == f"{text} {columns[token].count('1')} of {len(columns[0])} units active"
        )
        assert page.text(".t.on") == text.strip()
    for unit in range(3):
        browser.press("ArrowDown")
        word = "remembered" if columns[2][unit] == "1" else "not remembered"
        assert page.text(".readout strong") == word
    corner = f"const r = {canvas}.getBoundingClientRect()"
    corner += f"; {canvas}.dispatchEvent(new PointerEvent('pointermove',"
    corner += " { clientX: r.left + 1, clientY: r.bottom - 1 }))"
    browser.run(f"{{ {corner} }}")  # heads of a layer touch, and layers are a little apart
    unit = trace["units"][-1]
    assert f"layer {unit['layer']}, head {unit['head']}, kv" in page.text(".readout")
    browser.run("document.querySelectorAll('.t')[9].click()")
    assert page.text(".readout q").strip() == page.text(".t.on")


def test_an_answer_is_stopped(page, browser, server):
    browser.run("document.querySelector('[name=max_tokens]').value = ''")
    page.begin(LONG_QUESTION)
    browser.until("document.querySelector('.answer .text')?.textContent.length > 20")
    browser.press("Escape")
    browser.until(DONE, seconds=10)
    assert "stopped" in page.text(".answer .actions")
    assert browser.run("document.querySelector('canvas').dataset.columns") > "0"
    end = time.monotonic() + 10
    while any(slot["is_processing"] for slot in server.get("/slots")):
        assert time.monotonic() < end, "the server goes on writing"
    page.click("Regenerate")
    browser.until("document.querySelector('.answer .text')?.textContent.length > 20")
    page.click("Stop")
    browser.until(DONE, seconds=10)
    assert page.sent()[0] == page.sent()[1]


def test_an_edit_cuts_what_follows(page, browser):
    page.ask("Say one.")
    page.ask("Say two.")
    assert len(page.texts()) == 4
    browser.run("document.querySelector('.question .actions button').click()")
    browser.run("document.activeElement.select()")
    browser.type("Say three.")
    browser.press("Enter", modifiers=SHIFT)
    browser.type("Loudly.")
    browser.press("Enter")
    browser.until("document.querySelectorAll('article').length === 2")
    browser.until(DONE)
    assert page.texts()[0] == "Say three.\nLoudly."
    assert page.sent()[-1]["messages"] == [{"role": "user", "content": "Say three.\nLoudly."}]
    page.click("Edit", ".answer")
    browser.run("document.activeElement.select()")
    browser.type("Three!")
    browser.press("Enter")
    assert page.texts()[1] == "Three!"
    page.ask("Again.")
    assert page.sent()[-1]["messages"][1] == {"role": "assistant", "content": "Three!"}


def test_the_dial_and_the_settings(page, browser, server):
    def activation():
        return float(page.text("figure .value"))

    def type_into(name, text):
        browser.run(f"document.querySelector('[name={name}]').select()")
        browser.type(text)

    page.ask("What is a lighthouse?")
    before = activation()
    browser.run("document.querySelector('#shift-slider').focus()")
    browser.press("End")
    assert browser.run("document.querySelector('[name=threshold_shift]').value") == "4"
    type_into("system", "Be short.")
    type_into("seed", "7")
    page.click("Regenerate")
    browser.until("document.querySelector('.answer .actions')?.textContent.includes('dial +4')")
    assert activation() < before
    sent = page.sent()[-1]
    assert (sent["threshold_shift"], sent["seed"]) == (4, 7)
    assert sent["messages"][0] == {"role": "system", "content": "Be short."}

    type_into("top_p", "3")
    page.ask("More?")
    assert page.text("#error").startswith("Top-p: ")
    assert len(page.sent()) == 2

    page.load()  # what was set is kept; what was not shows the server's values
    parameters = server.get("/props")["default_generation_settings"]["params"]
    assert browser.run("document.querySelector('#shift-slider').value") == "4"
    assert float(browser.run("document.querySelector('[name=min_p]').placeholder")) == round(
        parameters["min_p"], 4
    )
    page.click("Back to the server's values")
    assert (
        browser.run("[...document.querySelectorAll('#settings [name]')].map(e => e.value).join('')")
        == ""
    )


def test_chats_are_kept(page, browser):
    page.ask("Say one.")
    answer = page.texts()[1]
    page.click("New chat", "#side")
    browser.until("!document.querySelector('article')")
    page.ask("Say two.")
    page.load()
    assert browser.run(
        "[...document.querySelectorAll('#chats .open')].map(e => e.textContent)"
    ) == ["Say two.", "Say one."]
    page.click("Say one.", "#chats")
    browser.until("document.querySelector('canvas') !== null")
    assert page.texts() == ["Say one.", answer]
    browser.run("document.querySelector('#chats li:last-child .delete').click()")
    browser.until("!document.querySelector('article')")
    assert browser.run("document.querySelectorAll('#chats li').length") == 1


def test_the_key_is_asked_for_and_kept(browser, server):
    page = Page(browser, server)
    for key, says in (("wrong", "did not take"), (KEY, "")):
        assert browser.run("document.querySelector('dialog').open")
        browser.type(key)
        browser.press("Enter")
        browser.until(f"document.querySelector('#key-wrong').textContent.includes({says!r})")
    browser.until("document.title.includes('small')")
    page.load()
    assert not browser.run("document.querySelector('dialog').open")


def test_no_request_leaves_and_text_stays_text(page, browser):
    page.ask("Hello.")
    page.click("Edit", ".answer")
    browser.run("document.activeElement.select()")
    browser.type(
        "<img src=x onerror='hit = 1'> ![i](http://example.org/i.png) [l](http://example.org)"
    )
    browser.press("Enter")
    assert page.texts()[1].startswith("<img src=x onerror='hit = 1'>")
    assert browser.run("document.querySelector('.text :is(img, a)')") is None
    assert browser.run("typeof hit") == "undefined"
    assert {request["url"].startswith(page.address) for request in browser.requests()} == {True}
    refused = "fetch('http://example.org').then(() => 'sent', () => 'refused')"
    assert browser.run(refused) == "refused"
    assert (
        browser.run("try { document.body.innerHTML = '<b>x'; 'set' } catch { 'refused' }")
        == "refused"
    )
    assert all("Security Policy" in line or "TrustedHTML" in line for line in browser.complaints())
    browser.events.clear()


def test_markdown(page, browser):
    def drawn(body):
        inside = f"const root = document.createElement('div'); {body}; return root.innerHTML"
        return browser.run(f"import('/markdown.js').then(({{ draw }}) => {{ {inside} }})")

    for source, expected in MARKDOWN:
        assert drawn(f"draw(root, {json.dumps(source)})") == expected
    source = json.dumps(SOURCE)
    whole = drawn(f"draw(root, {source})")
    assert all(f"<{tag}" in whole for tag in ("em", "ol", "pre", "table", "strong", "blockquote"))
    step = f"for (let n = 0; n <= {len(SOURCE)}; n++) draw(root, {source}.slice(0, n))"
    assert drawn(step) == whole
    deep = json.dumps("> " * 3000 + "x " + "- " * 3000 + "**" * 3000)
    assert "x" in drawn(f"draw(root, {deep})")


def test_tokens_find_their_text(page, browser):
    """Also where a character is several tokens, and where the server has taken some away."""
    texts = [
        "<think>",
        "\n",
        "Hm",
        ".",
        "</think>",
        "\n\n",
        "Na",
        "\ufffd",
        "\ufffd",
        "ve",
        " façade",
        "\n",
    ]
    call = f"align({json.dumps(texts)}, 'Hm.Naïve façade')"
    found = browser.run(f"import('/trace.js').then(({{align}}) => [...{call}.tokenAt])")
    assert found == [2, 2, 3, 6, 6, 8, 9, 9] + [10] * 7


def test_growth_is_shown_from_the_first_token_on(page, browser):
    """Thinned again and again, the points of a long answer were those of its end alone."""
    figures = "{ activation: { kv: 1 }, kv_used_bytes: n, kv_dense_bytes: n }"
    add = f"for (let n = 7; n < 5000; n++) addPoint(points, n, {figures})"
    call = f"const points = []; {add}; return points.map(p => p.tokens)"
    found = browser.run(f"import('/growth.js').then(({{addPoint}}) => {{ {call} }})")
    assert (found[0], found[-1]) == (7, 4999)
    assert 50 < len(found) <= 120
    assert max(after - before for before, after in zip(found, found[1:], strict=False)) < 250


def test_a_phone_and_readers_without_eyes(page, browser):
    page.ask("What is a lighthouse?")
    for size in ((360, 640), (1024, 700), (1920, 1000)):
        browser.screen(*size, phone=size[0] < 500)
        browser.until(f"window.innerWidth === {size[0]}")
        root = "document.documentElement"
        assert browser.run(f"{root}.scrollWidth <= {root}.clientWidth")
        assert browser.run("document.querySelector('canvas').clientWidth > 0")
    browser.screen(360, 640, phone=True)
    assert not browser.run("document.querySelector('#side').checkVisibility()")
    page.click("Menu")
    assert browser.run("document.querySelector('#side').getBoundingClientRect().width") <= 330
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    wanted = {"button", "textbox", "slider", "spinbutton", "image", "dialog", "article"}
    roles = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if not node["ignored"]
    ]
    named = [(role, name) for role, name in roles if role in wanted]
    assert len(named) > 15
    assert [role for role, name in named if not name] == []


def test_colours_can_be_read(page, browser):
    def luminance(name):
        style = "getComputedStyle(document.documentElement)"
        colour = browser.run(f"{style}.getPropertyValue('--{name}')").lstrip("#")
        if len(colour) == 3:
            colour = "".join(2 * digit for digit in colour)
        parts = [value / 255 for value in bytes.fromhex(colour)]
        red, green, blue = (p / 12.92 if p < 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    papers = set()
    for dark in (False, True):
        browser.screen(1400, 900, dark=dark)
        papers.add(luminance("paper") < 0.5)
        for ink, paper in PAIRS:
            low, high = sorted((luminance(ink), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (dark, ink, paper)
    assert papers == {False, True}


def test_a_dense_model_and_a_server_that_goes(browser, dense):
    with started(dense, "--ctx", "512", "--name", "plain") as server:
        page = Page(browser, server, temperature=0, max_tokens=8)
        assert not browser.run("document.querySelector('#dial').checkVisibility()")
        page.ask("What is a lighthouse?")
        assert "8 tokens" in page.text(".answer .actions")
        assert browser.run("document.querySelector('.answer :is(canvas, figure)')") is None
        page.ask("Again: " + "word " * 600)
        assert "and the context holds 512: shorten it" in page.text("#error")
        assert len(page.texts()) == 3
        server.end()
        page.click("Ask again")
        browser.until("document.querySelector('#error').textContent.includes('does not answer')")
        assert len(page.texts()) == 3
