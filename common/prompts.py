"""The prompt that a model is trained and evaluated with, and its tokens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The prompt that BA-LoRA, PiSSA and MetaMath train and evaluate with (Stanford Alpaca's, without input).
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", instruction: str) -> list[int]:
    """The tokens of ALPACA_PROMPT around an instruction; see `encode_opening`."""
    return encode_opening(tokenizer, ALPACA_PROMPT.format(instruction=instruction))


def encode_opening(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text that is to be continued, with the tokenizer's own start token if it has one."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text


def encode_response(tokenizer: "PreTrainedTokenizerBase", response: str) -> list[int]:
    """The response's tokens and the end-of-sequence token."""
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def decode_response(tokenizer: "PreTrainedTokenizerBase", prompt: list[int], tokens: list[int]) -> str:
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
