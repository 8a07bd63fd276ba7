"""`report.html`: a page of held-out text with the segments that the compressed caches made of it."""

from __future__ import annotations

import html
import json

import numpy as np

MARKS = {" ": "<i>·</i><wbr>", "\n": "<i>↵\n</i>", "\t": "<i>→\t</i>"}
"""How whitespace is made visible; it still breaks lines, and a tab is as wide as one."""

STYLE = """\
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
.text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  border: 1px solid #ddd; padding: .6em 1em }
.text span { unicode-bidi: isolate; padding: .15em 0 }
.text i { color: #999; font-style: normal }
.text b { color: #c00; font-weight: bold }
.odd { background: #dbe6ff } .even { background: #fff0c2 }
.merged { box-shadow: inset 1px 0 #bbb }
.scale span { padding: .15em .6em }"""

SCRIPT = """\
const merged = JSON.parse(document.getElementById("merged").textContent);
const tokens = document.querySelectorAll("#segments span");
const layer = document.getElementById("layer"), head = document.getElementById("head");
function mark() {
  let segments = 0;
  tokens.forEach((token, t) => {
    const joins = merged[layer.value][head.value][t] === "1";
    if (!joins) segments++;
    token.className = (joins ? "merged " : "") + (segments % 2 ? "odd" : "even");
    token.firstChild.textContent = joins ? "" : "|";
  });
  document.getElementById("which").textContent =
    `layer ${+layer.value + 1}, KV head ${head.value}: ${tokens.length} tokens, ${segments} entries, ` +
    `ratio ${(tokens.length / segments).toFixed(2)}`;
}
layer.onchange = head.onchange = mark;
document.getElementById("choice").hidden = false;
mark();"""


def page(pieces: list[str | None], merged: np.ndarray, chosen: tuple[int, int], report: dict) -> str:
    """The page: which tokens merge in how many heads, and the segments of one layer and KV head, to be chosen.

    It is one file without links. Without a script it shows the layer and head `chosen` alone.

    Args:
        pieces: `[n]`, the text of each token; `None` for the end of a document.
        merged: bool `[n, layers, KV heads]`, which of the tokens merged into the entry before them.
        chosen: a layer and a KV head, both from 0.
        report: what `report.json` holds.
    """
    texts = [_visible(piece) for piece in pieces]
    layers, heads = merged.shape[1:]
    shares = merged.mean((1, 2))
    overview = "".join(
        f'<span style="background:{_shade(share)}" title="token {t}: merged in {count} of {layers * heads} heads">'
        f"{text}</span>"
        for t, (text, share, count) in enumerate(zip(texts, shares, merged.sum((1, 2)), strict=True))
    )
    layer, head = chosen
    joins = merged[:, layer, head]
    segment = (~joins).cumsum()
    segments = "".join(
        f'<span class="{"merged " if join else ""}{"odd" if number % 2 else "even"}"><b>{"" if join else "|"}</b>'
        f"{text}</span>"
        for text, join, number in zip(texts, joins, segment, strict=True)
    )
    bits = [["".join("01"[int(m)] for m in merged[:, i, j]) for j in range(heads)] for i in range(layers)]
    scale = "".join(f'<span style="background:{_shade(share)}">{share:.0%}</span>' for share in (0, 0.25, 0.5, 0.75, 1))
    return f"""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Where segments break</title>
<style>
{STYLE}
</style>
<h1>Where segments break</h1>
<p>The first {len(pieces)} tokens of the first held-out window, read through compressed caches. A token merges into the
entry before it, or it appends one: then a new segment begins, and an entry stands for the tokens of a segment. Over all
the text that was read, the compression ratio is {report["compression_ratio"]:.2f}.</p>
<p>Spaces are shown as <code>·</code>, newlines as <code>↵</code>, tabs as <code>→</code>, the end of a document as
<code>■</code>; <code>�</code> is a token that begins a character or goes on with one, which then stands at the token
that completes it.</p>
<h2>All heads</h2>
<p>Background: the share of all {layers * heads} KV heads ({layers} layers × {heads}) in which the token merged into the
entry before it. <span class="scale">{scale}</span> White tokens begin a segment everywhere.</p>
<div class="text" id="overview">{overview}</div>
<h2>Segments of one head</h2>
<p id="choice" hidden>Layer <select id="layer">{_options(layers, layer, 1)}</select>
KV head <select id="head">{_options(heads, head, 0)}</select></p>
<p>A <b style="color:#c00">|</b> begins a segment, and the background changes with every segment; thin lines part the
tokens of one. Shown is <span id="which">layer {layer + 1}, KV head {head}: {len(pieces)} tokens, {segment[-1]} entries,
ratio {len(pieces) / segment[-1]:.2f}</span>.</p>
<noscript><p>Other layers and heads can be chosen where scripts may run.</p></noscript>
<div class="text" id="segments">{segments}</div>
<script type="application/json" id="merged">{json.dumps(bits)}</script>
<script>
{SCRIPT}
</script>
</html>
"""


def _visible(piece: str | None) -> str:
    """A token's text as HTML."""
    if piece is None:
        return "<i>■</i>\n"
    return "".join(map(_visible_character, piece)) or "<i>�</i>"


def _visible_character(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    if not character.isprintable():  # it would not be seen, or even turn the line around
        return f"<i>{character.encode('unicode_escape').decode()}</i>"
    return html.escape(character)


def _shade(share: float) -> str:
    return f"rgb(224 123 0/{share:.2f})"


def _options(count: int, chosen: int, first: int) -> str:
    return "".join(
        f'<option value="{i}"{" selected" if i == chosen else ""}>{i + first}</option>' for i in range(count)
    )
