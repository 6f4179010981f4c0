"""Tiny real models, made where a test runs: no weights are downloaded.

Run as a program it makes one in a folder: `python tests/support/tiny_models.py FOLDER`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.models.llm.answers import Contract, Question
from builder.models.llm.conversation import Conversation

#: The groups of the talks that `group_talks` has; the refused one is never portrayed.
GROUPS = [["Black", "Asian"], ["man", "woman"]]
REFUSED = "Asian woman"
REFUSAL = "I'm sorry, but I can't help with that."
SYSTEM = "Rewrite the sentence."
#: Least lead of every token of a taught answer over the next best one, as a difference of logits: rounding, which
#: differs with the processor, the threads and the batch, moves them by less than a thousandth of it.
MARGIN = 2.0

Talks = Sequence[tuple[list[dict[str, str]], str]]


def caption(number: int) -> str:
    return f"a person with a hat is standing in the street number {number}"


def group_talks(captions: Sequence[str]) -> Talks:
    """Every caption with every group, and its answer: a sentence that portrays the group, or a refusal.

    A refused one has a second turn, in which it is asked for again, and refused again.
    """
    talks = []
    for text, group in itertools.product(captions, map(" ".join, itertools.product(*GROUPS))):
        user = f'sentence: "{text}" group: "{group}"'
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        talks.append((messages, REFUSAL if group == REFUSED else portrait(group)))
        if group == REFUSED:
            talk = Conversation(Contract(), messages, Question(text, user), retries=1)
            talk.hear(REFUSAL)
            talks.append((talk.messages, REFUSAL))
    return talks


def portrait(group: str) -> str:
    return f"A {group} with a hat is standing in the street."


def tiny_llama(folder: Path, talks: Talks, *, steps: int = 400) -> Path:
    """A Llama of 0.4 million parameters that gives the answers of these talks, with a tokenizer of its own.

    What it says in a talk that it was not taught hangs on rounding: teach every turn that a test asks for.

    Raises:
        RuntimeError: it has not learnt them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(text for messages, answer in talks for text in (*_contents(messages), answer))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    examples = [_example(tokenizer, messages, answer) for messages, answer in talks]
    every = _padded(examples, tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    least = -math.inf
    for step in range(1, steps + 1):
        chosen = torch.randint(len(examples), (8,), generator=order).tolist()
        loss = model(**_padded([examples[i] for i in chosen], tokenizer.eos_token_id)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and (least := _least_margin(model, every)) >= MARGIN:
            break
    else:
        raise RuntimeError(f"the tiny model has not learnt its answers in {steps} steps: margin {least:.2f}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _contents(messages: Sequence[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def _tokenizer(texts: Any) -> Any:
    """Byte-level BPE with three roles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE(unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        model_max_length=2048,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def _example(tokenizer: Any, messages: list[dict[str, str]], answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a talk with its answer, and what is to be learnt of them: the answer alone."""
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    head = tokenizer(asked, add_special_tokens=False)["input_ids"]
    tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return head + tail, [-100] * len(head) + tail


def _least_margin(model: Any, batch: dict[str, Any]) -> float:
    """The least lead of a token of these answers over the next best one; negative if one of them is not given."""
    import torch

    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    is_learnt = labels != -100
    logits, labels = logits[is_learnt], labels[is_learnt].unsqueeze(1)
    right = logits.gather(1, labels).squeeze(1)
    others = logits.scatter(1, labels, -math.inf).amax(1)
    return float((right - others).min())


def _padded(examples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Any]:
    import torch

    longest = max(len(tokens) for tokens, _ in examples)
    missing = [longest - len(tokens) for tokens, _ in examples]
    return {
        "input_ids": torch.tensor([tokens + [pad] * n for (tokens, _), n in zip(examples, missing, strict=True)]),
        "labels": torch.tensor([labels + [-100] * n for (_, labels), n in zip(examples, missing, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(tokens) + [0] * n for (tokens, _), n in zip(examples, missing, strict=True)]
        ),
    }


if __name__ == "__main__":
    tiny_llama(Path(sys.argv[1]), group_talks([caption(i) for i in range(4)]))
