"""Consolidation on a tiny model: it learns, stays silent where it must, and gives up honestly."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn import Level, stack_levels
from everlearn.errors import InvalidArgument, SleepRejected
from everlearn.learner.anchor import VERSION, fit_gate, load_anchor, read_at_end, shared_start, tells_something
from everlearn.learner.consolidation import Consolidator, Schedule, SelfStudyObjective
from everlearn.learner.dreams import Dream
from everlearn.learner.examples import IGNORE, encode_examples, run_trunk
from everlearn.memories.gated import gated_memories
from everlearn.models.hub import load_model
from everlearn.models.stacking import continua, memory_parameters
from everlearn.models.trunk import SplitModel
from everlearn.optim import for_memory

VOICE = tiny_learner.bare_voice()
DREAMS = {
    number: [Dream(f"My {thing}{end}", f"Your {thing} is {name}.", name) for end in ("?", " is?", " called?", " now?")]
    for number, (thing, name) in enumerate((("cat", "Nils"), ("town", "Turku")))
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))
    base, tokenizer = load_model(str(tiny_learner.make_model(tmp_path)))
    memory = gated_memories(32, below=True)
    model = stack_levels(base, [Level("slow")], wiring="independent", layers=[1, 2, 3], memory=memory)
    split = SplitModel(model)
    anchor = load_anchor(split, tokenizer, VOICE, "key")
    lowest = next(iter(continua(model).values()))
    return model, tokenizer, split, anchor, lowest.memories[0].gate


def consolidator(parts, objective=None, **schedule) -> Consolidator:
    _, tokenizer, split, anchor, gate = parts
    lax = {"steps": 1, "agreement": 0.0, "recall": 0.0, "passes": 60, "rate": 1e-2, "batch": 4, "enough": 0.01}
    return Consolidator(split, tokenizer, gate, anchor, schedule=Schedule(**{**lax, **schedule}), objective=objective)


def quiet(stage, share):
    return None


def test_dreams_are_learned_and_the_reply_is_said(parts):
    model, tokenizer, *_ = parts
    work = consolidator(parts, passes=200, rate=3e-2)
    report = work.learn(DREAMS, [], torch.Generator().manual_seed(0), quiet)
    assert report.dreams == 6
    examples = encode_examples(tokenizer, [(found[0].question, found[0].reply) for found in DREAMS.values()])
    with torch.no_grad():
        best = model(input_ids=examples.ids).logits.argmax(-1)
    said = (examples.targets != IGNORE) & (examples.targets != tokenizer.eos_token_id)  # whose embedding is zero here
    assert (best[said] == examples.targets[said]).float().mean() > 0.9


def test_only_memories_change(parts):
    model, *_ = parts
    own = {id(parameter) for parameter in memory_parameters(model).values()}
    before = {name: tensor.clone() for name, tensor in model.named_parameters() if id(tensor) not in own}
    consolidator(parts, passes=2).learn(DREAMS, [], torch.Generator(), quiet)
    assert all(torch.equal(tensor, dict(model.named_parameters())[name]) for name, tensor in before.items())


def test_gate_divides_dreams_from_the_voice(parts):
    _, tokenizer, split, anchor, gate = parts
    examples = encode_examples(
        tokenizer, [(dream.question, dream.reply) for found in DREAMS.values() for dream in found]
    )
    read = run_trunk(split, examples).read
    fit_gate(gate, anchor, examples, read)
    rows = torch.arange(len(examples))
    opened = gate(read[rows, examples.asked])[:, 0]
    shut = gate(anchor.activations.read[torch.arange(len(anchor.replies)), anchor.replies.asked])[:, 0]
    assert opened.mean() > shut.mean() + 0.3
    start = min(shared_start(examples), shared_start(anchor.replies))
    assert start >= 3
    assert not gate(read[:1, :start]).any(), "the beginning of all prompts must stay the base's"


def test_examples_of_many_lengths_are_read_as_one_by_one(parts):
    _, tokenizer, split, *_ = parts
    said = ["by the sea " * (7 * k % 11) + "Who sings?" for k in range(40)]
    examples = encode_examples(tokenizer, [(message, "The parrot sings.") for message in said])
    together = run_trunk(split, examples)
    assert together.read.shape[:2] == together.hidden.shape[:2] == examples.ids.shape
    for row, length in enumerate(examples.lengths.tolist()):
        alone = split.trunk(examples.ids[row : row + 1, :length])
        torch.testing.assert_close(together.hidden[row, :length], alone.hidden[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.read[row, :length], alone.read[0], rtol=1e-4, atol=1e-5)


def test_shared_beginning_changes_no_result(parts):
    work = consolidator(parts, passes=3)
    work.learn(DREAMS, [], torch.Generator().manual_seed(0), quiet)
    examples = encode_examples(
        parts[1], [(dream.question, dream.reply) for found in DREAMS.values() for dream in found]
    )
    acts, rows = run_trunk(parts[2], examples), torch.arange(len(examples))
    with torch.no_grad():
        assert work._past is not None
        short = work._states(acts, rows, examples)
        work._past, work._start = None, 0
        torch.testing.assert_close(short, work._states(acts, rows, examples), rtol=1e-3, atol=1e-3)


def test_a_result_that_fails_the_check_is_rejected(parts):
    with pytest.raises(SleepRejected, match="of what was dreamt"):
        consolidator(parts, passes=1, rate=1e-6, recall=1.0, retries=1).learn(DREAMS, [], torch.Generator(), quiet)


def test_near_misses_stay_the_base(parts):
    """A contrast is held to the base's own reply, however much the dreams pull."""
    _, tokenizer, split, _, gate = parts
    near = Dream("My hat?", "The parrot sings.", "")
    found = {0: [*DREAMS[0], near], 1: DREAMS[1]}
    work = consolidator(parts, passes=10)
    report = work.learn(found, [], torch.Generator().manual_seed(0), quiet)
    assert report.dreams == 6, "a contrast is not learned as a dream"
    assert work.anchor.contrasts == 1
    assert int(work.anchor.trained()[-1]) == len(work.anchor.replies) - 1
    assert len(work.anchor.replies) - 1 not in work.anchor.held_out().tolist()
    examples = encode_examples(tokenizer, [(near.question, near.reply)])
    with torch.no_grad():
        gate.set_(torch.zeros(32), torch.tensor(-1.0))
        base = split.upper(run_trunk(split, examples))
    length = int(examples.lengths[0])
    torch.testing.assert_close(work.anchor.teacher[-1, :length], base[0], rtol=1e-4, atol=1e-4)


