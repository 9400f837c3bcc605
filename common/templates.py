"""How a conversation is written out for a model, and which of its tokens are trained.

`alpaca`    Alpaca's prompt around every instruction
`raw`       the turns' texts and nothing else
`chat`      the tokenizer's own chat template

Prompt and response are tokenised so that the border between them is the same as when the model generates. If they were
tokenised as one text, the tokenizer might merge characters across the border.
"""

import copy
import functools
import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError, first_line
from common.tables import as_text

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label of a token that is not to be predicted; cross_entropy's own default
MARK = "Kq7ZxW2v"  # stands for a turn's text; no conversation and no template contains it

REASONING = ("reasoning_content", "reasoning", "thinking")  # the keys under which templates look for a thought
# Templates that write today's date write this one, Llama 3.2's own default: a model is served on other days.
DAY = time.strptime("2024-07-26", "%Y-%m-%d")
# A generation prompt may end with an opened or an empty thought that a conversation's text does not have.
OPENED_THOUGHT = r"<think>\s*(?:</think>\s*)?$"
LEAVES_OUT = "it leaves out a thought, or another part of an earlier answer"
AS_TEXTS = "write calls and results as texts of assistant and user"
OPENS_THOUGHT = "a server's prompt opens a thought, which the answers here begin otherwise"
CUTS_OTHERWISE = "a server cuts earlier answers into other tokens of the same text"

Messages = list[dict[str, Any]]
Pieces = list[tuple[list[int], bool]]  # tokens, and whether they are trained

