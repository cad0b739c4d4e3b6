"""Tokens, blocks, masks, rows and files."""

import gzip
import json
import lzma

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankshift.core.errors import DataError
from rankshift.train import bundled, columns, config, data, sources, tokens

documents = st.lists(st.lists(st.integers(10, 99), max_size=40), max_size=12)


@pytest.fixture
def llama(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def bundle():
    path = bundled.model_path("babyllama")
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()


# ---- the bundled model -----------------------------------------------------------------------------------------------


def nll(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_the_bundled_model_with_its_tokenizer_gives_its_published_losses(bundle, shared):
    tokenizer, model = bundle
    story = " Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    ids = tokenizer(story + "One day, she saw a big dog.", return_tensors="pt").input_ids
    assert ids[0, :5].tolist() == [1, 3, 34, 9, 22]
    assert nll(model, ids) == pytest.approx(0.1263, abs=5e-5)
    text = bundled.text("tinyshakespeare").replace("\n", " ")[: 255 * 60]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids).view(60, 255)
    blocks = torch.cat([torch.ones(60, 1, dtype=torch.long), ids], 1)
    assert nll(model, blocks) == pytest.approx(2.72, abs=5e-3)
    vocabulary = json.loads(shared("data/pretrained/babyllama_tok105/vocab.json").read_text())
    assert tokenizer.convert_ids_to_tokens(range(105)) == vocabulary


def test_the_bundled_tokenizer_gives_text_back(bundle):
    tokenizer, _ = bundle
    text = bundled.text("tinyshakespeare")
    assert len(text) == 1115394
    ids = tokenizer(text[:5000], verbose=False).input_ids
    assert len(ids) == 5001
    assert tokenizer.decode(ids, skip_special_tokens=True) == text[:5000]


def test_what_is_shipped_is_small_and_has_its_licence():
    root = bundled.RECIPE.parent
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) < 5_000_000
    for directory in (entry for entry in root.iterdir() if entry.is_dir()):
        assert (directory / "LICENSE").stat().st_size > 100
        assert (directory / "README.md").is_file()


# ---- blocks ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(documents, st.integers(2, 17), st.booleans(), st.booleans())
def test_blocks_lose_and_repeat_nothing(texts, length, with_bos, with_eos):
    bos, eos = (1 if with_bos else None), (2 if with_eos else None)
    made = list(tokens.blocks(texts, length, bos, eos))
    assert all(0 < len(b.ids) <= length for b in made)
    assert all(len(b.ids) == len(b.labels) == len(b.positions) for b in made)
    flat = [i for b in made for i in b.ids if i != 1]
    assert flat == [i for text in texts for i in ([*text, 2] if with_eos else text)]
    for block in made:
        assert block.positions[0] == 0
        for i, (token, label, position) in enumerate(zip(block.ids, block.labels, block.positions, strict=True)):
            assert label == (tokens.IGNORE if position == 0 else token)
            assert position == 0 or position == block.positions[i - 1] + 1
            assert not with_bos or (token == 1) == (position == 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=9), max_size=12))
def test_whole_examples_share_a_block(texts):
    examples = [tokens.document(text) for text in texts]
    made = list(tokens.bundle(examples, 9))
    assert [i for b in made for i in b.ids] == [i for text in texts for i in text]
    assert sum(b.positions.count(0) for b in made) == len(texts)  # none was cut
    assert all(len(b.ids) <= 9 for b in made)


