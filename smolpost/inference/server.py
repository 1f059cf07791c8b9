"""Replies from an OpenAI-compatible server (vLLM and others) that serves the evaluated checkpoint.

Prompts go out as token ids to `/completions`, rendered here, so the server's own chat template and reasoning parser
do not change what is measured.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from transformers import PreTrainedTokenizerBase

from smolpost.chat.turn_end import endless_replies
from smolpost.errors import UserError
from smolpost.inference.engine import Reply
from smolpost.inference.generation import stored_stop_token_ids
from smolpost.inference.served import listed, served_as

TIMEOUT = 3600.0  # seconds; a reply of 32k tokens takes minutes
RETRIES = 5  # of a request that the server refused for now
CONCURRENCY = 64  # requests under way; the server batches them


class ServerEngine:
    """The model behind a URL; generates, but gives no log-probabilities.

    Args:
        url: Of the API, with its version: http://localhost:8000/v1.
        tokenizer: The checkpoint's.
        checkpoint: Folder of the checkpoint, which the server must name as its model.
        key: Of the URL in the recipe, for messages; null there means a model in this process.
    Raises:
        UserError: There is no such server, or it serves another model.
    """

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, *, key: str):
        self.tokenizer, self.url, self.key = tokenizer, url.rstrip("/"), key
        limits = httpx2.Limits(max_connections=CONCURRENCY)
        self._client = httpx2.Client(timeout=TIMEOUT, limits=limits, trust_env=False)
        self._model = self._served(checkpoint)
        self.stop_tokens = stored_stop_token_ids(checkpoint)
        if line := endless_replies(tokenizer, self.stop_tokens, checkpoint):
            print(line, flush=True)

    def _served(self, checkpoint: Path) -> str:
        """The server's name for the checkpoint; another model's scores must never be kept under this one's key."""
        models = self._send("GET", "/models")["data"]
        if model := served_as(models, checkpoint):
            return model["id"]
        raise UserError(
            f"{self.key}={self.url} serves {listed(models)}, not {checkpoint.resolve()}; start it on that folder"
        )

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_samples: int = 1,
        seed: int = 0,
    ) -> list[list[Reply]]:
        settings = {
            "model": self._model,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "n": num_samples,
            "stop_token_ids": self.stop_tokens,
            "skip_special_tokens": False,  # think and tool tags are special tokens to some tokenizers
            "spaces_between_special_tokens": False,
        }
        requests = [settings | {"prompt": prompt, "seed": (seed + i) % 2**63} for i, prompt in enumerate(prompts)]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(lambda request: self._send("POST", "/completions", request), requests))
        return [[self._reply(choice) for choice in answer["choices"]] for answer in answers]

    def logps(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        raise UserError(
            f"{self.key}={self.url} gives replies, not the log-probabilities that perplexity and preference need; "
            f"leave those tasks out, or set {self.key}=null to run the model here"
        )

    def _reply(self, choice: dict[str, Any]) -> Reply:
        text, cut = choice["text"], choice["finish_reason"] == "length"
        for token in self.tokenizer.convert_ids_to_tokens(self.stop_tokens):
            text = text.removesuffix(token)
        return Reply(text, len(self.tokenizer.encode(text, add_special_tokens=False)) + (not cut), cut)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request, repeated while the server is busy.

        Raises:
            UserError: The server does not answer, or refuses for another reason.
        """
        for attempt in range(RETRIES + 1):
            try:
                response = self._client.request(method, self.url + path, json=body)
            except httpx2.HTTPError as error:
                raise UserError(
                    f"{self.key}={self.url} does not answer ({type(error).__name__}: {error}); start it, or set "
                    f"{self.key}=null to run the model here"
                ) from error
            if response.status_code == 200:
                return response.json()
            if response.status_code not in (429, 502, 503) or attempt == RETRIES:
                break
            time.sleep(2**attempt / 4)
        said = " ".join(response.text.split())[:300]
        raise UserError(f"{self.key}={self.url}{path} answered {response.status_code}: {said}")
