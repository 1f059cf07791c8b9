"""Replies over real HTTP on loopback: the model behind a server answers as it does here."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from smolpost.errors import UserError
from smolpost.inference.local import LocalEngine
from smolpost.inference.server import ServerEngine


class Completions(BaseHTTPRequestHandler):
    """`/models` and `/completions` as vLLM answers them, from a LocalEngine."""

    def do_GET(self):
        self.answer(200, {"data": [{"id": "served", "root": self.server.root}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.failures:
            self.answer(self.server.failures.pop(), {"error": "not\nnow"})
            return
        [replies] = self.server.engine.generate(
            [body["prompt"]], max_new_tokens=body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"],
            num_samples=body["n"], seed=body["seed"],
        )  # fmt: skip
        choices = [{"text": r.text, "finish_reason": "length" if r.cut else "stop"} for r in replies]
        self.answer(200, {"choices": choices})

    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    httpd.engine, httpd.root, httpd.failures, httpd.bodies = LocalEngine(model, tokenizer), str(tmp_path), [], []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def test_replies_are_those_of_the_model_here(server, tokenizer, tmp_path):
    engine = ServerEngine(server.url, tokenizer, tmp_path)
    assert engine.generate(PROMPTS, max_new_tokens=6) == [
        server.engine.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS
    ]
    assert {body["skip_special_tokens"] for body in server.bodies} == {False}
    assert all(body["stop_token_ids"] == [tokenizer.eos_token_id] for body in server.bodies)
    sampled = engine.generate(PROMPTS[:1], max_new_tokens=6, temperature=1.0, num_samples=3, seed=4)
    assert sampled == [server.engine.generate(PROMPTS[:1], max_new_tokens=6, temperature=1.0, num_samples=3, seed=4)[0]]


def test_the_folder_says_where_replies_end(server, tokenizer, tmp_path, capsys):
    capsys.readouterr()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    ServerEngine(server.url, tokenizer, tmp_path).generate(PROMPTS[:1], max_new_tokens=2)
    assert server.bodies[-1]["stop_token_ids"] == [7, 8]
    assert f"{tmp_path} stops at " in capsys.readouterr().out


def test_a_busy_server_is_asked_again_and_a_broken_one_is_an_error(server, tokenizer, tmp_path):
    engine = ServerEngine(server.url, tokenizer, tmp_path)
    server.failures = [503, 429]
    assert len(engine.generate(PROMPTS[:1], max_new_tokens=2)) == 1
    server.failures = [400]
    with pytest.raises(UserError, match=r'/completions answered 400: \{"error": "not\\nnow"\}'):
        engine.generate(PROMPTS[:1], max_new_tokens=2)


def test_another_model_no_server_and_log_probabilities_are_refused(server, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"serves .*, not .*other; start it on that folder"):
        ServerEngine(server.url, tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match=r"evaluation.server=http://127.0.0.1:9/v1 does not answer"):
        ServerEngine("http://127.0.0.1:9/v1", tokenizer, tmp_path)
    with pytest.raises(UserError, match="not the log-probabilities that perplexity and preference need"):
        ServerEngine(server.url, tokenizer, tmp_path).logps([([1, 2], [1])])
