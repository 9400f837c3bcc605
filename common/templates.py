"""How a conversation is written out for a model, and which of its tokens are trained.

`alpaca`    Alpaca's prompt around every instruction (common/prompts.py)
`raw`       the turns' texts and nothing else
`chat`      the tokenizer's own chat template

Prompt and response are tokenised so that the border between them is where it is when the model generates: tokenised as
one text, a tokenizer may merge across it.
"""

import copy
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, first_line
from common.exports import clean_tokenizer_config
from common.prompts import ALPACA_PROMPT, encode_opening, encode_response

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label of a token that is not to be predicted; cross_entropy's own default
MARK = "Kq7ZxW2v"  # stands for a turn's text: no conversation and no template has it

Messages = list[dict[str, str]]
Pieces = list[tuple[list[int], bool]]  # tokens, and whether they are trained

# Our own templates for a chat endpoint; `generation` marks what is trained.
_ANSWER = (
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
)
_SYSTEM = "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
_NO_TOOLS = "{% elif message['role'] == 'tool' %}{{ raise_exception('no place for a tool turn') }}"
_ALPACA = ALPACA_PROMPT.replace("\n", "\\n").replace("{instruction}", "' + message['content'] + '")
JINJA = {
    "alpaca": "{% for message in messages %}"
    + _ANSWER
    + _SYSTEM
    + _NO_TOOLS
    + f"{{% else %}}{{{{ '{_ALPACA}' }}}}{{% endif %}}{{% endfor %}}",
    "raw": "{% for message in messages %}" + _ANSWER + "{% else %}{{ message['content'] }}{% endif %}{% endfor %}",
}


