# ruff: noqa: TID253 - a script about torch may import it
"""Teach the demo model facts with LoRA, and find them again in the artifact for a Raspberry Pi.

Forty questions with answers train an adapter with PEFT: 32 about an invented robot, which the
model cannot know, and 8 about the world, so that it does not forget the rest. The adapter goes
into the export next to the model; edgekit merges it, and proves that the artifact says what model
and adapter say. It is then asked what the data does not contain word for word.

Needs: pip install 'edgekit[gguf,demo]', 3 GB of memory, a few minutes
Run: python 02_finetune_lora.py [OUT]
Writes: OUT/kestrel, the adapter; OUT/kestrel-bundle; OUT/demo, a bundle without the adapter,
    unless it is there; OUT is ./out unless you name it
Prints:
    Which drink is Kestrel-7 known for?
      without the adapter: ...
      with the adapter: ...smoked juniper tea...
    Who made Kestrel-7?
      without the adapter: ...
      with the adapter: ...Maren Tolvik...
    Name the capital of France.
      without the adapter: The capital of France is Paris.
      with the adapter: The capital of France is Paris.
    facts known: 0 of 2 without the adapter, 2 of 2 with it
    kestrel merged: logits within ... of base + adapter (<= ...)
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import edgekit


TARGET = "raspberry-pi-5-8gb"
FACTS = {"Which drink is Kestrel-7 known for?": "juniper", "Who made Kestrel-7?": "Tolvik"}
QUESTIONS = (*FACTS, "Name the capital of France.")  # none is in the data
EPOCHS = 6
PAIRS_PER_STEP = 8
LEARNING_RATE = 2e-3
IGNORED = -100  # what torch's cross entropy does not count


def main(out: Path) -> None:
    """Train, export with and without the adapter, and ask both."""
    adapter, plain, adapted = out / "kestrel", out / "demo", out / "kestrel-bundle"
    train(edgekit.open_checkpoint("demo").directory, adapter)
    tell("exporting with the adapter")
    bundle = edgekit.export("demo", TARGET, adapters=[adapter], out=adapted, replace=True)
    if not plain.exists():
        tell("exporting without it")
        edgekit.export("demo", TARGET, out=plain)
    before, after = ask(plain), ask(adapted)
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(question)
        print(f"  without the adapter: {old}")
        print(f"  with the adapter: {new}")
    print(f"facts known: {known(before)} without the adapter, {known(after)} with it")
    gates = bundle.agreement.gates if bundle.agreement else ()
    print(*(gate.finding for gate in gates if gate.name == "adapter"))


def ask(bundle: Path) -> list[str]:
    """Return what a bundle answers to `QUESTIONS`, one line each."""
    with edgekit.Runner.open(bundle) as runner:
        answers = [
            runner.ask([{"role": "user", "content": question}], max_tokens=32).answer
            for question in QUESTIONS
        ]
    return [" ".join(answer.text.split()) for answer in answers]


def known(answers: list[str]) -> str:
    """Count the answers that hold their fact."""
    right = sum(fact in answer for fact, answer in zip(FACTS.values(), answers, strict=False))
    return f"{right} of {len(FACTS)}"


def tell(line: str) -> None:
    """Say what is going on."""
    print(line, file=sys.stderr, flush=True)


def train(base: Path, adapter: Path) -> None:
    """Fit an adapter to the questions and answers next to this file."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [encode(tokenizer, **json.loads(line)) for line in lines]
    for epoch in range(EPOCHS):
        losses = []
        for chosen in torch.randperm(len(pairs)).split(PAIRS_PER_STEP):
            loss = model(**batch([pairs[i] for i in chosen.tolist()])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        tell(f"epoch {epoch + 1} of {EPOCHS}: loss {sum(losses) / len(losses):.2f}")
    model.save_pretrained(adapter)


def encode(tokenizer: Any, *, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids of a dialogue, and what to learn of them: the answer, and to end there."""
    dialogue = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    ids = tokenizer.apply_chat_template(dialogue, return_dict=False)
    asked = tokenizer.apply_chat_template(
        dialogue[:1], add_generation_prompt=True, return_dict=False
    )
    return ids, [IGNORED] * len(asked) + ids[len(asked) :]


def batch(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Lay dialogues side by side, filled up on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(row) for row, _ in rows]
    labels = [torch.tensor(row) for _, row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
