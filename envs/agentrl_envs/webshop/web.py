"""Web server that shows people the pages of the shop in a browser on this machine.

    python -m agentrl_envs.webshop.web

Every button sends an action such as "click[buy now]", with the same effect as for an agent.
"""

import argparse
import errno
import re
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random
from secrets import compare_digest, token_urlsafe
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from agentrl.errors import AgentRLError, ConfigError, missing_extra
from agentrl_envs.webshop.goals import SPLITS, Draw, Goal
from agentrl_envs.webshop.oracle import click_names
from agentrl_envs.webshop.pages import as_text, clickable
from agentrl_envs.webshop.reward import MODES, Reward
from agentrl_envs.webshop.session import START, SUB_PAGES, Node, State, act
from agentrl_envs.webshop.shop import Shop

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

FOLDER = Path(__file__).parent
VISITS = 1000  # visits kept in memory; the oldest is dropped first
LONGEST = 16_384  # bytes of a form
TIMEOUT = 20.0  # seconds for receiving a request and sending its response
CONNECTIONS = 256  # concurrent connections
LOCAL_HOSTS = ("127.0.0.1", "localhost")
_NUMBER = re.compile(r"\d{1,15}", re.ASCII)


class RequestError(Exception):
    """A request that cannot be answered with a page of the shop.

    Args:
        status: The HTTP status of the response.
        text: The message for the user.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class Visit:
    """One customer's visit to the shop.

    Attributes:
        goal: The goal of the customer.
        state: The state of the session.
        reward: The reward of the purchase; None before it.
        steps: The number of actions, including those without effect.
        note: The reason why the last action had no effect.
    """

    goal: Goal
    state: State = START
    reward: Reward | None = None
    steps: int = 0
    note: str = ""


@dataclass(slots=True)
class Website:
    """The shop and its visits as HTML pages; not thread-safe.

    Args:
        shop: The shop.
        draw: A function that returns the number of the next goal.
        about: One line about the shop's data and settings, for the first page.
        pictures: Whether to show products' pictures, which the browser loads from their original hosts.
        wanted: The number of the goal that the first page proposes; None for a drawn one.
    """

    shop: Shop
    draw: Callable[[], int]
    about: str = ""
    pictures: bool = False
    wanted: int | None = None
    visits: OrderedDict[str, Visit] = field(default_factory=OrderedDict)
    token: str = field(default_factory=token_urlsafe)
    _templates: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        self._templates = Environment(
            loader=FileSystemLoader(FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def first_page(self) -> bytes:
        """Render the page on which visits start."""
        return self._render(
            "start", about=self.about, goals=len(self.shop.goals), wanted=self.wanted, token=self.token
        )

    def error_page(self, text: str) -> bytes:
        """Render an error page."""
        return self._render("error", text=text)

    def begin(self, form: Mapping[str, str]) -> str:
        """Start a visit; return its name, which cannot be guessed.

        Args:
            form: The fields "token" and "goal", a number, or empty for a drawn one.
        """
        self._check(form)
        number, last = form.get("goal", "").strip(), len(self.shop.goals) - 1
        if number and not (_NUMBER.fullmatch(number) and int(number) <= last):
            raise RequestError(400, f"There is no goal {number[:40]!r}: goals are numbered from 0 to {last}.")
        visit = Visit(self.shop.goals[int(number) if number else self.draw()])
        while len(self.visits) >= VISITS:
            self.visits.popitem(last=False)
        name = token_urlsafe()
        self.visits[name] = visit
        return name

    def page(self, name: str) -> bytes:
        """Render the open page of a visit."""
        visit = self._visit(name)
        nodes = self._nodes(visit)
        return self._render(
            "shop",
            about=self.about,
            visit=visit,
            page=_Layout(visit.state.page, nodes),
            text=as_text(nodes),
            actions=[f"click[{click}]" for click in click_names(clickable(nodes))],
            product=self.shop.catalogue.by_asin.get(visit.state.asin),
            picture=self._picture,
            price=self.shop.goals.prices.get(visit.state.asin),
            token=self.token,
        )

    def act(self, name: str, form: Mapping[str, str]) -> None:
        """Run the action of a form on the open page.

        Args:
            name: The name of the visit.
            form: The fields "token", "step" (the number of actions when the page was rendered), and "action"
                or "query" (the words to search for).
        """
        self._check(form)
        visit = self._visit(name)
        if form.get("step") != str(visit.steps):  # sent twice, or from a page in the browser's history
            visit.note = "The action was sent from an earlier page. This is the page that is open now."
            return
        if visit.reward is not None:
            visit.note = "The visit ended with the purchase."
            return
        action = f"search[{form['query']}]" if "query" in form else form.get("action", "")
        visit.steps += 1
        state = act(visit.state, action, clickable(self._nodes(visit)))
        if state is None:
            visit.note = f"{action[:200]} does nothing here, for an agent as for you."
            return
        visit.state, visit.note = state, ""
        if state.page == "done":
            visit.reward = self.shop.judge(visit.goal, state)
        self.visits.move_to_end(name)

    def _check(self, form: Mapping[str, str]) -> None:
        if not compare_digest(form.get("token", "").encode(), self.token.encode()):
            raise RequestError(403, "The form is not from this shop, or the shop has been restarted since.")

    def _visit(self, name: str) -> Visit:
        visit = self.visits.get(name)
        if visit is None:
            raise RequestError(404, f"There is no such visit. The shop keeps the latest {VISITS}.")
        return visit

    def _nodes(self, visit: Visit) -> tuple[Node, ...]:
        score = 0.0 if visit.reward is None else visit.reward.total
        return self.shop.page(visit.goal, visit.state, score)

    def _picture(self, asin: str) -> str:
        image = self.shop.catalogue.by_asin[asin].image
        return image if self.pictures and image.startswith("https://") else ""

    def _render(self, name: str, **values: Any) -> bytes:
        html: str = self._templates.get_template(f"{name}.html.j2").render(values)
        return html.encode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class _Layout:
    """Nodes of a page grouped by their place in the HTML layout."""

    name: str
    nodes: Sequence[Node]

    @property
    def title(self) -> str:
        """Return the title of the page."""
        names = {"index": "Search", "results": "Results", "item": "Item", "done": "Thank you"}
        return (names | SUB_PAGES)[self.name]

    @property
    def head(self) -> list[Node]:
        """Return the buttons that lead back."""
        return [node for node in self.nodes if node.kind == "button" and node.text in _HEAD]

    @property
    def ways(self) -> list[Node]:
        """Return the other buttons."""
        return [node for node in self.nodes if node.kind == "button" and node.text not in _HEAD]

    @property
    def texts(self) -> list[str]:
        """Return the plain texts below the instruction."""
        return [node.text for node in self.nodes[2:] if node.kind == "plain"]

    @property
    def products(self) -> list[tuple[Node, str, str]]:
        """Return link, title and price of each product."""
        return [
            (node, self.nodes[at + 1].text, self.nodes[at + 2].text)
            for at, node in enumerate(self.nodes)
            if node.kind == "link"
        ]

    @property
    def options(self) -> list[tuple[str, list[Node]]]:
        """Return the names of the options with their values."""
        values = [node for node in self.nodes if node.kind == "option"]
        return [(name, [node for node in values if node.target == name]) for name in self.texts[:-3]]


_HEAD = ("Back to Search", "< Prev", "Next >")


def web_app(site: Website, hosts: Sequence[str] = LOCAL_HOSTS) -> "Starlette":
    """Return the HTTP application of a website.

    GET requests change nothing. Forms carry a token, so other sites cannot submit them; there are no cookies
    and no scripts. Requests with an unknown host name are refused, which prevents DNS rebinding.

    Args:
        site: The website.
        hosts: The host names by which browsers may address this machine.

    Raises:
        MissingDependencyError: The extra `webshop` is not installed.
    """
    require_web()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, HTMLResponse, RedirectResponse
    from starlette.routing import Route

    images = "data: https:" if site.pictures else "data:"
    headers = {
        "Content-Security-Policy": f"default-src 'none'; img-src {images}; style-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def first_page(request: "Request") -> "Response":
        return HTMLResponse(site.first_page())

    async def begin(request: "Request") -> "Response":
        return RedirectResponse(f"/visit/{site.begin(await _form(request))}", 303)

    async def show(request: "Request") -> "Response":
        return HTMLResponse(site.page(request.path_params["name"]))

    async def carry_out(request: "Request") -> "Response":
        name = request.path_params["name"]
        site.act(name, await _form(request))
        return RedirectResponse(f"/visit/{name}", 303)

    async def style(request: "Request") -> "Response":
        return FileResponse(FOLDER / "web.css")

    async def on_error(request: "Request", error: Exception) -> "Response":
        if isinstance(error, HTTPException):
            return HTMLResponse(site.error_page(error.detail), error.status_code, error.headers)
        return HTMLResponse(site.error_page(str(error)), getattr(error, "status", 500))

    async def with_headers(request: "Request", call_next: RequestResponseEndpoint) -> "Response":
        response = await call_next(request)
        response.headers.update(headers)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    return Starlette(
        routes=[
            Route("/", first_page),
            Route("/", begin, methods=["POST"]),
            Route("/visit/{name}", show),
            Route("/visit/{name}", carry_out, methods=["POST"]),
            Route("/web.css", style),
        ],
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=with_headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
        exception_handlers={RequestError: on_error, HTTPException: on_error},
    )


def web_server(app: "Starlette", timeout: float = TIMEOUT) -> "Server":
    """Return a server that closes the connections of clients that send or read too slowly.

    Args:
        app: The application to serve.
        timeout: The seconds from the start of a connection, or from the end of a response on it, to the end
            of the next response.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimeoutProtocol(H11Protocol):
        deadline: "TimerHandle | None" = None

        def connection_made(self, transport: "Transport") -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.begin()

        def on_response_complete(self) -> None:
            self.begin()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
            super().connection_lost(exc)

        def begin(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
            self.deadline = self.loop.call_later(timeout, self.transport.abort)

    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        http=TimeoutProtocol,
        ws="none",
        limit_concurrency=CONNECTIONS,
    )
    return uvicorn.Server(config)


