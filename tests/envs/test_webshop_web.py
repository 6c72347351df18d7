"""The shop in a browser: pages and rules over HTTP, then user actions in a real Chromium."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from webshop_products import entry, shop, wants

from agentrl.errors import ConfigError, MissingDependencyError
from agentrl_envs.webshop import web
from agentrl_envs.webshop.pages import clickable
from agentrl_envs.webshop.web import Website, listen, main, web_app
from agentrl_envs.webshop_env import WebShopEnv

for needed in ("rapidfuzz", "starlette", "uvicorn"):
    pytest.importorskip(needed, reason="the extra webshop is not installed")
pytest.importorskip("httpx2", reason="Starlette's test client needs it")

EVIL = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;"""
BLUE = f"blue {EVIL.lower()}".replace("/", " | ")  # as the catalogue stores it


class Page(HTMLParser):
    """The relevant parts of an HTML page, parsed as a browser would."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.fields: dict[str, str] = {}
        self.clicks: list[str] = []
        self.by_id: dict[str, str] = {}
        self._open: list[str | None] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes.append((tag, values))
        if tag == "input" and values.get("type") == "hidden":
            self.fields[values["name"]] = values["value"]
        if tag == "button" and "name" in values:
            assert values["name"] == "action"
            self.clicks.append(values["value"])
        if tag == "button" and values.get("id") == "search":
            self.clicks.append("click[search]")
        if tag not in ("input", "meta", "link", "img"):
            self._open.append(values.get("id"))

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for name in self._open:
            if name:
                self.by_id[name] = self.by_id.get(name, "") + data

    @property
    def observation(self) -> str:
        return self.by_id["observation"].removeprefix("\n")


def client(site: Website) -> Any:
    from starlette.testclient import TestClient

    return TestClient(web_app(site), base_url="http://127.0.0.1:3000", raise_server_exceptions=True)


def evil_shop() -> Website:
    asin = "B0<'\"&>XYZ"
    product = entry(
        asin,
        name=f"Lamp {EVIL}",
        full_description=f"Text {EVIL}",
        small_description=[f"Bullet {EVIL}"],
        options={f"Color {EVIL}": ["red", f"blue {EVIL}"]},
        images=["javascript:alert(1)"],
    )
    sold = shop([product], {asin: wants("brass", instruction=f"Find me lamps {EVIL}")}, show_attributes=True)
    return Website(sold, lambda: 0, f"about {EVIL}", pictures=True)


def enter(http: Any, goal: str = "") -> tuple[str, Page]:
    token = Page(http.get("/").text).fields["token"]
    answer = http.post("/", data={"token": token, "goal": goal}, follow_redirects=False)
    assert answer.status_code == 303
    return answer.headers["location"], Page(http.get(answer.headers["location"]).text)


def say(http: Any, path: str, page: Page, action: str) -> Page:
    """Send an action as the page's button or search field does."""
    searched = re.fullmatch(r"search\[(.*)\]", action, re.S)
    said = {"query": searched[1]} if searched else {"action": action}
    answer = http.post(path, data=page.fields | said)
    assert answer.status_code == 200
    return Page(answer.text)


@pytest.fixture(scope="module")
def env() -> WebShopEnv:
    return WebShopEnv(products=200, goals="synthetic", show_attributes=True, expert=True, max_steps=40)