# The prompt that BA-LoRA, PiSSA and MetaMath train and evaluate with (Stanford Alpaca's, without input).
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# Our own templates for a chat endpoint; `generation` marks the trained text.
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
        jinja: the chat template that renders exactly the prompt of training.
        end_token_id: the token that ends an assistant's turn.

    Raises:
        UserError: `chat`, and the tokenizer has no chat template, or one that cannot be trained with.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str, arguments: dict[str, Any] | None = None):
        self.tokenizer, self.name, self.arguments = tokenizer, name, arguments or {}
        self._borders: tuple[str, tuple[str, ...]] = ("", ())  # begin and end tokens that a text may already contain
        if name != "chat":
            if arguments:
                raise UserError(f"--template-args are the chat template's: --template {name} has none")
            self._is_marked, self.end_token_id = True, tokenizer.eos_token_id
            self.opening = self._opening()
            self.jinja = self.opening + JINJA[name]
            self._borders = self._begin_token(self.opening), (tokenizer.eos_token or "",)
            return
        if not tokenizer.chat_template:
            raise UserError("--template chat: the tokenizer has no chat template; take alpaca or raw")
        self.jinja = _with_arguments(tokenizer.get_chat_template(), self.arguments)
        self._is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.jinja) is not None
        self._whole: set[tuple[str, ...]] = set()  # sequences of roles from which the template drops nothing
        self._is_open = False  # whether the token that begins the next turn ends a turn, as in GLM's template
        self.end_token_id = self._end_of_turn()
        begin = self._begin_token(self._render([{"role": "user", "content": "Hello"}], prompt=True)[0])
        self._borders = begin, (tokenizer.eos_token or "", tokenizer.decode([self.end_token_id]))

    def _begin_token(self, opening: str) -> str:
        """The begin token, if `opening` starts with it and no turn does (SmolLM2's begins every turn)."""
        begin = self.tokenizer.bos_token or ""
        return begin if opening.startswith(begin) and opening.count(begin) == 1 else ""

    def pieces(
        self, messages: Messages, first: int = 0, masked: Collection[int] = (), tools: list[dict] | None = None
    ) -> Pieces:
        """The tokens of a conversation, cut where a trained part begins or ends.

        Args:
            first: the assistant's turns are trained from this message on. masked: messages that are not.
            tools: the tools that the chat template offers to the model.

        Raises:
            UserError: the template refuses the conversation, drops a turn, or writes turns that cannot be located.
        """
        messages = self._without_borders(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = {turn for turn in turns if turn >= first and turn not in masked}
        if self.name != "chat":
            no_place = ("tool",) * (self.name == "alpaca")
            if tools or any(message.get("tool_calls") or message["role"] in no_place for message in messages):
                raise UserError(f"--template {self.name} has no place for tools: take --template chat, or {AS_TEXTS}")
            return self._own_pieces(messages, trained)
        roles = tuple((message["role"], *sorted(message)) for message in messages)
        if (roles, bool(tools)) not in self._whole:
            self._require_every_turn(messages, tools)
            self._whole.add((roles, bool(tools)))
        text, spans, prompts = self._spans(messages, sorted(trained), tools)
        return self._tokenised(text, spans, sorted({*prompts, *(border for span in spans for border in span)}))

    def keys_read(self, messages: Messages, tools: list[dict] | None = None) -> set[str]:
        """The keys of the messages, beside role, content and calls, without which the template writes another text."""
        keys = {key for message in messages for key in message} - {"role", "content", "tool_calls"}
        if not keys or self.name != "chat":
            return set()

        def written_without(key: str | None) -> str | None:
            try:
                return self._render([{k: v for k, v in message.items() if k != key} for message in messages], tools)[0]
            except UserError:  # the template insists on the key
                return None

        whole = written_without(None)
        return {key for key in keys if written_without(key) != whole}

    def require_served(
        self,
        messages: Messages,
        pieces: Pieces,
        tools: list[dict] | None = None,
        served: "PreTrainedTokenizerBase | None" = None,
        untrained: Collection[int] = (),
    ) -> set[str]:
        """Compares the prompts of the trained turns with a server's prompts for the same messages.

        Args:
            pieces: the messages' pieces. served: the server's tokenizer, such as an export's; None: this one, saved and
                loaded again. untrained: the assistant's turns that stand in prompts alone.

        Returns:
            the differences that do not prevent training: OPENS_THOUGHT, CUTS_OTHERWISE.

        Raises:
            UserError: the prompts differ otherwise; shows both around the first difference.
        """
        served = served or self.saved
        messages, notes = self._without_borders(messages), set()
        ids = [token for piece, _ in pieces for token in piece]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i not in untrained]
        for turn in turns[:1] + turns[1:][-1:]:
            calls = {"add_generation_prompt": True, "tools": tools, "return_dict": False}
            prompt = served.apply_chat_template(messages[:turn], **calls)
            if ids[: len(prompt)] == prompt:
                continue
            text, written = served.decode(prompt), served.decode(ids)
            thoughtless = re.sub(OPENED_THOUGHT, "", text)
            if written.startswith(thoughtless) and (thoughtless != text or turn != turns[0]):
                notes.add(CUTS_OTHERWISE if written.startswith(text) else OPENS_THOUGHT)
                continue
            place = next((i for i, pair in enumerate(zip(ids, prompt, strict=False)) if pair[0] != pair[1]), len(ids))
            trained_tokens, served_tokens = (
                served.convert_ids_to_tokens(tokens[max(place - 3, 0) : place + 5]) for tokens in (ids, prompt)
            )
            raise UserError(
                f"the prompt of message {turn + 1} differs between training and serving, from token {place} on: "
                f"trained {trained_tokens}, served {served_tokens}; take another --template"
            )
        return notes

    def prompt(self, text: str) -> list[int]:
        """The tokens before the answer to the user's `text`, the same in training and from a server."""
        messages = [{"role": "user", "content": text}]
        if self.name == "chat":
            return self._ids(self._render(messages, prompt=True)[0])
        return self._own_pieces([*messages, {"role": "assistant", "content": ""}], ())[0][0]

    def leaves_out(
        self,
        messages: Messages,
        tools: list[dict] | None = None,
        keys: Collection[str] = (),
        untrained: Collection[int] = (),
    ) -> bool:
        """Whether the chat template leaves out a part of an answer: its thought, or a text beside a tool call.

        Args:
            keys: the keys of a message that the template reads. untrained: the answers that stand in prompts alone.

        Raises:
            UserError: it is a part of the conversation's last message, which is to be trained.
        """
        if self.name != "chat":
            return False
        messages = self._without_borders(messages)
        text, lost = "".join(self._written(messages, tools)[0].split()), set()
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                parts = re.split(r"</?think>", message["content"])
                for part in (*parts, *(as_text(message[key]) for key in REASONING if key in keys and key in message)):
                    if "".join(part.split()) not in text:
                        lost.add(index)
        if (last := len(messages) - 1) in lost and last not in untrained:
            what = f"a part of message {last + 1}, the last answer"
            raise UserError(f"the chat template leaves out {what}: {_remedy(messages, tools)}")
        return bool(lost)

    def _without_borders(self, messages: Messages) -> Messages:
        """The messages without the begin and end tokens that the template writes around them too."""
        begin, ends = self._borders
        found = []
        for index, message in enumerate(messages):
            content = message["content"]
            if begin and not index:
                content = content.removeprefix(begin)
            end = next((end for end in ends if end and content.rstrip().endswith(end)), "")
            if end and message["role"] == "assistant":
                content = content.rstrip().removesuffix(end)
            found.append(message | {"content": content})
        return found

    # ---- alpaca and raw

    def _opening(self) -> str:
        """The beginning of the server's prompt that makes its tokens those of `encode_opening`."""
        start = self.tokenizer.decode(encode_opening(self.tokenizer, ""))  # the start token, if there is one
        for opening in (start, f"{start} ", ""):
            if all(self._ids(opening + text) == encode_opening(self.tokenizer, text) for text in (ALPACA_PROMPT, "Hi")):
                return opening
        return start

    def _own_pieces(self, messages: Messages, trained: Collection[int]) -> Pieces:
        """The pieces for `alpaca` and `raw`: one answer is tokenised alone, several as a server tokenises them."""
        texts, text = [], ""
        for index, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "assistant":
                texts.append((text, content, index in trained))
                text = ""
            elif self.name == "raw":
                text += content
            else:
                text += content + "\n\n" if message["role"] == "system" else ALPACA_PROMPT.format(instruction=content)
        if len(texts) == 1:
            before, answer, is_trained = texts[0]
            opening = encode_opening(self.tokenizer, before)
            return [(opening, False), (encode_response(self.tokenizer, answer), is_trained)]
        whole, spans, borders = self.opening, [], set()
        for before, answer, is_trained in texts:
            start = len(whole) + len(before)
            whole += before + answer + self.tokenizer.eos_token
            borders |= {start, len(whole)}
            spans += [(start, len(whole))] if is_trained else []
        return self._tokenised(whole, spans, sorted(borders))

    def end_answers(self, generation_config: "GenerationConfig") -> None:
        """Makes generation also stop at the token that ends a turn."""
        before = generation_config.eos_token_id
        stops = before if isinstance(before, list) else [] if before is None else [before]
        if self.end_token_id not in stops:
            generation_config.eos_token_id = [*stops, self.end_token_id] if stops else self.end_token_id

    @property
    def plain_jinja(self) -> str:
        """The chat template for other programs: without `generation` marks, which only transformers' jinja knows."""
        return self.jinja if self.name == "chat" else re.sub(r"\{% (end)?generation %\}", "", self.jinja)

    def save(self, folder: Path, generation_config: "GenerationConfig | None" = None) -> None:
        """Writes the tokenizer with the chat template of training and its name, as `trained_template`."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = self.plain_jinja
        tokenizer.init_kwargs = self.tokenizer.init_kwargs | {"trained_template": self.name}
        save_tokenizer(tokenizer, folder)
        if generation_config is not None:
            generation_config.save_pretrained(folder)

    # ---- chat: where in the text the trained parts are

    def _render(
        self, messages: Messages, tools: list[dict] | None = None, *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """A conversation's text and the spans of its generation marks; with `prompt`, up to an answer's beginning."""
        from transformers.utils.chat_template_utils import render_jinja_template

        def render(messages: Messages) -> tuple[str, list[tuple[int, int]]]:
            (text,), marks = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.jinja,
                return_assistant_tokens_mask=self._is_marked,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
            return text, [tuple(mark) for mark in marks[0]] if marks else []

        try:
            return render(messages)
        except Exception as error:  # errors of jinja, and anything that a template's expressions raise
            try:
                if any(message.get("tool_calls") for message in messages):
                    return render([_with_arguments_as_text(message) for message in messages])
            except Exception:  # the first error says more
                pass
            raise UserError(f"the chat template refuses it: {first_line(error)}; {_remedy(messages, tools)}") from error

    def _written(self, messages: Messages, tools: list[dict] | None) -> tuple[str, list[tuple[int, int]]]:
        """A conversation's text as it is trained, and the spans of its generation marks.

        The text is the template's, with two additions that a model has to learn: the last answer's thought, if the
        prompt opens it and the template leaves it out (DeepSeek-R1's), and the token that ends the last turn (GLM's).
        """
        text, marks = self._render(messages, tools)
        last = messages[-1]
        if marks or last["role"] != "assistant":
            return text, marks
        thought = re.match(r"(?s)\s*(?:<think>\s*)?(.*)</think>", last["content"])
        if thought and not last.get("tool_calls") and thought[1].strip() not in text:
            prompt = self._render(messages[:-1], tools, prompt=True)[0]
            if prompt.rstrip().endswith("<think>"):
                closing = self._render([*messages[:-1], _marked(last)], tools)[0].partition(MARK)[2]
                text = prompt + last["content"][thought.start(1) :] + closing
        if self._is_open:
            follows = {"role": "tool" if last.get("tool_calls") else "user", "content": MARK}
            marked = [*messages[:-1], _marked(last)]
            ends, goes_on = (self._render(part, tools)[0].partition(MARK)[2] for part in (marked, [*marked, follows]))
            text += self._special_head(goes_on[len(ends) :])
        return text, marks

    def _special_head(self, text: str) -> str:
        """The special token that a text begins with, or an empty text."""
        ids = self._ids(text)[:1]
        return self.tokenizer.decode(ids) if ids and ids[0] in self._special else ""

    @functools.cached_property
    def saved(self) -> "PreTrainedTokenizerBase":
        """The tokenizer as a server has it: saved and loaded again."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=self.is_remote)

    @property
    def is_remote(self) -> bool:
        """Whether the tokenizer's class is code of its repository, which --trust-remote-code alone lets in."""
        return type(self.tokenizer).__module__.startswith("transformers_modules")

    @functools.cached_property
    def _special(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    def _spans(
        self, messages: Messages, turns: list[int], tools: list[dict] | None
    ) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The conversation's text, its trained parts, and the ends of the prompts that they answer."""
        text, marks = self._written(messages, tools)
        prompts = [self._render(messages[:turn], tools, prompt=True)[0] for turn in turns]
        if not marks:
            heads = [prompt if text.startswith(prompt) else re.sub(OPENED_THOUGHT, "", prompt) for prompt in prompts]
            for turn, head in zip(turns, heads, strict=True):
                if not text.startswith(head):
                    remedy = "take another --template" if turn == turns[-1] else "--train-on last trains the last alone"
                    raise UserError(
                        f"the prompt of message {turn + 1} does not end as the template begins it: {remedy}"
                    )
        if marks:
            assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if turns != assistants:
                counts = [(len(self._render(messages[:i], tools)[1]), len(self._render(messages[: i + 1], tools)[1])) for i in turns]  # fmt: skip  # noqa: E501
                marks = [mark for before, after in counts for mark in marks[before:after]]
            return text, marks, [len(prompt) for prompt in prompts if text.startswith(prompt)]
        spans = []
        for turn, head in zip(turns, heads, strict=True):
            spans.append((len(head), self._end(messages, turn, text, tools)))
            if spans[-1][0] >= spans[-1][1]:
                raise UserError(f"the chat template writes message {turn + 1} where it cannot be found")
        return text, spans, []

    def _end(self, messages: Messages, turn: int, text: str, tools: list[dict] | None = None) -> int:
        """The end of the assistant's `turn` in `text`, the whole conversation, after the text that closes the turn.

        The text after the content stays the same when another content takes its place, which shows where the content
        ends. The closing text is as long as the text that follows when the conversation ends with this turn.
        """
        marked = [*messages[:turn], _marked(messages[turn]), *messages[turn + 1 :]]
        calls = messages[turn].get("tool_calls")
        said = calls[-1]["function"]["name"] if calls else messages[turn]["content"]

        def rest(part: Messages) -> str:  # the content may come again later, as a function's name beside its result
            return self._written(part, tools)[0].partition(MARK)[2].replace(MARK, said)

        after = rest(marked)
        closing = after if turn == len(messages) - 1 else rest(marked[: turn + 1])
        if not text.endswith(after):
            raise UserError(
                f"the text that the chat template writes after message {turn + 1} depends on that message's words"
            )
        ends = () if closing == after else (closing, after)
        length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(closing, after, strict=False)))
        while length and not all(self._begins(text, closing[:length]) for text in ends):
            length -= 1  # not inside a token: two different tokens may both begin with "<"
        length = length or len(self._special_head(after))  # gpt-oss ends earlier turns by another token than the last
        if not length:
            raise UserError(f"the chat template does not close message {turn + 1}: a model would never stop")
        return len(text) - len(after) + length

    def _require_every_turn(self, messages: Messages, tools: list[dict] | None = None) -> None:
        """Raises a UserError if the text does not depend on one of the turns, or on the tools."""
        for index, message in enumerate(messages):
            marked = [*messages[:index], _marked(message), *messages[index + 1 :]]
            if MARK not in self._render(marked, tools)[0]:
                what = "the tool calls of " * bool(message.get("tool_calls"))
                whose = f"{what}message {index + 1}, of the role {message['role']}"
                raise UserError(f"the chat template drops {whose}: {_remedy(messages, tools)}")
        if tools and self._render(messages, tools)[0] == self._render(messages)[0]:
            raise UserError("the chat template has no place for tools: write them into the system's turn")

    def _end_of_turn(self) -> int:
        """The first special token after an assistant's answer.

        Raises:
            UserError: there is no such token, or it is not trained.
        """
        answer = MARK[::-1]
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        closing = self._render(messages)[0].rpartition(answer)[2]
        if not closing:
            self._is_open = not self._is_marked
            closing = self._written(messages, None)[0].rpartition(answer)[2]
        end = next((token for token in self._ids(closing) if token in self._special), None)
        trained = [token for ids, is_trained in self.pieces(messages) if is_trained for token in ids]
        if end is None or end not in trained:
            what = "ends no turn by a special token" if end is None else "leaves what ends a turn out of its marks"
            raise UserError(f"--template chat: the chat template {what}: a model would never stop; take another one")
        return end

    # ---- chat: from text to tokens

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _begins(self, text: str, head: str) -> bool:
        """Whether the tokens of `text` begin with the tokens of `head`."""
        ids = self._ids(head)
        return self._ids(text)[: len(ids)] == ids

    def _tokenised(self, text: str, spans: list[tuple[int, int]], borders: list[int]) -> Pieces:
        """The text's tokens in pieces between `borders`.

        The text is tokenised as a whole, if every answer's prompt then has the tokens that a server gives it; else each
        piece is tokenised by itself.
        """
        cuts = list(zip([0, *borders], [*borders, len(text)], strict=True))
        pieces, whole = [self._ids(text[start:end]) for start, end in cuts], self._ids(text)
        are_alike = [token for piece in pieces for token in piece] == whole
        if not are_alike and all(self._begins(text, text[:border]) for border in borders):
            lengths = [0, *(len(self._ids(text[:border])) for border in borders), len(whole)]
            pieces = [whole[start:end] for start, end in itertools.pairwise(lengths)]
        trained = [any(start <= cut[0] and cut[1] <= end for start, end in spans) for cut in cuts]
        return list(zip(pieces, trained, strict=True))


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes the tokenizer for transformers 4 and 5, and for llama.cpp's converter."""
    tokenizer = copy.copy(tokenizer)
    if getattr(tokenizer, "legacy", None) is not None:  # it changes tokens, and transformers 5 does not write it
        tokenizer.init_kwargs = tokenizer.init_kwargs | {"legacy": tokenizer.legacy}
    tokenizer.save_pretrained(folder)
    _clean_tokenizer_config(folder / "tokenizer_config.json")
    if (path := _sentencepiece_model(tokenizer)) is not None:
        shutil.copyfile(path, folder / path.name)


