"""smolpost merge: words to merges, what is printed, and refusals in one line."""

import argparse
import json
import shutil

import pytest
import torch

from smolpost import cli
from smolpost.errors import UserError
from smolpost.merging.command import add_arguments, merge_command
from tests.merging.checkpoints import mean, save_checkpoint, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return {name: save_checkpoint(root / folder, i) for i, (name, folder) in enumerate({"a": "a=1", "b": "b"}.items())}


def run(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return merge_command(**vars(parser.parse_args([str(word) for word in words])))


def manifest(folder):
    return json.loads((folder / "merge_manifest.json").read_text())


def test_linear_merge_with_fractions_and_what_is_printed(trained, tmp_path, capsys):
    out = tmp_path / "out"
    a, b = trained["a"], trained["b"]  # a folder's name may hold a =
    assert run(out, f"{a}=2/3", f"{b}=1/3", "--dtype", "float32", "--verify", "full", "--base", b) == 0
    exact = mean([(a, 2 / 3), (b, 1 / 3)])
    for name, tensor in weights(out).items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=2.4e-7)
    made = manifest(out)
    assert made["base"] == "b" and made["num_compared"] == made["num_parameters"]
    printed = capsys.readouterr().out
    assert "method     linear, by smolpost\ninput      a=1: 0.666666667\ninput      b: 0.333333333\n" in printed
    assert f"checked    {made['num_parameters']:,} elements in fp64: " in printed
    assert "GB/s read and written" in printed and printed.endswith(f"folder     {out}\n")


def test_a_method_with_settings_and_a_start_that_is_no_other_input(trained, tmp_path, capsys):
    run(tmp_path / "slerp", trained["a"], trained["b"], "--method", "slerp", "--set", "t=[0, 1]")
    assert manifest(tmp_path / "slerp")["config"]["parameters"] == {"t": [0, 1]}
    assert (manifest(tmp_path / "slerp")["base_model"], manifest(tmp_path / "slerp")["dtype"]) == ("a=1", "bfloat16")
    words = (f"{trained['b']}=1", "--base-model", trained["a"], "--method", "dare_linear", "--set", "density=0.5")
    run(tmp_path / "dare", *words, "--seed", "4")
    made = manifest(tmp_path / "dare")
    assert (made["base"], made["base_model"], made["seed"]) == ("b", "a=1", 4)
    printed = capsys.readouterr().out
    assert "from       a=1\nbase       b: its config, tokenizer, chat template\nseed       4\n" in printed


def test_a_mergekit_file_with_named_folders(trained, tmp_path, capsys):
    file = tmp_path / "merge.yml"
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("x", 3), ("y", 1))]
    file.write_text(json.dumps({"merge_method": "linear", "models": models}))
    words = (f"x={trained['a']}", f"y={trained['b']}", "--config", file, "--base", "x")
    run(tmp_path / "out", *words)
    assert 'input      x: {"weight": 3}, counts as 0.75' in capsys.readouterr().out
    run(tmp_path / "ours", *words, "--engine", "ours")
    assert manifest(tmp_path / "ours")["correctly_rounded"] > 0.5
    assert manifest(tmp_path / "out")["dtype"] == "float32"  # as the inputs are stored


@pytest.mark.parametrize("order", ["O C x y", "C O x y", "O x C y S", "S O x y C", "O x S y C"])
def test_words_and_options_in_any_order(order, trained, tmp_path, capsys):
    file = tmp_path / "merge.yml"
    models = [{"model": name, "parameters": {"weight": 1}} for name in "xy"]
    file.write_text(json.dumps({"merge_method": "linear", "models": models, "parameters": {"int8_mask": True}}))
    places = {"O": [tmp_path / "out"], "C": ["--config", file], "S": ["--allow-template-change"]}
    places |= {"x": [f"x={trained['a']}"], "y": [f"y={trained['b']}"]}
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge", *(str(word) for letter in order.split() for word in places[letter])])
    assert ended.value.code == 0
    assert manifest(tmp_path / "out")["base"] == "x"
    assert (
        "unused     parameter int8_mask: linear does not look at it\nbase       x: its config"
        in capsys.readouterr().out
    )


def test_models_without_a_tokenizer(trained, tmp_path, capsys):
    for name in "ab":
        shutil.copytree(trained[name], tmp_path / name, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    words = [f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b'}=0.5"]
    with pytest.raises(UserError, match="or merge without tokenizers: --no-tokenizer"):
        run(tmp_path / "out", *words)
    run(tmp_path / "out", *words, "--no-tokenizer")
    assert "base       a: its config\n" in capsys.readouterr().out
    run(tmp_path / "slerp", tmp_path / "a", tmp_path / "b", "--method", "slerp", "--set", "t=0.5", "--no-tokenizer")
    assert weights(tmp_path / "slerp").keys() == weights(tmp_path / "out").keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "merge has no inputs; name them as FOLDER=WEIGHT"),
        (["A=0.5", "B"], "merge input 'b' has no weight; state it as FOLDER=WEIGHT"),
        (["A=half", "B=0.5"], "merge input 'a=1': weight 'half' is not a number such as 0.45 or 1/3"),
        (["A=0.5", "B=0.4"], "merge weights a=1=0.5, b=0.4 sum to 0.9, not 1"),
        (["A=1", "--set", "t=1"], "merge --set has no effect with a weighted mean (no --method); drop one of them"),
        (["A=1", "--seed", "0"], "merge --seed has no effect with a weighted mean"),
        (["A", "B", "--method", "slerp", "--verify", "full"], "merge --verify has no effect with method=slerp"),
        (["A", "B", "--method", "slurp"], "merge method 'slurp' is not one of mergekit's"),
        (["A", "B", "--method", "slerp", "--set", "t=much"], "merge --set t=much is not KEY=VALUE with a number"),
        (["A", "B", "--method", "slerp", "--set", "t=1", "--set", "t=2"], "merge --set t=2 states t twice"),
        (["b", "--config", "x.yml"], "--config is not NAME=FOLDER, a model that the file names"),
        (["--config", "x.yml", "--dtype", "float16"], "merge --dtype has no effect with config; drop one of them"),
        (["--config", "x.yml"], "merge config x.yml cannot be read ("),
    ],
)
def test_words_that_make_no_merge_are_refused(words, message, trained, tmp_path):
    places = {"A": str(trained["a"]), "B": str(trained["b"])}
    words = [places[word[0]] + word[1:] if word[0] in places else word for word in words]
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_of_a_merged_folder_is_refused(trained, tmp_path):
    soup = tmp_path / "soup"
    run(soup, f"{trained['a']}=0.5", f"{trained['b']}=0.5")
    run(tmp_path / "again", f"{soup}=0.5", f"{trained['b']}=0.5")
    content = bytearray((soup / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (soup / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"soup/model.safetensors is not the file that was written: "):
        run(tmp_path / "out", f"{soup}=0.5", f"{trained['b']}=0.5")
    assert not (tmp_path / "out").exists()
