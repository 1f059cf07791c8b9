"""What a stage of synthetic data leaves behind, through the commands that read it."""

import json
import re

import pyarrow.parquet as pq
import pytest

from smolpost.cli import main
from smolpost.files import digest
from smolpost.publish.push import package, place_of, push
from smolpost.synthesis.records import RequestFailed
from tests.synthesis.fakes import thinking_reply
from tests.synthesis.generated import Generated
from tests.synthesis.outcomes import turns


@pytest.fixture
def generated(tmp_path, monkeypatch):
    rows = [{"messages": turns(f"{i}?", f"{i}."), "source": f"s{i % 2}"} for i in range(6)]
    settings = "teacher: {model: big, url: http://secret-host:1/v1, api_key_env: KEY}\nmax_failed: 0.5"

    def reply(request):
        return (
            RequestFailed("HTTP 400", ("400",)) if request.messages[-1]["content"] == "4?" else thinking_reply(request)
        )

    return Generated(tmp_path, monkeypatch, "reasoning_traces", rows, settings, teacher=reply)


def test_provenance_follows_a_row_back_to_its_request(generated):
    folder = generated.make()
    found = pq.read_table(folder / "provenance.parquet").to_pylist()
    assert [row["status"] for row in found] == ["accepted"] * 4 + ["failed", "accepted"]
    seeds = [reply["seed"] for row in found for reply in row["replies"]]
    answered = [request for request in generated.asked() if request.messages[-1]["content"] != "4?"]
    assert seeds == [request.seed for request in answered] and len(set(seeds)) == 5
    reply = found[0]["replies"][0]
    assert (reply["model"], reply["server"], reply["server_version"]) == ("fake", "fake", "1")
    assert json.loads(reply["sampling"])["temperature"] == 0.6
    assert found[0]["row_hash"] == digest({"messages": turns("0?", "0."), "source": "s0"}, 64)


def test_addresses_and_names_of_keys_are_not_published(generated, tmp_path):
    found = package(generated.make())
    push(found, place_of(f"file://{tmp_path}/out", found))
    for file in (tmp_path / "out").iterdir():
        assert b"secret-host" not in file.read_bytes() and b"api_key" not in file.read_bytes(), file
    assert "| model | fake |" in (tmp_path / "out" / "README.md").read_text()


def test_inspect_finds_the_stage_by_its_name(generated, capsys, tmp_path):
    def inspect(*words):
        with pytest.raises(SystemExit) as end:
            main(["inspect", *generated.words, "stage=made", *words])
        return end.value.code, "".join(capsys.readouterr())

    code, text = inspect()
    assert code == 2 and "stage=made has no rows yet; `smolpost run" in text
    generated.make()
    capsys.readouterr()
    code, text = inspect("--limit", "2")
    assert code == 0 and "failed: teacher: HTTP 400" in text and "shown 2 of 6 prompts" in text
    assert inspect("--html", str(tmp_path / "page.html"))[0] == 0


def test_status_of_the_run_stays_beside_its_replies(generated):
    generated.make()
    [status] = generated.located()[1].replies["teacher"].folder.glob("status.json")
    found = json.loads(status.read_text())
    assert (found["state"], found["prompts"], found["done"], found["failed"]) == ("finished", 6, 5, 1)


# ---------------------------------------------------------------- preview


def test_preview_shows_rows_of_every_source_and_keeps_nothing(generated, capsys):
    with pytest.raises(SystemExit) as end:
        main(["make", *generated.words, "stage=made", "preview=3"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.count("══ ") == 3 and "── reply\nthink: They say 0?\nanswer: You said 0?" in text
    assert "preview of 3 of 6 prompts: 3 accepted; nothing is kept" in text
    assert sorted(request.messages[-1]["content"] for request in generated.asked()) == ["0?", "1?", "2?"]
    # 10 tokens of prompt and 5 of answer for each of 6 prompts.
    assert re.search(r"teacher +60 ± 0 +30 ± 0 .* no prices set", text)
    stage = generated.located()[1]
    assert not stage.folder.exists() and not stage.replies["teacher"].folder.exists()


def test_counts_are_printed_when_a_stage_is_made(generated, capsys):
    generated.make()
    assert re.search(r"s0 +3 +2 +66\.7% +1\n", capsys.readouterr().out)
