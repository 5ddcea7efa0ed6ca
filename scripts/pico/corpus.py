"""The text that pico is trained and measured on, and its tokens.

It collects documents from the running interpreter's standard library, decides which are held out,
and trains the tokenizer. It knows nothing about models, and does without torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pico import END_OF_TEXT, END_OF_TEXT_ID, Tokens

HELD_OUT_ONE_IN = 20

SKIPPED_DIRECTORIES = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test",
    "encodings",  # character tables, not prose and not code
    "pydoc_data",  # read as plain text by topic_documents()
}  # fmt: skip
BUILTIN_MODULES = (
    "_bisect", "_codecs", "_collections", "_csv", "_functools", "_heapq", "_io", "_json", "_random",
    "_socket", "_sre", "_struct", "_thread", "_warnings", "_weakref", "array", "atexit", "binascii",
    "builtins", "cmath", "errno", "faulthandler", "fcntl", "gc", "itertools", "marshal", "math",
    "mmap", "posix", "pwd", "resource", "select", "signal", "sys", "time", "types", "unicodedata",
    "zlib",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One separately shuffled piece of text; `held_out` ones are never trained on."""

    name: str
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Whole files are held out, by name, so that the split is the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def source_documents(stdlib: Path) -> Iterator[Document]:
    """Every .py and .txt file of the standard library, without tests and generated tables."""
    for path in sorted(stdlib.rglob("*")):
        name = path.relative_to(stdlib).as_posix()
        skipped = SKIPPED_DIRECTORIES.intersection(name.split("/")) or "config-" in name
        if skipped or path.suffix not in {".py", ".txt"} or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 64:
            yield Document(name, text, is_held_out(name))


def docstring_document(source: Document) -> Document | None:
    """The longer docstrings of a module as plain prose, so that unindented text is learnt too."""
    try:
        tree = ast.parse(source.text)
    except SyntaxError:
        return None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    prose = "\n\n".join(text for text in texts if len(text) >= 160)
    return Document(f"docstrings:{source.name}", prose + "\n", source.held_out) if prose else None


def topic_documents() -> Iterator[Document]:
    """The language reference, as `help("with")` shows it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        yield Document(f"topic:{topic}", text, is_held_out(f"topic:{topic}"))


def method_docstrings(owner: str, member: object) -> Iterator[str]:
    """The longer docstrings of a class's own attributes; nothing for what is not a class."""
    attributes = vars(member) if inspect.isclass(member) else {}
    for name, attribute in sorted(attributes.items()):
        doc = getattr(attribute, "__doc__", None)
        if not name.startswith("__") and isinstance(doc, str) and len(doc) > 60:
            yield f"{owner}.{name}\n\n{doc}"


def builtin_documents() -> Iterator[Document]:
    """Docstrings of what is written in C: the module, its members, and theirs."""
    for module_name in BUILTIN_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        parts = [inspect.getdoc(module) or ""]
        for member_name, member in sorted(vars(module).items()):
            if member_name.startswith("__") or not (inspect.isclass(member) or callable(member)):
                continue
            parts.append(f"{module_name}.{member_name}\n\n{inspect.getdoc(member) or ''}")
            parts.extend(method_docstrings(member_name, member))
        name = f"builtin:{module_name}"
        yield Document(name, "\n\n".join(parts) + "\n", is_held_out(name))


def collect_documents() -> list[Document]:
    """The corpus, in a fixed order."""
    sources = list(source_documents(Path(sysconfig.get_path("stdlib"))))
    documents = [*sources, *topic_documents(), *builtin_documents()]
    for source in sources:
        prose = docstring_document(source) if source.name.endswith(".py") else None
        if prose is not None and not prose.held_out:  # held-out text is not counted twice
            documents.append(prose)
    assert len({document.name for document in documents}) == len(documents)
    return documents


def corpus_digest(documents: list[Document]) -> str:
    """sha256 over names and texts: two machines with the same digest train on the same text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.name.encode()).digest())
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so any text makes the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[Tokens]:
    """Each document's tokens, ended by the separator."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.int64) for encoding in encodings]


@dataclass(frozen=True)
class Corpus:
    """Token streams. `held_out` starts with a separator, so its first real token has a context."""

    train_documents: list[Tokens]
    held_out: Tokens
    train_bytes: int
    held_out_bytes: int
    document_count: int
    digest: str

    @property
    def train_tokens(self) -> int:
        return sum(len(document) for document in self.train_documents)


def tokenize_corpus(documents: list[Document], tokenizer: Tokenizer) -> Corpus:
    train = [document.text for document in documents if not document.held_out]
    held_out = [document.text for document in documents if document.held_out]
    separator = np.array([END_OF_TEXT_ID], dtype=np.int64)
    return Corpus(
        train_documents=encode_documents(tokenizer, train),
        held_out=np.concatenate([separator, *encode_documents(tokenizer, held_out)]),
        train_bytes=sum(len(text.encode()) for text in train),
        held_out_bytes=sum(len(text.encode()) for text in held_out),
        document_count=len(documents),
        digest=corpus_digest(documents),
    )
