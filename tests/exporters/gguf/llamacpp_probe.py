"""What stock llama.cpp makes of a GGUF file, asked in a child process that may crash."""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TIME_LIMIT = 120


def tokenize(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, special tokens added and recognised; loads the vocabulary only."""
    return json.loads(_ask(model, {"texts": list(texts)}))["tokens"]


def logits(model: Path, tokens: Sequence[int]) -> np.ndarray:
    """Logits of all positions, float32 [tokens, vocabulary], in llama.cpp's most exact mode."""
    answer = json.loads(_ask(model, {"prompt": list(tokens)}))
    return np.frombuffer(bytes.fromhex(answer["logits"]), "<f4").reshape(len(tokens), -1)


def load(model: Path) -> dict[str, str]:
    """Loads everything, validates the tensor data and returns the metadata as text."""
    return json.loads(_ask(model, {}))["metadata"]


def _ask(model: Path, request: dict) -> str:
    child = subprocess.run(
        [sys.executable, __file__, str(model)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert child.returncode == 0, f"llama.cpp: status {child.returncode}\n{child.stderr[-3000:]}"
    return child.stdout


def _answer(path: str, request: dict) -> dict:
    import llama_cpp as lc

    lc.llama_backend_init()
    params = lc.llama_model_default_params()
    params.use_extra_bufts = False  # repacked weights crash on AMX CPUs
    params.check_tensors = True
    params.vocab_only = "texts" in request
    model = lc.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit("llama.cpp refused the file")
    if "texts" in request:
        return {"tokens": [_tokens(lc, model, text) for text in request["texts"]]}
    if "prompt" in request:
        return {"logits": _logits(lc, model, request["prompt"]).hex()}
    return {"metadata": _metadata(lc, model)}


def _tokens(lc, model, text: str) -> list[int]:
    raw = text.encode()
    buffer = (ctypes.c_int32 * (len(raw) + 16))()
    vocabulary = lc.llama_model_get_vocab(model)
    count = lc.llama_tokenize(vocabulary, raw, len(raw), buffer, len(buffer), True, True)
    assert count >= 0
    return list(buffer[:count])


def _logits(lc, model, prompt: list[int]) -> bytes:
    params = lc.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(prompt)
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = 0
    context = lc.llama_init_from_model(model, params)
    batch = lc.llama_batch_init(len(prompt), 0, 1)
    batch.n_tokens = len(prompt)
    for position, token in enumerate(prompt):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    assert lc.llama_decode(context, batch) == 0
    size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(lc.llama_get_logits(context), shape=(len(prompt), size))
    return found.astype("<f4").tobytes()


def _metadata(lc, model) -> dict[str, str]:
    entries = {}
    buffer = ctypes.create_string_buffer(1 << 16)
    for index in range(lc.llama_model_meta_count(model)):
        lc.llama_model_meta_key_by_index(model, index, buffer, len(buffer))
        key = buffer.value.decode()
        lc.llama_model_meta_val_str_by_index(model, index, buffer, len(buffer))
        entries[key] = buffer.value.decode(errors="replace")
    return entries


if __name__ == "__main__":
    answer = json.dumps(_answer(sys.argv[1], json.loads(sys.stdin.read())))
    sys.stdout.write(answer)
