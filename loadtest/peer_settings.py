"""What a picture is in the comparison with peers: the same for every arm, number for number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PictureAsked:
    """One square picture.

    Attributes:
        prompt: No two alike, so that no cache helps.
        seed: Of its noise; arms draw differently from it.
        side: pixels.
        steps: Of denoising, each with guidance.
        guidance_scale: Above 1.
        max_sequence_length: T5 tokens.
    """

    prompt: str
    seed: int
    side: int
    steps: int
    guidance_scale: float = 4.5
    max_sequence_length: int = 256


@dataclass(frozen=True)
class Cell:
    """A model and a size on which arms are compared.

    Attributes:
        model: As `loadtest.sd35` names it.
        side: pixels.
        steps: Of each picture.
        batch: Pictures that `serve.batch` gathers for the compiled arms.
    """

    model: str
    side: int
    steps: int
    batch: int

    @property
    def name(self) -> str:
        """Model and side, e.g. `large-1024`."""
        return f"{self.model}-{self.side}"

    def ask(self, number: int, steps: int | None = None) -> PictureAsked:
        """Return the picture of a number."""
        prompt = f"picture {number} of a lighthouse above a rocky shore in the evening light"
        return PictureAsked(prompt, number, self.side, steps or self.steps)


CELLS = {
    cell.name: cell
    for cell in (
        Cell("large", 1024, 28, 5),
        Cell("large", 512, 28, 10),
        Cell("medium", 512, 28, 10),
        Cell("medium", 1024, 28, 5),
        # For tests: what runs on a card runs on a CPU first.
        Cell("tiny", 64, 3, 2),
        Cell("tiny-dual", 64, 3, 2),
    )
}