def test_anchor_weight_keeps_the_voice(parts):
    model, tokenizer, split, anchor, gate = parts

    def drift(weight: float) -> float:
        for parameter in memory_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        work = consolidator(parts, SelfStudyObjective(weight), passes=20, enough=0.0)
        fit = torch.zeros(32)
        gate.set_(fit, torch.tensor(1.0))  # everything open: only the anchor holds
        examples = encode_examples(
            tokenizer, [(dream.question, dream.reply) for found in DREAMS.values() for dream in found]
        )
        acts = run_trunk(split, examples)
        work._train(examples, acts, anchor.trained(), 20, torch.Generator().manual_seed(0), quiet)
        rows = anchor.trained()
        mask = anchor.replies.targets[rows] != IGNORE
        with torch.no_grad():
            ours = split.logits(split.upper(anchor.activations.part(rows))[mask]).log_softmax(-1)
            base = split.logits(anchor.teacher[rows][mask]).log_softmax(-1)
        return float((base.exp() * (base - ours)).sum(-1).mean())

    assert drift(10.0) < 0.5 * drift(0.0)


def test_nothing_to_learn_is_an_error(parts):
    with pytest.raises(InvalidArgument, match="no dreams"):
        consolidator(parts).learn({0: []}, [], torch.Generator(), quiet)


def test_few_dreams_get_enough_steps(parts):
    assert consolidator(parts, passes=2, steps=9, enough=0.0).learn(DREAMS, [], torch.Generator(), quiet).passes == 5


@pytest.mark.parametrize("name", ["muon", "m3"])
def test_another_optimiser_learns_at_its_own_rate(parts, name):
    made = []

    def optimizer(params, rate):
        made.append(for_memory(name, scale=3.0)(params, rate))
        return made[-1]

    work = consolidator(parts, passes=40, rate=1e-2)
    work.optimizer = optimizer
    report = work.learn(DREAMS, [], torch.Generator().manual_seed(0), quiet)
    assert report.loss < 3.0
    assert 0 < made[0].param_groups[0]["lr"] < 3.0 * 0.2 * 1e-2  # near the end of its own schedule


def test_bad_schedule():
    with pytest.raises(InvalidArgument, match="passes"):
        Schedule(passes=0)
    with pytest.raises(InvalidArgument, match="replay"):
        Schedule(replay=-1)


def test_anchor_cache_is_used_and_mended(parts, tmp_path):
    _, tokenizer, split, anchor, _ = parts
    again = load_anchor(split, tokenizer, VOICE, "key")
    assert torch.equal(again.teacher, anchor.teacher)
    file = tmp_path / "cache" / "anchors" / f"key-{VERSION}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    mended = load_anchor(split, tokenizer, VOICE, "key")
    assert torch.equal(mended.activations.hidden, anchor.activations.hidden)


def test_probe_tells_statements_from_chatter(parts):
    _, tokenizer, split, anchor, _ = parts
    odds = tells_something(anchor, read_at_end(split, tokenizer, [*VOICE.statements, *VOICE.chatter]))
    assert (odds[:2] > 0).all()
    assert (odds[2:] < 0).all()
