"""The model directory in the Hugging Face layout: written atomically, and read back.

It knows the files' names and formats, not when or why they are written.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer

from pico import END_OF_TEXT, END_OF_TEXT_ID
from pico.model import Pico, PicoConfig


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.chmod(0o644)
    temporary.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def export_tokenizer(out: Path, tokenizer: Tokenizer, config: PicoConfig) -> None:
    """Everything but the weights: known before training starts."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
    write_json(out / "config.json", config.to_hugging_face())
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    write_json(out / "special_tokens_map.json", special)
    write_json(
        out / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    ids = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    write_json(out / "generation_config.json", ids)


def export_weights(out: Path, model: Pico) -> None:
    """model.safetensors in bf16; no lm_head, it is tied to the embeddings."""
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    data = safetensors.torch.save(weights, metadata={"format": "pt"})
    write_atomically(out / "model.safetensors", data)


def load_exported(out: Path) -> Pico:
    """The exported weights, computing in float32."""
    raw = json.loads((out / "config.json").read_text(encoding="utf-8"))
    model = Pico(PicoConfig(**{name: raw[name] for name in asdict(PicoConfig())}))
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    return model.float().eval()
