"""A prepared folder of made-up text, where there is no data yet: counting sequences, which a model can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megakern.data.files import sha256_of_file
from megakern.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from megakern.data.manifest import SCHEMA, SPLITS, Manifest, Options, Skipped, SplitInfo, TokenizerInfo
from megakern.data.tokenizer import EOD, JsonTokenizer

NOISE = 0.1  # part of the tokens that are drawn at random
DOCUMENT = 100  # tokens; the Loader cuts samples across documents


def write_synthetic(folder: Path, *, vocab_size: int, tokens: int, seed: int) -> None:
    """Make `folder`, which `PreparedData` opens: `tokens` training tokens or a few more, over all of `vocab_size`."""
    folder.mkdir()
    vocabulary = {EOD: 0, **{str(token): token for token in range(1, vocab_size)}}
    tokenizer = JsonTokenizer({"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": EOD}})
    tokenizer.save(folder / "tokenizer.json")
    generator = np.random.default_rng(seed)
    splits = {}
    for split in SPLITS:
        with IndexedWriter(folder / split, dtype_for(vocab_size)) as writer:
            while writer.token_count < tokens:
                writer.add_document(_document(generator, vocab_size))
        splits[split] = _describe(folder / split)
    manifest = Manifest(
        schema=SCHEMA,
        dtype=np.dtype(dtype_for(vocab_size)).name,
        held_out="documents",
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, sha256=tokenizer.sha256
        ),
        skipped=Skipped(duplicate=0, empty=0, undecodable=0, unreadable=0),
        options=Options(
            tokenizer="synthetic",
            vocab_size=vocab_size,
            validation_fraction=0.5,
            text_key="text",
            include=None,
            exclude=(),
            train_bytes_limit=0,
            seed=seed,
        ),
        **splits,
    )
    (folder / "manifest.json").write_bytes(manifest.content())


def _document(generator: np.random.Generator, vocab_size: int) -> np.ndarray:
    start, stride = generator.integers(vocab_size), generator.integers(1, 4)
    text = (start + stride * np.arange(DOCUMENT)) % vocab_size
    noise = generator.random(DOCUMENT) < NOISE
    return np.where(noise, generator.integers(vocab_size, size=DOCUMENT), text)


def _describe(prefix: Path) -> SplitInfo:
    dataset = IndexedDataset(prefix)
    return SplitInfo(
        documents=len(dataset),
        tokens=dataset.token_count,
        bytes=dataset.bin_path.stat().st_size,
        bin_bytes=dataset.bin_path.stat().st_size,
        bin_sha256=sha256_of_file(dataset.bin_path),
        idx_bytes=dataset.idx_path.stat().st_size,
        idx_sha256=sha256_of_file(dataset.idx_path),
    )
