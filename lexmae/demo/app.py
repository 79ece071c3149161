"""The web page: Flask around a service, with nothing from outside, no inline script and no inline style."""

from __future__ import annotations

import ipaddress
import signal
import socket
from dataclasses import asdict
from typing import Any

from lexmae import cli
from lexmae.errors import InputError

MOST_HITS, MOST_CHARACTERS = 100, 2000
_SHOWN = {"matches": 6, "added": 10}  # terms of a result; the document's own page has them all
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def require_flask() -> None:
    """InputError where the web server's package is missing."""
    try:
        import flask  # noqa: F401
    except ImportError:
        raise InputError('the demo needs Flask: pip install -e ".[demo]"') from None


def create_app(service: Any, host: str = "127.0.0.1", hits: int = 10) -> Any:
    """The Flask application.

    Args:
        service: gives `search(text, hits)`, `document(id, query)`, `name` and a length.
        host: where it listens; on a loopback address, requests for other host names are refused, so that no page of
            the internet can read it through a name that it points here (DNS rebinding).
        hits: results where a request does not say.
    """
    import flask

    app = flask.Flask(__name__)
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    about = {"name": service.name, "documents": len(service), "shown": _SHOWN}

    def page(template: str, code: int = 200, **values: Any) -> Any:
        return flask.render_template(template, **{"about": about, "query": "", **values}), code

    def asked() -> tuple[str, int]:
        text, count = flask.request.args.get("q", "").strip(), flask.request.args.get("hits", str(hits))
        if len(text) > MOST_CHARACTERS:
            raise InputError(f"a query has at most {MOST_CHARACTERS} characters, not {len(text)}")
        if not count.isascii() or not count.isdigit() or len(count) > 9 or not 1 <= int(count) <= MOST_HITS:
            raise InputError(f"hits must be a number from 1 to {MOST_HITS}")
        return text, int(count)

    @app.before_request
    def refuse_other_hosts() -> None:
        name = flask.request.host.rsplit(":", 1)[0] if not flask.request.host.endswith("]") else flask.request.host
        if is_loopback(host) and not is_loopback(name.strip("[]")):
            flask.abort(400, "unknown host name")

    @app.after_request
    def add_headers(response: Any) -> Any:
        response.headers.update(_HEADERS)
        return response

    @app.get("/")
    def home() -> Any:
        text, count = asked()
        return page("search.html", query=text, answer=service.search(text, count) if text else None)

    @app.get("/document")
    def document() -> Any:
        text, _ = asked()
        found = service.document(flask.request.args.get("id", ""), text)
        if found is None:
            return page("error.html", 404, query=text, reason="There is no document of that id.")
        return page("document.html", query=text, document=found)

    @app.get("/api/search")
    def search() -> Any:
        text, count = asked()
        if not text:
            raise InputError("the parameter q is missing or empty")
        return flask.jsonify(asdict(service.search(text, count)))

    _handle_errors(app, page)
    return app


def _handle_errors(app: Any, page: Any) -> None:
    """Errors as a page, or as JSON under `/api/`."""
    import flask
    from werkzeug.exceptions import HTTPException

    def answer(code: int, reason: str) -> Any:
        if flask.request.path.startswith("/api/"):
            return flask.jsonify(error=reason), code
        return page("error.html", code, reason=reason)

    app.register_error_handler(InputError, lambda error: answer(400, str(error)))
    app.register_error_handler(HTTPException, lambda error: answer(error.code, error.description))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. InputError where that is not possible."""
    if not 0 <= port <= 65535:
        raise InputError(f"port {port}: must be between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(64)
    except OSError as error:
        raise InputError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
    return opened


def serve(app: Any, opened: socket.socket, host: str) -> None:
    """Answer requests until Ctrl-C or a request to terminate."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        """Leaves the terminal to messages that matter."""

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            pass

    port = opened.getsockname()[1]
    server = make_server(host, port, app, threaded=True, request_handler=Quiet, fd=opened.fileno())
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shown = f"[{host}]" if ":" in host else host
    cli.say(f"http://{shown}:{port}/ (Ctrl-C stops)")
    if not is_loopback(host):
        cli.say("warning: whoever reaches this machine can use the page")
    try:
        server.serve_forever()  # returns at Ctrl-C
    except KeyboardInterrupt:
        pass  # which came before or behind its own handling
    finally:
        server.server_close()
        opened.close()
        cli.say("stopped")