def test_packed_texts_do_not_see_each_other(llama):
    """Logits and loss of texts in one block are those of each text alone."""
    _, model = llama
    model.config.use_cache = False
    texts = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    block = list(tokens.blocks(texts, 40, 2, 3))
    assert len(block) == 1
    batch = data.LanguageBatch(0, packed=True)(
        [vars(block[0]) | {"input_ids": block[0].ids, "position_ids": block[0].positions}]
    )
    with torch.no_grad():
        packed = model(**batch)
        at, total, count = 0, 0.0, 0
        for text in texts:
            ids = torch.tensor([[2, *text, 3]])
            alone = model(input_ids=ids, labels=ids)
            torch.testing.assert_close(packed.logits[:, at : at + ids.shape[1]], alone.logits, rtol=1e-5, atol=1e-6)
            at += ids.shape[1]
            total, count = total + alone.loss.item() * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert packed.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_padding_changes_nothing(llama):
    _, model = llama
    model.config.use_cache = False
    short, long = tokens.document([2, 5, 6, 3]), tokens.document([2, 7, 8, 9, 10, 11, 3])
    rows = [{"input_ids": e.ids, "labels": e.labels, "position_ids": e.positions} for e in (short, long)]
    for packed in (True, False):
        batch = data.LanguageBatch(0, packed)(rows)
        assert ("position_ids" in batch) is packed
        with torch.no_grad():
            both = model(**batch).logits
            alone = model(input_ids=torch.tensor([short.ids])).logits
        torch.testing.assert_close(both[:1, :4], alone, rtol=1e-5, atol=1e-6)
        assert batch["labels"][0, 4:].tolist() == [-100] * 3


# ---- prompts and chats -----------------------------------------------------------------------------------------------


def words(tokenizer, ids):
    return tokenizer.decode([i for i in ids if i != tokens.IGNORE])


def test_only_the_completion_is_learned(llama):
    tokenizer, _ = llama
    example = tokens.completion(tokenizer, "two and one ?", "three .", 2, learn_all=False)
    assert words(tokenizer, example.ids) == "[CLS] two and one ? three . [SEP]"
    assert words(tokenizer, example.labels) == "three . [SEP]"
    assert words(tokenizer, tokens.completion(tokenizer, "two", "three", 2, True).labels) == "two three [SEP]"


CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello you"},
    {"role": "user", "content": "how are you ?"},
    {"role": "assistant", "content": "fine ."},
]


def test_only_the_assistant_is_learned(llama):
    tokenizer, _ = llama
    marked = tokens.chat(tokenizer, CHAT, learn_all=False)
    assert words(tokenizer, marked.labels) == "hello you [SEP] fine . [SEP]"
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain = tokens.chat(tokenizer, CHAT, learn_all=False)
    assert (plain.ids, plain.labels) == (marked.ids, marked.labels)
    assert words(tokenizer, tokens.chat(tokenizer, CHAT, True).labels).startswith("user hello [SEP] [CLS] assistant")


def test_templates_that_cannot_serve(llama):
    tokenizer, _ = llama
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        tokens.chat(tokenizer, CHAT, False)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="the chat template refuses the messages"):
        tokens.chat(tokenizer, CHAT, False)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        tokens.chat(tokenizer, CHAT, False)


def test_sharegpt_turns_are_read():
    found = data._messages([{"from": "human", "value": "a", "role": None}, {"from": "gpt", "value": "b"}])
    assert found == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="without a role"):
        data._messages([{"content": "a"}])


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_masking_has_the_published_shares():
    ids = np.full((400, 50), 7)
    special = np.zeros_like(ids, bool)
    special[:, 0] = True
    masked, labels = tokens.mask(ids, special, 0.15, 4, 1000, np.random.default_rng(0))
    chosen = labels != tokens.IGNORE
    assert not chosen[:, 0].any()
    assert chosen[:, 1:].mean() == pytest.approx(0.15, abs=0.01)
    assert (labels[chosen] == 7).all()
    assert (masked[~chosen] == 7).all()
    assert (masked[chosen] == 4).mean() == pytest.approx(0.8, abs=0.02)
    assert (masked[chosen] == 7).mean() == pytest.approx(0.1, abs=0.02)


def test_even_a_short_row_has_something_to_predict():
    _, labels = tokens.mask(
        np.array([[2, 9, 3]]), np.array([[True, False, True]]), 0.01, 4, 9, np.random.default_rng(0)
    )
    assert labels.tolist() == [[-100, 9, -100]]


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows_of(**columns_):
    import datasets

    return datasets.Dataset.from_dict(columns_)


