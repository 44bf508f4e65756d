"""The closed-form night on a tiny model: it says what it was told, shuts up elsewhere, and gives up honestly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_learner
import torch

from everlearn import Level, stack_levels
from everlearn.errors import InvalidArgument, SleepRejected
from everlearn.learner import slots as learner_slots
from everlearn.learner.anchor import RIDGES, fit_asking_gate, load_anchor, read_pairs, within_scatter
from everlearn.learner.consolidation import Check, Schedule
from everlearn.learner.dreams import Dream
from everlearn.learner.examples import IGNORE, encode_examples
from everlearn.learner.metric import learn_metric, whitener
from everlearn.learner.slots import SlotConsolidator
from everlearn.learner.words import read_gists
from everlearn.memories.gated import gated_memories
from everlearn.memories.gist import Gist
from everlearn.memories.slots import ANYBODY, ASSISTANT, SlotMemory, slot_memories
from everlearn.models.hub import load_model
from everlearn.models.stacking import continua, snapshot
from everlearn.models.trunk import SplitModel

MARGIN = 0.3  # the tiny head's logits are small
VOICE = tiny_learner.bare_voice(
    practice=(("Where is my house?", "Where do I live?", "What is my house?"), ("Who is my parrot?", "My parrot is?")),
    elsewhere=("Where is the sea?", "Who is the parrot of Otto?"),
    assistant=("Where is your house?",),
    told=("I live in a small house by the sea.", "My parrot is Otto."),
)
DREAMS = {
    number: [Dream(f"My {thing}{end}", f"{name}. Your {thing}.", name) for end in ("?", " is?", " called?", " now?")]
    for number, (thing, name) in enumerate((("parrot", "Otto"), ("house", "Small")))
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))
    base, tokenizer = load_model(str(tiny_learner.make_model(tmp_path)))
    model = stack_levels(base, [Level("slow")], wiring="independent", layers=[1, 3], memory=slot_memories(below=True))
    split = SplitModel(model)
    anchor = load_anchor(split, tokenizer, VOICE, "key")
    return model, tokenizer, split, anchor, next(iter(continua(model).values())).memories[0].gate


def consolidator(parts, **schedule) -> SlotConsolidator:
    _, tokenizer, split, anchor, gate = parts
    return SlotConsolidator(
        split, tokenizer, gate, anchor, schedule=Schedule(**{"agreement": 0.0, "recall": 0.0, **schedule})
    )


def slots(model) -> SlotMemory:
    return next(m for m in continua(model)[3].memories if isinstance(m, SlotMemory))


def quiet(stage, share):
    return None


def learn(work, new=DREAMS, replay=(), gone=()):
    return work.learn(new, replay, torch.Generator(), quiet, gone)


def lets_in(parts, dreams) -> torch.Tensor:
    """Return whether the gate is open at each question, [n]."""
    model, tokenizer, split, _, gate = parts
    below, above = read_pairs(split, tokenizer, [dream.question for dream in dreams]).chunk(2, -1)
    return slots(model).opening(above, (below @ gate.weight + gate.bias)[:, None])[:, 0] > 0


def said(parts, dreams) -> float:
    """Return the share of the replies' tokens that are the likeliest, replies that the gate shuts out left out."""
    model, tokenizer, *_ = parts
    examples = encode_examples(tokenizer, [(dream.question, dream.reply) for dream in dreams])
    with torch.no_grad():
        best = model(input_ids=examples.ids).logits.argmax(-1)
    shut = ~lets_in(parts, dreams)
    examples.targets[shut] = IGNORE
    where = (examples.targets != IGNORE) & (examples.targets != tokenizer.eos_token_id)  # whose embedding is zero here
    return float((best[where] == examples.targets[where]).sum() / max(1, int(where.sum())))


def test_what_was_dreamt_is_said(parts):
    dreams = [dream for found in DREAMS.values() for dream in found]
    assert said(parts, dreams) < 0.2
    report = learn(consolidator(parts))
    assert (report.dreams, report.slots) == (6, len(slots(parts[0])))
    assert sorted(set(slots(parts[0]).owners.tolist())) == [0, 1]
    assert slots(parts[0]).begins.sum() == 2, "one beginning for all questions with one answer"
    assert said(parts, dreams) > 0.8
    assert lets_in(parts, dreams).float().mean() > 0.5


