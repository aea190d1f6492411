"""A drafter knows how long its training rows were, and says once that it drafts behind longer
contexts.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from tests.fakes import tiny_target


def test_decoding_beyond_the_trained_length_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tiny_target()
    save_pretrained(
        Medusa(target.shape, 2).double(), tmp_path, Provenance.of(target, data={"max_length": 20})
    )
    drafter = load_pretrained(tmp_path, target)
    assert isinstance(drafter, Medusa) and drafter.trained_length == 20
    decoder = SpeculativeDecoder(target, drafter, name="of twenty")
    with caplog.at_level(logging.WARNING):
        decoder.decode([[7] * 8], Sampling(), 12)
        assert "of twenty" not in caplog.text
        for _ in range(2):
            decoder.decode([[7] * 9], Sampling(), 12)
    assert caplog.text.count("of twenty was trained on rows of 20 tokens (data.max_length)") == 1


def test_a_folder_that_does_not_say_so_warns_of_nothing(tmp_path: Path) -> None:
    target = tiny_target()
    save_pretrained(Medusa(target.shape, 2), tmp_path, Provenance.of(target))
    assert load_pretrained(tmp_path, target).trained_length is None