async def _form(request: "Request") -> dict[str, str]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST:
            raise RequestError(413, f"The form is longer than {LONGEST} bytes.")
    try:
        pairs = parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=10)
    except ValueError as error:
        raise RequestError(400, "The request is not a valid form of this shop.") from error
    return dict(pairs)


def require_web() -> None:
    """Raise `MissingDependencyError` if the extra `webshop` is not installed."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise missing_extra(f"WebShop in a browser needs {', '.join(missing)}", "webshop")


def listen(host: str, port: int) -> socket.socket:
    """Bind a port, before the shop is loaded.

    Args:
        host: The address to listen on.
        port: The port; 0 for a free one.

    Raises:
        ConfigError: The port is in use or not available.
    """
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen()
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use: choose another, or --port 0 for a free one"
            ) from error
        raise ConfigError(f"port {port} of {host}: {error.strerror or error}") from error
    return taken


def website(options: argparse.Namespace) -> Website:
    """Build the website for the command-line options."""
    from agentrl_envs.webshop_env import WebShopEnv

    env = WebShopEnv(
        data=options.data,
        products=options.products,
        goals=options.goals,
        split=options.split,
        split_rule=options.split_rule,
        reward=options.reward,
        price_seed=options.price_seed,
        show_attributes=options.attributes,
        cache=options.cache,
    )
    shop, rng = env.shop, Random(options.seed)
    if options.goal is not None and not 0 <= options.goal < len(shop.goals):
        raise ConfigError(f"--goal: {options.goal}, wanted a number from 0 to {len(shop.goals) - 1}")
    draw = Draw(shop.goals, shop.splits[options.split])
    shop.search("lamp")  # opens the index, so that no page has to wait for it
    return Website(shop, lambda: draw(rng.random()), env.data, options.pictures, options.goal)


def parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    made = argparse.ArgumentParser(
        prog="python -m agentrl_envs.webshop.web",
        description="Shop in a browser as agents do in agentrl/WebShop-v0: the same pages, the same search, "
        "the same score. Open the address that is printed; Ctrl+C ends it.",
        epilog="Without --data the products are generated: nothing is downloaded. To use it from another "
        "computer, forward the port: ssh -L 3000:127.0.0.1:3000 MACHINE",
    )
    serving = made.add_argument_group("where")
    serving.add_argument("--port", type=int, default=3000, help="port, 0 for a free one (default: 3000)")
    serving.add_argument(
        "--host",
        default=LOCAL_HOSTS[0],
        help="address to listen on; anyone who can reach an address other than 127.0.0.1 can use the shop. "
        "Browsers may use this address, 127.0.0.1 or localhost, but no other host name",
    )
    shop = made.add_argument_group("the shop")
    shop.add_argument(
        "--data", metavar="FOLDER", help="folder with WebShop's files, such as items_shuffle_1000.json"
    )
    shop.add_argument("--products", type=int, metavar="N", help="number of products")
    shop.add_argument("--goals", default="synthetic", help="synthetic (default) or human")
    shop.add_argument("--split-rule", help="index (default with --data) or product")
    shop.add_argument("--reward", default=MODES[0], help="original (default) or fixed")
    shop.add_argument(
        "--price-seed", type=int, default=0, metavar="N", help="seed of prices and price limits"
    )
    shop.add_argument("--attributes", action="store_true", help="show a page with the attributes of items")
    shop.add_argument(
        "--cache", metavar="FOLDER", help="folder for search indexes (default: the user's cache)"
    )
    shop.add_argument(
        "--pictures", action="store_true", help="show pictures, which the browser loads from their hosts"
    )
    visits = made.add_argument_group("customers")
    visits.add_argument("--goal", type=int, metavar="N", help="goal to propose (default: a drawn one)")
    visits.add_argument("--split", default=SPLITS[0], help="goals to draw from: train (default), dev or test")
    visits.add_argument(
        "--seed", type=int, metavar="N", help="seed for drawing goals (default: different every time)"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl+C; return the exit status, 2 if the options are invalid."""
    options = parser().parse_args(arguments)
    try:
        require_web()
        if not 0 <= options.port <= 65535:
            raise ConfigError(f"--port: {options.port}, wanted a number from 0 to 65535")
        with listen(options.host, options.port) as taken:
            host = f"[{options.host}]" if ":" in options.host else options.host
            app = web_app(website(options), (*LOCAL_HOSTS, host))
            print(f"The shop is open at http://{host}:{taken.getsockname()[1]}/", flush=True)  # noqa: T201
            web_server(app).run(sockets=[taken])
    except KeyboardInterrupt:
        return 0
    except AgentRLError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