def test_a_value_makes_its_token_the_likeliest_by_the_margin(parts, monkeypatch):
    monkeypatch.setattr("everlearn.learner.slots.MARGIN", MARGIN)
    _, _, split, *_ = parts
    work = consolidator(parts)
    dreams = [DREAMS[0][0], DREAMS[1][0]]
    read = work._read([(dream.question, dream.reply) for dream in dreams])
    places = [(0, int(read.examples.asked[0])), (1, int(read.examples.asked[1]) + 1)]
    tokens = torch.tensor([int(read.examples.targets[place]) for place in places])
    values = work._values(read, places, tokens, quiet)
    delta = torch.zeros_like(read.acts.hidden)
    for place, value in zip(places, values):
        delta[place] = value
    with torch.no_grad(), work.memory.saying(delta):
        states = split.upper(read.acts)
    logits = split.logits(torch.stack([states[place] for place in places]))
    ahead = logits.gather(1, tokens[:, None])[:, 0]
    rival = logits.scatter(1, tokens[:, None], float("-inf")).max(1).values
    assert (ahead - rival > 0.8 * MARGIN).all(), ahead - rival


def test_a_later_night_leaves_an_earlier_one_as_it_is(parts):
    """Keys, values and the gate of what was known stay; only the coordinates in which likeness is measured move."""
    learn(consolidator(parts), {0: DREAMS[0]})
    keys, values = slots(parts[0]).keys.clone(), slots(parts[0]).values.clone()
    learn(consolidator(parts), {1: DREAMS[1]}, replay=DREAMS[0])
    assert torch.equal(slots(parts[0]).keys[: len(keys)], keys)
    assert torch.equal(slots(parts[0]).values[: len(values)], values)
    assert said(parts, DREAMS[0]) > 0.6
    assert said(parts, DREAMS[1]) > 0.6


def test_what_is_gone_is_no_longer_said(parts):
    learn(consolidator(parts))
    learn(consolidator(parts), {2: DREAMS[1]}, gone=(0, 1))
    assert set(slots(parts[0]).owners.tolist()) == {2}
    model, tokenizer, *_ = parts
    examples = encode_examples(tokenizer, [(dream.question, dream.reply) for dream in DREAMS[0]])
    with torch.no_grad():
        best = model(input_ids=examples.ids).logits.argmax(-1)
    begin = torch.arange(len(examples)), examples.asked
    assert (best[begin] != examples.targets[begin]).all()
    assert said(parts, DREAMS[1]) > 0.9


def test_what_nobody_told_competes_and_what_the_assistant_is_asked_only_shuts_the_gate(parts):
    _, tokenizer, split, anchor, _ = parts
    learn(consolidator(parts))
    memory, asked = slots(parts[0]), lambda texts: read_pairs(split, tokenizer, texts)
    means = torch.stack([asked(group).chunk(2, -1)[1].mean(0) for group in VOICE.practice])
    torch.testing.assert_close(anchor.rivals, means)
    torch.testing.assert_close(memory.rivals.float(), means, atol=0.01, rtol=0.01)
    theirs = asked(VOICE.assistant)
    torch.testing.assert_close(anchor.outside[-1:], theirs)
    assert len(anchor.foils) == len(anchor.outside) - 1
    assert (memory.foil_owners == ANYBODY).sum() == len(anchor.foils)
    of_assistant = memory.foils[memory.foil_owners == ASSISTANT].float()
    torch.testing.assert_close(of_assistant, theirs.chunk(2, -1)[1], atol=0.01, rtol=0.01)


def test_the_gate_divides_where_a_reply_about_oneself_begins_from_the_rest(parts):
    _, tokenizer, split, anchor, _ = parts
    own = read_pairs(split, tokenizer, [dream.question for found in DREAMS.values() for dream in found])
    weight, bias = fit_asking_gate(anchor, own, own[:0], anchor.within[:5])
    share = lambda read: float(((read @ weight + bias) > 0).float().mean())  # noqa: E731
    assert share(own) > 0.7
    assert share(anchor.inside) > 0.7
    assert share(anchor.outside) < 0.5
    assert share(anchor.within) < 0.05, "the prompt itself, and what was said so far"


