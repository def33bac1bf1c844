"""The pages that runs and comparisons leave, as tests read them."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "rect"}


class Page(HTMLParser):
    """Elements with their texts; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, len(self.texts)))
            self.texts.append([tag, dict(attributes).get("class"), ""])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, number in self.open:
            self.texts[number][2] += data

    def of(self, tag, cls=None):
        return [text for name, its, text in self.texts if name == tag and (cls is None or its == cls)]
