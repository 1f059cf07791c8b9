"""ONNX: the graph in onnxruntime against the checkpoint, with and without a cache, padded and in batches."""

import json

import numpy as np
import pytest
import torch

from smolpost.errors import UserError
from smolpost.export.command import export
from smolpost.model import SmolLM3ForCausalLM
from tests.export.export_models import THETA, letters, save_checkpoint

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra smolpost[export]")
pytest.importorskip("onnxscript", reason="onnxscript is in the extra smolpost[export]")

LAYERS = 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, export, manifest); one for all, as the exporter takes ten seconds."""
    folder = tmp_path_factory.mktemp("onnx")
    model = save_checkpoint(folder / "model", num_hidden_layers=LAYERS, no_rope_layers=[1, 0])
    return model, folder / "out", export("onnx", model, folder / "out", asked=letters(300))


def ours(folder, ids, **more):
    with torch.no_grad():
        return SmolLM3ForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids, **more).logits.numpy()


def run(folder, ids, mask, places, past=None):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()][3:]
    assert names == [f"past_key_values.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    past = past or [np.zeros((len(ids), 2, 0, 8), np.float32)] * len(names)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    inputs = {name: np.asarray(value, np.int64) for name, value in inputs.items()}
    return session.run(None, inputs | dict(zip(names, past, strict=True)))


def test_manifest_and_files(exported):
    _, out, manifest = exported
    row = manifest["check"]["lengths"][300]
    assert row["logit_difference"] < 1e-3
    assert row["ours"] == row["exported"]
    assert (manifest["rope_theta"], manifest["no_rope_layers"], manifest["dtype"]) == (THETA, [1, 0], "float32")
    assert manifest["versions"]["onnxruntime"] == onnxruntime.__version__
    assert set(manifest["files"]) | {"export_manifest.json"} == {file.name for file in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA


def test_any_batch_and_length(exported):
    model, out, _ = exported
    ids = torch.randint(0, 100, (5, 70), generator=torch.Generator().manual_seed(1))
    logits, *_ = run(out, ids, np.ones((5, 70)), np.tile(np.arange(70), (5, 1)))
    np.testing.assert_allclose(logits, ours(model, ids), atol=1e-4, rtol=0)


def test_cache_continues_the_sequence(exported):
    model, out, _ = exported
    ids = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(2))
    _, *past = run(out, ids[:, :33], np.ones((1, 33)), np.arange(33)[None])
    logits, *present = run(out, ids[:, 33:], np.ones((1, 40)), np.arange(33, 40)[None], past)
    np.testing.assert_allclose(logits, ours(model, ids)[:, 33:], atol=1e-4, rtol=0)
    assert present[0].shape == (1, 2, 40, 8)


def test_padding_on_the_left_is_not_seen(exported):
    model, out, _ = exported
    ids = torch.randint(0, 100, (1, 30), generator=torch.Generator().manual_seed(3))
    padded = np.concatenate([np.full((1, 10), 99), ids.numpy()], axis=1)
    places = np.concatenate([np.zeros(10), np.arange(30)])[None]
    logits, *_ = run(out, padded, (np.arange(40) >= 10)[None], places)
    np.testing.assert_allclose(logits[:, 10:], ours(model, ids), atol=1e-4, rtol=0)


WINDOW = {"use_sliding_window": True, "sliding_window": 16}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": THETA}}
LONG = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 128, "rope_theta": THETA}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("fields", "reason", "others"),
    [
        (WINDOW, "use_sliding_window=true is not carried to ONNX", ["mlx", "vllm-config"]),
        # mlx-lm looks for a layer without a window.
        (WINDOW | {"no_rope_layers": [0] * 4}, "use_sliding_window=true is not carried to ONNX", ["vllm-config"]),
        (DYNAMIC, "rope_type=dynamic changes with the length", ["mlx", "vllm-config"]),
        ({"rope_parameters": LONG}, "rope_type=longrope changes with the length", []),
    ],
    ids=["window", "all windows", "dynamic", "longrope"],
)
def test_what_a_graph_cannot_hold_is_refused_and_goes_where_the_line_says(tmp_path, fields, reason, others):
    model = save_checkpoint(tmp_path / "model", **fields)
    with pytest.raises(UserError, match=reason) as error:
        export("onnx", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    remedy = f"export it as {' or '.join(others)}" if others else "no other format carries it"
    assert str(error.value).endswith(f"; {remedy}") and "\n" not in str(error.value)
    for other in others:
        if other == "mlx":
            pytest.importorskip("mlx.core", reason="mlx has no build for this machine")
        manifest = export(other, model, tmp_path / other, asked=letters(64, 600))
        assert manifest["check"]["failures"] == []
