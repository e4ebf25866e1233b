"""Rules of the page's server, with a function in place of the model."""

from concurrent.futures import ThreadPoolExecutor
import pathlib
import re
import socket
import threading
import time

import pytest

from taskexpert_jax import serve
from taskexpert_jax.errors import UserError
from tests.app import serving

server = serving.server

STATIC = pathlib.Path(server.__file__).parent / "static"
IMAGE = "/predictions"


class Model:
    """Answers with the request's own bytes; notes what it was asked for, and how many calls ran at once."""

    def __init__(self):
        self.asked: list[bytes] = []
        self.at_once = self.most_at_once = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, data: bytes) -> bytes:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.asked.append(data)
        assert self.may_answer.wait(30)
        self.at_once -= 1
        if data == b"unreadable":
            raise UserError("not a readable image (is damaged); replace or remove it")
        if data == b"broken":
            raise RuntimeError("RESOURCE_EXHAUSTED: <secret>")
        return b"answer to " + data


@pytest.fixture(scope="module")
def shared():
    model = Model()
    with serving.served(model) as client:
        yield client, model


@pytest.fixture
def fresh():
    """A server whose model does not answer before it may."""
    model = Model()
    model.may_answer.clear()
    with serving.served(model) as client:
        yield client, model
        model.may_answer.set()


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_page_needs_nothing_but_the_server(shared):
    client, _ = shared
    page = client.ask("GET", "/")
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    html = page.body.decode()
    assert not re.search(r"https?:|//|\bon\w+=|style=|<style|<script(?! type=\"module\" src=\"page.js\")", html)
    linked = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert sorted(linked) == ["data:,", "page.css", "page.js"]
    for path in STATIC.iterdir():
        text = client.ask("GET", f"/{path.name}").body.decode()
        assert path.read_text() in text
        assert not re.search(r"https?:|@import|url\(|\beval\(|innerHTML|insertAdjacentHTML|document\.write", text)
    assert "--paper" in client.ask("GET", "/page.css").body.decode()  # the reports' colours, light and dark


@pytest.mark.parametrize("path", ["/", "/run", "/nothing", "/page.js"])
def test_every_answer_has_the_headers_that_forbid_code_of_others(shared, path):
    headers = shared[0].ask("GET", path).headers
    assert headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] in ("no-store", "no-cache")


def test_a_space_of_hugging_face_is_embedded_there(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/rooms")
    with serving.served(Model()) as client:
        policy = client.ask("GET", "/").headers["content-security-policy"]
    assert policy.endswith("frame-ancestors https://huggingface.co")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("localhost:8000", True),  # another port, as of an SSH tunnel
        ("LOCALHOST.", True),
        ("[::1]:7860", True),
        ("rebound.example", False),
        ("localhost.rebound.example:7860", False),
        ("127.0.0.1.rebound.example", False),
        ("localhost:1@rebound.example", False),
        ("", False),
    ],
)
def test_a_server_on_this_machine_answers_to_its_own_names_only(shared, host, allowed):
    for path in ("/", "/run"):
        answer = shared[0].ask("GET", path, Host=host)
        assert answer.status == (200 if allowed else 421)
        assert allowed or answer.error == (
            "this server answers to 127.0.0.1, ::1, localhost only; start it with --host to change that"
        )


def test_a_server_for_others_answers_to_all_names():
    with serving.served(Model(), hosts=None) as client:
        assert client.ask("GET", "/run", Host="rooms.example").status == 200


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200)])
def test_pages_of_other_sites_cannot_send_images(shared, site, status):
    client, model = shared
    body = f"from {site}".encode()
    answer = client.ask("POST", IMAGE, body, Sec_Fetch_Site=site)
    assert answer.status == status
    assert (body in model.asked) == (status == 200)


@pytest.mark.parametrize("said", [True, False])
def test_a_file_above_the_limit_is_refused_and_not_read(shared, said):
    client, model = shared
    before = len(model.asked)
    size = 1_000_001
    body = bytes(size) if said else (bytes(100_001) for _ in range(10))  # chunked: without Content-Length
    answer = client.ask("POST", IMAGE, body)
    assert answer.status == 413
    assert answer.error == (
        "the file is larger than 1 MB, the limit of this server: save it smaller, or start the server with a larger "
        "--max_upload"
    )
    assert len(model.asked) == before
    assert client.ask("POST", IMAGE, bytes(size - 1)).status == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "line"),
    [
        ("GET", "/nothing", None, {}, 404, "Not Found"),
        ("GET", "/../serve.py", None, {}, 404, "Not Found"),
        ("GET", IMAGE, None, {}, 405, "Method Not Allowed"),
        ("POST", IMAGE, b"", {}, 400, "the request has no image: send the bytes of an image file as its body"),
        ("POST", IMAGE, b"x", {"X_Ticket": "<b>"}, 400, "the header X-Ticket must be 32 hexadecimal digits"),
        ("POST", IMAGE, b"unreadable", {}, 400, "not a readable image (is damaged); replace or remove it"),
    ],
)
def test_errors_are_one_line_of_json(shared, method, path, body, headers, status, line):
    answer = shared[0].ask(method, path, body, **headers)
    assert (answer.status, answer.error) == (status, line)
    assert answer.headers["content-type"] == "application/json"


