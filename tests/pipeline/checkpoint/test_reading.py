"""What is read back is what transformers saved, however it was stored."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import Checkpoint, hf_config, open_checkpoint
from pipeline.errors import InputError
from tests.pipeline.checkpoint.files import WEIGHTS, edited, edited_weights, shard
from tests.tiny import FAMILIES, make_checkpoint, random_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def contents(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_save_pretrained_wrote(
    family: str, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"tie_word_embeddings": tied}
    if family == "llama":
        settings |= {"attention_bias": True, "mlp_bias": True}
    make_checkpoint(tmp_path, family, dtype=dtype, **settings)
    model = random_model(family, **settings).to(dtype)
    expected = {name: weight.detach().float() for name, weight in model.named_parameters()}

    checkpoint = open_checkpoint(tmp_path)

    assert_same(contents(checkpoint), expected)
    assert checkpoint.tied is tied
    assert checkpoint.notes == ()
    assert checkpoint.num_parameters == sum(w.numel() for w in expected.values())
    assert checkpoint.nbytes == checkpoint.num_parameters * dtype.itemsize
    assert {n: checkpoint.shape(n) for n in expected} == {n: w.shape for n, w in expected.items()}


def test_shards_hold_the_same_as_a_single_file(folder: Path) -> None:
    whole = contents(open_checkpoint(folder))
    shards = shard(folder, parts=3)
    checkpoint = open_checkpoint(folder)
    assert_same(contents(checkpoint), whole)
    assert set(shards) < set(checkpoint.files)


def test_shards_written_by_transformers_are_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one", "qwen3")
    make_checkpoint(tmp_path / "many", "qwen3", shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (contents(open_checkpoint(tmp_path / name)) for name in ("one", "many"))
    assert_same(one, many)


def test_pickles_are_read_if_allowed(folder: Path) -> None:
    whole = contents(open_checkpoint(folder))
    with edited_weights(folder) as tensors:
        torch.save(dict(tensors), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert_same(contents(open_checkpoint(folder, allow_pickle=True)), whole)


def test_tensors_own_their_memory(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    checkpoint, before = open_checkpoint(folder), (folder / WEIGHTS).read_bytes()
    first = checkpoint.read("model.norm.weight")
    copy = first.clone()
    first.zero_()
    assert torch.equal(checkpoint.read("model.norm.weight"), copy)
    assert (folder / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("head", ["absent", "identical", "different"])
def test_weights_decide_whether_the_head_is_tied(folder: Path, flag: bool, head: str) -> None:
    with edited(folder) as config:
        config["tie_word_embeddings"] = flag
    with edited_weights(folder) as tensors:
        if head == "absent":
            del tensors[HEAD]
        elif head == "identical":
            tensors[HEAD] = tensors[EMBEDDING].clone()
        else:
            tensors[HEAD] = tensors[EMBEDDING].clone()
            tensors[HEAD].view(torch.int16)[-1, -1] ^= 1  # the last bit of the last weight

    checkpoint = open_checkpoint(folder)

    assert checkpoint.tied is (head != "different")
    assert checkpoint.config["tie_word_embeddings"] is checkpoint.tied
    assert (HEAD in checkpoint.shapes) is not checkpoint.tied
    assert len(checkpoint.notes) == (flag is not checkpoint.tied), "noted if the config is wrong"
    assert hf_config(checkpoint).tie_word_embeddings is checkpoint.tied


def test_equal_numbers_in_different_bytes_are_not_tied(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors[EMBEDDING][0, 0] = 0.0
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][0, 0] = -0.0
    assert not open_checkpoint(folder).tied


def test_harmless_oddities_are_noted_not_refused(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert open_checkpoint(folder).notes == ()
    with edited_weights(folder) as tensors:
        tensors["model.layers.9.extra\x1b[31m"] = torch.ones(8)
    with edited(folder) as config:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    checkpoint = open_checkpoint(folder)
    remote, extra = checkpoint.notes
    assert "auto_map" in remote
    assert "model.layers.9.extra" in extra
    assert "\x1b" not in extra, "names from a file must not reach the terminal raw"
    assert "auto_map" not in checkpoint.config


def test_the_fingerprint_is_the_digest_of_every_file(folder: Path) -> None:
    fingerprint = open_checkpoint(folder).fingerprint()
    names = {path.name for path in folder.iterdir()}
    assert fingerprint.keys() == names
    assert {WEIGHTS, "config.json", "tokenizer.json"} <= names
    for name, entry in fingerprint.items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_opening_does_not_import_torch(folder: Path) -> None:
    with edited_weights(folder) as tensors:
        del tensors[HEAD]
    code = (
        "import sys; from pipeline.checkpoint import open_checkpoint\n"
        f"checkpoint = open_checkpoint({str(folder)!r})\n"
        "assert checkpoint.num_parameters > 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE = [
    ("llama", {}),
    ("llama", LLAMA3),
    ("llama", {"type": "linear", "factor": 3.0}),
    ("qwen2", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ("qwen3", {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3}),
]


@pytest.mark.parametrize("spelling", [4, 5], ids="transformers-{}".format)
@pytest.mark.parametrize(("family", "scaling"), ROPE)
def test_the_config_computes_the_same_whichever_transformers_wrote_it(
    family: str, scaling: dict[str, Any], spelling: int, tmp_path: Path
) -> None:
    """Rotary frequencies by hand: theta^(-2i/d), scaled at the ends as the type says."""
    import transformers

    make_checkpoint(tmp_path, family)
    with edited(tmp_path) as config:
        for key in ("rope_theta", "rope_scaling", "rope_parameters"):
            config.pop(key, None)
        if spelling == 4:
            config |= {"rope_theta": 5e4, "rope_scaling": scaling or None, "torch_dtype": "float16"}
        else:
            normal = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
            config |= {"rope_parameters": {"rope_theta": 5e4, **normal}, "dtype": "float16"}
    checkpoint = open_checkpoint(tmp_path)
    prefix = checkpoint.architecture.class_prefix
    model = getattr(transformers, f"{prefix}ForCausalLM")(hf_config(checkpoint)).eval()
    model.load_state_dict(contents(checkpoint))
    frequencies = model.model.rotary_emb.inv_freq
    base = 5e4 ** -(torch.arange(0, 16, 2) / 16)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind is None:
        assert torch.allclose(frequencies, base, rtol=1e-6)
    elif kind == "linear":
        assert torch.allclose(frequencies, base / 3.0, rtol=1e-6)
    else:  # the highest frequency is kept, the lowest is divided by the factor
        assert torch.allclose(frequencies[0], base[0], rtol=1e-6)
        assert torch.allclose(frequencies[-1], base[-1] / scaling["factor"], rtol=1e-6)
    assert next(model.parameters()).dtype == torch.float32
    assert torch.isfinite(model(torch.arange(24)[None]).logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_weights_give_the_logits_of_from_pretrained(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_checkpoint(tmp_path, family)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(tmp_path)
    model = type(reference)(hf_config(checkpoint)).eval()
    model.load_state_dict(contents(checkpoint))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_no_key_of_a_config_reaches_transformers_but_sizes_and_flags(folder: Path) -> None:
    with edited(folder) as config:
        config |= {
            "attn_implementation": "someone/evil-kernel",
            "_attn_implementation": "someone/evil-kernel",
            "custom_pipelines": {"x": {"impl": "evil.X"}},
            "torch_dtype": "float64",
        }
    made = hf_config(open_checkpoint(folder))
    assert "evil" not in json.dumps(made.to_dict(), default=str)
    assert getattr(made, "_attn_implementation", None) != "someone/evil-kernel"


def test_a_config_that_transformers_rejects_is_an_input_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def reject(**_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(transformers, "LlamaConfig", reject)
    with pytest.raises(InputError, match="rejects the config"):
        hf_config(open_checkpoint(folder))
