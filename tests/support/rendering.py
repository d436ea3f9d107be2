"""Text of what rich prints, for tests of tables and views."""

import io

from rich.console import Console, RenderableType


def render_text(renderable: RenderableType, width: int = 120) -> str:
    """Returns the printed lines for a terminal of `width` characters, without colours and trailing spaces."""
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
