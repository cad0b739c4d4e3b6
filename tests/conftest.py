"""Settings of every test run, and the way to the shared data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

torch.set_num_threads(1)  # tiny models are slower on more, and test processes share the machine


def shared(*parts: str) -> Path:
    """A path under the shared data directory; the test is skipped if it is not there."""
    root = Path(os.environ.get("RANKSHIFT_SHARED", Path(__file__).parents[2] / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"shared data is not here: {path.name}")
    return path


@pytest.fixture(name="shared")
def shared_fixture():
    """:func:`shared` as a fixture."""
    return shared


# ---- tiny models, as directories that transformers loads ------------------------------------------------------------


def word_tokenizer(words, template: str | None = None):
    """A tokenizer of whole words with BERT's special tokens; unknown words are [UNK]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(set(words) - set(special))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, chat_template=template, **names)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A BERT of random weights that knows the commonest words of SST-2; trained as a masked LM, so without a head."""
    import gzip
    import json
    from collections import Counter

    from transformers import BertConfig, BertForMaskedLM

    directory = tmp_path_factory.mktemp("models") / "tiny-bert"
    with gzip.open(shared("data/glue/sst2_dev.jsonl.gz"), "rt") as file:
        words = Counter(word for row in file for word in json.loads(row)["text"].lower().split())
    tokenizer = word_tokenizer([word for word, _ in words.most_common(500)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    """A ViT of random weights for images of 16 × 16."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    directory = tmp_path_factory.mktemp("models") / "tiny-vit"
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    ViTModel(config).save_pretrained(directory)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory)
    return directory


CHAT = (
    "{% for m in messages %}[CLS] {{ m.role }} "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} [SEP]{% endgeneration %}"
    "{% else %}{{ m.content }} [SEP]{% endif %} {% endfor %}{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A Llama of random weights whose tokenizer knows a few words and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    words = "user assistant hello how are you fine thanks what is two and one three a b c d e f ? . question answer :"
    tokenizer = word_tokenizer(words.split(), CHAT)
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
