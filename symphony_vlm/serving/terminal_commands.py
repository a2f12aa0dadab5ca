"""What the words after a slash do in the terminal chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from symphony_vlm.serving.chat import ChatSession

__all__ = ["Commands", "note"]

_HELP = """\
/image PATH          attach a picture to the next question; may be repeated
/corrupt NAME 1..5   from now on the model sees all pictures corrupted so, say: /corrupt fog 3
/corrupt off         and as they are again
/routing [LAYER]     which experts the last answer used, in all layers or word by word in one
/reset               start a new conversation
/help                show this
/quit                leave (so does Ctrl-D)
Everything else is a question. Ctrl-C stops an answer. A question that begins with "/" needs a blank before it."""


def note(text: str) -> None:
    """A remark beside the conversation, on standard error."""
    typer.secho(text, err=True, dim=True)


class Commands:
    """The commands of one chat, and the pictures as they were before they were corrupted.

    Args:
        session: the conversation.
        console: where tables go.
        pictures: attached already, in order.
    """

    def __init__(self, session: ChatSession, console: Console, pictures: Sequence[Image.Image] = ()) -> None:
        self._session = session
        self._console = console
        self._pictures = list(pictures)
        self._corruption: tuple[str, int] | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/corrupt": self._corrupt,
            "/routing": self._routing,
            "/reset": self._reset,
            "/help": lambda argument: note(_HELP),
        }

    def run(self, line: str) -> None:
        """Does what a line says.

        Raises:
            InputError: there is no such command, or it cannot be done.
        """
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise InputError(
                f"unknown command {name!r}{nearest(name, self._commands)}", remedy="/help lists the commands."
            )
        self._commands[name](argument.strip())

    def waiting(self) -> str:
        """How many pictures wait for the next question, as a sentence's beginning."""
        count = self._session.num_pending_images
        return "1 picture is" if count == 1 else f"{count} pictures are"

    def _image(self, argument: str) -> None:
        from symphony_vlm.serving.chat import read_picture

        # People drag files into the terminal, which quotes them.
        path = argument.strip("'\"")
        if not path:
            raise InputError("no path given", where="/image", remedy="Write /image PATH.")
        picture = read_picture(Path(path).expanduser())
        self._session.add_image(self._shown(picture))
        self._pictures.append(picture)
        note(f"{self.waiting()} attached to your next question.")

    def _corrupt(self, argument: str) -> None:
        before, self._corruption = self._corruption, _read_corruption(argument)
        try:
            if self._pictures:
                self._session.replace_images([self._shown(picture) for picture in self._pictures])
        except InputError:
            self._corruption = before
            raise
        seen = "as they are"
        if self._corruption is not None:
            name, severity = self._corruption
            seen = f"with {name} of severity {severity}"
        so_far = "; what was said so far stays" if self._session.history else ""
        note(f"From now on the model sees all pictures {seen}{so_far}.")

    def _shown(self, picture: Image.Image) -> Image.Image:
        if self._corruption is None:
            return picture
        import numpy as np
        from PIL import Image

        from symphony_vlm.corruptions import corrupt, corruption_rng, image_key

        name, severity = self._corruption
        pixels = np.asarray(picture)
        # The generator of an evaluation with seed 0 of a picture that is no file.
        rng = corruption_rng(image_key(pixels), name, severity, 0)
        return Image.fromarray(corrupt(pixels, name, severity, rng))

    def _routing(self, argument: str) -> None:
        from symphony_vlm.serving.routing_view import view_routing
        from symphony_vlm.serving.terminal_routing import coloured_words, share_table

        if argument and not argument.isdecimal():
            raise InputError(f"{argument!r} is not the number of a layer", where="/routing")
        view = view_routing(self._session.model, self._session.history, self._session.image_features)
        if not view.answer:
            raise InputError("the last answer is empty", where="/routing")
        if argument:
            self._console.print(coloured_words(view, int(argument)), soft_wrap=True)
            return
        note(f"What each expert contributed to the answer's {len(view.answer)} words, by layer:")
        self._console.print(share_table(view))

    def _reset(self, argument: str) -> None:
        self._session.reset()
        self._pictures.clear()
        self._corruption = None
        note("A new conversation.")


def _read_corruption(argument: str) -> tuple[str, int] | None:
    from symphony_vlm.corruptions import CORRUPTIONS, parse_corruptions

    if argument == "off":
        return None
    name, _, severity = argument.partition(" ")
    if name and name not in CORRUPTIONS:
        parse_corruptions(name)  # its message names the nearest
    if name not in CORRUPTIONS or severity.strip() not in ("1", "2", "3", "4", "5"):
        raise InputError(
            f"{argument!r} is not a corruption and a severity from 1 to 5",
            where="/corrupt",
            remedy=f"Write /corrupt fog 3, or /corrupt off. Corruptions: {', '.join(CORRUPTIONS)}.",
        )
    return name, int(severity)
