"""The files of the web page: complete, and loading nothing from elsewhere.

tests/server/test_page.py uses the page in a browser.
"""

import re
from pathlib import Path

import mod_export

PAGE = Path(mod_export.__file__).parent / "assets" / "page"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
LOADED = {
    ".html": r'(?:href|src)="([^"#]+)"',
    ".js": r'^(?:import|export) [^;]*? from "\./([^"]+)";',
    ".css": r"(?:url\(|@import )([^;)]+)",
    ".svg": r'href="([^"#]+)"',
}


def test_each_file_is_loaded_by_another_and_each_that_is_loaded_is_there():
    loaded = {"index.html"}
    for name, text in TEXTS.items():
        loaded |= set(re.findall(LOADED[Path(name).suffix], text, flags=re.M))
    assert loaded == set(TEXTS)


def test_no_address_of_another_machine():
    """The namespaces of SVG are names. The browser is told to refuse such requests, too."""
    addresses = re.findall(r"(?:\w+:)?//[\w.]+\.\w+[^\s\"']*", "".join(TEXTS.values()))
    assert set(addresses) == {"http://www.w3.org/2000/svg"}
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', TEXTS["index.html"])[1]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules.pop("require-trusted-types-for") == "'script'"
    assert rules.pop("default-src") == "'none'"
    assert set(rules.values()) == {"'self'", "'none'"}


def test_no_markup_is_made_of_text():
    script = "".join(text for name, text in TEXTS.items() if name.endswith(".js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", script)
