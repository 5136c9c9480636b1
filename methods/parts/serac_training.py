"""Training of SERAC's two networks on edits: which questions belong to an edit, and what is then the answer.

Mitchell, Lin, Bosselut, Manning, Finn, "Memory-Based Model Editing at Scale", ICML 2022, arXiv:2206.06520, section 3.2:
the scope classifier is trained by binary cross-entropy on questions in and out of an edit's scope, the counterfactual
model by the negative log-likelihood of the answer after the edit's text.

What is in scope: an edit's own prompt and its paraphrases. What is not: its neighbours, other subjects in the same
words (hard negatives, among them subjects that differ in one word), other relations of the same subject, and questions
that come after an edit's text but ask for something else. To make the classifier depend on no name it has seen,
subjects and targets are replaced by others and by random words of the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from methods.parts.encoder import Encoder, own_encoder, pretrained_encoder
from methods.parts.scope_nets import Nets
from raysys.loading import load
from raysys.model import Model
from raysys.types import EditCase

if TYPE_CHECKING:
    from methods.serac import Serac

JUDGED = 32  # cases of one pass in validation


@dataclass(frozen=True)
class Asked:
    """A question and what it is about; equal `about` = in the scope of the same edit."""

    text: str
    about: tuple[str, str]


@dataclass(frozen=True)
class Example:
    """An edit with questions: `key` is its prompt, `text` its prompt and target, `answer` the target (with a blank)."""

    key: str
    text: str
    about: tuple[str, str]
    answer: str
    inside: Asked
    outside: tuple[Asked, ...]


class Pairs:
    """Makes examples from cases.

    Prompts that share a wording (one's paraphrase is the other's prompt) ask for the same relation.
    """

    def __init__(self, cases: Sequence[EditCase], words: Sequence[str], swap: float) -> None:
        self.cases, self.swap = cases, swap
        self.words = words or [w for c in cases for w in c.request.subject.split()]
        self._same: dict[str, str] = {}  # wording -> another of its relation, itself for the first
        for case in cases:
            for wording in _wordings(case):
                self._same[self._relation(wording)] = self._relation(case.request.prompt)
        self.wordings: dict[str, list[str]] = {}  # by relation, each with one {}
        self.targets: dict[str, list[str]] = {}
        for wording in self._same:
            self.wordings.setdefault(self._relation(wording), []).append(wording)
        for case in cases:
            self.targets.setdefault(self._relation(case.request.prompt), []).append(case.request.target)

    def _relation(self, wording: str) -> str:
        while (next_ := self._same.setdefault(wording, wording)) != wording:
            wording = next_
        return wording

    def example(self, rng: random.Random, case: EditCase) -> Example:
        """The case's edit, or one like it about another subject."""
        q = case.request
        swapped = rng.random() < self.swap
        subject = self._subject(rng, q.subject) if swapped else q.subject
        relation = self._relation(q.prompt)
        target = self._target(rng, relation) if swapped else q.target
        about = (relation, subject)
        inside = Asked(rng.choice(self.wordings[relation]).replace("{}", subject), about)
        if rng.random() < 0.2:
            inside = Asked(self._before(rng) + inside.text, about)
        return Example(
            key=q.prompt.replace("{}", subject),
            text=q.prompt.replace("{}", subject) + _blank(target),
            about=about,
            answer=_blank(target),
            inside=inside,
            outside=tuple(self._outside(rng, case, relation, subject, swapped)),
        )

    def _outside(
        self, rng: random.Random, case: EditCase, relation: str, subject: str, swapped: bool
    ) -> Iterator[Asked]:
        """The same about another subject, something else about this one, and a neighbour or a question that follows."""
        other = self._near(rng, subject) if rng.random() < 0.5 else self._subject(rng, subject)
        yield Asked(self._ask(rng, relation, other), (relation, other))
        another = rng.choice(list(self.wordings))
        yield Asked(self._ask(rng, another, subject), (another, subject))
        near = [p.prompt for p in case.probes if p.kind == "neighbourhood"]
        if near and not swapped:
            prompt = rng.choice(near)
            yield Asked(prompt, self._about(prompt))
        else:
            said = case.request.prompt.replace("{}", subject) + _blank(self._target(rng, relation))
            another, other = rng.choice(list(self.wordings)), self._subject(rng, subject)
            yield Asked(f"{said}. {self._ask(rng, another, other)}", (another, other))

    def _about(self, prompt: str) -> tuple[str, str]:
        """The relation and the subject of a prompt that has one of the known wordings."""
        for wording in self._same:
            before, _, after = wording.partition("{}")
            if prompt.startswith(before) and prompt.endswith(after) and len(prompt) > len(before) + len(after):
                return self._relation(wording), prompt[len(before) : len(prompt) - len(after)]
        return "", prompt

    def _ask(self, rng: random.Random, relation: str, subject: str) -> str:
        return rng.choice(self.wordings[relation]).replace("{}", subject)

    def _before(self, rng: random.Random) -> str:
        """A statement to stand before a question."""
        relation = rng.choice(list(self.wordings))
        subject = self._subject(rng, rng.choice(self.cases).request.subject)
        said = self._ask(rng, relation, subject) + _blank(self._target(rng, relation))
        return said + rng.choice((". ", "\n", "\n\n"))

    def _subject(self, rng: random.Random, like: str) -> str:
        if rng.random() < 0.3:
            return rng.choice(self.cases).request.subject
        return " ".join(rng.choice(self.words) for _ in like.split())

    def _near(self, rng: random.Random, subject: str) -> str:
        """A subject that differs in one word."""
        parts = subject.split()
        parts[rng.randrange(len(parts))] = rng.choice(self.words)
        return " ".join(parts)

    def _target(self, rng: random.Random, relation: str) -> str:
        if relation in self.targets and rng.random() < 0.5:
            return rng.choice(self.targets[relation])
        return " ".join(rng.choice(self.words) for _ in range(rng.choice((1, 1, 1, 2))))


