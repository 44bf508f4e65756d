"""A judge that compares words, and dreams that the tests of a night share."""

from __future__ import annotations

from everlearn.learner.dreams import Dream
from everlearn.learner.night import Kept
from everlearn.learner.superseding import FOLLOWS


def dream(question: str, reply: str) -> Dream:
    return Dream(question, reply, reply.split()[-1])


class Judge:
    """Finds a question about a passage when they share the word that comes last in the question.

    Its answer is the last word of the passage.
    """

    def answers(self, passages, questions):
        return [passage.split()[-1] for passage in passages]

    def rather(self, passages, questions, ones, others):
        """The answer that comes last in the passage; without one, what is as long is as good."""
        pairs = zip(passages, ones, others)
        return [(p.rfind(a) - p.rfind(b)) / 10 if a in p or b in p else 5.0 * (len(a) - len(b)) for p, a, b in pairs]

    def about(self, passages, questions):
        self.asked = list(zip(passages, questions))
        return [10.0 if q.rstrip("?").split()[-1] in p else 0.0 for p, q in self.asked]

    def follows(self, passages, later):
        return [FOLLOWS for _ in passages]


def kept(id: int, observation: int, question: str, reply: str) -> Kept:
    return Kept(id, observation, dream(question, reply), reply)