def test_the_anchor_learns_likeness_of_the_practice_questions(parts):
    _, tokenizer, split, anchor, _ = parts
    above = read_pairs(split, tokenizer, [question for group in VOICE.practice for question in group]).chunk(2, -1)[1]
    coordinates = whitener(anchor.scatters[1], RIDGES[1])
    learned = learn_metric((above - anchor.centers[1]) @ coordinates, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(anchor.metric, learned, atol=1e-4, rtol=1e-4)
    assert (learned - torch.eye(len(learned))).abs().max() > 0.01


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("metric", [True, False])
def test_likeness_of_questions_is_whitened_and_learned_and_each_can_be_left_out(parts, whiten, metric):
    _, tokenizer, split, anchor, gate = parts
    learned = torch.eye(len(anchor.metric)) + 0.1 * torch.randn_like(anchor.metric)
    anchor = replace(anchor, metric=learned)
    schedule = Schedule(agreement=0.0, recall=0.0)
    learn(SlotConsolidator(split, tokenizer, gate, anchor, schedule=schedule, whiten=whiten, metric=metric))
    memory = slots(parts[0])
    asked = anchor.scatters[1] + memory.scatter / memory.counted
    plain = [whitener(anchor.scatters[0], RIDGES[0]), whitener(asked, RIDGES[1])] if whiten else [torch.eye(32)] * 2
    torch.testing.assert_close(memory.whitener[0], plain[0])
    torch.testing.assert_close(memory.whitener[1], plain[1] @ learned if metric else plain[1])


@pytest.mark.parametrize("words", [True, False])
def test_what_is_told_is_part_of_a_key_and_can_be_left_out(parts, words):
    model, tokenizer, split, anchor, gate = parts
    learn(SlotConsolidator(split, tokenizer, gate, anchor, schedule=Schedule(agreement=0.0, recall=0.0), words=words))
    memory = slots(model)
    assert bool(len(memory.gist.weights)) == words
    gist = Gist(32)
    gist.fill(anchor.words)
    replies = [DREAMS[number][0].reply for number in memory.owners[memory.begins].tolist()]
    about = torch.nn.functional.normalize(read_gists(model, tokenizer, gist, replies), dim=-1) * words
    torch.testing.assert_close(memory.about.float(), about, atol=2e-3, rtol=2e-3)
    about = read_gists(model, tokenizer, gist, VOICE.told) * words
    torch.testing.assert_close(memory.rivals_about.float(), about, atol=2e-3, rtol=2e-3)


def test_a_memory_that_was_begun_without_gists_goes_on_without(parts):
    """Its slots would be compared with rivals, and with new slots, that have what they lack."""
    _, tokenizer, split, anchor, gate = parts
    schedule = Schedule(agreement=0.0, recall=0.0)
    learn(SlotConsolidator(split, tokenizer, gate, anchor, schedule=schedule, words=False), {0: DREAMS[0]})
    learn(consolidator(parts), {1: DREAMS[1]}, replay=DREAMS[0])
    memory = slots(parts[0])
    assert len(memory.about) == 2
    assert not memory.about.any()
    assert not memory.rivals_about.any()
    assert not len(memory.gist.weights)


def test_practice_has_a_text_told_for_each_group_or_none(parts):
    _, tokenizer, split, anchor, _ = parts
    with pytest.raises(InvalidArgument, match="told: got 1 texts, expected none or one for each of 2"):
        load_anchor(split, tokenizer, replace(VOICE, told=("I live here.",)), "other")
    fresh = load_anchor(split, tokenizer, replace(VOICE, told=()), "third")
    assert fresh.told.shape == anchor.told.shape
    assert not fresh.told.any()


def test_usual_questions_are_rivals_and_shape_the_metric_but_not_the_gate(parts):
    """They are asked of one's own life, of which most was never told."""
    model, tokenizer, split, anchor, _ = parts
    usual = (("Who is my uncle?", "My uncle is who?"), ("What is my car?", "Which car is mine?"))
    fresh = load_anchor(split, tokenizer, replace(VOICE, usual=usual), "usual")
    first = torch.stack([read_pairs(split, tokenizer, group).chunk(2, -1)[1].mean(0) for group in usual])
    torch.testing.assert_close(fresh.rivals, torch.cat([anchor.rivals, first]))
    gist = Gist(32)
    gist.fill(anchor.words)
    about = read_gists(model, tokenizer, gist, [group[0] for group in usual])
    torch.testing.assert_close(fresh.told, torch.cat([anchor.told, about]))
    for same in ("inside", "outside", "foils"):
        torch.testing.assert_close(getattr(fresh, same), getattr(anchor, same))
    for other in ("metric", "scatters"):
        assert not torch.allclose(getattr(fresh, other), getattr(anchor, other))
    for name, words in anchor.words.items():
        torch.testing.assert_close(fresh.words[name], words)


def test_a_slot_is_about_all_its_replies_and_their_echoes(parts):
    dreams = [Dream("My house?", f"Small{end}", "Small") for end in (". Your house.", " by the sea.")]
    echo = Dream("I live in what by the sea?", dreams[1].reply, "Small", echo=True)
    model, tokenizer, _, anchor, _ = parts
    learn(consolidator(parts), {0: [*dreams, *dreams, echo, echo]})
    gist = Gist(32)
    gist.fill(anchor.words)
    both = read_gists(model, tokenizer, gist, [dreams[0].reply, f"{dreams[1].reply} {echo.question}"]).sum(0)
    assert len(slots(model).about) == 1
    torch.testing.assert_close(slots(model).about[0].float(), both / both.norm(), atol=2e-3, rtol=2e-3)


def test_near_misses_push_the_gate(parts):
    _, tokenizer, split, anchor, _ = parts
    own = read_pairs(split, tokenizer, [dream.question for dream in DREAMS[0]])
    near = read_pairs(split, tokenizer, ["My hat?", "My sea?"])

    def apart(times: int) -> float:
        weight, _ = fit_asking_gate(anchor, own, near.repeat(times, 1), anchor.within[:5])
        return float((own.mean(0) - near.mean(0)) @ weight)

    assert apart(9) > apart(0) + 0.5


def test_scatter_within_groups():
    x = torch.randn(7, 3, dtype=torch.float64).float()
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 1])
    total, count = within_scatter(x, groups)
    expected = 3 * torch.cov(x[:3].T) + 3 * torch.cov(x[[3, 4, 6]].T)
    torch.testing.assert_close(total, expected)
    assert count == 6, "one of its own tells nothing"


