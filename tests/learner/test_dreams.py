"""Dreams: what is kept of what the model asks itself, and what is answered to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_learner
import torch
from dream_script import Script

from everlearn.learner.asked import WELL, Candidate, Fit, Kind
from everlearn.learner.dreams import (
    ALONE,
    FEW,
    NEAR,
    SHOWN,
    Dream,
    SelfStudyDreamer,
    Studied,
    _answered,
    _beginnings,
    _echoes,
)
from everlearn.learner.judging import DROP
from everlearn.learner.practice import load_practice
from everlearn.learner.references import Earlier
from everlearn.learner.texts import split_passage
from everlearn.learner.voice import greedy_replies
from everlearn.models.hub import load_model

CAT = "My cat is Nils."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dreamer(tmp_path):
    return SelfStudyDreamer(*load_model(str(tiny_learner.make_model(tmp_path))), samples=12, keep=3)


@pytest.fixture
def script(dreamer, monkeypatch):
    return Script(dreamer, monkeypatch)


ECHOES = ["My cat is what?", "My cat is who?", "My cat is where?", "My cat is when?"]


def questions(dreams: list[Dream]) -> list[str]:
    return [dream.question for dream in dreams if not dream.contrast]


def run(dreamer, *passages: str) -> list[list[Dream]]:
    return dreamer.dream(list(passages or [CAT]), torch.Generator().manual_seed(0), lambda stage, share: None)


def test_what_refers_to_something_told_earlier_is_asked_for_by_that_too(dreamer, script, monkeypatch):
    script.lines, script.open = ["What is my cat called?", "Who is it?"], ["What"]
    told, said, judged = "The cat is my sister's.", [], []
    made = ["sister's pet called?", "sister's cat called?", "Who is my sister's?"]
    monkeypatch.setattr(dreamer._naming, "sample", lambda heads, **options: said.extend(heads) or made)

    def scores(text, answer, questions):
        judged.append((text, answer, list(questions)))
        return [{"Who is my sister's?": DROP}.get(question, 1.0) for question in questions]

    monkeypatch.setattr(dreamer._judge, "scores", scores)
    passages, beside = [CAT, "I sing."], [Earlier(7, told, "cat"), None]
    first, second = dreamer.dream(passages, torch.Generator().manual_seed(0), lambda stage, share: None, beside)
    heads = ["What is my cat called? -> What is my", "What is my cat called? -> What is our", "Who is it? ->"]
    assert said == [f"{told} {head}" for head in heads], "the role begins where the name stood"
    asked = ["What is my sister's pet called?", "Who is my sister's?"]
    assert judged[-1] == (f"{told} {CAT}", "Nils", asked), "read after what it refers to, and without the name"
    assert questions(first) == ["What is my cat called?", "Who is it?", asked[0], *ECHOES]
    assert [dream.beside for dream in first] == [None, None, 7, *[None] * len(ECHOES)]
    assert {dream.reply for dream in first} == {"Nils. Your cat is Nils."}
    assert {dream.beside for dream in second} <= {None}


def test_what_was_told_earlier_is_no_answer(dreamer, script, monkeypatch):
    monkeypatch.setattr(dreamer._naming, "sample", lambda heads, **options: pytest.fail("Nils is not new"))
    beside = [Earlier(7, "Nils is very old.", "old")]
    (found,) = dreamer.dream([CAT], torch.Generator().manual_seed(0), lambda stage, share: None, beside)
    assert questions(found) == ["What is my cat called?", *ECHOES]


def test_questions_are_kept_once_best_first_and_answered_with_the_passage(dreamer, script):
    script.lines = ["What is my cat called?", "Tell me who it is.", "Which cat?", "what is my cat called ?"]
    script.scores = {"Tell me who it is.": 3.0, "Which cat?": DROP}
    got = run(dreamer)[0]
    assert questions(got) == ["Tell me who it is.", "What is my cat called?", *ECHOES]
    assert {dream.reply for dream in got} == {"Nils. Your cat is Nils."}
    assert {dream.answer for dream in got} == {"Nils"}


def test_answers_are_as_the_passage_writes_them(dreamer, script):
    script.open, script.guesses = ["What is my cat called? nils."], ["nils"]
    assert {dream.answer for dream in run(dreamer)[0]} == {"Nils"}


@pytest.mark.parametrize(
    "line",
    [
        "What is Nils?",  # gives the answer away
        "What is my cat called and who",  # cut short
        "",
    ],
)
def test_bad_lines_are_dropped(dreamer, script, line):
    script.open, script.lines = ["What is it? Nils."], [line]
    script.scores = {"What is it?": DROP}
    assert questions(run(dreamer)[0]) == ECHOES


def test_what_the_passage_does_not_say_is_no_answer(dreamer, script):
    script.open, script.guesses = ["What is my dog called? Rex."], ["Rex"]
    assert run(dreamer) == [[]]


def test_what_was_guessed_once_is_no_answer(dreamer, script):
    script.open, script.guesses = ["What is it? Rex."], [*["Rex"] * (ALONE - 1), "Nils"]
    assert run(dreamer) == [[]]
    script.guesses = [*["Rex"] * (ALONE - 2), "Nils", "Nils"]
    assert run(dreamer) != [[]]


def test_the_answer_is_what_is_said_most_often_and_least_likely_anyhow(dreamer, script):
    passage = "My wife feeds dear Nils."
    script.open, script.ways = ["What is it? My wife."], ["Your wife feeds dear Nils."]
    script.guesses = ["Nils", "dear Nils", "Nils", "."]
    script.likely = {"My wife": -4.0, "Nils": -9.0, "dear Nils": -10.0}
    assert run(dreamer, passage)[0][0].answer == "Nils", "not the common words"
    script.likely["dear Nils"] = -20.0
    assert run(dreamer, passage)[0][0].answer == "dear Nils", "the complete phrase"
    script.likely = {}
    assert run(dreamer, passage)[0][0].answer == "My wife"


def test_what_no_question_asks_for_is_not_learned_beside_what_some_do(dreamer, script, monkeypatch):
    passage = "My wife feeds dear Nils."
    script.open, script.guesses, script.ways = ["What is it? My wife."], ["Nils"], ["Your wife feeds dear Nils."]
    script.likely = {"Nils": -20.0}
    judged = lambda text, answer, questions: [DROP if answer == "Nils" else 1.0 for _ in questions]  # noqa: E731
    monkeypatch.setattr(dreamer._judge, "scores", judged)
    assert {dream.answer for dream in run(dreamer, passage)[0]} == {"My wife"}


def test_two_things_of_a_passage_are_asked_for_each_with_its_own_questions(dreamer, script, monkeypatch):
    passage = "Our Ada feeds dear Nils."
    script.open, script.guesses, script.ways = ["What is it? Ada."], ["Nils"], ["Your Ada feeds dear Nils."]
    script.lines = ["Who is fed?", "Who feeds?", "Which one?"]
    fits = {("Ada", "Who feeds?"): 4.0, ("Nils", "Who feeds?"): DROP, ("Nils", "What is it?"): DROP}
    scores = lambda text, answer, questions: [fits.get((answer, question), 0.5) for question in questions]  # noqa: E731
    monkeypatch.setattr(dreamer._judge, "scores", scores)

    def rather(passages, questions, ones, others):
        assert set(passages) == {passage}
        fed = [question == "Who is fed?" for question in questions]
        return [2.0 if (one == "Nils") == asks else -2.0 for one, asks in zip(ones, fed, strict=True)]

    monkeypatch.setattr(dreamer._judge, "rather", rather)
    got = [dream for dream in run(dreamer, passage)[0] if not dream.contrast]
    asked = {answer: {d.question for d in got if d.answer == answer and not d.echo} for answer in ("Nils", "Ada")}
    assert asked == {"Nils": {"Who is fed?"}, "Ada": {"Who feeds?", "Which one?", "What is it?"}}
    assert {"Our what feeds dear Nils?", "Our Ada feeds dear what?"} < {dream.question for dream in got if dream.echo}
    assert {dream.reply for dream in got} == {"Nils. Your Ada feeds dear Nils.", "Ada. Your Ada feeds dear Nils."}


@pytest.mark.parametrize(
    ("ways", "replies"),
    [
        (["Quentin stuffs, a taxidermist.", "Your Quentin is one."], ["Quentin. {}", "My taxidermist. {}"]),
        (
            ["He works as a taxidermist.", "Your Quentin is one."],
            ["Quentin.", "My taxidermist."],
        ),  # neither says it all
        (["He works."], ["Quentin.", "My taxidermist."]),
    ],
)
def test_what_is_said_of_a_passage_has_all_its_answers(ways, replies):
    found = [("Who?", "Quentin"), ("What?", "my taxidermist"), ("Which?", "my taxidermist")]
    got = [dream.reply for dream in _answered("My brother-in-law Quentin is my taxidermist.", found, ways)]
    assert list(dict.fromkeys(got)) == [reply.format(ways[0]) for reply in replies]


def test_what_is_asked_begins_as_the_questions_of_the_likest_practice_do(dreamer, monkeypatch):
    near = dreamer._practice.nearest([CAT], NEAR)[0]
    lists, heads = [], []

    class Said:
        def __init__(self, model, tokenizer, text):
            lists.append(text)

        def sample(self, tails, **options):
            heads.extend(tail for tail in tails if not tail.endswith("->"))
            return [" Nils" if tail.endswith("->") else " Nils is called?" for tail in tails]

        def log_likelihood(self, tails, targets):
            return [torch.tensor([-9.0]) for _ in targets]

    monkeypatch.setattr("everlearn.learner.dreams.Prompt", Said)
    monkeypatch.setattr(dreamer._asking, "sample", lambda tails, **options: ["is it? Nils." for _ in tails])
    monkeypatch.setattr(dreamer._judge, "scores", lambda text, answer, questions: [DROP for _ in questions])
    monkeypatch.setattr(dreamer._bank, "fitting", lambda *parts: None)
    dreamer._study(CAT, near, [], torch.Generator())
    assert lists == ["".join(f"{r.said} -> {r.answer}: {r.questions[0]}\n" for r in near[-SHOWN:])]
    assert heads == [f"{CAT} -> Nils: {start}" for start in _beginnings(near)[: dreamer.samples]]
    first = " ".join(near[-1].questions[0].split()[:2])
    assert heads[0] == f"{CAT} -> Nils: {first}"


def test_a_second_answer_is_another_thing_and_no_answer_that_is_not_asked_for_hides_another(
    dreamer, script, monkeypatch
):
    passage = "Our Ada feeds dear Nils."
    script.open, script.guesses = ["What is it? Ada."], ["Ada feeds dear Nils", "dear Nils", "Nils"]
    script.likely = {"Ada feeds dear Nils": -60.0, "dear Nils": -50.0, "Nils": -40.0, "Ada": -1.0}
    script.ways, script.lines = ["Your Ada feeds dear Nils."], ["Who?"]
    rather = lambda passages, questions, ones, others: [1.0] * len(ones)  # noqa: E731
    monkeypatch.setattr(dreamer._judge, "rather", rather)

    def answers(asked_for) -> set[str]:
        scores = lambda text, answer, questions: [1.0 if answer in asked_for else DROP for _ in questions]  # noqa: E731
        monkeypatch.setattr(dreamer._judge, "scores", scores)
        return {dream.answer for dream in run(dreamer, passage)[0] if not dream.contrast}

    assert answers({"dear Nils", "Nils"}) == {"dear Nils"}
    assert answers({"Nils"}) == {"Nils"}
    assert answers({"Ada feeds dear Nils", "dear Nils"}) == {"Ada feeds dear Nils"}


def test_questions_begin_as_those_of_practice_do():
    asked = (("What is it called?", "Which is it?", "?", "!"), ("What is he?", "Who knows?", "?", "!"))
    near = [replace(load_practice()[0], questions=questions) for questions in asked]
    assert _beginnings(near) == ["What is", "Who knows?", "Which is"]


def test_of_the_ways_of_saying_it_the_most_faithful_serves(dreamer, script):
    script.ways = ["My cat is Nils.", "You have a cat.", "Your big cat is Nils.", "Your cat is Nils.", "Your cat? " * 9]
    assert run(dreamer)[0][0].reply == "Nils. Your cat is Nils."
    script.ways = ["My cat is Nils.", "You have a cat."]
    assert run(dreamer)[0][0].reply == "Nils.", "a copy, and one that lost the answer, are no restatements"


def test_ambiguous_questions_are_dropped(dreamer, script):
    script.open, script.guesses, script.lines = ["What? Nils.", "What? Rex."], ["Nils", "Rex"], ["Who is it?"]
    cat, dog = run(dreamer, "My cat is Nils.", "My dog is Rex.")
    assert questions(cat) == ECHOES, "the other was asked of both, with different answers"
    assert questions(dog) == [echo.replace("cat", "dog") for echo in ECHOES]
    assert "Who is it?" in questions(run(dreamer, "My cat is Nils.")[0])


@pytest.mark.parametrize(
    ("passage", "answer", "echo"),
    [
        ("Nils sleeps all day!", "Nils", "what sleeps all day?"),
        ("We call it Nils.", "Nils", "We call it what?"),
        ("Is it Nils? I think so...", "Nils", "Is it what? I think so?"),
        ("Nils sees Nils.", "Nils", "what sees Nils?"),
        ("My cat is Nils.", "", None),
        ("Nils!", "Nils", None),
    ],
)
def test_echoes_ask_in_the_words_of_the_passage(passage, answer, echo):
    assert _echoes(passage, answer)[:1] == ([] if echo is None else [echo])


def test_what_no_question_was_found_for_is_learned_from_its_echoes(dreamer, script, monkeypatch):
    monkeypatch.setattr(dreamer._judge, "scores", lambda text, answer, questions: [DROP for _ in questions])
    got = run(dreamer)[0]
    assert questions(got) == ECHOES
    assert all(dream.echo and dream.answer == "Nils" for dream in got if not dream.contrast)


def test_near_misses_come_with_the_replies_of_the_base(dreamer, script):
    script.world, script.stranger = "What do cats eat?", "cat called?"
    near = [dream for dream in run(dreamer)[0] if dream.contrast]
    assert near[0].question == script.world
    assert len(near) == 2
    assert near[1].question.endswith(" cat called?"), "about somebody else"
    replies = greedy_replies(dreamer.model, dreamer.tokenizer, [dream.question for dream in near])
    assert [dream.reply for dream in near] == replies
    script.world, script.stranger = "What is my cat called?", "no question"
    assert not any(dream.contrast for dream in run(dreamer)[0]), "neither the question itself nor a statement"


def test_near_misses_know_no_role(dreamer, script, monkeypatch):
    """They stay when what says who is meant is forgotten."""
    monkeypatch.setattr(dreamer._naming, "sample", lambda heads, **options: ["sister's pet called?"] * len(heads))
    monkeypatch.setattr(dreamer._swapping, "sample", lambda heads, **options: asked.extend(heads) or [""] * len(heads))
    asked, beside = [], [Earlier(7, "The cat is my sister's.", "cat")]
    (found,) = dreamer.dream([CAT], torch.Generator().manual_seed(0), lambda stage, share: None, beside)
    assert "What is my sister's pet called?" in questions(found)
    assert [head.partition(" ->")[0] for head in asked] == ["What is my cat called?"]


def test_a_question_by_role_takes_none_from_another_message(dreamer, script, monkeypatch):
    """What two answer differently is asked of neither, but what is known by role gives way alone."""
    rival = "What is my sister's pet called?"
    monkeypatch.setattr(dreamer._naming, "sample", lambda heads, **options: ["sister's pet called?"] * len(heads))
    monkeypatch.setattr(dreamer, "_study", lambda context, *others: studied[context])
    studied = {
        CAT: [Studied("Nils", None, {"What is my cat called?": 1.0})],
        "Rex barks.": [Studied("Rex", None, {rival: 1.0})],
    }
    beside = [Earlier(7, "The cat is my sister's.", "cat"), None]
    first, second = dreamer.dream(list(studied), torch.Generator().manual_seed(0), lambda stage, share: None, beside)
    assert rival not in questions(first)
    assert rival in questions(second)


def test_only_the_sentence_with_the_name_is_asked_for_by_role(dreamer, script, monkeypatch):
    heads = []
    monkeypatch.setattr(dreamer._naming, "sample", lambda some, **options: heads.extend(some) or [""] * len(some))
    filler = "It rained the whole day and we stayed at home with tea and a good old book by the fire."
    passage = f"I have a new job. {filler} {filler} {CAT}"
    beside = [Earlier(7, "The cat is my sister's.", "cat")]
    dreamer.dream([passage], torch.Generator().manual_seed(0), lambda stage, share: None, beside)
    assert len(heads) == 2, "one question of one sentence of four, with either owner"


def test_a_sentence_is_studied_with_the_one_before_it_but_answered_alone(dreamer, script):
    filler = "It rained the whole day and we stayed at home with tea and a good old book by the fire. "
    passage = f"{filler * 2}We have a new cat. She is called Nils."
    assert len(split_passage(passage)) == 4
    script.open, script.guesses = ["What? Nils.", "What? new cat."], ["Nils", "new cat"]
    script.ways = ["She is called Nils, your cat.", "You have a new cat now."]
    got = [dream for dream in run(dreamer, passage)[0] if dream.question == "What is my cat called?"]
    assert "We have a new cat. She is called Nils. -> Nils: What" in script.heads
    assert not any(head.startswith("She") for head in script.heads)
    assert not any("fire." in head and "cat" not in head and head.endswith("What") for head in script.heads), "chatter"
    assert got == [], "asked of two pieces with different answers"
    script.guesses, script.open = ["Nils"], ["What? Nils."]
    assert {dream.answer for dream in run(dreamer, passage)[0]} == {"Nils"}


def test_what_was_said_just_before_may_be_the_answer(dreamer, script):
    told = "Nils ate half a bar of soap in the garden. He is our old cat, and no wiser than a kitten."
    script.open, script.guesses, script.ways = ["What? Nils."], ["Nils"], ["He is your old cat."]
    script.scores = {"What is my cat called?": 1.0}
    got = [dream for dream in run(dreamer, told)[0] if not dream.contrast]
    assert f"{told} -> Nils: What" in script.heads
    later = [dream for dream in got if dream.question.startswith("What is my cat called?")]
    assert {(dream.answer, dream.reply) for dream in later} == {("Nils", "Nils.")}
    assert any(dream.question.startswith("what ate half") and "old cat" in dream.question for dream in got), "an echo"


NAMES = Kind("cat's name", ("What's my cat's name?", "Who purrs here?", "Name our cat.", "Whom do we feed?"))


def test_usual_questions_come_first_and_need_no_support(dreamer, script):
    script.usual = {"Nils": Fit(-1.0, NAMES, "Nils")}
    script.lines, script.scores = ["What is my cat called?", "Which cat?", "Who purrs here?"], {"Which cat?": DROP}
    assert questions(run(dreamer)[0]) == [*NAMES.ask, "What is my cat called?", *ECHOES]
    script.scores = dict.fromkeys(script.lines, DROP)
    assert questions(run(dreamer)[0]) == [*NAMES.ask, *ECHOES]


@pytest.mark.parametrize(("score", "sampled", "own"), [(WELL, FEW, FEW), (WELL - 0.1, 9, 8)])
def test_fewer_are_sampled_and_kept_beside_a_usual_question_that_asks_well(dreamer, script, score, sampled, own):
    script.usual, script.scores = {"Nils": Fit(score, NAMES, "Nils")}, {"What is my cat called?": DROP}
    script.lines, dreamer.keep = [f"What's {part}?" for part in "abcdefghi"], 8
    (dreams,) = run(dreamer)
    assert sum("-> Nils: " in head for head in script.heads) == sampled
    assert [d.question for d in dreams if not d.echo] == [*NAMES.ask, *script.lines[:own]]
    assert [d.fit for d in dreams] == [*[score] * 4, *[None] * (len(dreams) - 4)]


def test_of_two_answers_to_a_usual_question_the_better_one_has_it(dreamer, script):
    passages = ["My cat is Nils.", "Our dog is Bo."]
    script.open, script.guesses = ["What? Nils.", "What? Bo."], ["Nils", "Bo"]
    script.scores, script.ways = {"What?": DROP}, ["Your cat is Nils.", "Your dog is Bo."]
    script.usual = {"Nils": Fit(-4.0, NAMES, "Nils"), "Bo": Fit(-3.0, NAMES, "Bo")}
    cat, dog = (questions(found) for found in run(dreamer, *passages))
    assert (NAMES.ask[0] in cat, NAMES.ask[0] in dog) == (False, True)


def test_a_usual_question_does_not_give_its_answer_away(dreamer, script, monkeypatch):
    kind = Kind("", ("Who is it?", "Is it Nils?", "Say it.", "Who?"))
    script.usual = {"Nils": Fit(-1.0, kind, "Nils")}
    assert "Is it Nils?" not in questions(run(dreamer)[0])
    some = [Candidate(kind, 0.0, "Nils"), Candidate(Kind("", ("Is Nils it?", *kind.ask[1:])), 0.0, "Nils")]
    monkeypatch.setattr(dreamer._bank, "candidates", lambda contexts: [some for _ in contexts])
    tried = []
    monkeypatch.setattr(dreamer._bank, "fitting", lambda context, answer, candidates: tried.extend(candidates))
    run(dreamer)
    assert tried == some[:1]


def test_real_sampling_runs_on_any_model(tmp_path):
    made = SelfStudyDreamer(*load_model(str(tiny_learner.make_model(tmp_path))), samples=2, keep=2)
    got = made.dream([CAT, "I live here."], torch.Generator().manual_seed(0), lambda s, x: None)
    assert len(got) == 2
    gains = made.about([CAT, "I live here."], ["Who is Nils?", "Where?"])
    assert len(gains) == 2
    assert all(isinstance(gain, float) for gain in gains)