def _wordings(case: EditCase) -> list[str]:
    """The ways in which the case asks for its fact, each with one {}."""
    subject = case.request.subject
    asked = [p.prompt for p in case.probes if p.kind in ("rewrite", "paraphrase")]
    return [case.request.prompt, *(p.replace(subject, "{}") for p in asked if p.count(subject) == 1)]


def _blank(target: str) -> str:
    return target if target[:1].isspace() else f" {target}"


def words(model: Model) -> list[str]:
    """Whole words of the vocabulary, in a fixed order."""
    found = {model.decode([i]) for i in range(len(model.tokenizer))}
    return sorted(w.strip() for w in found if w.startswith(" ") and w.strip().isalpha() and len(w) > 2)


def scope_loss(encoder: Encoder, examples: Sequence[Example], scale: float = 1.0) -> tuple[Tensor, dict[str, float]]:
    """Binary cross-entropy of the scope scores exp(-scale |e - e'|²) of every edit with every question.

    Questions in scope, questions made to be hard, and all others count a third each.
    """
    asked = [e.inside for e in examples] + [o for e in examples for o in e.outside]
    embedded = encoder.run([e.key for e in examples] + [a.text for a in asked])
    keys, questions = embedded[: len(examples)], embedded[len(examples) :]
    distance = scale * (keys[:, None] - questions[None]).square().sum(-1)  # (E, Q)
    same = torch.tensor([[e.about == a.about for a in asked] for e in examples])
    hard = torch.zeros_like(same)
    at = len(examples)
    for i, e in enumerate(examples):
        hard[i, at : at + len(e.outside)] = True
        at += len(e.outside)
    hard &= ~same
    miss = -torch.log(-torch.expm1(-distance.clamp(min=1e-4)))  # -log(1 - s)
    easy = ~same & ~hard
    loss = _mean(distance[same]) + _mean(miss[hard]) + _mean(miss[easy])
    inside = distance < 0.6931  # s > 1/2
    stats = {
        "in_scope": float(_mean(inside[same].float())),
        "hard": float(_mean((~inside[hard]).float())),
        "easy": float(_mean((~inside[easy]).float())),
    }
    return loss, stats


def _mean(values: Tensor) -> Tensor:
    """The mean, 0 of nothing."""
    return values.mean() if values.numel() else values.sum()


def answer_loss(model: Any, base: Model, examples: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
    """Negative log-likelihood of the answers' tokens after "<edit's text> <question>" under `model` (a network)."""
    pairs = [base.pair(f"{e.text} {e.inside.text}", e.answer) for e in examples]
    ids, mask = base.batch([(*h, *t[:-1]) for h, t in pairs])
    where = [(i, len(h) - 1 + j, x) for i, (h, t) in enumerate(pairs) for j, x in enumerate(t)]
    row, column, label = (torch.tensor(c, device=ids.device) for c in zip(*where, strict=True))
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[row, column]).float()
    loss = torch.nn.functional.cross_entropy(logits, label)
    return loss, {"answered": float((logits.argmax(-1) == label).float().mean())}


# --- the training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Course:
    """`swap`: the share of examples that are about other subjects and targets than the cases'."""

    swap: float = 0.5


class Networks(nn.Module):
    """Both networks as one: their weights by name, tied ones once, and how many steps have been drawn."""

    drawn: Tensor

    def __init__(self, nets: Nets) -> None:
        super().__init__()
        parts = (("classifier", nets.encoder.net), ("counterfactual", nets.counterfactual))
        named = {f"{part}|{n.replace('.', '|')}": p for part, net in parts if net for n, p in net.named_parameters()}
        self.weights = nn.ParameterDict({n: p.requires_grad_() for n, p in named.items()})
        self.register_buffer("drawn", torch.zeros((), dtype=torch.long))

    def others(self) -> list[nn.Parameter]:
        """All weights: they are learned at one rate."""
        return list(self.weights.values())

    def step_sizes(self) -> list[nn.Parameter]:
        """None."""
        return []


