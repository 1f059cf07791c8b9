"""A finished stage's rows at a target: all of them or none that load, and nobody else's files are touched."""

import json
import shutil
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub.errors import RepositoryNotFoundError

from smolpost.cli import main
from smolpost.errors import UserError
from smolpost.files import MANIFEST, hashes, write_json
from smolpost.publish import filesystems
from smolpost.publish.push import package, place_of
from smolpost.publish.push import push as put
from smolpost.publish.targets import PUSHED
from smolpost.synthesis import results
from tests.synthesis.outcomes import FACTS, accepted, filtered

ALL = {"README.md", "report.json", "failed.jsonl", "filtered.jsonl", "provenance.parquet", "rows.parquet", PUSHED}


def push(folder, target, *, replace=False, public=False, **settings):
    found = package(folder, target, **settings)
    return put(found, place_of(target, found, public=public), replace=replace)


def stage(folder, *identities: str, key: str):
    folder.mkdir()
    outcomes = [*map(accepted, identities), filtered("f")]
    results.write(folder, outcomes, facts=FACTS, max_failed=0, num_prompts=len(outcomes))
    write_json(folder / MANIFEST, {"key": key, "files": hashes(folder)})
    return folder


@pytest.fixture
def first(tmp_path):
    return stage(tmp_path / "first", "1", "2", key="k1")


@pytest.fixture
def second(tmp_path):
    return stage(tmp_path / "second", "3", key="k2")


@pytest.fixture(params=["file", "memory"])
def target(request, tmp_path):
    """(URL, function that returns name -> content of what lies there)."""
    system = fsspec.filesystem(request.param)
    root = f"{tmp_path}/out/data" if request.param == "file" else "/push-test/data"
    yield (
        f"{request.param}://{root}",
        lambda: {
            path[len(root) + 1 :]: system.cat_file(path) for path in (system.find(root) if system.exists(root) else [])
        },
    )
    if request.param == "memory":
        system.rm("/push-test", recursive=True) if system.exists("/push-test") else None


def test_everything_arrives(first, target, capsys):
    url, there = target

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main(["push", str(first), url, *words])
        assert end.value.code == 0
        return capsys.readouterr().out

    assert run().endswith("nothing was written and nobody was asked; --check looks at the target; --yes pushes\n")
    assert f"{url} is empty\n" in run("--check") and not there()
    assert run("--yes").startswith(f"{url}: 2 rows of key k1 (README.md, ")
    assert f"{url} holds this already; --yes would write nothing\n" in run("--check")
    assert set(there()) == ALL
    for name in ALL - {PUSHED}:
        assert there()[name] == (first / name).read_bytes()
    stated = json.loads(there()[PUSHED])
    assert stated["key"] == "k1" and stated["rows"] == 2 and MANIFEST not in stated["files"]
    assert push(first, url + "/").endswith(", as before")


def test_without_provenance_no_raw_text_leaves(first, target):
    url, there = target
    push(first, url, with_provenance=False)
    assert set(there()) == {"README.md", "report.json", "rows.parquet", PUSHED}
    assert b"provenance" not in there()["README.md"]


def test_the_owners_changes_of_the_card_are_pushed(first, target):
    url, there = target
    push(first, url)
    text = (first / "README.md").read_text()
    (first / "README.md").write_text(text.replace("---\n", "---\nlicense: cc-by-4.0\n", 1) + "\n## Thanks\n\nTo ëll.\n")
    with pytest.raises(UserError, match="--replace puts this"):
        push(first, url)
    push(first, url, replace=True)
    assert there()["README.md"] == (first / "README.md").read_bytes()
    push(first, url, replace=True, with_provenance=False)
    card = there()["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "cc-by-4.0" and [entry["data_files"] for entry in header["configs"]] == ["rows.parquet"]
    assert card.endswith("## Thanks\n\nTo ëll.\n") and "## Licence" in card and "provenance" not in card
    (first / "README.md").write_text("My own words.")
    push(first, url, replace=True, with_provenance=False)
    assert there()["README.md"] == b"My own words."


def test_other_rows_are_replaced_only_when_asked(first, second, target):
    url, there = target
    push(first, url)
    with pytest.raises(UserError, match="holds what was pushed of key k1; --replace puts this"):
        push(second, url)
    assert there()["rows.parquet"] == (first / "rows.parquet").read_bytes()
    push(second, url, replace=True, with_provenance=False)
    assert there()["rows.parquet"] == (second / "rows.parquet").read_bytes()
    assert "provenance.parquet" not in there()


@pytest.mark.parametrize("name", ["photo.png", "README.md", "rows.parquet", "deep/er/README.md"])
def test_files_of_others_are_never_replaced(first, target, name):
    url, there = target
    system, root = fsspec.core.url_to_fs(url)
    system.makedirs(f"{root}/deep/er", exist_ok=True)
    system.pipe_file(f"{root}/{name}", b"mine")
    for replace in (False, True):
        with pytest.raises(UserError, match=f"holds {name}, which `smolpost push` did not write"):
            push(first, url, replace=replace)
    assert there() == {name: b"mine"}


def loads(files: dict[str, bytes]) -> bool:
    """Whether a reader that follows the card, or takes any Parquet file without one, finds rows."""
    return "rows.parquet" in files or ("README.md" not in files and "provenance.parquet" in files)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("writes", range(8))
def test_an_interrupted_push_leaves_nothing_that_loads(first, second, target, monkeypatch, before, writes):
    url, there = target
    if before:
        push(first, url)
    write, done = filesystems._put, []

    def stops(system, path, file):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(path)
        write(system, path, file)

    monkeypatch.setattr(filesystems, "_put", stops)
    with pytest.raises(KeyboardInterrupt):
        push(second, url, replace=before)
    if writes == 0:
        assert ("rows.parquet" in there()) == before
    elif writes < 7:
        assert not loads(there())
    else:  # all but the last word: the rows are whole
        assert there()["rows.parquet"] == (second / "rows.parquet").read_bytes()
    monkeypatch.setattr(filesystems, "_put", write)
    push(second, url, replace=before)  # the same command
    assert set(there()) == ALL and there()["rows.parquet"] == (second / "rows.parquet").read_bytes()


def test_what_cannot_be_pushed(first, tmp_path):
    def refused(text, folder=first, target="file:///tmp/x", **settings):
        with pytest.raises(UserError, match=text) as error:
            push(folder, target, **settings)
        assert "\n" not in str(error.value)

    refused("is not a folder", tmp_path / "none")
    shutil.copytree(first, unfinished := tmp_path / "unfinished")
    (unfinished / MANIFEST).unlink()
    refused("is not finished: it has no manifest.json", unfinished)
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / MANIFEST, {"key": "k"})
    refused("is of kind None, which makes neither a trained model nor synthetic data", other)
    refused("Protocol not known: nowhere", target="nowhere://x")
    refused("is not a target; give a dataset id", target="/data/rows")
    refused("is a file or folder here; write file://", target=str(tmp_path / "first"))
    refused("--public is for the Hub", public=True)
    (tmp_path / "file").write_text("x")
    refused("is a file; name a folder", target=f"file://{tmp_path}/file")
    refused("NotADirectoryError", target=f"file://{tmp_path}/file/below")
    (first / "rows.parquet").write_bytes(b"changed")
    refused("is not the file that was written")


