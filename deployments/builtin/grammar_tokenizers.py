"""Tokenizers for the drawn world's English, in the formats that CLIP and T5 ship.

Each grammar word is one token; a written word ("CAT" in double quotes) is spelled letter by
letter, because a model this small learns to draw letters, not words. Text outside the grammar
falls apart into characters, and what has no character becomes the unknown token.

- T5 is case-sensitive: capital letters are tokens of their own. Every grammar word also has a
  capitalised twin, for prompts that begin like a sentence.
- CLIP lower-cases, so its byte-pair merges grow from the *end* of a word (``r`` + ``ed</w>``):
  a spelled word is touched only where it shares an ending with a grammar word.
"""

import string

from transformers import CLIPTokenizer, T5Tokenizer

from deployments.builtin.vocabulary import words

CLIP_BOS, CLIP_EOS, CLIP_UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
_END_OF_WORD = "</w>"
_CLIP_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
_T5_SPACE = "▁"
_T5_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
# Unigram picks the split with the largest sum: one word piece must beat all its characters.
_WORD_SCORE, _CHARACTER_SCORE = -1.0, -4.0


def _clip_merges(grammar: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that join each word of letters from its last letter to its first."""
    merges: dict[tuple[str, str], None] = {}
    for word in grammar:
        if not word.isalpha():
            continue  # CLIP splits digits and punctuation into single characters anyway
        suffix = word[-1] + _END_OF_WORD
        for letter in reversed(word[:-1]):
            merges[(letter, suffix)] = None
            suffix = letter + suffix
    return list(merges)


def build_clip_tokenizer(length: int, grammar: tuple[str, ...] | None = None) -> CLIPTokenizer:
    """A CLIP tokenizer for the grammar.

    Args:
        length: tokens of a prompt, the start and end marks included.
        grammar: its lower-case words; those of the drawn world where None.
    """
    merges = _clip_merges(words() if grammar is None else grammar)
    tokens = [CLIP_BOS, CLIP_EOS, CLIP_UNKNOWN]
    tokens += list(_CLIP_CHARACTERS)
    tokens += [character + _END_OF_WORD for character in _CLIP_CHARACTERS]
    tokens += [first + second for first, second in merges]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        unk_token=CLIP_UNKNOWN,
        bos_token=CLIP_BOS,
        eos_token=CLIP_EOS,
        pad_token=CLIP_EOS,
        model_max_length=length,
    )


def build_t5_tokenizer(length: int, grammar: tuple[str, ...] | None = None) -> T5Tokenizer:
    """A T5 tokenizer for the grammar.

    Args:
        length: tokens of a prompt, the end mark included.
        grammar: its lower-case words; those of the drawn world where None.
    """
    grammar = words() if grammar is None else grammar
    pieces: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, _T5_SPACE: -2.0}
    for character in _T5_CHARACTERS:
        pieces[character] = _CHARACTER_SCORE
    pieces[_T5_SPACE + '"'] = _WORD_SCORE
    for word in grammar:
        pieces[_T5_SPACE + word] = _WORD_SCORE
    for word in grammar:
        if word[0].isalpha():
            pieces[_T5_SPACE + word[0].upper() + word[1:]] = _WORD_SCORE
    return T5Tokenizer(
        vocab=list(pieces.items()),
        extra_ids=0,
        additional_special_tokens=[],
        model_max_length=length,
    )
