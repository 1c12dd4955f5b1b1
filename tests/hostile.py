"""A text that tries everything a page or a terminal could fall for, and a parser that tells what a page holds."""

from html.parser import HTMLParser

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31mred\u202etxt {{ 7*7 }}"


class Tags(HTMLParser):
    """found: (tag, attributes) of every element, in order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