# ---------------------------------------------------------------- the Hub


class FakeHub:
    """What the Hub's API does, over a dictionary."""

    endpoint = "https://huggingface.co"

    def __init__(self, folder):
        self.folder, self.files, self.private, self.commits, self.repo_type = folder, None, None, [], "dataset"

    def repo_info(self, identity, *, repo_type):
        assert repo_type == self.repo_type
        if self.files is None:
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404", response=response)
        return SimpleNamespace(
            private=self.private, siblings=[SimpleNamespace(rfilename=name) for name in self.files], sha="0" * 40
        )

    def create_repo(self, identity, *, repo_type, private, exist_ok):
        assert repo_type == self.repo_type and exist_ok
        if self.files is None:
            self.files, self.private = {".gitattributes": b""}, private

    def hf_hub_download(self, identity, name, *, repo_type, revision):
        (self.folder / name).write_bytes(self.files[name])
        return str(self.folder / name)

    def create_commit(self, identity, operations, *, commit_message, repo_type, parent_commit):
        assert parent_commit == ("0" * 40 if self.commits else None)
        for operation in operations:
            if isinstance(operation, huggingface_hub.CommitOperationAdd):
                with operation.as_file() as content:
                    self.files[operation.path_in_repo] = content.read()
            else:
                del self.files[operation.path_in_repo]
        self.commits.append(commit_message)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    (tmp_path / "hub").mkdir()
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def test_hub_gets_one_private_commit(first, second, hub, tmp_path):
    line = push(first, "me/rows")
    assert line.startswith("https://huggingface.co/datasets/me/rows: 2 rows of key k1") and line.endswith("; private")
    assert set(hub.files) == ALL | {".gitattributes"} and hub.private and hub.commits == ["smolpost push k1"]
    assert push(first, "hf://datasets/me/rows").endswith(", as before") and len(hub.commits) == 1
    with pytest.raises(UserError, match="holds what was pushed of key k1"):
        push(second, "me/rows")
    push(second, "me/rows", replace=True, with_provenance=False)
    assert set(hub.files) == {"README.md", "report.json", "rows.parquet", PUSHED, ".gitattributes"}
    (tmp_path / "found.parquet").write_bytes(hub.files["rows.parquet"])
    assert pq.read_table(tmp_path / "found.parquet")["id"].to_pylist() == ["3"]


def test_hub_visibility_is_never_a_surprise(first, hub):
    push(first, "me/rows", public=True)
    assert hub.private is False
    with pytest.raises(UserError, match="me/rows is open to all on the Hub; --public writes to it"):
        push(first, "me/rows")
    hub.private = True
    with pytest.raises(UserError, match="me/rows is private on the Hub; leave --public out"):
        push(first, "me/rows", public=True)


def test_hub_data_of_others_stay(first, hub):
    hub.files, hub.private = {".gitattributes": b"", "README.md": b"mine"}, True
    for replace in (False, True):
        with pytest.raises(UserError, match=r"holds README\.md, which `smolpost push` did not write"):
            push(first, "me/rows", replace=replace)
    assert hub.files["README.md"] == b"mine" and not hub.commits


def test_hub_that_refuses(first, hub, monkeypatch):
    def refuses(*_, **__):
        raise OSError("401 Unauthorized\nbad token")

    monkeypatch.setattr(hub, "create_commit", refuses)
    with pytest.raises(UserError, match="cannot be written \\(401 Unauthorized bad token\\); check the name, HF_TOKEN"):
        push(first, "me/rows")
