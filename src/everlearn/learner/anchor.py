"""The anchor: the base's own voice behind the trunk, and the gate that is fitted between it and what was dreamt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from everlearn.errors import InvalidArgument, StoreError
from everlearn.learner.examples import IGNORE, Examples, encode_examples, run_trunk
from everlearn.learner.metric import learn_metric, whitener
from everlearn.learner.voice import Voice
from everlearn.learner.words import learn_words, read_gists
from everlearn.memories.gated import Gate, rms_normalise
from everlearn.memories.gist import Gist
from everlearn.models.hub import cache_dir
from everlearn.models.memory_file import atomic_write
from everlearn.models.trunk import Activations, SplitModel

# what is cached beside the activations
KEPT = [
    "teacher",
    "own",
    "statements",
    "chatter",
    "moments",
    "inside",
    "outside",
    "foils",
    "rivals",
    "within",
    "centers",
    "scatters",
    "metric",
    "told",
]
VERSION = 2  # of what is cached
HELD_OUT = 4  # one in so many replies is never trained on, only checked
GATE_DECAY = 0.03  # weight decay of the gate's logistic regression
GATE_SHIFT = 0.5  # g = clamp(logit + shift, 0, 1): half open where the two sides are equally likely
# the same for a gate that only says where a reply about one's own life begins: g = clamp(slope (logit + shift), 0, 1)
ASKING_DECAY, ASKING_SHIFT, ASKING_SLOPE = 0.003, -0.2, 4.0
# weights in the gate's regression: the token that starts a reply, one of a learned reply, one of ordinary text, and the
# end of a question about one's own life of which nothing was told
ASKED, SPOKEN, OTHER, OWN = 5.0, 1.0, 0.3, 2.0
FEW = 100  # dreams; the starts of fewer count as much as so many, or the voice would shut them out
ELSEWHERE = 4  # one in so many positions of the voice is shown to that gate
RIDGES = 0.1, 0.4  # of a scatter's mean diagonal, added to it: inside replies, and where they begin
VOICE_SHARE = 0.1  # of the scatter of the voice's questions beside that of one question in several wordings


@dataclass(frozen=True)
class Anchor:
    """The voice as tensors.

    Attributes:
        replies: conversations in the base's voice, with its replies.
        activations: the trunk's activations on them.
        teacher: the base's last hidden states on them, [n, T, d].
        own: what the lowest memory reads at the end of a question about one's own life, [m, d].
        statements: the same at the end of something told about oneself, [k, d].
        chatter: the same at the end of what tells nothing, [l, d].
        moments: second moments E[x x^T] of what each learning layer's memories read on the replies, each x scaled to
            mean square 1, [layers, d, d].
        inside: what the lowest and the highest memory read where the reply to a question about one's own life would
            begin, the practice questions too, one beside the other and each scaled to mean square 1, [p, 2 d].
        outside: the same for those that only look like it, for questions of the voice that may be trained on and, last,
            for those about the assistant.
        foils: of these, but for the assistant's, what the highest memory reads, [q, d]: nearer to them than to what was
            told, a question is not answered.
        rivals: the mean of that over the wordings of each practice question and each usual one, [g, d]: what else one
            may ask about.
        within: the same anywhere else in the voice's conversations, a part of them.
        centers: mean of what the highest memory reads, scaled to mean square 1, inside the voice's replies and at the
            end of its questions, [2, d].
        scatters: its covariance, [2, d, d]; at the end of questions that of one practice or usual question in several
            wordings, with a share of that of the voice.
        metric: what was learned of the practice questions and the usual ones beyond that, [d, d].
        told: gists of what the practice questions ask about, and of the usual ones, [g, e].
        words: what a gist is read with, the buffers of a :class:`~everlearn.memories.gist.Gist`.
        contrasts: how many of the replies, the last ones, are near misses of the dreams.
    """

    replies: Examples
    activations: Activations
    teacher: Tensor
    own: Tensor
    statements: Tensor
    chatter: Tensor
    moments: Tensor
    inside: Tensor
    outside: Tensor
    foils: Tensor
    rivals: Tensor
    within: Tensor
    centers: Tensor
    scatters: Tensor
    metric: Tensor
    told: Tensor
    words: Mapping[str, Tensor]
    contrasts: int = 0

    def trained(self) -> Tensor:
        """Return the indices of the replies that may be trained on."""
        own = len(self.replies) - self.contrasts
        return torch.tensor([i for i in range(len(self.replies)) if i >= own or i % HELD_OUT])

    def held_out(self) -> Tensor:
        """Return the indices of those that are only checked."""
        return torch.arange(0, len(self.replies) - self.contrasts, HELD_OUT)

    def joined(self, replies: Examples, activations: Activations, teacher: Tensor) -> Anchor:
        """Return the anchor with near misses of the dreams beside the voice, answered by the base as well."""
        more = len(replies)
        if not more:
            return self
        ours, of = self.replies, self.activations
        hidden, read = _stack(of.hidden, activations.hidden), _stack(of.read, activations.read)
        both = Examples(
            _stack(ours.ids, replies.ids),
            _stack(ours.targets, replies.targets, IGNORE),
            torch.cat([ours.asked, replies.asked]),
            torch.cat([ours.lengths, replies.lengths]),
        )
        states = _stack(self.teacher, teacher)
        acts = Activations(hidden, read, both.ids)
        return replace(self, replies=both, activations=acts, teacher=states, contrasts=self.contrasts + more)


def load_anchor(split: SplitModel, tokenizer: PreTrainedTokenizerBase, voice: Voice, key: str) -> Anchor:
    """Return the anchor of ``voice`` for an unlearned ``split``, from the cache under ``key``, or computed and cached.

    The base's last hidden states are taken from ``split`` itself, so its memory must be closed or untouched.
    """
    if voice.told and len(voice.told) != len(voice.practice):
        raise InvalidArgument(
            f"told: got {len(voice.told)} texts, expected none or one for each of {len(voice.practice)}"
        )
    replies = encode_examples(tokenizer, [*voice.general, *voice.others])
    path = cache_dir() / "anchors" / f"{key}-{VERSION}.safetensors"
    if path.is_file():
        try:
            kept = load_file(path)
            if kept["ids"].shape == replies.ids.shape and torch.equal(kept["ids"], replies.ids):
                acts = Activations(kept.pop("hidden"), kept.pop("read"), replies.ids)
                words = {name: kept[f"words.{name}"] for name in Gist.NAMES}
                return Anchor(replies, acts, words=words, **{name: kept[name] for name in KEPT})  # type: ignore[arg-type]
        except (SafetensorError, OSError, KeyError):
            pass  # a damaged cache is made anew
    acts = run_trunk(split, replies)
    with torch.no_grad(), split.watching() as seen:
        teacher = torch.cat([split.upper(part) for part in acts.split(32)])
    positions = torch.arange(replies.ids.shape[1])
    at, lived = (torch.arange(len(replies)), replies.asked), positions < replies.lengths[:, None]
    spoken = lived & (positions >= replies.asked[:, None])
    moments = torch.stack([_second_moment(torch.cat(layer)[spoken]) for layer in seen])
    own, statements, chatter = (read_at_end(split, tokenizer, t) for t in (voice.own, voice.statements, voice.chatter))
    both = pair(acts.read, torch.cat(seen[-1]))
    asked, trained = both[at], torch.arange(len(replies)) % HELD_OUT > 0
    spoken[at] = lived[at] = False
    above = both[spoken].chunk(2, -1)[1]
    practice = [question for group in voice.practice for question in group]
    usual = [question for group in voice.usual for question in group]
    groups = torch.tensor([index for index, group in enumerate((*voice.practice, *voice.usual)) for _ in group])
    mine = read_pairs(split, tokenizer, [*practice, *voice.own])
    practised = torch.cat([mine[: len(practice)], read_pairs(split, tokenizer, usual)]).chunk(2, -1)[1]
    heard = asked.chunk(2, -1)[1]
    scatter, count = within_scatter(practised, groups)
    scatter = scatter / max(count, 1) + VOICE_SHARE * torch.cov(heard.T)
    outside = torch.cat([read_pairs(split, tokenizer, voice.elsewhere), asked[trained]])
    metric = learn_metric((practised - heard.mean(0)) @ whitener(scatter, RIDGES[1]), groups)
    words = learn_words(split.model, tokenizer, [*voice.told, *practice, *voice.elsewhere])
    gist = Gist(len(words["center"]))
    gist.fill(words)
    told = [*(voice.told or [""] * len(voice.practice)), *(group[0] for group in voice.usual)]
    anchor = Anchor(
        replies,
        acts,
        teacher,
        own,
        statements,
        chatter,
        moments,
        inside=mine,
        outside=torch.cat([outside, read_pairs(split, tokenizer, voice.assistant)]),
        foils=outside.chunk(2, -1)[1],
        rivals=torch.stack([practised[groups == group].mean(0) for group in groups.unique()])
        if len(groups)
        else practised,
        within=both[trained][lived[trained]][::ELSEWHERE],
        centers=torch.stack([above.mean(0), heard.mean(0)]),
        scatters=torch.stack([torch.cov(above.T), scatter]),
        metric=metric,
        told=read_gists(split.model, tokenizer, gist, told),
        words=words,
    )
    tensors = {"ids": replies.ids, "hidden": acts.hidden, "read": acts.read}
    tensors |= {name: getattr(anchor, name) for name in KEPT}
    tensors |= {f"words.{name}": tensor for name, tensor in anchor.words.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    except (OSError, StoreError):
        pass  # a cache that cannot be written costs time, nothing else
    return anchor


def pair(read: Tensor, above: Tensor) -> Tensor:
    """Return what the lowest and the highest memory read, [..., d] each, scaled to mean square 1, as [..., 2 d]."""
    return torch.cat([rms_normalise(read), rms_normalise(above)], -1)


@torch.no_grad()
def read_pairs(split: SplitModel, tokenizer: PreTrainedTokenizerBase, messages: Sequence[str]) -> Tensor:
    """Return :func:`pair` where the reply to each message would begin, [n, 2 d]."""
    if not messages:
        return torch.zeros(0, 2 * cast(int, split.model.config.hidden_size))
    examples = encode_examples(tokenizer, [(message, None) for message in messages])
    acts = run_trunk(split, examples)
    with split.watching() as seen:
        for part in acts.split(32):
            split.upper(part)
    ends = torch.arange(len(examples)), examples.asked
    return pair(acts.read[ends], torch.cat(seen[-1])[ends])


def within_scatter(x: Tensor, groups: Tensor) -> tuple[Tensor, int]:
    """Return the summed scatter [d, d] of ``x`` [n, d] about the mean of its group, unbiased, and how many it is of."""
    total, count = torch.zeros(x.shape[1], x.shape[1]), 0
    for group in groups.unique():
        own = x[groups == group]
        if len(own) > 1:
            total += len(own) * torch.cov(own.T)
            count += len(own)
    return total, count


def _second_moment(x: Tensor) -> Tensor:
    x = rms_normalise(x)
    return x.T @ x / len(x)


def fit_gate(gate: Gate, anchor: Anchor, dreams: Examples, read: Tensor) -> None:
    """Fit ``gate`` in place: open where a dream is answered or one's own life is asked about, closed in the voice.

    Logistic regression on what the lowest memory reads, token by token; the start of a reply counts most. The beginning
    that all prompts share is ordinary too, and is counted once.

    Args:
        gate: the stack's gate.
        anchor: the ordinary.
        dreams: what was dreamt.
        read: the trunk's activations on the dreams, [n, T, d].
    """
    start = shared_start(anchor.replies)
    inside, outside = [anchor.own], []
    weights_in, weights_out = [torch.full((len(anchor.own),), OWN)], []
    more = max(1.0, FEW / len(dreams))
    for row, (asked, length) in enumerate(zip(dreams.asked.tolist(), dreams.lengths.tolist())):
        inside.append(read[row, asked:length])
        weights_in.append(torch.tensor([more * ASKED] + [SPOKEN] * (length - asked - 1)))
    replies = anchor.replies
    outside.append(anchor.activations.read[0, :start])
    weights_out.append(torch.full((start,), more * ASKED))
    for row in anchor.trained().tolist():
        asked, length = int(replies.asked[row]), int(replies.lengths[row])
        outside.append(anchor.activations.read[row, start:length])
        weight = torch.full((length - start,), OTHER)
        weight[asked - start] = ASKED
        weights_out.append(weight)
    positive, negative = rms_normalise(torch.cat(inside)), rms_normalise(torch.cat(outside))
    mean, deviation = negative.mean(0), negative.std(0) + 1e-3
    inputs = (torch.cat([positive, negative]) - mean) / deviation
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    importance = torch.cat(weights_in + weights_out)
    weight, bias = _logistic_regression(inputs, labels, importance / importance.mean())
    gate.set_(weight / deviation, bias - (weight * mean / deviation).sum() + GATE_SHIFT)


def fit_asking_gate(anchor: Anchor, inside: Tensor, outside: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights [2 d] and bias [] of a gate that is open where a reply about one's own life begins.

    Logistic regression on :func:`pair`, [n, 2 d] each, beside what the anchor has of each kind.

    Args:
        anchor: the base's voice and the practice questions.
        inside: where the reply to a dreamt question begins.
        outside: where the reply to a near miss begins.
        within: inside the replies of dreams, which the gate has nothing to say about.
    """
    others = torch.cat([anchor.within, within])
    parts = [  # what is read, whether it is to be open there, and the weight of each
        (inside, 1.0, 1.0),
        (anchor.inside, 1.0, 2.0),
        (anchor.outside, 0.0, 5.0),
        (outside, 0.0, 1.0),
    ]
    share = sum(len(read) * weight for read, _, weight in parts) * OTHER / len(others)
    parts.append((others, 0.0, share))
    inputs = torch.cat([read for read, _, _ in parts])
    labels = torch.cat([torch.full((len(read),), label) for read, label, _ in parts])
    importance = torch.cat([torch.full((len(read),), weight) for read, _, weight in parts])
    mean, deviation = anchor.outside.mean(0), anchor.outside.std(0) + 1e-3
    weight, bias = _logistic_regression(
        (inputs - mean) / deviation, labels, importance / importance.mean(), ASKING_DECAY
    )
    slope = ASKING_SLOPE / deviation
    return weight * slope, ASKING_SLOPE * (bias + ASKING_SHIFT) - (weight * mean * slope).sum()