def _sentencepiece_model(tokenizer: "PreTrainedTokenizerBase") -> Path | None:
    """The tokenizer.model that a tokenizer was loaded from, if all its special tokens are in it: llama.cpp's converter
    needs this file for Gemma, and would then not see a token that was added elsewhere."""
    from sentencepiece import SentencePieceProcessor

    path = Path(str(getattr(tokenizer, "vocab_file", None)))
    if path.name != "tokenizer.model" or not path.is_file():
        return None
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):  # other formats have this name too
        return None
    added = tokenizer.added_tokens_decoder.items()
    return path if all(model.PieceToId(token.content) == number for number, token in added) else None


def _clean_tokenizer_config(path: Path) -> None:
    """Removes entries of a tokenizer_config.json that only transformers 5 knows, or that its loading call left."""
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # both versions know the class by this name
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _with_arguments(jinja: str, arguments: dict[str, Any]) -> str:
    """A chat template with its variables set, and with DAY instead of today's date."""
    day = lambda found: repr(time.strftime(found[2], DAY))  # noqa: E731
    jinja = re.sub(r"""strftime_now\((["'])(.*?)\1\)""", day, jinja)
    return "".join(f"{{% set {name} = {_literal(value)} %}}" for name, value in arguments.items()) + jinja


def _literal(value: Any) -> str:
    """A value as a jinja literal."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(part)}' for key, part in value.items())}}}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its tool calls as JSON, as some templates want them."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | ({"tool_calls": calls} if calls else {})


def _remedy(messages: Messages, tools: list[dict] | None) -> str:
    """The remedy for a conversation that the chat template does not write."""
    if tools or any(message.get("tool_calls") for message in messages):
        return f"leave it out (--skip-bad), or {AS_TEXTS}"
    return "leave it out (--skip-bad), or take --template raw"


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """A message with MARK in place of its content, or of the name of the function that it calls last."""
    if not message.get("tool_calls"):
        return message | {"content": MARK}
    *calls, last = message["tool_calls"]
    return message | {"tool_calls": [*calls, last | {"function": last["function"] | {"name": MARK}}]}


# ------------------------------------------------------------------------------------------------------------------
# A prompt and its answer without messages
# ------------------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", instruction: str) -> list[int]:
    """The tokens of ALPACA_PROMPT around an instruction; see `encode_opening`."""
    return encode_opening(tokenizer, ALPACA_PROMPT.format(instruction=instruction))


def encode_opening(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text that is to be continued, with the tokenizer's own start token if it has one."""
    ids, end = tokenizer(text)["input_ids"], tokenizer.eos_token_id
    # Some tokenizers close every text. OPT's end token is its start token too, and is all that an empty text has.
    is_closed = bool(ids) and ids[-1] == end and tokenizer("a")["input_ids"][-1] == end
    return ids[:-1] if is_closed else ids


