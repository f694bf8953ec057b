"""What models are called on the command line."""

from pathlib import Path


def named_models(texts: list[str]) -> dict[str, str]:
    """Models by the names under which they are shown.

    Args:
        texts: NAME=MODEL, or MODEL, which is called as its folder, or as its file without the extension.

    Returns:
        From name to model, in the order given.

    Raises:
        ValueError: If two have one name.
    """
    pairs = [_named(text) for text in texts]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"models should have different names, got {', '.join(names)}: write NAME=MODEL.")
    return dict(pairs)


def _named(text: str) -> tuple[str, str]:
    name, _, model = text.partition("=")
    if model and "/" not in name:  # a path may hold an equals sign
        return name, model
    path = Path(text).absolute()
    return (path.stem if path.is_file() else path.name), text