@pytest.mark.parametrize(
    ("names", "task", "expected"),
    [
        ({"text": "str"}, None, {"text": "text"}),
        ({"review": "str"}, None, {"text": "review"}),
        ({"sentence1": "str", "sentence2": "str", "label": "int", "idx": "int"}, None,
         {"text": "sentence1", "text2": "sentence2", "label": "label"}),
        ({"question": "str", "answer": "str"}, None, {"prompt": "question", "completion": "answer"}),
        ({"instruction": "str", "input": "str", "output": "str"}, "causal-lm",
         {"prompt": "{instruction}\n{input}", "completion": "output"}),
        ({"text": "str", "label": "int"}, "causal-lm", {"text": "text"}),
    ],
)  # fmt: skip
def test_columns_are_inferred(names, task, expected):
    rows = rows_of(**{name: ["a"] if kind == "str" else [1] for name, kind in names.items()})
    assert columns.infer(rows, {}, task).of == expected


def test_columns_as_given_and_templates():
    rows = rows_of(q=["two"], a=["three"], text=["t"])
    found = columns.infer(rows, {"prompt": "Q: {q}\nA:", "completion": "a"}, "causal-lm")
    chosen = columns.select(rows, found, "data.train")
    assert chosen.column_names == ["completion", "prompt"]
    assert chosen[0] == {"prompt": "Q: two\nA:", "completion": "three"}
    with pytest.raises(DataError, match=r"no column 'qq' .*Did you mean 'q'\?"):
        columns.infer(rows, {"prompt": "{qq}"}, None)


def test_held_out_rows_are_drawn_by_the_seed():
    rows = rows_of(text=[str(i) for i in range(100)], label=[0] * 100)
    wanted = config.DataConfig(train="x", validation=0.1)
    a, b, c = (data.split(rows, wanted, seed) for seed in (0, 0, 1))
    assert a.validation["text"] == b.validation["text"] != c.validation["text"]
    assert len(a.validation) == 10
    assert sorted([*a.train["text"], *a.validation["text"]]) == sorted(rows["text"])


def test_of_few_texts_the_end_is_held_out():
    text = " ".join(f"w{i}" for i in range(1000))
    found = data.split(rows_of(text=[text]), config.DataConfig(train="x", validation=0.1), 0)
    head, tail = found.train["text"][0], found.validation["text"][0]
    assert head + tail == text
    assert head.endswith(" ")
    assert len(tail) == pytest.approx(0.1 * len(text), rel=0.02)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.xz", "a.tsv", "a.parquet", "a.txt.xz"]
)
def test_every_kind_of_file(tmp_path, name):
    values = [{"text": "NA", "label": 1}, {"text": "null", "label": 0}, {"text": "a, b", "label": 1}]
    kind = name.removesuffix(".gz").removesuffix(".xz").rpartition(".")[2]
    if kind == "parquet":
        rows_of(text=[v["text"] for v in values], label=[v["label"] for v in values]).to_parquet(tmp_path / name)
    else:
        text = {
            "jsonl": "\n".join(map(json.dumps, values)), "json": json.dumps(values), "txt": "one\n\ntwo\n",
            "csv": 'text,label\nNA,1\nnull,0\n"a, b",1\n', "tsv": "text\tlabel\nNA\t1\nnull\t0\na, b\t1\n",
        }[kind]  # fmt: skip
        opened = {".gz": gzip.open, ".xz": lzma.open}.get(name[-3:], open)
        with opened(tmp_path / name, "wt") as file:
            file.write(text)
    found = sources.load(str(tmp_path / name), "data.train")
    assert found.to_list() == ([{"text": "one\n\ntwo\n"}] if kind == "txt" else values)


def test_globs_directories_and_lists(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "notes.doc").write_text("x")
    for spec in (str(tmp_path), str(tmp_path / "*.txt"), tuple(str(tmp_path / f"{n}.txt") for n in "abc")):
        assert sources.load(spec, "data.train")["text"][:] == ["a", "b", "c"]
    with pytest.raises(DataError, match="of no kind that can be read"):
        sources.load(str(tmp_path / "notes.doc"), "data.train")
    (tmp_path / "d.csv").write_text("text\na")
    with pytest.raises(DataError, match="mixes files of several kinds"):
        sources.load(str(tmp_path), "data.train")
    with pytest.raises(DataError, match="matches no file"):
        sources.load(str(tmp_path / "*.parquet"), "data.train")
