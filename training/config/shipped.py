"""Find recipes by name: `quick` is a recipe that Fledge ships, `quick.toml` may be the user's."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[1] / "recipes"


def names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(path: Path) -> Path:
    """Return the file of a recipe.

    Args:
        path: A path, or the name of a shipped recipe, with or without ".toml". A file of the user
            comes first; a folder of the same name is not in the way.
    """
    if path.exists() and not (path.is_dir() and not path.suffix):
        return path
    by_name = path.parent in (Path(), Path("training/recipes"))
    found = FOLDER / f"{path.name.removesuffix('.toml')}.toml"
    return found if by_name and found.is_file() else path


def other(path: Path) -> Path | None:
    """Return the user's own file NAME.toml if `path` is the NAME of a shipped recipe; else None."""
    own = path.with_name(f"{path.name}.toml")
    return own if not path.suffix and find(path).parent == FOLDER and own.is_file() else None


def unknown(path: Path) -> str:
    """Return the error message for a recipe that does not exist."""
    known = names()
    own = path.with_name(f"{path.name}.toml")
    near = difflib.get_close_matches(path.name.removesuffix(".toml").lower(), known, n=1)
    near = [str(own)] if not path.suffix and own.is_file() else near
    hint = f"did you mean {near[0]!r}? Else use" if near else "use"
    return f"{path}: no such recipe; {hint} one of {', '.join(known)}, or a file of your own"
