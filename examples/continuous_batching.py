"""Serving: many requests at once over one paged cache of keys and values; they join and leave at any step.

A small GPT is trained for a moment and then continues pieces of its text. What is waiting joins as soon as there are
blocks for it (its prompt goes through the model at once), every step gives each request in the batch one more
character, and who is done leaves and gives its blocks back. All of it is `attention_decode`; at the end each request is
generated once more, alone and without any cache, and must have got the same characters.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pykernels.functional import attention_decode
from pykernels.testing.models.gpt import GPT, task
from pykernels.testing.text import Text, default_text, read_text


@dataclass
class Request:
    """`tokens`: the prompt, then what was generated for it; `wanted` of them in all. `blocks`: where its keys are."""

    tokens: list[int]
    wanted: int
    blocks: list[int] = field(default_factory=list)


class Server:
    """A GPT's layers over a cache in blocks, shared by the requests of a batch."""

    def __init__(self, model: GPT, blocks: int, block_size: int, most: int) -> None:
        attention = model.layers[0].attention
        size = attention.query.out_features // attention.heads
        shape = (len(model.layers), blocks, attention.heads, block_size, size)
        self.model, self.most, self.block_size = model, most, block_size
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.free = list(range(blocks))

    @torch.no_grad()
    def next_tokens(self, requests: list[Request], count: int) -> list[int]:
        """The token after each request's, whose last `count` tokens have no keys in the cache yet."""
        tokens = torch.tensor([request.tokens[-count:] for request in requests])
        lengths = torch.tensor([len(request.tokens) for request in requests], dtype=torch.int32)
        table = torch.zeros(len(requests), max(len(request.blocks) for request in requests), dtype=torch.int32)
        for row, request in zip(table, requests, strict=True):
            row[: len(request.blocks)] = torch.tensor(request.blocks)
        place = lengths[:, None] - count + torch.arange(count)
        block, within = table.gather(1, (place // self.block_size).long()).long(), (place % self.block_size).long()
        x = self.model.token(tokens) + self.model.position(place)
        for n, layer in enumerate(self.model.layers):
            y, attention = layer.norms[0](x), layer.attention
            parts = attention.query(y), *attention.key_value(y).chunk(2, -1)
            query, key, value = (part.unflatten(-1, (attention.heads, -1)) for part in parts)
            self.keys[n][block, :, within], self.values[n][block, :, within] = key, value
            out = attention_decode(query.transpose(1, 2), self.keys[n], self.values[n], lengths, block_table=table)
            x = x + attention.out(out.transpose(1, 2).flatten(-2))
            x = x + layer.mlp(layer.norms[1](x))
        chosen: list[int] = self.model.head(self.model.norm(x[:, -1])).argmax(-1).tolist()
        return chosen

    def run(self, requests: list[Request]) -> Iterator[int]:
        """Serves them all; yields how many were in the batch of each step."""
        waiting, running = deque(requests), list[Request]()
        while waiting or running:
            while waiting and len(running) < self.most and self.admit(waiting[0]):
                running.append(waiting.popleft())
                running[-1].tokens += self.next_tokens(running[-1:], len(running[-1].tokens))
            if not running:
                raise ValueError(f"a request for {waiting[0].wanted} tokens does not fit in the cache")
            for request in [r for r in running if len(r.tokens) >= r.wanted]:
                running.remove(request)
                self.free += request.blocks
            if running:
                for request, token in zip(running, self.next_tokens(running, 1), strict=True):
                    request.tokens.append(token)
                yield len(running)

    def admit(self, request: Request) -> bool:
        """Takes blocks for all that the request will need, if there are as many."""
        needed = -(-request.wanted // self.block_size)
        if needed > len(self.free):
            return False
        request.blocks, self.free = self.free[:needed], self.free[needed:]
        return True


@torch.no_grad()
def alone(model: GPT, prompt: list[int], wanted: int) -> list[int]:
    """One request by itself: the whole sequence through the model for each token."""
    tokens = list(prompt)
    while len(tokens) < wanted:
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


def trained(text: Text, small: bool, steps: int) -> GPT:
    made = task(text, small)
    torch.manual_seed(0)
    model: GPT = made.build(made.functions("pykernels"))
    optimizer = made.optimizer(model)
    for batch in made.batches(steps):
        model(*batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def requests_for(model: GPT, ids: Tensor, count: int) -> list[Request]:
    """Pieces of the text of several lengths, to be continued by several lengths."""
    longest = model.position.num_embeddings
    found = []
    for n in range(count):
        start, prompt = 997 * n % (len(ids) - longest), 3 + 5 * n % (longest // 3)
        found.append(Request(ids[start : start + prompt].tolist(), prompt + 3 + 7 * n % (longest // 2)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose that Python ships)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument("--small", action="store_true", help="toy sizes, for a quick look")
    options = parser.parse_args()
    text = read_text(options.text) if options.text else default_text()
    characters = text.characters()
    model = trained(text, options.small, options.steps)
    requests = requests_for(model, characters.ids, 12)
    prompts = [list(request.tokens) for request in requests]
    server = Server(model, blocks=48, block_size=8, most=6)
    start = time.perf_counter()
    batches = list(server.run(requests))
    together = time.perf_counter() - start
    start = time.perf_counter()
    expected = [alone(model, prompt, len(r.tokens)) for prompt, r in zip(prompts, requests, strict=True)]
    apart = time.perf_counter() - start
    equal = expected == [request.tokens for request in requests]
    spelled = ["".join(characters.vocabulary[t] for t in request.tokens) for request in requests]
    print(f"{len(requests)} requests in {len(batches)} steps of {min(batches)} to {max(batches)}: {together:.2f} s")
    print(f"one at a time, without a cache: {apart:.2f} s; characters: {'equal' if equal else 'DIFFERENT'}")
    print(f"for example {spelled[-1][: len(prompts[-1])]!r} -> {spelled[-1][len(prompts[-1]) :]!r}")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