def test_an_error_of_the_server_is_in_its_log_and_not_in_the_answer(shared, capsys):
    client, _ = shared
    answer = client.ask("POST", IMAGE, b"broken")
    assert answer.status == 500
    assert answer.error == "not predicted, because of an error in the server: its terminal shows it"
    assert "RESOURCE_EXHAUSTED: <secret>" in capsys.readouterr().err
    assert client.ask("POST", IMAGE, b"next").body == b"answer to next"


def test_requests_take_turns_and_each_gets_its_own_answer(fresh):
    client, model = fresh
    bodies = [f"image {index}".encode() for index in range(server.PLACES)]
    tickets = [f"{index:032x}" for index in range(server.PLACES)]
    with ThreadPoolExecutor(server.PLACES) as threads:
        answers = []
        for body, ticket in zip(bodies, tickets, strict=True):
            answers.append(threads.submit(client.ask, "POST", IMAGE, body, X_Ticket=ticket))
            until(lambda ticket=ticket: b"null" not in client.ask("GET", f"/line/{ticket}").body)
        ahead = [client.ask("GET", f"/line/{ticket}").body for ticket in tickets]
        assert ahead == [b'{"ahead":%d}' % index for index in range(server.PLACES)]
        full = client.ask("POST", IMAGE, b"one too many")
        assert (full.status, full.headers["retry-after"]) == (503, "5")
        assert full.error == "too many images are waiting: try again in a moment"
        model.may_answer.set()
        assert [answer.result().body for answer in answers] == [b"answer to " + body for body in bodies]
    assert model.asked == bodies and model.most_at_once == 1
    assert client.ask("POST", IMAGE, b"later").status == 200  # all places are free again


def test_the_image_of_somebody_who_has_left_is_not_predicted(fresh):
    client, model = fresh
    with ThreadPoolExecutor(server.PLACES) as threads:
        first = threads.submit(client.ask, "POST", IMAGE, b"first")
        until(lambda: model.asked)
        ticket = "0" * 32
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            head = f"POST {IMAGE} HTTP/1.1\r\nHost: localhost\r\nX-Ticket: {ticket}\r\nContent-Length: 4\r\n\r\n"
            connection.sendall(head.encode() + b"left")
            until(lambda: client.ask("GET", f"/line/{ticket}").body == b'{"ahead":1}')
        until(lambda: client.ask("GET", f"/line/{ticket}").body == b'{"ahead":null}')
        model.may_answer.set()
        assert first.result().body == b"answer to first"
    assert client.ask("POST", IMAGE, b"last").status == 200
    assert model.asked == [b"first", b"last"]


def test_a_taken_port_and_wrong_hosts_are_one_line():
    with serve.listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(UserError) as error:
            serve.listen("127.0.0.1", port)
        assert str(error.value) == (f"--port={port} is in use on 127.0.0.1; give another, or --port=0 for any free one")
        assert serve.address_of(sock) == f"http://127.0.0.1:{port}"
    with pytest.raises(UserError, match=r"^--host=no\.such\.host: no such host; give an address of this machine"):
        serve.listen("no.such.host", 0)
    with pytest.raises(UserError, match=r"^--host=192\.0\.2\.1: not an address of this machine"):
        serve.listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("rooms.example", False)],
)
def test_loopback(host, expected):
    assert server.is_loopback(host) is expected


@pytest.mark.parametrize("flag", ["--port=70000", "--port=x", "--max_upload=0", "--max_upload=nan"])
def test_wrong_flags_are_refused_before_anything_is_loaded(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main(["RUN", flag])
    assert ended.value.code == 2
    name, _, value = flag.partition("=")
    assert f"argument {name}: '{value}': must be a" in capsys.readouterr().err


def test_without_its_packages_the_page_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert serve.main(["RUN", "--port=0"]) == 2
    assert capsys.readouterr().err == 'error: the page needs uvicorn: pip install "taskexpert-jax[app]"\n'
