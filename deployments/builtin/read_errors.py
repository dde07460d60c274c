"""What can be wrong with a typed prompt of the drawn world."""


class PromptError(ValueError):
    """A prompt outside the grammar of the drawn world: ``prompt``, and the ``reason``."""

    def __init__(self, prompt: str, reason: str) -> None:
        super().__init__(f"cannot read the prompt {prompt!r}: {reason}")
        self.prompt = prompt
        self.reason = reason


class UnknownWordError(PromptError):
    """A word that the drawn world does not have, named by ``word``."""

    def __init__(self, prompt: str, word: str) -> None:
        super().__init__(prompt, f"this world has no word {word!r}")
        self.word = word
