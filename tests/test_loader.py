"""The order of samples against Megatron's rules walked token by token, and the targets. No device needed."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakern.config import ConfigError
from megakern.data.files import DataError
from megakern.data.indexed import IndexedDataset, IndexedWriter
from megakern.data.loader import Loader, SampleOrder, check_vocabulary, validation_batches


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def dataset(folder, lengths, dtype=np.int32):
    """Documents of these lengths; every token of the dataset is another number."""
    next_token = 0
    with IndexedWriter(folder / "x", dtype) as writer:
        for length in lengths:
            writer.add_document(np.arange(next_token, next_token + length))
            next_token += length
    return IndexedDataset(folder / "x")


def megatron_epoch(documents, T, seed):
    """The samples of one epoch by Megatron's rules, token by token.

    Documents are shuffled; a greedy walk takes T + 1 tokens a sample, and starts the next on the last token of the one
    before; the same generator shuffles the samples.
    """
    generator = np.random.RandomState(seed)
    order = np.arange(len(documents), dtype=np.int32)
    generator.shuffle(order)
    tokens = iter([token for k in order for token in documents[k]])
    walked, sample = [], [next(tokens)]
    for token in tokens:
        sample.append(token)
        if len(sample) == T + 1:
            walked.append(sample)
            sample = [token]
    places = np.arange(len(walked), dtype=np.uint32)
    generator.shuffle(places)
    return [walked[place] for place in places]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), T=st.integers(1, 30), seed=st.integers(0, 2**32 - 1)
)
def test_the_first_epoch_is_megatrons(tmp_path, lengths, T, seed):
    if sum(lengths) < T + 1:
        lengths = [*lengths, T + 1]
    data = dataset(tmp_path, lengths)
    order = SampleOrder(data, T, seed)
    expected = megatron_epoch([data[i].tolist() for i in range(len(data))], T, seed)
    assert [order.tokens(i).tolist() for i in range(order.samples_per_epoch)] == expected


def test_the_first_epoch_is_numpys_by_hand(tmp_path):
    """RandomState(1): shuffle of 3 documents is [0, 2, 1], then of 4 samples [2, 1, 3, 0]; lengths 3, 4, 2, T = 2."""
    generator = np.random.RandomState(1)
    documents, samples = np.arange(3), np.arange(4)
    generator.shuffle(documents)
    generator.shuffle(samples)
    assert documents.tolist() == [0, 2, 1] and samples.tolist() == [2, 1, 3, 0]
    order = SampleOrder(dataset(tmp_path, [3, 4, 2]), 2, 1)  # the stream is 0 1 2, 7 8, 3 4 5 6
    assert [order.tokens(i).tolist() for i in range(4)] == [[8, 3, 4], [2, 7, 8], [4, 5, 6], [0, 1, 2]]


def test_every_epoch_holds_every_sample_once_and_in_its_own_order(tmp_path):
    data = dataset(tmp_path, [5, 9, 1, 30, 0, 12])
    order = SampleOrder(data, 4, 7)
    n = order.samples_per_epoch
    assert n == (57 - 1) // 4
    epochs = [[order.tokens(e * n + i) for i in range(n)] for e in range(4)]
    for epoch in epochs:
        predicted = np.concatenate([row[1:] for row in epoch])
        assert len(set(predicted.tolist())) == n * 4, "a target twice"
    assert len({str(epoch) for epoch in epochs}) == 4
    assert {str(epoch) for epoch in epochs[1:]}.isdisjoint(
        str([SampleOrder(data, 4, 8).tokens(e * n + i) for i in range(n)]) for e in range(1, 4)
    )


def test_order_is_a_function_of_seed_and_index_alone(tmp_path):
    data = dataset(tmp_path, [13, 7, 25])
    forward = SampleOrder(data, 4, 3)
    rows = [forward.tokens(i).tolist() for i in range(60)]
    backward = SampleOrder(data, 4, 3)
    assert [backward.tokens(i).tolist() for i in reversed(range(60))] == rows[::-1]
    assert len(backward._epochs) == 2, "memory of two epochs"


def test_later_epochs_never_change(tmp_path):
    """Written down once: a resumed run of a newer version must see the same data."""
    order = SampleOrder(dataset(tmp_path, [6, 5, 8]), 3, 42)
    n = order.samples_per_epoch
    assert n == 6
    assert [order.tokens(n + i).tolist()[0] for i in range(n)] == [0, 14, 11, 7, 3, 17]


def test_batches_are_the_samples_and_targets_one_ahead(tmp_path):
    data = dataset(tmp_path, [13, 7, 25], np.uint16)
    loader, order = Loader(data, 4, 3), SampleOrder(data, 4, 3)
    tokens, targets = loader.batch(8, 6)  # 11 samples an epoch: across two
    assert tokens.dtype == targets.dtype == torch.int64 and tokens.is_contiguous() and targets.is_contiguous()
    for row in range(6):
        sample = order.tokens(8 + row).tolist()
        assert tokens[row].tolist() == sample[:-1] and targets[row].tolist() == sample[1:]
    parts = [loader.batch(8 + i, 2)[0] for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), tokens), "ranks that take parts of a batch see the same data"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 1),
    T=st.integers(1, 12),
    batch=st.integers(1, 4),
    ranks=st.integers(1, 3),
)
def test_validation_predicts_every_token_once(tmp_path, lengths, T, batch, ranks):
    data = dataset(tmp_path, lengths)
    pairs = []
    for rank in range(ranks):
        for tokens, targets in validation_batches(data, T, batch, shard=(rank, ranks)):
            assert tokens.shape == targets.shape and tokens.shape[1] == T and 1 <= len(tokens) <= batch
            real = targets != -100
            assert bool((tokens[~real] == 0).all())
            pairs += zip(tokens[real].tolist(), targets[real].tolist(), strict=True)
    assert sorted(pairs) == [(i, i + 1) for i in range(sum(lengths) - 1)]


def test_validation_windows_by_hand(tmp_path):
    got = [(x.tolist(), y.tolist()) for x, y in validation_batches(dataset(tmp_path, [4, 4]), 3, 2)]
    assert got == [([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]]), ([[6, 0, 0]], [[7, -100, -100]])]


def test_vocabulary_check_names_the_token(tmp_path, monkeypatch):
    monkeypatch.setattr("megakern.data.loader._CHUNK", 4)
    data = dataset(tmp_path, [5, 6])
    check_vocabulary(data, 11)
    with pytest.raises(
        DataError, match=r"x\.bin: token 9 is 9, and the model has a vocabulary of 9; use the tokenizer"
    ):
        check_vocabulary(data, 9)
    with IndexedWriter(tmp_path / "x", np.int16) as writer:
        writer.add_document([3, -2])
    with pytest.raises(DataError, match="token 1 is -2"):
        check_vocabulary(IndexedDataset(tmp_path / "x"), 9)


def test_wrong_arguments_are_named(tmp_path):
    data = dataset(tmp_path, [3, 2])
    assert SampleOrder(data, 4, 0).samples_per_epoch == 1
    with pytest.raises(
        DataError, match=r"x\.bin: one sample of sequence_length = 5 needs 6 tokens, there are 5; shorten"
    ):
        SampleOrder(data, 5, 0)
    with pytest.raises(ConfigError, match="sequence_length must be 1 or more, got 0"):
        SampleOrder(data, 0, 0)
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match=rf"the data seed must be from 0 to 2\^32 - 1, got {seed}"):
            SampleOrder(data, 4, seed)
    with pytest.raises(ConfigError, match="a sample index must be 0 or more, got -1"):
        Loader(data, 4, 0).batch(-1, 1)
    with pytest.raises(ConfigError, match="a batch must have 1 sample or more, got 0"):
        Loader(data, 4, 0).batch(0, 0)
    with pytest.raises(ConfigError, match="sequence_length must be 1 or more, got 0"):
        validation_batches(data, 0, 1)
    with pytest.raises(ConfigError, match="a batch must have 1 window or more, got 0"):
        validation_batches(data, 4, 0)
    with pytest.raises(ConfigError, match=r"shard must be \(rank, ranks\) with 0 <= rank < ranks, got \(2, 2\)"):
        validation_batches(data, 4, 1, shard=(2, 2))
    with pytest.raises(DataError, match="validation needs 2 tokens or more, there are 1"):
        validation_batches(dataset(tmp_path, [1]), 4, 1)


def test_a_token_outside_the_vocabulary_is_found_when_its_batch_is_read(tmp_path):
    with IndexedWriter(tmp_path / "wide", np.int32) as writer:
        writer.add_document(np.arange(10))
        writer.add_document(np.array([50, 3, 3, 3, 3]))
    dataset = IndexedDataset(tmp_path / "wide")
    check_vocabulary(dataset, 40, limit=10)
    with pytest.raises(DataError, match=r"token 10 is 50, and the model has a vocabulary of 40"):
        check_vocabulary(dataset, 40)
    loader = Loader(dataset, 4, 0, vocab_size=40)
    with pytest.raises(DataError, match=r"samples from 0: token \d+ is 50"):
        loader.batch(0, loader.order.samples_per_epoch)
    assert Loader(dataset, 4, 0, vocab_size=51).batch(0, 3)[0].shape == (3, 4)