def encode_response(tokenizer: "PreTrainedTokenizerBase", response: str) -> list[int]:
    """The response's tokens and the end-of-sequence token."""
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


# The marks after which a reasoning model's answer begins; many tokenizers have them as special tokens.
END_OF_THOUGHT = re.compile(
    r"</(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<channel\|>"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)


def decode_response(tokenizer: "PreTrainedTokenizerBase", prompt: list[int], tokens: list[int]) -> str:
    """The exact text that `tokens` add to the text of `prompt`; of special tokens only those of END_OF_THOUGHT."""
    text, start = "", 0
    if END_OF_THOUGHT.search(tokenizer.decode(tokens)):
        for place, length in itertools.product(range(len(tokens)), (1, 3)):  # the longest mark has three tokens
            end = place + length
            if place >= start and END_OF_THOUGHT.fullmatch(mark := tokenizer.decode(tokens[place:end])):
                text += _added(tokenizer, [*prompt, *tokens[:start]], tokens[start:place]) + mark
                start = end
    return text + _added(tokenizer, [*prompt, *tokens[:start]], tokens[start:])


def _added(tokenizer: "PreTrainedTokenizerBase", prompt: list[int], tokens: list[int]) -> str:
    """The exact text that `tokens` add to the text of `prompt`, without special tokens.

    If they were decoded alone, a space could be lost: LlamaTokenizer drops a text's first space, and others "clean up"
    spaces before punctuation.
    """
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, [*prompt, *tokens])
    )
    if not whole.startswith(before):
        before = before.rstrip("\ufffd")  # half a character, which `tokens` complete
    return whole.removeprefix(before)
