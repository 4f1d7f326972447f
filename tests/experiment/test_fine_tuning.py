from __future__ import annotations

from dataclasses import replace

import pytest
import transformers

from unmerge.errors import UnmergeError
from unmerge.experiment.fine_tuning import _collate, encode, fine_tune, relative_norm
from unmerge.experiment.presets import PRESETS
from unmerge.experiment.tasks import TASKS, Example
from unmerge.experiment.training import character_tokenizer, draw_examples, relative_delta_norm

TEMPLATE = (
    "{% for message in messages %}<bos>{{ message.role }}:{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TRAINING = replace(PRESETS["micro"].training, rank=2, alpha=4, epochs=1, batch=2, learning_rate=5e-3, chat=False)


@pytest.fixture
def tokenizer():
    found = character_tokenizer()
    found.chat_template = TEMPLATE
    return found


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_a_chat_prompt_stands_in_the_template_and_only_the_answer_is_labelled(tokenizer):
    ids, labels = encode(tokenizer, Example("2+2?", "4"), chat=True, max_length=100)
    assert text(tokenizer, ids) == "<bos>user:2+2?;assistant:4<eos>"
    assert text(tokenizer, [label for label in labels if label != -100]) == "4<eos>"
    assert len(ids) == len(labels)


def test_without_a_template_the_answer_is_on_a_line_of_its_own(tokenizer):
    ids, _ = encode(tokenizer, Example("2+2?", "4"), chat=False, max_length=100)
    assert text(tokenizer, ids) == "<bos>2+2?\n4<eos>"


def test_a_long_prompt_is_cut_inside_the_template(tokenizer):
    ids, labels = encode(tokenizer, Example("x" * 500, "yes"), chat=True, max_length=40)
    assert len(ids) <= 40
    assert text(tokenizer, ids).startswith("<bos>user:xxx")
    assert text(tokenizer, ids).endswith("x;assistant:yes<eos>")
    assert sum(label != -100 for label in labels) == 4


def test_a_long_answer_leaves_half_of_the_length_to_the_prompt(tokenizer):
    ids, labels = encode(tokenizer, Example("x" * 500, "y" * 500), chat=True, max_length=60)
    assert len(ids) <= 60
    assert sum(label != -100 for label in labels) == 30


def test_rows_are_padded_to_the_longest():
    import torch

    inputs, labels = _collate([([5, 6, 7], [-100, 6, 7]), ([8], [8])], torch.device("cpu"))
    assert inputs.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[-100, 6, 7], [8, -100, -100]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss_and_gives_the_same_bytes_twice(tiny_world, tmp_path, dtype):
    train, tests = draw_examples(TASKS["imdb_sentiment"], 0, 24, 4)
    training = replace(TRAINING, dtype=dtype, accumulation=2)
    records = [
        fine_tune(tiny_world.base, train, tests, tmp_path / name, training=training, seed=1) for name in ("a", "b")
    ]
    assert records[0].loss_after < records[0].loss_before
    assert (records[0].loss_before, records[0].loss_after) == (records[1].loss_before, records[1].loss_after)
    first, again = (tmp_path / name / "adapter_model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()


def test_a_snapshot_is_an_earlier_checkpoint_of_the_same_run(tiny_world, tmp_path):
    train, tests = draw_examples(TASKS["imdb_sentiment"], 0, 8, 4)
    training = replace(TRAINING, epochs=2)
    early, last, alone = (tmp_path / name for name in ("early", "last", "alone"))
    fine_tune(tiny_world.base, train, tests, last, training=training, seed=1, snapshots={1: early})
    fine_tune(tiny_world.base, train, tests, alone, training=training, seed=1)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (early, last, alone)]
    assert weights[1] == weights[2] != weights[0]
    assert relative_norm(early, tiny_world.base) < relative_norm(last, tiny_world.base)


def test_a_chat_base_is_trained_by_the_same_code(tiny_world, tokenizer, tmp_path):
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_world.base).save_pretrained(base)
    tokenizer.save_pretrained(base)
    train, tests = draw_examples(TASKS["imdb_sentiment"], 0, 4, 2)
    training = replace(TRAINING, chat=True)
    record = fine_tune(base, train, tests, tmp_path / "adapter", training=training, seed=1)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert record.loss_after != record.loss_before


def test_the_relative_norm_is_that_of_the_dense_change(tiny_world):
    adapter = tiny_world.adapter("xsum")
    assert relative_norm(adapter, tiny_world.base) == pytest.approx(
        relative_delta_norm(adapter, tiny_world.base), rel=1e-5
    )


def test_nothing_to_train_on_is_refused(tiny_world, tmp_path):
    with pytest.raises(UnmergeError, match="0 examples to train on and 0 to test on"):
        fine_tune(tiny_world.base, [], [], tmp_path, training=TRAINING, seed=0)
