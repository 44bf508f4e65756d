"""The learner end to end on a tiny model: wake, sleep, forget, rollback, isolation."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_learner
import torch
from lives import SAID, ids, logits, owners, states

from everlearn.errors import FingerprintError, InvalidArgument, SleepRejected, StoreCorrupt, StoreLocked
from everlearn.learner.consolidation import Schedule
from everlearn.learner.dreams import Dream
from everlearn.learner.learner import Learner
from everlearn.learner.night import kept_dreams
from everlearn.learner.slots import SlotConsolidator
from everlearn.learner.superseding import Given
from everlearn.models.hub import load_model
from everlearn.models.stacking import memory_state


def test_untouched_is_the_base_to_the_last_bit(learner, pair):
    with torch.no_grad():
        assert torch.equal(logits(learner()), pair[0](input_ids=ids(pair[1])).logits)


def test_a_night_is_kept_over_processes(learner, pair):
    one = learner()
    assert one.observe(SAID).state == "heard"
    one.observe("no news today")
    report = one.sleep()
    assert (report.night, report.consolidated, report.dismissed) == (1, (1,), (2,))
    assert states(one) == ["consolidated", "dismissed"]
    after, replied = logits(one), one.ask("What was said now?", max_new_tokens=6)
    one.close()
    again = learner()
    assert torch.equal(logits(again), after)
    assert again.ask("What was said now?", max_new_tokens=6) == replied
    with torch.no_grad():
        assert not torch.equal(after, pair[0](input_ids=ids(pair[1])).logits)


def test_sleep_without_news_does_nothing(learner):
    one = learner()
    assert one.sleep().night is None
    one.observe("no news")
    assert one.sleep().night == 1
    assert states(one) == ["dismissed"]
    assert one.sleep().night is None


def test_remember_overrides_the_selection(learner):
    one = learner()
    one.observe("no news but remember it", remember=True)
    assert one.sleep().consolidated == (1,)


def test_two_users_on_one_base_never_mix(learner, pair):
    one, two = learner("one"), learner("two")
    one.observe(SAID)
    one.sleep()
    with torch.no_grad():
        base = pair[0](input_ids=ids(pair[1])).logits
    assert torch.equal(logits(two), base)
    assert not torch.equal(logits(one), base)
    mine = logits(one)
    two.observe("I live by the sea.")
    two.sleep()
    assert torch.equal(logits(one), mine)
    assert two.history()[0].text != one.history()[0].text
    assert not torch.equal(logits(two), mine)


def test_two_users_in_two_threads_live_as_they_would_alone(learner):
    lives = {"ann": ("My parrot is Otto.", "I live by the sea."), "bob": ("The sea is blue.", "My house is small.")}

    def live(name: str, folder: str) -> tuple:
        with learner(folder) as one:
            for text in lives[name]:
                one.observe(text)
            one.sleep()
            said = [one.ask("Where do you live?", max_new_tokens=6) for _ in range(4)]
            knew = logits(one)
            one.forget(1)
            return said, knew, logits(one), [item.text for item in one.history()]

    alone = {name: live(name, f"{name} alone") for name in lives}
    with ThreadPoolExecutor(2) as threads:
        running = {name: threads.submit(live, name, name) for name in lives}
        together = {name: done.result() for name, done in running.items()}
    for name, (said, knew, forgot, texts) in alone.items():
        assert together[name][0] == said
        assert together[name][3] == texts == ["", lives[name][1]]
        assert torch.equal(together[name][1], knew)
        assert torch.equal(together[name][2], forgot)
    assert not torch.equal(alone["ann"][1], alone["bob"][1])


def test_nothing_of_a_memory_is_ever_in_a_temporary_file(learner, monkeypatch):
    """A process that is killed would leave it there, where `forget` cannot reach it."""

    def none(*arguments, **options):
        raise AssertionError("a temporary file was made")

    for name in ("mkdtemp", "mkstemp", "TemporaryDirectory", "NamedTemporaryFile"):
        monkeypatch.setattr(tempfile, name, none)
    voice = learner("first")  # its anchor goes to the cache by a temporary file there; nothing of a user is in it
    monkeypatch.setattr("everlearn.learner.anchor.atomic_write", lambda path, data: None)
    voice.observe(SAID)
    voice.sleep()
    knew = logits(voice)
    voice.close()
    again = learner("first")
    assert torch.equal(logits(again), knew)
    again.forget(1)


def test_rollback_is_exact_and_can_be_undone(learner, pair):
    one = learner()
    one.observe(SAID)
    one.sleep()
    first = {key: tensor.clone() for key, tensor in memory_state(one.model).items()}
    one.observe("I live by the sea.")
    one.sleep()
    second = logits(one)
    one.rollback(1)
    assert all(torch.equal(tensor, first[key]) for key, tensor in memory_state(one.model).items())
    assert states(one) == ["consolidated", "heard"]
    one.rollback(0)
    with torch.no_grad():
        assert torch.equal(logits(one), pair[0](input_ids=ids(pair[1])).logits)
    one.rollback(2)
    assert torch.equal(logits(one), second)
    assert one.diff(1)["learned"] == [{"id": 2, "text": "I live by the sea."}]


def test_forget_leaves_the_memory_that_never_knew(learner, tmp_path):
    """Rebuilt from the night before, with what remains: as if the forgotten had not been told that day."""
    one = learner("with")
    one.observe("The sea is blue.")
    one.sleep()
    one.observe(SAID)
    one.observe("I live by the sea.")
    one.sleep()
    knew = logits(one)
    assert one.forget("parrot is otto") == [2]
    assert states(one) == ["consolidated", "forgotten", "consolidated"]
    assert not torch.equal(logits(one), knew)
    assert all(b"Otto" not in file.read_bytes() for file in (tmp_path / "with").rglob("*") if file.is_file())
    with pytest.raises(Exception, match="night 2"):
        one.rollback(2)
    one.rollback(1)


def test_forgetting_the_last_night_gives_the_one_before_back(learner):
    one = learner()
    one.observe("The sea is blue.")
    one.sleep()
    first = {key: tensor.clone() for key, tensor in memory_state(one.model).items()}
    one.observe(SAID)
    one.sleep()
    one.forget(SAID)
    assert all(torch.equal(tensor, first[key]) for key, tensor in memory_state(one.model).items())
    assert states(one) == ["consolidated", "forgotten"]


def test_forgetting_everything_gives_the_base_back(learner, pair):
    one = learner()
    one.observe(SAID)
    one.sleep()
    one.forget(1)
    with torch.no_grad():
        assert torch.equal(logits(one), pair[0](input_ids=ids(pair[1])).logits)


def test_forgetting_what_was_only_heard_needs_no_night(learner):
    one = learner()
    one.observe(SAID)
    one.forget(SAID)
    assert states(one) == ["forgotten"]
    assert one.nights() == []


def test_forget_says_what_it_cannot_find(learner):
    one = learner()
    one.observe("I live by the sea.")
    one.observe("I swim in the sea.")
    for words, why in (("mountain", "nothing that was told"), ("sea", "2 observations"), (" ", "got nothing")):
        with pytest.raises(InvalidArgument, match=why):
            one.forget(words)
    with pytest.raises(InvalidArgument, match="ids of observations"):
        one.forget(7)


def test_a_rejected_sleep_changes_nothing(learner):
    one = learner(schedule=Schedule(passes=1, recall=1.1, agreement=0.0, retries=0))
    one.observe(SAID)
    before = logits(one)
    with pytest.raises(SleepRejected):
        one.sleep()
    assert torch.equal(logits(one), before)
    assert states(one) == ["heard"]
    assert one.nights() == []


def test_chat_streams_and_journals_first(learner):
    one = learner()
    stream = one.chat("I live by the sea.", max_new_tokens=5)
    next(stream)
    assert [item.text for item in one.history()] == ["I live by the sea."]
    whole = one.ask("I live by the sea.", max_new_tokens=5)
    assert "".join(one.chat("I live by the sea.", max_new_tokens=5)).strip() == whole
    with pytest.raises(InvalidArgument, match="expected words"):
        list(one.chat(" "))


def test_one_process_at_a_time(learner):
    learner()
    with pytest.raises(StoreLocked):
        learner()


def test_another_base_is_refused(learner, tmp_path):
    learner().close()
    other, tokenizer = load_model(str(tiny_learner.make_model(tmp_path / "other", seed=1)))
    with pytest.raises(FingerprintError, match="its own base model"):
        Learner.from_pretrained(other, tokenizer=tokenizer, memory=tmp_path / "m")
    learner().close()


def test_a_damaged_night_is_named_and_can_be_left(learner, tmp_path):
    one = learner()
    one.observe(SAID)
    one.sleep()
    one.close()
    night = next((tmp_path / "m" / "nights").iterdir())
    night.write_bytes(night.read_bytes()[:-5])
    with pytest.raises(StoreCorrupt, match=night.name):
        learner()


def test_export_and_import_carry_the_memory(learner, tmp_path):
    one = learner()
    one.observe(SAID)
    one.sleep()
    one.export(tmp_path / "file")
    Learner.import_(tmp_path / "file", memory=tmp_path / "copy")
    assert torch.equal(logits(learner("copy")), logits(one))


def test_status_counts_the_bytes_of_a_user(learner):
    status = learner().status()
    assert 0 < status["memory_bytes"] <= 16 * 2**20
    assert status["observations"]["heard"] == 0


def test_what_is_told_later_drops_the_slots_of_what_it_contradicts(learner, monkeypatch):
    """And what is left of the older observation is learned anew."""
    one = learner()
    one.observe("The sea is blue.")
    one.observe(SAID)
    one.sleep()
    first = {row.observation: [] for row in one.store.dreams()}
    for row in one.store.dreams():
        first[row.observation].append(row.id)
    gone = {3: Given(first[2][:1], [Dream("What is heard?", "Singing.", "Singing", taken=first[2][0])], {})}
    monkeypatch.setattr("everlearn.learner.learner.superseded", lambda dreamer, new, old, beside: gone)
    one.observe("My parrot sings.")
    report = one.sleep()
    assert report.superseded == (2,)
    assert owners(one) == {1, 2, 3}
    new = [item.dream for item in kept_dreams(one.store) if item.observation == 3]
    question = next(row.payload["question"] for row in one.store.dreams() if row.id == first[2][0])
    assert [(dream.question, dream.answer) for dream in new if dream.taken] == [(question, "Singing")]
    assert first[2][0] not in [item.id for item in kept_dreams(one.store)]


def test_what_was_said_beside_it_is_learned_anew_without_naming_it(learner, monkeypatch):
    said = "We have a daughter, Tamsin, who is seven."

    class Two:
        def dream(self, passages, generator, progress, beside=None):
            names = ("Tamsin", "seven") if said in passages else ("eight",)
            return [[Dream(f"{name}?", f"{name}. {passage}", name) for name in names] for passage in passages]

        def follows(self, passages, later):
            return [0.0 for _ in passages]

    one = learner(dreamer=Two())
    monkeypatch.setattr(
        "everlearn.learner.learner.superseded",
        lambda dreamer, new, old, beside: {
            n: Given([k.id for k in old if k.dream.answer == "seven"], list(dreams), {})
            for n, (_, dreams) in new.items()
        },
    )
    learned = []
    learn = SlotConsolidator.learn

    def watched(self, new, *rest):
        learned.append(new)
        return learn(self, new, *rest)

    monkeypatch.setattr(SlotConsolidator, "learn", watched)
    for text in (said, "She turned eight."):
        one.observe(text)
        one.sleep()
    left = Dream("Tamsin?", "Tamsin.", "Tamsin")
    assert learned[1][1] == [left]
    assert [item.dream for item in kept_dreams(one.store) if item.observation == 1] == [left]
    one.forget("eight")
    assert [item.dream.reply for item in kept_dreams(one.store)] == [f"{name}. {said}" for name in ("Tamsin", "seven")]


def test_forgetting_leaves_what_was_told_later_in_place_of_what_it_contradicts(learner, monkeypatch):
    """The night to go back to still knew what a later one, that stays, has replaced."""
    one = learner()
    one.observe("The sea is blue.")
    one.sleep()
    old = [row.id for row in one.store.dreams()]
    monkeypatch.setattr(
        "everlearn.learner.learner.superseded",
        lambda dreamer, new, *_: {n: Given(old if n == 2 else [], list(dreams), {}) for n, (_, dreams) in new.items()},
    )
    one.observe("The sea is green.")
    one.observe(SAID)
    one.sleep()
    assert owners(one) == {2, 3}
    one.forget(SAID)
    assert owners(one) == {2}, "neither what is forgotten nor what was replaced"
    one.forget("The sea is green.")
    assert owners(one) == {1}, "what it replaced holds again"


class Named:
    """Dreams of a message by its words and, with what it refers to, by that; what is about a town takes towns over."""

    def dream(self, passages, generator, progress, beside):
        made = [[Dream(f"What of {passage}", f"{last(passage)}.", last(passage))] for passage in passages]
        for passage, earlier, dreams in zip(passages, beside, made, strict=True):
            if earlier:
                number = earlier.observation
                dreams.append(Dream("Where does my sister live?", f"{last(passage)}.", last(passage), beside=number))
        return made

    def answers(self, passages, questions):
        return [last(passage) for passage in passages]

    def follows(self, passages, later):
        return [30.0 * text.endswith("Paloma") for text in later]

    def about(self, passages, questions):
        return [10.0 * ("lives" in passage or "moved" in passage) for passage in passages]

    def rather(self, passages, questions, ones, others):
        return [0.0 for _ in passages]


def last(passage: str) -> str:
    return passage.rstrip(".").split()[-1]


TOWN, SISTER, MOVED = "My sister lives in Boise.", "Everybody calls my sister Paloma.", "Paloma moved to Oslo."


@pytest.mark.parametrize("nights", [[[TOWN], [SISTER], [MOVED]], [[TOWN], [SISTER, MOVED]]], ids=["three", "two"])
def test_what_is_known_by_role_goes_with_what_says_who_it_is(learner, tmp_path, nights):
    one = learner(dreamer=Named())
    for texts in nights:
        for text in texts:
            one.observe(text)
        report = one.sleep()
    assert report.superseded == (1,), "the town, by what the two messages say together"
    by_role = [item for item in kept_dreams(one.store) if "sister live" in item.dream.question]
    assert {(item.observation, item.dream.answer, item.dream.beside) for item in by_role} >= {(3, "Oslo", 2)}
    assert owners(one) == {2, 3}
    one.forget(SISTER)
    assert owners(one) == {1, 3}, "the town holds again: nothing says that Paloma is the sister"
    held = {(item.observation, item.dream.question) for item in kept_dreams(one.store)}
    assert held == {(1, f"What of {TOWN}"), (3, f"What of {MOVED}")}
    one.close()
    assert not any(
        b"Where does my sister" in file.read_bytes() for file in (tmp_path / "m").rglob("*") if file.is_file()
    )


def test_what_is_only_chatter_names_nobody(learner):
    """Only what was learned says who is meant."""
    one = learner(dreamer=Named())
    for text in (f"no news: {SISTER}", MOVED):
        one.observe(text)
    one.sleep()
    assert [item.dream.question for item in kept_dreams(one.store)] == [f"What of {MOVED}"]
