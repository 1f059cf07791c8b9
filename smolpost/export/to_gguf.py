"""GGUF through llama.cpp's convert_hf_to_gguf.py, scored in llama.cpp itself (llama-cpp-python).

llama.cpp fixes NoPE to every fourth layer, in its code and not in the file: other patterns are refused.
"""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from smolpost.errors import UserError
from smolpost.export.folder import ExportSource, portable_tokenizer_config, stage
from smolpost.export.session import CHUNK
from smolpost.files import write_json
from smolpost.inference.generation import stored_stop_token_ids

FILE = "model.gguf"
TOOLS = ("gguf", "llama-cpp-python")
SCRIPT = "convert_hf_to_gguf.py"
FOLDER_VARIABLE = "LLAMA_CPP"
NOPE_INTERVAL = 4
TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# Of Llama 3 and the models that took over its tokenizer, SmolLM3 among them.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def obstacle(source: ExportSource) -> str:
    """What llama.cpp would run in another way, whatever its file says; "" for nothing."""
    config = source.config
    expected = [i for i in range(config.num_hidden_layers) if (i + 1) % NOPE_INTERVAL == 0]
    if source.nope_layers != expected:
        return (
            f"no_rope_layers has NoPE in layers {source.nope_layers} (from 0), and llama.cpp always in {expected}, "
            "every fourth"
        )
    for key, right in {"use_sliding_window": False, "attention_bias": False, "mlp_bias": False}.items():
        if getattr(config, key) != right:
            return f"{key}={getattr(config, key)} is not in llama.cpp's SmolLM3"
    if (rope := config.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
        return f"rope_type={rope} is not in llama.cpp's SmolLM3 (yarn, linear and llama3 work)"
    if source.dtype not in TYPES:
        return f"dtype={source.dtype} has no GGUF type, which {', '.join(TYPES)} have"
    return ""


def converter_folder(llama_cpp: Path | None) -> Path:
    """The converter, in the given folder or in that of the variable LLAMA_CPP.

    Raises:
        UserError: Neither is given, or the script is not in it.
    """
    folder = llama_cpp or (Path(os.environ[FOLDER_VARIABLE]) if os.environ.get(FOLDER_VARIABLE) else None)
    if folder is None:
        raise UserError(
            f"gguf needs llama.cpp's {SCRIPT}, which no package carries: give its folder as --llama-cpp FOLDER or "
            f"{FOLDER_VARIABLE}=FOLDER (a clone of llama.cpp, or vendor/llama.cpp of llama-cpp-python's source archive)"
        )
    if not (folder / SCRIPT).is_file():
        raise UserError(f"{folder} has no {SCRIPT}; give the top folder of llama.cpp's sources")
    return folder


def convert(source: ExportSource, out: Path, llama_cpp: Path | None) -> str:
    """Write the file into the folder `out`; returns the dtype of its matrices, the checkpoint's."""
    staged = stage(source, out.parent / "source")
    # llama.cpp adds a begin token with Llama 3's vocabulary, unless a field forbids it.
    begins = source.tokenizer("a").input_ids[:1] == [source.tokenizer.bos_token_id]
    write_json(staged / "tokenizer_config.json", portable_tokenizer_config(source) | {"add_bos_token": begins})
    folder = str(converter_folder(llama_cpp))
    command = [sys.executable, "-m", "smolpost.export.convert_gguf", folder, pre_tokenizer(source), str(staged)]
    done = subprocess.run(
        [*command, "--outfile", str(out / FILE), "--outtype", TYPES[source.dtype]],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode or not (out / FILE).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise UserError(f"{folder}/{SCRIPT} failed on {source.folder}: {lines[-1].strip()}")
    return source.dtype


def pre_tokenizer(source: ExportSource) -> str:
    """What `convert_gguf` shall do with a tokenizer that the converter has not met."""
    tokenizer = json.loads((source.folder / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer["model"]["type"] != "BPE":
        return "none"
    first = tokenizer.get("pre_tokenizer") or {}
    if first.get("type") == "ByteLevel" and first.get("use_regex", True):
        return "gpt-2"
    if first.get("type") == "Sequence" and first["pretokenizers"][0].get("pattern") == {"Regex": LLAMA3_PATTERN}:
        return "llama-bpe"
    return "known"


def check_file(source: ExportSource, session: "GgufSession", text: str) -> list[str]:
    """Compare what the file says of itself with the checkpoint.

    Args:
        text: A rendered prompt, which both tokenizers read.
    Returns:
        Sentences for the report: what the file could not carry.
    Raises:
        UserError: RoPE's theta, the chat template, the tokenizer or the token that ends a reply is another.
    """
    from gguf import GGUFReader

    fields = GGUFReader(session.file).fields
    theta, wanted = float(fields["smollm3.rope.freq_base"].contents()), source.config.rope_parameters["rope_theta"]
    if not np.isclose(theta, wanted, rtol=1e-6):
        raise UserError(f"{FILE}: rope.freq_base={theta:g}, and rope_theta={wanted:g} in {source.folder}")
    if fields["tokenizer.ggml.model"].contents() == "none":
        return [f"{FILE} has no tokenizer, because llama.cpp has no type for this one; give it token ids"]
    template = fields["tokenizer.chat_template"].contents() if "tokenizer.chat_template" in fields else None
    if isinstance(source.tokenizer.chat_template, str | None) and template != source.tokenizer.chat_template:
        raise UserError(f"{FILE}: the chat template is not that of {source.folder}")
    ours, theirs = source.tokenizer(text).input_ids, session.tokenize(text)
    if ours != theirs:
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        raise UserError(
            f"{FILE}: llama.cpp cuts a prompt into other tokens than {source.folder}'s tokenizer, from token {place} on"
        )
    # A file names one such token; of others llama.cpp knows many by their text.
    unknown = [token for token in stored_stop_token_ids(source.folder) if not session.stops_at(token)]
    names = ", ".join(map(str, source.tokenizer.convert_ids_to_tokens(unknown)))
    if source.tokenizer.eos_token_id in unknown:
        raise UserError(f"{FILE}: llama.cpp does not stop at {names}, where {source.folder} does")
    return [f"{FILE}: llama.cpp does not stop at {names}; name it as a stop string"] if unknown else []


class GgufSession:
    """The file in llama.cpp on a CPU, its cache in fp32."""

    stop_tokens = None  # a file without a tokenizer has none; `check_file` compares the others

    def __init__(self, folder: Path, config: Any, max_tokens: int):
        import llama_cpp

        self._api, self.file = llama_cpp, folder / FILE
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(self.file).encode(), model_params)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {self.file}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max_tokens, CHUNK, CHUNK
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        weakref.finalize(self, _free, llama_cpp, self._batch, self._context, self._model)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.reset()

    def reset(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._seen = 0

    def feed(self, ids: list[int]) -> np.ndarray:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, self._seen + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp cannot decode tokens {self._seen} to {self._seen + len(ids)}")
        self._seen += len(ids)
        size = self._api.llama_vocab_n_tokens(self._vocabulary)
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(len(ids), size)).copy()

    def stops_at(self, token: int) -> bool:
        """Whether generation ends with this token."""
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token))

    def tokenize(self, text: str) -> list[int]:
        """Token ids, with the special tokens that llama.cpp adds."""
        data = text.encode()
        ids = (self._api.llama_token * (len(data) + 2))()
        number = self._api.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), True, True)
        return list(ids[:number])


def _free(api: Any, batch: Any, context: Any, model: Any) -> None:
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