def tells_something(anchor: Anchor, read: Tensor) -> Tensor:
    """Return the log odds [n] that a message tells of its speaker, for what the lowest memory reads at its end [n, d].

    A linear probe between the base's own statements on one side and its chatter and questions on the other.
    """
    asked = anchor.replies.asked
    questions = anchor.activations.read[torch.arange(len(asked)), asked]
    positive = rms_normalise(anchor.statements)
    negative = rms_normalise(torch.cat([anchor.chatter, anchor.own, questions]))
    both = torch.cat([positive, negative])
    mean, deviation = both.mean(0), both.std(0) + 1e-3
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    balance = torch.cat([torch.full((len(positive),), len(negative) / len(positive)), torch.ones(len(negative))])
    weight, bias = _logistic_regression((both - mean) / deviation, labels, balance / balance.mean())
    return (rms_normalise(read) - mean) / deviation @ weight + bias


def read_at_end(split: SplitModel, tokenizer: PreTrainedTokenizerBase, messages: Sequence[str]) -> Tensor:
    """Return what the lowest memory reads where the reply to each message would begin, [n, d]."""
    examples = encode_examples(tokenizer, [(message, None) for message in messages])
    return run_trunk(split, examples).read[torch.arange(len(examples)), examples.asked]


def _logistic_regression(
    inputs: Tensor, labels: Tensor, importance: Tensor, decay: float = GATE_DECAY
) -> tuple[Tensor, Tensor]:
    """Minimise the weighted binary cross-entropy plus ``decay |w|^2`` by L-BFGS; return w [d] and b []."""
    weight = torch.zeros(inputs.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight + bias
        loss = F.binary_cross_entropy_with_logits(logits, labels, weight=importance) + decay * weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def shared_start(examples: Examples) -> int:
    """Return how many leading tokens all examples share."""
    shortest = int(examples.lengths.min())
    differs = (examples.ids[:, :shortest] != examples.ids[0, :shortest]).any(0).nonzero()
    return int(differs[0]) if len(differs) else shortest


def _stack(first: Tensor, second: Tensor, fill: int = 0) -> Tensor:
    """Stack two batches [n, T, ...] of different T, padded on the right."""
    return pad_sequence([*first, *second], batch_first=True, padding_value=fill)


def reply_positions(examples: Examples) -> Tensor:
    """Return the mask [n, T] of the positions that predict a token of the reply."""
    return examples.targets != IGNORE
