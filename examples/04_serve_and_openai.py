"""Serve a bundle on this machine and call it with the official `openai` client.

Needs: pip install 'edgekit[gguf,serve,demo]' openai
Run: python 04_serve_and_openai.py [OUT]
Writes: OUT/demo, a bundle of 142 MiB, unless it is there; OUT is ./out unless you name it
Prints:
    serving SmolLM2-135M-Instruct on http://127.0.0.1:...
    chat: The capital of France is Paris. (... tokens, stop)
    streamed in ... pieces: The capital of France is Paris.
"""

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

import edgekit


QUESTION = "Name the capital of France."
START_LIMIT_S = 300


def main(bundle: Path) -> None:
    """Serve, ask, and stop the server."""
    if not bundle.exists():
        edgekit.export("demo", "raspberry-pi-5-8gb", out=bundle)
    with served(bundle) as address:
        # There is no key to check, but the client insists on one.
        client = openai.OpenAI(base_url=address, api_key="none")
        model = client.models.list().data[0].id
        print(f"serving {model} on {address}")
        ask(client, model)
        ask_streaming(client, model)


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """Serve a bundle in a process of its own on a free port, as `edgekit serve` does."""
    context = multiprocessing.get_context("spawn")
    greetings = context.Queue()
    server = context.Process(
        target=edgekit.serve, args=(bundle,), kwargs={"port": 0, "say": greetings.put}
    )
    server.start()
    try:
        greeting = greetings.get(timeout=START_LIMIT_S)  # serving NAME on ADDRESS; …
        yield greeting.rpartition(" on ")[2].partition(";")[0]
    finally:
        server.terminate()
        server.join()


def ask(client: openai.OpenAI, model: str) -> None:
    """Ask and wait for the whole answer."""
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    choice, usage = completion.choices[0], completion.usage
    tokens = usage.completion_tokens if usage else 0
    print(f"chat: {choice.message.content} ({tokens} tokens, {choice.finish_reason})")


def ask_streaming(client: openai.OpenAI, model: str) -> None:
    """Ask and take the pieces as they come."""
    chunks = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    print(f"streamed in {len(pieces)} pieces: {''.join(pieces)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out") / "demo")