def test_a_visit_shows_the_pages_clicks_and_reward_of_the_environment(env: WebShopEnv) -> None:
    rng = Random(5)
    http = client(Website(env.shop, lambda: 0))
    bought: list[float] = []
    pages = 0
    for episode, task in enumerate(env.tasks("train")[:12]):
        observation, info = env.reset(options={"task": task})
        path, page = enter(http, task.partition("/")[2])
        score, done = 0.0, False
        for step in count():
            nodes = env.snapshot().nodes
            assert page.observation == observation
            assert set(page.clicks) == {f"click[{name}]" for name in clickable(nodes)}
            assert len(page.clicks) == sum(node.kind != "plain" for node in nodes)
            assert (
                page.by_id.get("actions", "").split()
                == " ".join(action for action in info["actions"] if action.startswith("click")).split()
            )
            pages += 1
            if done:
                break
            wander = episode % 2 and step < 12
            choices = [action for action in info["actions"] if action != "click[buy now]"]
            action = rng.choice(choices) if wander else info["expert"] or "click[back to search]"
            observation, score, done, truncated, info = env.step(action)
            assert not truncated
            page = say(http, path, page, action)
        assert page.by_id["score"] == f"{score:.4g}"
        bought.append(score)
    assert len(bought) == 12
    assert bought.count(1.0) >= 8
    assert pages > 100


def test_a_poor_purchase_shows_the_parts_of_its_score(env: WebShopEnv) -> None:
    http = client(Website(env.shop, lambda: 0))
    goal = env.shop.goals[3]
    other = next(each for each in env.shop.catalogue.products if each.category != goal.product.category)
    env.reset(options={"task": next(t for s in env.splits for t in env.tasks(s) if t.endswith("/3"))})
    path, page = enter(http, "3")
    clicks: tuple[str, ...] = (f"search[{other.title}]", f"click[{other.asin.lower()}]", "click[buy now]")
    for action in clicks:
        _, score, _, _, info = env.step(action)
        page = say(http, path, page, action)
    parts = info["reward_parts"]
    assert 0 <= score < 1
    assert page.by_id["score"] == f"{score:.4g}"
    wanted = len(goal.attributes)
    assert f"Attributes{round(parts['r_att'] * wanted)} of {wanted}" in page.by_id["parts"].replace("\n", "")
    assert other.asin in page.html
    assert goal.product.asin in page.html


def test_everything_is_escaped() -> None:
    http = client(evil_shop())
    assert Page(http.get("/").text).tags.count("script") == 0
    path, page = enter(http)
    actions = [
        f"search[{EVIL}]",
        "click[b0<'\"&>xyz]",
        f"click[{BLUE}]",
        *("click[description]", "click[< prev]", "click[features]", "click[< prev]", "click[attributes]"),
        *("click[< prev]", f"click[{EVIL}]", f"search[a[b]{EVIL}]", "click[buy now]"),
    ]
    seen = pressed = 0
    for action in actions:
        page = say(http, path, page, action)
        assert not {"script", "img", "iframe", "svg"} & set(page.tags)
        for tag, attributes in page.attributes:
            known = {"name", "value", "class", "id", "type", "href", "rel", "lang", "charset", "content"}
            known |= {"method", "action", "role", "for", "scope", "colspan", "autofocus", "required"}
            known |= {"autocomplete", "placeholder", "inputmode", "pattern"}
            assert set(attributes) <= known | {each for each in attributes if each.startswith("aria-")}, tag
        seen += "<script>" in page.observation
        pressed += any(attributes.get("aria-pressed") == "true" for _, attributes in page.attributes)
    assert seen == len(actions) - 1  # the done page does not show the instruction
    assert pressed == 6
    assert "49" not in page.by_id["instruction"]
    assert "{{ 7 * 7 }}" in page.by_id["instruction"]
    assert page.by_id["score"]


def test_an_action_that_does_nothing_is_said_so_and_counted() -> None:
    http = client(evil_shop())
    path, page = enter(http)
    for step, action in enumerate(("click[buy now]", "dance", "search[]", "click[search]"), 1):
        before = page.observation
        page = say(http, path, page, action)
        assert page.observation == before
        assert "does nothing here" in page.html
        assert page.fields["step"] == str(step)
    assert "does nothing here" not in say(http, path, page, "search[lamp]").html


