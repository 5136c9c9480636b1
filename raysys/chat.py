"""Chats: benchmark questions as messages, put through the chat template that comes with an instruction-tuned model.

What is asked is what lm-evaluation-harness 0.4.13 asks with `--apply_chat_template`, to the character. The description
of a task is the system's message; each example is one of the user's and one of the assistant's (`multiturn`, its
default), or examples and question are one message of the user's, joined as in a plain prompt. The template is told to
begin the assistant's turn, and choices lose what joined them to the question ("A", not " A"). A template that refuses a
message (many know no system) is tried again without the system's.

Templates are programs that come with a model; transformers runs them in a sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from typing import Any

from raysys.types import Choose, Query, Turn

Messages = list[dict[str, str]]
BETWEEN = "\n\n"  # a study's own instruction and a task's description
DAY = date(2024, 7, 26)  # "today": what Llama 3's templates take where there is no clock
CLOCK = "strftime_now"  # the function that tells a template the time
PROBE: Messages = [{"role": "user", "content": "?"}]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """`system`: an instruction before every description. `arguments`: what the template is given besides, by name.

    A template that asks for today's date is told `DAY`, so that a study taken up tomorrow asks the same questions.
    """

    multiturn: bool = True
    system: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def check(self, tokenizer: Any, model: str) -> None:
        """Raise ValueError for a model without a usable chat template."""
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"model {model!r}: its tokenizer has no chat template. Take the instruction-tuned model, save a "
                "template beside its tokenizer (chat_template.jinja), or set scoring.apply_chat_template = false."
            ) from error
        self._rendered(tokenizer, PROBE, f"model {model!r}")

    def asked(self, tokenizer: Any, query: Query) -> Query:
        """`query` with the prompt as the template renders it, and with bare choices.

        Raises ValueError when the template fails.
        """
        turns = query.turns or (Turn("user", query.prompt, _end(query)),)
        prompt = self._rendered(tokenizer, self.messages(turns), query.id)
        if isinstance(query, Choose):
            choices = tuple(choice.removeprefix(turns[-1].end) for choice in query.choices)
            return replace(query, prompt=prompt, choices=choices)
        return replace(query, prompt=prompt)

    def messages(self, turns: tuple[Turn, ...]) -> Messages:
        """The turns as a template takes them: a role and its content each."""
        said = [t for t in turns if t.role != "system"]
        assert said, "a question is there"
        system = _joined(self.system, "".join(t.text + t.end for t in turns if t.role == "system"))
        if not self.multiturn:
            begun = said[-1:] if said[-1].role == "assistant" else []  # the answer's beginning stays a turn
            *rest, last = said[: len(said) - len(begun)]
            said = [Turn("user", "".join(t.text + t.end for t in rest) + last.text), *begun]
        found = [Turn("system", system), *said] if system else said
        return [{"role": t.role, "content": t.text} for t in found]

    def _rendered(self, tokenizer: Any, messages: Messages, where: str) -> str:
        from jinja2 import TemplateError

        try:
            try:
                return self._render(tokenizer, messages)
            except TemplateError:
                if messages[0]["role"] != "system":
                    raise
                return self._render(tokenizer, messages[1:])
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: the model's chat template can't render it: {error}") from error

    def _render(self, tokenizer: Any, messages: Messages) -> str:
        begun = messages[-1]["role"] == "assistant"
        template = tokenizer.get_chat_template()
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=_stopped() + template if CLOCK in template else template,
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            **self.arguments,
        )
        return text


@cache
def _stopped() -> str:
    """The clock of a template, stopped at `DAY`, to be put before it: templates are given data alone, no functions."""
    parts = "".join(f"|replace('%{c}', '{DAY.strftime('%' + c)}')" for c in "aAbBdmyYjHIMSp")
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}\n"  # jinja drops this line's end


def _end(query: Query) -> str:
    """What joins a plain prompt to its choices: a blank, if all begin with one."""
    return " " if isinstance(query, Choose) and all(c.startswith(" ") for c in query.choices) else ""


def _joined(first: str, second: str) -> str:
    """Both, apart by an empty line unless a blank stands between them."""
    between = BETWEEN if first and second and not (first[-1].isspace() or second[0].isspace()) else ""
    return first + between + second