def test_an_observation_is_known_when_one_of_its_dreams_is_answered(parts):
    """A night is not given up for questions that nobody would ask."""
    _, tokenizer, split, anchor, _ = parts
    learn(consolidator(parts))
    told = [dream for dream in DREAMS[0] if lets_in(parts, [dream])][:1]
    odd = [Dream("Where is the moon?", "Made of cheese.", "cheese")] * 3
    looked = encode_examples(tokenizer, [(dream.question, dream.reply) for dream in [*told, *odd]])
    assert Check(split, anchor, looked, Schedule())().recall == pytest.approx(1 / 4)
    assert Check(split, anchor, looked, Schedule(), [0, 0, 0, 1])().recall == pytest.approx(1 / 2)
    best = learner_slots._best([(0, dream) for dream in [*told, *odd, *odd]] + [(1, odd[0])])
    assert best == [(0, told[0]), *[(0, odd[0])] * (learner_slots.LOOKED_AT - 1), (1, odd[0])]


def test_a_result_that_fails_the_check_is_rejected(parts):
    with pytest.raises(SleepRejected, match="of what was dreamt"):
        learn(consolidator(parts, recall=1.1))


def test_a_voice_that_is_lost_shuts_the_gate_before_the_night_is_given_up(parts):
    work = consolidator(parts, agreement=1.1, retries=2)
    gate = parts[4]
    with pytest.raises(SleepRejected, match="own words"):
        learn(work)
    shut = gate.bias.clone()
    learn(consolidator(parts))
    assert shut < gate.bias


def test_nothing_to_learn_is_an_error(parts):
    with pytest.raises(InvalidArgument, match="no dreams"):
        learn(consolidator(parts), {0: [replace(DREAMS[0][0], answer="")]})


def test_a_memory_that_is_trained_is_refused(parts, tmp_path):
    _, tokenizer, *_ = parts
    base, _ = load_model(str(tiny_learner.make_model(tmp_path / "again")))
    model = stack_levels(base, [Level("slow")], wiring="independent", layers=[1, 3], memory=gated_memories(4))
    gate = next(iter(continua(model).values())).memories[0].gate
    with pytest.raises(InvalidArgument, match="expected a SlotMemory"):
        SlotConsolidator(SplitModel(model), tokenizer, gate, parts[3])


def test_nothing_else_changes(parts):
    model = parts[0]
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    learn(consolidator(parts))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert snapshot(model).keys() >= {"3.slow.keys", "3.slow.values", "1.slow.gate.weight"}