def test_a_form_that_is_sent_twice_acts_once() -> None:
    many = shop([entry(f"B{number:09}") for number in range(45)])
    http = client(Website(many, lambda: 0))
    path, page = enter(http)
    first = say(http, path, page, "search[lamp]")
    second = say(http, path, first, "click[next >]")
    again = say(http, path, first, "click[next >]")
    assert "Page 2 " in second.observation
    assert again.observation == second.observation
    assert "earlier page" in again.html


def test_after_the_purchase_nothing_changes() -> None:
    http = client(evil_shop())
    path, page = enter(http)
    for action in ("search[lamp]", "click[b0<'\"&>xyz]", "click[buy now]"):
        page = say(http, path, page, action)
    answer = http.post(path, data=page.fields | {"step": "3", "query": "lamp"})
    assert Page(answer.text).observation == page.observation


def test_looking_changes_nothing_and_visits_are_apart() -> None:
    http = client(evil_shop())
    one, first = enter(http)
    two, second = enter(http)
    assert one != two
    assert len(one) == len("/visit/") + 43
    say(http, one, first, "search[lamp]")
    assert http.get(one).text == http.get(one).text
    assert Page(http.get(two).text).observation == second.observation
    for method in ("get", "head"):
        before = Page(http.get(two).text).observation
        getattr(http, method)(
            two, params={"action": "search[x]", "query": "x", "token": second.fields["token"]}
        )
        assert Page(http.get(two).text).observation == before


def test_what_no_form_of_this_shop_sent_is_refused() -> None:
    site = evil_shop()
    http = client(site)
    path, page = enter(http)
    query = {"step": "0", "query": "lamp"}
    for token in ({}, {"token": ""}, {"token": "\u00e9"}, {"token": page.fields["token"][:-1]}):
        assert http.post(path, data=query | token).status_code == 403
        assert http.post("/", data=token).status_code == 403
    assert site.visits[path.removeprefix("/visit/")].steps == 0
    assert len(site.visits) == 1
    assert http.post(path, data=page.fields | {"query": "x" * 20_000}).status_code == 413
    assert http.post(path, content="&".join("a=b" for _ in range(50))).status_code == 400
    assert http.post(path, content=b"\xff\xfe\x00" * 10).status_code == 403
    assert http.put(path).status_code == 405
    for goal in ("-1", "99999", "1" * 50, "x", "\u0663", "<script>"):
        answer = http.post("/", data={"token": page.fields["token"], "goal": goal})
        assert answer.status_code == 400
        assert "script" not in Page(answer.text).tags


def test_an_unknown_visit_or_page_is_not_found() -> None:
    http = client(evil_shop())
    _, page = enter(http)
    assert http.get("/visit/nobody").status_code == 404
    assert http.post("/visit/nobody", data=page.fields).status_code == 404
    assert http.get("/etc/passwd").status_code == 404
    assert "no such visit" in http.get("/visit/<script>").text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:3000", "127.0.0.1.evil.example", "localhost.", ""]
)
def test_a_browser_that_calls_another_name_is_refused(host: str) -> None:
    answer = client(evil_shop()).get("/", headers={"Host": host})
    assert answer.status_code == 400
    assert "token" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:3000", "localhost:8080", "LOCALHOST"])
def test_a_browser_that_calls_this_machine_is_served(host: str) -> None:
    assert client(evil_shop()).get("/", headers={"Host": host}).status_code == 200


