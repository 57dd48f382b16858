"""What every page of HTML must hold."""

from html.parser import HTMLParser

VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}


class Nesting(HTMLParser):
    """Asserts that every element that is opened is closed, in order, and no name is given twice; keeps the images."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.names, self.images = [], [], []
        self.feed(page)
        assert not self.open and len(self.names) == len(set(self.names))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names += [value for name, value in attributes if name == "id"]
        self.images += [dict(attributes)] if tag == "img" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