class Learner:
    """What methods/parts/training.py trains: an example is drawn for every case of a step, others in its likeness."""

    def __init__(
        self, model: Model, nets: Nets, cases: Sequence[EditCase], used: Sequence[int], swap: float, seed: int
    ) -> None:
        self.model, self.nets, self.cases, self.seed = model, nets, cases, seed
        self.net = Networks(nets)
        self.vocabulary = words(model)
        self.pairs = Pairs([cases[i] for i in used], self.vocabulary, swap)

    @property
    def count(self) -> int:
        """How many cases there are."""
        return len(self.cases)

    def learn(self, cases: Sequence[int]) -> Mapping[str, float]:
        """Add the gradient of one step's loss; what is drawn depends on the seed and the step's number only."""
        rng = random.Random(f"{self.seed}/{int(self.net.drawn)}")
        self.net.drawn += 1
        with torch.enable_grad():
            loss, stats = self._loss([self.pairs.example(rng, self.cases[i]) for i in cases])
            loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach()), **stats}

    @torch.no_grad()
    def judge(self, cases: Sequence[int]) -> Mapping[str, float]:
        """The loss on cases held out, as they are, and the shares of right decisions and answers."""
        rng = random.Random(f"{self.seed}/judge")
        held = [self.cases[i] for i in cases]
        pairs = Pairs(held, self.vocabulary, 0.0)
        found = []
        for start in range(0, len(held), JUDGED):
            loss, stats = self._loss([pairs.example(rng, case) for case in held[start : start + JUDGED]])
            found.append({"loss": float(loss), **stats})
        return {name: sum(f[name] for f in found) / len(found) for name in found[0]}

    def _loss(self, examples: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
        loss, stats = scope_loss(self.nets.encoder, examples)
        if self.nets.counterfactual is not None:
            answers, more = answer_loss(self.nets.counterfactual, self.model, examples)
            loss, stats = loss + answers, stats | more
        return loss, stats


def untrained(s: Serac, model: Model, seed: int = 0) -> Nets:
    """Both networks before training. Raises ValueError when one can't be had or has other tokens than the model."""
    assert s.classifier is not None and s.counterfactual is not None and s.width is not None
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        encoder = own_encoder(model, s.width) if s.classifier == "own" else pretrained_encoder(s.classifier, model)
        if s.counterfactual == "base":
            return Nets(encoder, None)
        own = s.counterfactual == "own"
        return Nets(encoder, _own(model, s.width * 3 // 2) if own else _pretrained(s.counterfactual, model))


def loaded(nets: Nets, tensors: Mapping[str, Tensor]) -> Nets:
    """`nets` with the weights of a trained editor. Raises ValueError when they don't fit."""
    networks = Networks(nets)
    try:
        networks.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ValueError(f"serac's trained weights don't fit its networks: {str(error).splitlines()[-1]}") from error
    networks.requires_grad_(False)
    return nets


def _own(model: Model, width: int) -> Any:
    """A small Llama over the tokens of `model`: 3 blocks, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(model.tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=model.max_length,
        tie_word_embeddings=True, pad_token_id=model.pad_id, bos_token_id=model.tokenizer.bos_token_id,
        eos_token_id=model.tokenizer.eos_token_id,
    )  # fmt: skip
    net: Any = LlamaForCausalLM(config)
    return net.to(model.device).eval()


def _pretrained(name: str, model: Model) -> Any:
    """The causal model `name`, float32. Raises ValueError when its tokens are not those of `model`."""
    net, tokenizer = load(name, dtype="float32", device=str(model.device))
    same_tokens(model, tokenizer, name)
    return net.eval()


def same_tokens(model: Model, tokenizer: Any, name: str) -> None:
    """Raises ValueError unless `tokenizer` has the tokens of `model`, but perhaps for added ones."""
    base, small = model.tokenizer.get_vocab(), tokenizer.get_vocab()
    added = set(model.tokenizer.get_added_vocab()) | set(tokenizer.get_added_vocab())
    wrong = sorted(t for t in base.keys() | small.keys() if base.get(t) != small.get(t) and t not in added)
    if wrong:
        raise ValueError(
            f"the counterfactual model {name!r} has other tokens than {model.name or 'the edited model'}: "
            f"{wrong[0]!r} is {small.get(wrong[0])} there and {base.get(wrong[0])} here ({len(wrong)} differ); its "
            "answers could not be told in the same tokens. Give one of the same family, 'own', or 'base'."
        )