def test_every_answer_forbids_scripts_frames_and_other_sites() -> None:
    http = client(Website(evil_shop().shop, lambda: 0))
    path, page = enter(http)
    answers = [
        *(http.get("/"), http.get(path), http.get("/nowhere"), http.get("/", headers={"Host": "evil"})),
        *(http.post(path), http.post(path, data=page.fields | {"query": "a"}, follow_redirects=False)),
        http.get("/web.css"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 400, 403, 303, 200]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy == (
            "default-src 'none'; img-src data:; style-src 'self'; form-action 'self'; base-uri 'none'; "
            "frame-ancestors 'none'"
        )
        assert answer.headers["cache-control"] == "no-store"
        assert "set-cookie" not in answer.headers


def test_pictures_are_shown_only_when_asked_for() -> None:
    sold = shop([entry()])
    shown = []
    for pictures in (False, True):
        http = client(Website(sold, lambda: 0, pictures=pictures))
        path, page = enter(http)
        page = say(http, path, page, "search[lamp]")
        shown.append([values["src"] for tag, values in page.attributes if tag == "img"])
        assert ("https:" in http.get(path).headers["content-security-policy"]) == pictures
    assert shown == [[], ["https://example.org/1.jpg"]]


def test_the_oldest_visits_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "VISITS", 3)
    site = evil_shop()
    http = client(site)
    paths = [enter(http) for _ in range(3)]
    say(http, *paths[0], "search[lamp]")  # the first visit is now the most recently active one
    paths.append(enter(http))
    assert [http.get(path).status_code for path, _ in paths] == [200, 404, 200, 200]
    assert len(site.visits) == 3


def test_texts_that_are_no_unicode_are_shown_all_the_same() -> None:
    sold = shop([entry(name="Lamp \ud800")])
    http = client(Website(sold, lambda: 0))
    path, page = enter(http)
    assert "Lamp ?" in say(http, path, page, "search[lamp]").html


