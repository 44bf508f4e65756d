"""Reading through the cache equals reading at once; answers equal a naive greedy loop; memory stays flat."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from everlearn.evals.contestants import Size, choose, make
from everlearn.evals.long_context import Costs, answer, ask, read

SIZE = Size(16, 1, 2, 16, {"chunk_size": 4}, (1, 64))


@pytest.fixture(params=[c.name for c in choose(None, {}, left_out=("lstm",))])
def model(request):
    torch.manual_seed(1)
    made = make(choose([request.param], {})[0], SIZE, 11).eval()
    for p in made.parameters():
        p.data *= 3  # else every token is answered alike
    return made


def naive(model, context, question, stop, limit):
    """Greedy decoding without a cache."""
    said = []
    for _ in range(limit):
        ids = torch.tensor([[*context, *question, *said]])
        with torch.no_grad():
            token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token == stop:
            break
        said.append(token)
    return said


def test_answers_equal_those_without_a_cache(model):
    contexts = torch.randint(0, 11, (3, 23))
    questions = [[1, 2, 3], [4], [5, 6]]
    wanted = [naive(model, context.tolist(), question, 0, 5) for context, question in zip(contexts, questions)]
    for piece in (23, 5):
        reading = read(model, contexts, piece)
        assert answer(model, reading.cache, 23, questions, stop=0, limit=5) == wanted
    assert any(wanted)


def test_prompts_of_several_lengths_are_answered_in_their_order(model):
    prompts = [([1, 2, 3, 4], [5]), ([1, 2], [3, 4]), ([4, 3, 2, 1], [6, 7])]
    reader = SimpleNamespace(eos_token_id=0, decode=lambda ids: " ".join(map(str, ids)))
    costs = Costs()
    found = ask(model, prompts, reader, costs, limit=4, batch_tokens=8)
    assert found == [" ".join(map(str, naive(model, *prompt, 0, 4))) for prompt in prompts]
    assert len(costs.cache) == 2
    measures = {m.metric: m.value for m in costs.measures("length=4")}
    assert measures["cache_bytes"] == max(costs.cache)
    assert measures["read_tokens_per_second"] > 0


def test_hopes_state_does_not_grow():
    made = make(choose(["hope"], {})[0], SIZE, 11).eval()
    sizes = {read(made, torch.zeros(1, n, dtype=torch.long), 16).bytes for n in (16, 160)}
    assert len(sizes) == 1
