"""What a compressed model says of itself: which weights train, and whether its embeddings are tied."""

from __future__ import annotations

import io_models as models
import pytest
import transformers
from test_compressed import ended

import rankshift as rs


def test_what_was_frozen_in_the_model_that_is_filled_stays_frozen(tmp_path):
    ended("mixed").export(tmp_path / "out", format="compressed")
    model = models.mixed(seed=5)
    model.embed.requires_grad_(False)
    loaded = rs.load_compressed(tmp_path / "out", model)
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {"embed.weight"}


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_the_config_says_whether_embeddings_are_tied(untied: bool, tmp_path):
    """transformers ties by it: what was trained apart would be one again in the next save and load."""
    run = ended("llama", models.llama(tie=True), **({"modules_to_save": ("lm_head",)} if untied else {}))
    assert run.model.config.tie_word_embeddings is True
    model = run.compress()
    assert model.config.tie_word_embeddings is not untied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not untied
    model.config.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.tie_word_embeddings is not untied