def test_a_port_in_use_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use: choose another"):
            listen("127.0.0.1", port)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: port {port} of 127.0.0.1 is in use: choose another, or --port 0 for a free one\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "70000"), "--port: 70000, wanted a number from 0 to 65535"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--data", "/nowhere"), "'/nowhere', wanted a folder"),
        (("--split", "trian"), "split 'trian' is unknown; did you mean 'train'"),
        (("--products", "60", "--goal", "123456"), "--goal: 123456, wanted a number from 0 to "),
    ],
)
def test_wrong_arguments_are_one_message(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--port", "0", *arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert out == ""


def test_without_the_extra_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(MissingDependencyError, match=r"needs uvicorn: pip install -e '\.\[webshop\]'"):
        web_app(evil_shop())


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Run the command in a separate process and yield its address."""
    command = [sys.executable, "-m", "agentrl_envs.webshop.web", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert "The shop is open at http://127.0.0.1:" in line
            yield line.split()[-1]
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
        finally:
            server.kill()


@contextmanager
def serving(timeout: float) -> Iterator[tuple[str, int]]:
    with listen("127.0.0.1", 0) as taken:
        server = web.web_server(web_app(evil_shop()), timeout)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            yield taken.getsockname()
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\ntoken=",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HTTP/1.1\r\nHost: 127.0",
    ],
    ids=["nothing", "half a head", "half a form", "half a second request"],
)
def test_who_sends_half_a_request_is_not_waited_for(half: bytes) -> None:
    with serving(timeout=0.3) as address, socket.create_connection(address, timeout=20) as visitor:
        visitor.sendall(half)
        said = b""
        while data := visitor.recv(1 << 16):  # it times out if the server keeps waiting
            said += data
    assert said.startswith(b"HTTP/1.1 200 OK" if half.count(b"GET") == 2 else b"")
    assert said.count(b"HTTP/1.1 ") == (half.count(b"GET") == 2)


def test_who_sends_one_byte_at_a_time_is_not_waited_for_either() -> None:
    with serving(timeout=0.3) as address, socket.create_connection(address, timeout=20) as visitor:
        for _ in range(2000):
            try:
                visitor.sendall(b"G")
            except ConnectionError:
                return
            time.sleep(0.01)
    pytest.fail("it waited on")


def test_a_connection_serves_as_many_requests_as_come_in_time() -> None:
    with serving(timeout=20) as address, socket.create_connection(address, timeout=20) as visitor:
        for _ in range(3):
            visitor.sendall(b"GET /web.css HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            said = visitor.recv(1 << 16)
            assert said.startswith(b"HTTP/1.1 200 OK")
            length = int(said.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            body = said.partition(b"\r\n\r\n")[2]
            while len(body) < length:
                body += visitor.recv(1 << 16)


class Tab:
    """A page in a browser, used as a person does: with screen, mouse and keyboard."""

    def __init__(self, connection: Any) -> None:
        self._socket = connection
        self._numbers = count(1)
        self.loads = 0
        self.troubles: list[str] = []
        self.requested: list[str] = []
        self("Page.enable")
        self("Log.enable")
        self("Network.enable")
        while self.ask("document.readyState") != "complete":
            time.sleep(0.05)
        self.painted()

    def __call__(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> Any:
        answer = json.loads(self._socket.recv(timeout=30))
        self.loads += answer.get("method") == "Page.loadEventFired"
        if answer.get("method") == "Log.entryAdded":
            self.troubles.append(answer["params"]["entry"]["text"])
        if answer.get("method") == "Network.requestWillBeSent":
            self.requested.append(answer["params"]["request"]["url"])
        return answer

    @contextmanager
    def turning(self) -> Iterator[None]:
        """Wait for the new page that the actions in this context open."""
        self.loads = 0
        yield
        while not self.loads:
            self._read()
        self.painted()

    def painted(self) -> None:
        """Wait for two frames: Chromium ignores keys pressed before a page is on the screen."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
        self("Runtime.evaluate", expression=frames, awaitPromise=True)

    def open(self, address: str) -> None:
        with self.turning():
            self("Page.navigate", url=address)

    def ask(self, script: str) -> Any:
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, text: str) -> None:
        """Click the only button with a text, and wait for the next page."""
        where = self.ask(
            "(() => { const found = [...document.querySelectorAll('button')].filter("
            f"each => each.innerText.trim() === {json.dumps(text)}); if (found.length !== 1) return null;"
            "found[0].scrollIntoView({block: 'center'}); const box = found[0].getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        assert where is not None, f"no button {text!r} in {self.ask('document.body.innerText')}"
        with self.turning():
            for kind in ("mousePressed", "mouseReleased"):
                self(
                    "Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1
                )

    def type(self, text: str) -> None:
        self("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def tab_to(self, text: str) -> None:
        for _ in range(60):
            self.press("Tab", 9)
            if self.ask("document.activeElement.innerText") == text:
                return
        raise AssertionError(f"the Tab key does not reach {text!r}")


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    pytest.importorskip("websockets", reason="Chromium is spoken to over a websocket")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    command = [
        *(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", "--allow-pre-commit-input", "--window-size=1000,800"),
        *("--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'chromium'}", "about:blank"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    limit = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    try:
        found = tmp_path / "chromium" / "DevToolsActivePort"
        while not (found.exists() and len(found.read_text().split()) == 2):
            assert process.poll() is None, "chromium ended"
            time.sleep(0.05)
        import httpx2
        from websockets.sync.client import connect

        port = found.read_text().split()[0]
        pages = httpx2.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
        address = next(each["webSocketDebuggerUrl"] for each in pages if each["type"] == "page")
        with connect(address, max_size=None) as connection:
            yield Tab(connection)
    finally:
        limit.cancel()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def way_to_buy(env: WebShopEnv, task: str) -> tuple[list[str], float]:
    """Return the oracle's actions and its score."""
    _, info = env.reset(options={"task": task})
    actions, score, done = [], 0.0, False
    while not done:
        actions.append(info["expert"])
        _, score, done, _, info = env.step(actions[-1])
    return actions, score


def with_options(env: WebShopEnv) -> tuple[int, list[str]]:
    """Return a goal that needs an option and is on the first page of results."""
    for task in env.tasks("test"):
        actions, score = way_to_buy(env, task)
        if len(actions) > 3 and score == 1.0 and "click[next >]" not in actions:
            return int(task.partition("/")[2]), actions
    raise AssertionError("there is no such goal")


def test_a_person_buys_with_the_mouse_what_scores_1(tab: Tab) -> None:
    env = WebShopEnv(products=200, expert=True)
    goal, actions = with_options(env)
    with served("--products", "200", "--goal", str(goal)) as address:
        tab.open(address)
        tab.click("Go shopping")
        assert tab.ask("document.querySelector('#instruction').innerText") == env.shop.goals[goal].instruction
        tab.type(actions[0].removeprefix("search[").removesuffix("]"))  # the field has the focus
        tab.click("Search")
        asin = actions[1].removeprefix("click[").removesuffix("]")
        tab.click(env.shop.catalogue.by_asin[asin.upper()].title)
        for action in actions[2:-1]:
            value = action.removeprefix("click[").removesuffix("]")
            tab.click(value)
            chosen = tab.ask(
                "[...document.querySelectorAll('[aria-pressed=true]')].map(e => e.innerText).join('|')"
            )
            assert value in chosen
        tab.click("Features")
        assert tab.ask("document.querySelector('h1').innerText") == "Features"
        tab.click("< Prev")
        tab.click("Buy Now")
        assert tab.ask("document.querySelector('#score').innerText") == "1"
        assert "Kind of product" in tab.ask("document.querySelector('#parts').innerText")
        tab.click("Next customer")
        assert tab.ask("document.querySelectorAll('[type=search]').length") == 1
        assert tab.ask("document.activeElement.name") == "query"
        assert tab.requested
        assert all(url.startswith((address, "data:")) for url in tab.requested)
    assert tab.troubles == []


def test_a_person_buys_with_the_keyboard_alone(tab: Tab) -> None:
    env = WebShopEnv(products=200)
    query = env.shop.goals[3].product.query
    with served("--products", "200", "--goal", "3") as address:
        tab.open(address)
        tab.tab_to("WebShop")
        tab.tab_to("Go shopping")
        with tab.turning():
            tab.press("Enter", 13, "\r")
        tab.type(query)
        with tab.turning():
            tab.press("Enter", 13, "\r")
        env.reset(options={"task": next(t for s in env.splits for t in env.tasks(s) if t.endswith("/3"))})
        observation = env.step(f"search[{query}]")[0]
        assert tab.ask("document.querySelector('#observation').textContent") == observation
        link = next(node for node in env.snapshot().nodes if node.kind == "link")
        tab.tab_to(env.shop.catalogue.by_asin[link.target].title)
        with tab.turning():
            tab.press(" ", 32, " ")
        tab.tab_to("Buy Now")
        with tab.turning():
            tab.press("Enter", 13, "\r")
        env.step(f"click[{link.text.lower()}]")
        score = env.step("click[buy now]")[1]
        assert tab.ask("document.querySelector('#score').innerText") == f"{score:.4g}"
    assert tab.troubles == []


@pytest.mark.parametrize("width", [360, 1000])
def test_no_page_is_wider_than_the_screen_and_no_script_of_a_product_runs(tab: Tab, width: int) -> None:
    import uvicorn

    site = evil_shop()
    with listen("127.0.0.1", 0) as taken:
        server = uvicorn.Server(uvicorn.Config(web_app(site), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            tab(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=740,
                deviceScaleFactor=1,
                mobile=False,
            )
            tab.open(f"http://127.0.0.1:{taken.getsockname()[1]}/")
            tab.click("Go shopping")
            tab.type(EVIL * 5)
            for text in ("Search", f"Lamp {EVIL}", BLUE, "Description", "< Prev", "Buy Now"):
                tab.click(text)
                assert tab.ask("document.documentElement.scrollWidth") <= width
                assert tab.ask("document.querySelectorAll('script, img').length") == 0
            assert tab.ask("document.querySelector('h1').innerText") == "Thank you for shopping with us!"
        finally:
            server.should_exit = True
            thread.join(30)
    assert tab.troubles == []
