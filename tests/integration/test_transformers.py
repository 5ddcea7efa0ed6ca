"""The model that ships gives the same text in `transformers` as through all the processes."""

from __future__ import annotations

import pytest

from baton.client import Client
from tests.integration.conftest import StartCluster
from tests.support.requests import text_of

pytestmark = pytest.mark.processes


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("medium", ["shm", "zmq"])
def test_pico_gives_the_text_of_transformers(start_cluster: StartCluster, medium: str) -> None:
    """In float32, greedy: 64 tokens and their text, over a prompt of several chunks too."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained("models/pico", dtype=torch.float32)
    tokenizer = Tokenizer.from_file("models/pico/tokenizer.json")
    cluster = start_cluster(medium=medium, decode=1, kv_dtype="f32")
    with Client(cluster.address) as client:
        for text in ("import os\n", text_of(0, 0, 900), text_of(3, 500, 3000)):
            ids = tokenizer.encode(text).ids
            with torch.no_grad():
                whole = model.generate(
                    torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=None,
                    pad_token_id=0,
                )[0].tolist()  # fmt: skip
            *events, _ = client.generate(text, max_tokens=64, ignore_eos=True)
            assert [e.token.token_id for e in events] == whole[len(ids) :]
            assert "".join(e.token.text for e in events) == tokenizer.decode(whole[len(ids) :])
