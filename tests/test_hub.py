"""Commits of the Hub, against a Hub on loopback: looked up once, the same for every later command."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from smolpost.errors import UserError
from smolpost.hub import Commits

FIRST, SECOND = "1" * 40, "2" * 40


class Hub(BaseHTTPRequestHandler):
    """`/api/models/ID/revision/NAME` and the same for datasets, as huggingface.co answers them."""

    def do_GET(self):
        if "/revision/" in self.path:  # the client asks for more when it first asks
            self.server.asked.append(self.path)
        commit = self.server.commits.get(self.path)
        content = {"id": "org/name", "sha": commit, "private": False, "downloads": 0, "likes": 0, "tags": []}
        self.send_response(self.server.status or (200 if commit else 404))
        if not commit:
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("X-Error-Message", "Invalid rev id")
        data = json.dumps(content if commit else {"error": "Invalid rev id"}).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on which main of a model and a dataset stands at the first commit."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    httpd.asked, httpd.status = [], None
    httpd.commits = {f"/api/{kind}s/org/name/revision/main": FIRST for kind in ("model", "dataset")}
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs" / "tiny" / "hub.json"


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_branch_that_moves_on_stays_where_it_was(hub, file, kind):
    assert Commits(file).known(kind, "org/name") is None
    assert Commits(file).shown(kind, "org/name") == "org/name@main = (looked up when first used)"
    assert hub.asked == []  # to show a plan asks nobody
    assert Commits(file).resolve(kind, "org/name") == FIRST
    hub.commits[f"/api/{kind}s/org/name/revision/main"] = SECOND
    for revision in (None, "main"):
        assert Commits(file).resolve(kind, "org/name", revision) == FIRST
        assert Commits(file).known(kind, "org/name", revision) == FIRST
    assert Commits(file).shown(kind, "org/name") == "org/name@main = 1111111"
    assert hub.asked == [f"/api/{kind}s/org/name/revision/main"]
    kept = json.loads(file.read_text())
    assert list(kept) == [f"{kind} org/name@main"] and kept[f"{kind} org/name@main"]["commit"] == FIRST
    assert Commits(file.parent.with_name("other") / "hub.json").resolve(kind, "org/name") == SECOND


def test_kinds_and_revisions_are_kept_apart(hub, file):
    hub.commits["/api/datasets/org/name/revision/v1.0"] = SECOND
    commits = Commits(file)
    assert commits.resolve("model", "org/name") == FIRST
    assert commits.resolve("dataset", "org/name", "v1.0") == SECOND
    assert commits.known("dataset", "org/name") is None and commits.known("model", "org/name", "v1.0") is None
    assert len(json.loads(file.read_text())) == 2


def test_a_commit_stands_for_itself(hub, file):
    assert Commits(file).resolve("model", "org/name", SECOND) == SECOND
    assert Commits(file).shown("model", "org/name", SECOND) == f"org/name@{SECOND}"
    assert hub.asked == [] and not file.exists()


def test_processes_that_look_up_at_once_agree(hub, file):
    """The branch moves between their questions: only the first one asks."""
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(Commits(file).resolve("model", "org/name"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [FIRST] * 4 and len(hub.asked) == 1


def test_what_the_hub_does_not_have_is_one_line(hub, file):
    with pytest.raises(UserError) as error:
        Commits(file).resolve("dataset", "org/name", "v9")
    text = str(error.value)
    assert text.startswith("dataset org/name@v9 is not on the Hub for this user (") and "\n" not in text
    assert text.endswith("check its name and revision, and HF_TOKEN where it is private or gated")
    assert not file.exists()


def no_network(monkeypatch, hub):
    hub.shutdown()
    hub.server_close()


def offline_mode(monkeypatch, hub):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def out_of_order(monkeypatch, hub):
    hub.status = 503


@pytest.mark.parametrize("trouble", [no_network, offline_mode, out_of_order])
def test_without_the_hub_its_cache_says_the_commit_and_else_one_line_the_remedy(
    hub, file, monkeypatch, tmp_path, trouble
):
    trouble(monkeypatch, hub)
    with pytest.raises(UserError) as error:
        Commits(file).resolve("model", "org/name")
    text = str(error.value)
    assert text.startswith("model org/name@main: its commit is not known here, and the Hub does not answer (")
    assert text.endswith("); run this once where there is a network, or give a commit of 40 hex digits as its revision")
    assert "\n" not in text and not file.exists()
    (refs := tmp_path / "cache" / "models--org--name" / "refs").mkdir(parents=True)
    (refs / "main").write_text(SECOND)
    assert Commits(file).resolve("model", "org/name") == SECOND
    assert Commits(file).known("model", "org/name") == SECOND


def test_what_is_known_needs_no_hub(hub, file, monkeypatch):
    Commits(file).resolve("model", "org/name")
    offline_mode(monkeypatch, hub)
    assert Commits(file).resolve("model", "org/name") == FIRST
