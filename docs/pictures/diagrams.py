"""How it works, in four pictures: a turn, the tiers, a chain of blocks, and the ring of slots."""

from __future__ import annotations

from docs.pictures.canvas import AMBER, BLUE, GREY, PALE, TEAL, Canvas

_BLOCK = 256
"""Tokens of a full block: ``kvtier.store.store.DEFAULT_BLOCK_SIZE``; a test compares them."""


def turn() -> str:
    """Draw one call of generate(): what is done before, during and after the model runs."""
    canvas = Canvas(
        720, 395, "A turn: the prompt is matched, known K and V are loaded, the rest is computed, new K and V are kept"
    )
    canvas.words(20, 28, "the prompt of this turn", bold=True)
    parts = [
        (430, "known from earlier turns", TEAL),
        (170, "new", AMBER),
        (60, "last", AMBER),
    ]  # the last token is computed in every turn
    x = 20.0
    for width, words, fill in parts:
        canvas.box(x, 44, width, 40, words, fill=fill)
        x += width + 5
    steps = [
        ("begin", "match token ids: buffers first,\nthen RAM, then files"),
        ("load", "known K and V come in, layer by layer,\nwhile earlier layers compute"),
        ("run", "the model computes the new tokens\nand generates the answer"),
        ("commit", "the new K and V go to RAM at once,\nto files behind the turn"),
    ]
    for i, (name, words) in enumerate(steps):
        y = 112 + 70 * i
        canvas.box(20, y, 110, 48, name, fill=BLUE)
        canvas.words(150, y + 24, words)
        if i:
            canvas.arrow((75, y - 22), (75, y - 3))
    canvas.arrow((235, 84), (235, 97), (560, 97), (560, 134), head=False, dashed=True)
    canvas.box(440, 134, 260, 76, "a token differs?\nReuse ends there, never later", fill=PALE)
    canvas.box(440, 240, 260, 76, "nothing known, or a doubt?\nAll is computed, and the\nreport says why", fill=PALE)
    canvas.arrow((570, 210), (570, 237), dashed=True)
    return canvas.svg()


def tiers() -> str:
    """Draw where K and V can be, from the fastest place to the one that lasts."""
    canvas = Canvas(720, 330, "The tiers: device, host, disk and lower tiers, and what moves between them")
    rows = [
        ("device", "buffers of this conversation", "ends with the cache", TEAL, 300),
        ("host", "blocks in RAM, shared by all caches of the process", "ends with the process", BLUE, 400),
        ("disk", "files, shared by all processes of the machine", "stays;\n50 GiB by\ndefault", GREY, 500),
    ]
    for i, (name, words, lasts, fill, width) in enumerate(rows):
        y = 20 + 80 * i
        canvas.box(110, y, width, 54, words, fill=fill, small=True)
        canvas.words(20, y + 27, name, bold=True)
        canvas.words(122 + width, y + 27, lasts, small=True)
        if i:
            canvas.arrow((180, y - 26), (180, y - 3))
            canvas.arrow((230, y - 3), (230, y - 24))
            canvas.words(245, y - 13, ("commit / load", "write-behind / load")[i - 1], small=True)
    canvas.box(
        110,
        260,
        500,
        50,
        "lower tiers of your own: an object store, another machine",
        fill=PALE,
        small=True,
        dashed=True,
    )
    canvas.words(20, 285, "lower", bold=True)
    canvas.arrow((180, 234), (180, 257), dashed=True)
    canvas.arrow((230, 257), (230, 237), dashed=True)
    canvas.words(622, 285, "by their\nown rules", small=True)
    return canvas.svg()


def chain() -> str:
    """Draw a sequence as blocks, each named by all tokens before it, and two conversations that branch."""
    canvas = Canvas(
        720, 300, "A chain of blocks: two conversations share the blocks before the first token that differs"
    )
    canvas.box(20, 110, 96, 60, "root\nthe model", fill=BLUE, small=True)
    canvas.box(160, 110, 130, 60, f"block A\ntokens 0 – {_BLOCK - 1}")
    canvas.box(330, 50, 160, 60, f"block B\ntokens {_BLOCK} – {2 * _BLOCK - 1}")
    canvas.box(530, 50, 120, 60, "tail C\n40 tokens", fill=AMBER)
    canvas.box(330, 170, 160, 60, f"block B'\ntokens {_BLOCK} – {2 * _BLOCK - 1}")
    canvas.arrow((116, 140), (157, 140))
    canvas.arrow((290, 130), (310, 130), (310, 80), (327, 80))
    canvas.arrow((290, 150), (310, 150), (310, 200), (327, 200))
    canvas.arrow((490, 80), (527, 80))
    canvas.words(530, 128, "grows with the conversation", small=True)
    canvas.words(505, 200, "differs at token 301:\ntokens 256 – 300 of B are reused", small=True)
    canvas.words(20, 30, "key = SHA-256(key before + token ids)", bold=True)
    canvas.words(
        20,
        262,
        "The first 301 tokens are computed once. A conversation that differs in token 0 shares nothing.",
        small=True,
    )
    return canvas.svg()


def ring() -> str:
    """Draw six layers, three of them cold: which slot is filled and read while which layer computes."""
    canvas = Canvas(
        720, 290, "The ring: two slots; attention reads one while pages of the next cold layer arrive in the other"
    )
    left, width, layers = 80, 62, 10
    cold = (1, 3, 5)
    canvas.words(left, 22, "step n", bold=True)
    canvas.words(left + 6 * width, 22, "step n + 1", bold=True)
    for i in range(layers):
        layer = i % 6
        canvas.box(left + i * width + 2, 40, width - 4, 44, f"{layer}", fill=GREY if layer in cold else TEAL)
    canvas.words(10, 62, "layer")
    reads = [i for i in range(layers) if i % 6 in cold]
    for turn_number, i in enumerate(reads):  # before the boxes, so that no arrow crosses their words
        middle = left + (i + 0.5) * width
        canvas.arrow((middle, 127 + turn_number % 2 * 62), (middle, 87), dashed=True)
    for row, slot in enumerate("AB"):
        y = 130 + row * 62
        canvas.words(10, y + 22, f"slot {slot}")
        for turn_number, i in enumerate(reads):
            if turn_number % 2 != row:
                continue
            earlier = reads[turn_number - 2] + 1 if turn_number >= 2 else 0
            begin, end = left + earlier * width, left + i * width
            canvas.box(
                begin + 2,
                y,
                end - begin - 4,
                44,
                f"{i % 6} arrives" if i - earlier > 1 else f"{i % 6} in",
                fill=PALE,
                small=True,
                dashed=True,
            )
            canvas.box(end + 2, y, width - 4, 44, f"read {i % 6}", fill=BLUE, small=True)
    canvas.words(
        10,
        272,
        "Green layers are hot, grey ones cold. A slot is filled again only after its layer has read it.",
        small=True,
    )
    return canvas.svg()