class Template:
    """One of the three templates, for one tokenizer.

    Attributes:
        jinja: the chat template that renders the very prompt of training.
        end_token_id: the token that ends an assistant's turn.

    Raises:
        UserError: `chat`, and the tokenizer has no chat template, or one that cannot be trained with.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str):
        self.tokenizer, self.name = tokenizer, name
        if name != "chat":
            opening = tokenizer.decode(encode_opening(tokenizer, ""))  # the start token, where the tokenizer has one
            self.jinja, self.end_token_id = opening + JINJA[name], tokenizer.eos_token_id
            return
        if not tokenizer.chat_template:
            raise UserError("--template chat: the tokenizer has no chat template; take alpaca or raw")
        self.jinja = tokenizer.get_chat_template()
        self._is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.jinja) is not None
        self._whole: set[tuple[str, ...]] = set()  # sequences of roles that are known to be written out whole
        self.end_token_id = self._end_of_turn()

    def pieces(self, messages: Messages, first: int = 0) -> Pieces:
        """The tokens of a conversation, cut where a trained part begins or ends.

        Args:
            first: the assistant's turns are trained from this message on.

        Raises:
            UserError: the template refuses the conversation or drops a turn, or what it writes cannot be told apart.
        """
        if self.name != "chat":
            return self._own_pieces(messages, first)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._whole:
            self._require_every_turn(messages)
            self._whole.add(roles)
        text, spans, prompts = self._spans(messages, first)
        return self._tokenised(text, spans, sorted({*prompts, *(border for span in spans for border in span)}))

    def prompt(self, text: str) -> list[int]:
        """The tokens before the answer to `text`, said by the user: training's, and what a server makes of it."""
        messages = [{"role": "user", "content": text}]
        if self.name == "chat":
            return self._ids(self._render(messages, prompt=True)[0])
        return self._own_pieces([*messages, {"role": "assistant", "content": ""}], 0)[0][0]

    def _own_pieces(self, messages: Messages, first: int) -> Pieces:
        """Of `alpaca` and `raw`: each answer is tokenised by itself."""
        pieces, text = [], ""
        for index, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "assistant":
                before = encode_opening(self.tokenizer, text) if not pieces else self._ids(text)
                pieces += [(before, False), (encode_response(self.tokenizer, content), index >= first)]
                text = ""
            elif self.name == "raw":
                text += content
            elif message["role"] == "tool":
                raise UserError("Alpaca's prompt has no place for a tool's turn: take --template chat")
            else:
                text += content + "\n\n" if message["role"] == "system" else ALPACA_PROMPT.format(instruction=content)
        return pieces

    def end_answers(self, generation_config: "GenerationConfig") -> None:
        """Has generation stop at the token that ends a turn, beside those at which it stops already."""
        before = generation_config.eos_token_id
        stops = before if isinstance(before, list) else [] if before is None else [before]
        if self.end_token_id not in stops:
            generation_config.eos_token_id = [*stops, self.end_token_id] if stops else self.end_token_id

    @property
    def plain_jinja(self) -> str:
        """The chat template for other programs: ours without its marks, which only transformers' jinja knows."""
        return self.jinja if self.name == "chat" else re.sub(r"\{% (end)?generation %\}", "", self.jinja)

    def save(self, folder: Path, generation_config: "GenerationConfig | None" = None) -> None:
        """Writes the tokenizer with the chat template of training and its name, as `trained_template`."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = self.plain_jinja
        tokenizer.init_kwargs["trained_template"] = self.name
        tokenizer.save_pretrained(folder)
        clean_tokenizer_config(folder / "tokenizer_config.json")
        if generation_config is not None:
            generation_config.save_pretrained(folder)

    # ---- chat: where in the text the trained parts are

    def _render(self, messages: Messages, *, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """A conversation's text, and where its generation marks are; with `prompt`, up to an answer's beginning."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), marks = render_jinja_template(
                conversations=[messages],
                chat_template=self.jinja,
                return_assistant_tokens_mask=self._is_marked,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # jinja's own, and whatever a template's expressions raise
            raise UserError(f"the chat template refuses it: {first_line(error)}") from error
        return text, [tuple(mark) for mark in marks[0]] if marks else []

    def _spans(self, messages: Messages, first: int) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The conversation's text, its trained parts, and the ends of the prompts that they answer."""
        text, marks = self._render(messages)
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        prompts = [self._render(messages[:turn], prompt=True)[0] for turn in turns]
        if marks:
            before = len(self._render(messages[: turns[0]])[1])
            return text, marks[before:], [len(prompt) for prompt in prompts if text.startswith(prompt)]
        spans = []
        for turn, prompt in zip(turns, prompts, strict=True):
            if not text.startswith(prompt):
                raise UserError(
                    f"the chat template begins message {turn + 1} otherwise than its prompt ends: train on the last "
                    "turn alone (--train-on last), or give the template generation marks"
                )
            spans.append((len(prompt), self._end(messages, turn, text)))
            if spans[-1][0] >= spans[-1][1]:
                raise UserError(f"the chat template writes message {turn + 1} where it cannot be found")
        return text, spans, []

    def _end(self, messages: Messages, turn: int, text: str) -> int:
        """Where in `text`, the whole conversation, the assistant's `turn` ends, with what closes it.

        With another content in its place, what follows the content is the same: that says where the content ends. How
        much of what follows closes the turn: as much as follows where the conversation ends there.
        """
        marked = [*messages[:turn], messages[turn] | {"content": MARK}, *messages[turn + 1 :]]
        after = self._render(marked)[0].rpartition(MARK)[2]
        closing = self._render(marked[: turn + 1])[0].rpartition(MARK)[2]
        if not text.endswith(after):
            raise UserError(f"the chat template writes what follows message {turn + 1} by what it says")
        length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(closing, after, strict=False)))
        while length and not all(self._begins(text, closing[:length]) for text in (closing, after)):
            length -= 1  # inside a token: "<" of two different ones
        if not length:
            raise UserError(f"the chat template does not close message {turn + 1}: a model would never stop")
        return len(text) - len(after) + length

    def _require_every_turn(self, messages: Messages) -> None:
        """Raises a UserError where the text is the same whatever one of the turns says."""
        for index, message in enumerate(messages):
            marked = [*messages[:index], message | {"content": MARK}, *messages[index + 1 :]]
            if MARK not in self._render(marked)[0]:
                raise UserError(f"the chat template drops message {index + 1}, of the role {message['role']}")

    def _end_of_turn(self) -> int:
        """The first special token after an assistant's answer.

        Raises:
            UserError: there is none, or it is not trained.
        """
        answer = MARK[::-1]
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        closing = self._ids(self._render(messages)[0].rpartition(answer)[2])
        end = next((token for token in closing if token in special), None)
        trained = [token for ids, is_trained in self.pieces(messages) if is_trained for token in ids]
        if end is None or end not in trained:
            what = "ends no turn by a special token" if end is None else "leaves what ends a turn out of its marks"
            raise UserError(f"--template chat: the chat template {what}: a model would never stop")
        return end

    # ---- chat: from text to tokens

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _begins(self, text: str, head: str) -> bool:
        """Whether the tokens of `head` are those that `text` begins with."""
        ids = self._ids(head)
        return self._ids(text)[: len(ids)] == ids

    def _tokenised(self, text: str, spans: list[tuple[int, int]], borders: list[int]) -> Pieces:
        """The text's tokens in pieces between `borders`.

        As the whole is tokenised, where the prompt of every answer is then tokenised as a server does it; else each
        piece by itself.
        """
        cuts = list(zip([0, *borders], [*borders, len(text)], strict=True))
        pieces, whole = [self._ids(text[start:end]) for start, end in cuts], self._ids(text)
        are_alike = [token for piece in pieces for token in piece] == whole
        if not are_alike and all(self._begins(text, text[:border]) for border in borders):
            lengths = [0, *(len(self._ids(text[:border])) for border in borders), len(whole)]
            pieces = [whole[start:end] for start, end in itertools.pairwise(lengths)]
        trained = [any(start <= cut[0] and cut[1] <= end for start, end in spans) for cut in cuts]
        return list(zip(pieces, trained, strict=True))
